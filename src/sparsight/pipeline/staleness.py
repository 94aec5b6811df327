"""Finds stale stages by comparing recorded digests, independent of mtimes and Snakemake metadata.

Files can be swapped under Snakemake: by ``git checkout`` and ``dvc checkout``, by copying a results folder, by
``snakemake --touch``. Every stage leaves a record of the settings and files behind its result
(:mod:`sparsight.pipeline.records`). Before anything is planned, :func:`mark` compares the records with the
configuration and with the files. A stage that differs in anything gets a new mark: a small file that its rule has as an
input, so Snakemake runs the rule again.
"""

import dataclasses
import json
import os
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sparsight.common.digests import file_digest
from sparsight.common.files import json_text, write_shared
from sparsight.pipeline.records import settings
from sparsight.pipeline.run import Run


def mark(run: Run) -> dict[str, str]:
    """Make sure that every stage has a mark, and renew the marks of stale stages.

    Returns:
        For the stages whose marks are renewed, the reason.
    """
    folder = run.folder / ".trust"
    folder.mkdir(parents=True, exist_ok=True)
    with _Digests(folder / "digests.json") as digests:
        reasons = {stage: _difference(run, stage, section, digests) for stage, section in stages(run)}
    for stage, reason in reasons.items():
        path = folder / stage
        text = None if stage != "configuration" else json_text(dataclasses.asdict(run))  # what its script writes
        if reason:
            write_shared(path, text or f"{uuid.uuid4()}\n")  # Snakemake compares contents too
        elif not path.exists() or (text is not None and path.read_text() != text):
            write_shared(path, text or "")
            os.utime(path, (0, 0))  # older than any result
    return {stage: reason for stage, reason in reasons.items() if reason}


def stages(run: Run) -> Iterator[tuple[str, Any]]:
    """Every stage of a run by the name of its record, with the section that it reads, or None."""
    yield "images", run.images
    for name, images in run.other_images.items():
        yield f"images-{name}", images
    for name, backbone in run.backbones.items():
        yield f"backbone-{name}", backbone
        for split in ("train", "val", "test"):
            for part in range(run.activations.parts):
                yield f"extract-{name}-{split}-{part}", run.activations
            yield f"activations-{name}-{split}", None
    for name, sae in run.saes.items():
        yield f"sae-{name}", sae
        if not sae.sites:
            yield f"evaluate-{name}", None
    for name in run.chains:
        yield f"evaluate-{name}", None
    for name in run.repeated:
        yield f"stability-{name}", None
    for name in run.steering_names:
        yield f"steering-{name}", run.steering[name.rpartition("-s")[0]]
    for name in run.transfers:
        for other in run.other_images:
            yield f"steering-{name}-{other}", None
    for name, policy in run.policies.items():
        yield f"policy-{name}", policy
        yield f"pruning-{name}", run.pruning
    yield "configuration", run
    yield "timings", None
    yield "summary", None
    yield "report", run.report


def gathered(run: Run, stage: str) -> dict[str, set[str]]:
    """By folder, the names of the results that a stage reads, if it gathers those of many other stages; else empty.

    The names follow from sections that are not the stage's own, such as the seeds of the SAEs.
    """
    kind, _, name = stage.partition("-")
    if kind == "stability":
        return {"saes": {f"{name}-s{seed}" for seed in run.saes[name].seeds}}
    if kind == "pruning":
        return {"saes": set(run.steered)}
    if kind == "timings":
        return {"backbones": {policy.backbone for policy in run.policies.values()}}
    if kind in ("summary", "report"):
        return {
            "backbones": set(run.backbones),
            "saes": {*run.sae_names, *run.chains},
            "steering": set(run.steering_names),
            "pruning": set(run.policies),
        }
    return {}


def _gathered_difference(expected: dict[str, set[str]], inputs: Iterable[str]) -> str:
    """Why a stage that gathers results is stale; empty if it has read exactly those that it would read now."""
    paths = [Path(name).parts for name in inputs]
    for kind, names in expected.items():
        read = {path[1] for path in paths if path[0] == kind and len(path) > 2}
        if kind == "steering":  # its results are files, not folders
            read |= {Path(path[1]).stem for path in paths if path[0] == kind and len(path) == 2}
        if missing := names - read:
            return f"it has not read {kind}/{min(missing)}"
        if former := read - names:
            return f"it has read {kind}/{min(former)}, which the configuration does not have"
    return ""


def _difference(run: Run, stage: str, section: Any, digests: "_Digests") -> str:
    """Why a stage is stale; empty if it is not, or if it has no result yet."""
    if stage == "configuration":  # its file is compared instead of a record
        path = run.folder / "configuration.json"
        same = not path.exists() or path.read_text() == json_text(dataclasses.asdict(run))
        return "" if same else "it is another configuration's"
    try:
        record = json.loads((run.folder / "records" / f"{stage}.json").read_text())
    except FileNotFoundError:
        return ""
    except ValueError:
        return "its record cannot be read"
    for key, value in settings(run.compute, section, run.seed).items():
        if record.get(key) != value:
            return {"compute": "compute", "config": "its section", "seed": "the seed"}[key] + " has changed"
    if reason := _gathered_difference(gathered(run, stage), record["inputs"]):
        return reason
    for kind in ("inputs", "outputs"):
        for name, digest in record[kind].items():
            path = run.folder / name
            if path.exists() and digests.of(path) != digest:  # Snakemake makes missing files
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

    def __enter__(self) -> "_Digests":
        return self

    def __exit__(self, *_: object) -> None:
        write_shared(self.path, json.dumps(self._seen))
