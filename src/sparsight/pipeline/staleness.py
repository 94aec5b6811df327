"""Finds stale stages by comparing recorded digests, independent of mtimes and Snakemake metadata.

Files can be swapped under Snakemake: by ``git checkout`` and ``dvc checkout``, by copying a results folder, by
``snakemake --touch``. Every stage leaves a record of the settings, code and files behind its result
(:mod:`sparsight.pipeline.records`). While Snakemake plans, each rule asks whether the record of its stage still holds.
A stage that differs in anything gets a new mark: a small file that its rule has as an input, so Snakemake runs the rule
again. A stage that agrees has an empty mark, older than any result.

Marks lie with Snakemake's own files, and every plan sets them anew. So a plan that is not carried out, such as that of
a dry run, changes nothing in the run's folder, and the next plan takes its marks back.
"""

import json
import os
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sparsight.common.digests import file_digest
from sparsight.common.files import write_shared
from sparsight.common.progress import log

_SETTINGS = {"compute": "compute", "config": "its section", "seed": "the seed", "code": "its code"}


class Marks:
    """The marks of a run's stages.

    Args:
        run: folder of the run's results.
        folder: folder of the marks, created if missing.
    """

    def __init__(self, run: Path, folder: Path) -> None:
        self.run, self.folder = run, folder
        folder.mkdir(parents=True, exist_ok=True)
        self._digests = _Digests(folder / "digests.json")
        self._reasons: dict[str, str] = {}

    def path(self, stage: str) -> Path:
        """The mark of a stage.

        It has a folder of its own, because Snakemake lists a folder once in a plan: with several targets, marks that
        are made for the second would be missing in the list made for the first.
        """
        return self.folder / "marks" / stage / "mark"

    def renew(self, stage: str, settings: dict[str, Any], reads: Iterable[str] | None = None) -> str:
        """Make the mark of a stage agree with its record; say on stderr why a stage is stale.

        Args:
            stage: name of the stage's record.
            settings: what the record would hold now (:func:`sparsight.pipeline.records.settings`).
            reads: paths of the files that the stage would read now, if their number follows from sections other than
                the stage's own, such as the seeds of the SAEs.

        Returns:
            The reason why the stage is stale; empty if it is not, or if it has no result yet.
        """
        if stage not in self._reasons:
            reason = self._reasons[stage] = self._difference(stage, settings, reads)
            path = self.path(stage)
            path.parent.mkdir(parents=True, exist_ok=True)
            if reason:
                log(f"{stage} is made again: {reason}")
                write_shared(path, f"{uuid.uuid4()}\n")  # Snakemake compares contents too
            elif not path.exists() or path.stat().st_size:
                write_shared(path, "")
                os.utime(path, (0, 0))  # older than any result
        return self._reasons[stage]

    def save(self) -> None:
        """Remember the digests of files for the next plan."""
        self._digests.save()

    def _difference(self, stage: str, settings: dict[str, Any], reads: Iterable[str] | None) -> str:
        try:
            record = json.loads((self.run / "records" / f"{stage}.json").read_text())
        except FileNotFoundError:
            return ""
        except ValueError:
            return "its record cannot be read"
        for key, value in settings.items():
            if record.get(key) != value:
                return f"{_SETTINGS[key]} has changed"
        if reads is not None:
            expected, read = {os.path.relpath(path, self.run) for path in reads}, set(record["inputs"])
            if missing := expected - read:
                return f"it has not read {min(missing)}"
            if former := read - expected:
                return f"it has read {min(former)}, which the configuration does not have"
        for kind in ("inputs", "outputs"):
            for name, digest in record[kind].items():
                path = self.run / name
                if path.exists() and self._digests.of(path) != digest:  # Snakemake makes missing files
                    return f"{name} is not the file that it has {'read' if kind == 'inputs' else 'made'}"
        return ""


class _Digests:
    """Digests of files, remembered with size and time so that large ones are read once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._known: dict[str, list[Any]] = json.loads(path.read_text())
        except (FileNotFoundError, ValueError):
            self._known = {}
        self._seen: dict[str, list[Any]] = {}

    def of(self, path: Path) -> str:
        name, status = os.fspath(path), path.stat()
        if name not in self._seen:
            stamp = [status.st_size, status.st_mtime_ns, status.st_ino]
            cached = self._known.get(name)
            digest = cached[-1] if cached and cached[:-1] == stamp else file_digest(path)
            self._seen[name] = [*stamp, digest]
        return str(self._seen[name][-1])

    def save(self) -> None:
        known = {**self._known, **self._seen}  # a plan for one target sees only some files
        if self._seen and known != self._known:
            write_shared(self.path, json.dumps({name: known[name] for name in known if Path(name).exists()}))
