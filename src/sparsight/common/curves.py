"""Training curves for TensorBoard, made of the ``training.jsonl`` files of a run, finished or not."""

import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_POSITION = ("step", "epoch")
_FOLDERS = {"backbone": "backbones", "policy": "pruning", "sae": "saes"}
"""Where the results of a stage that trains lie, by the first word of its name."""


class Curves:
    """Writes ``results/<run>/tensorboard``, if tensorboard is installed; without it nothing happens.

    Events hold the time of writing, so they are no result: they lie outside all that a run makes or compares.

    Args:
        run: the run's folder.
    """

    def __init__(self, run: Path) -> None:
        self.run, self.folder = run, run / "tensorboard"
        self.installed = importlib.util.find_spec("tensorboard") is not None
        self._lines: dict[Path, int] = {}
        self._steps: dict[tuple[str, str], int] = {}
        self._writers: dict[str, Any] = {}
        if self.installed and self.folder.exists():
            shutil.rmtree(self.folder)  # all of it is written again

    def write(self) -> None:
        """Add what the logs hold since the last call."""
        if not self.installed:
            return
        for log in sorted(self.run.rglob("training.jsonl")):
            lines = log.read_text().split("\n")[:-1]
            for line in map(json.loads, lines[self._lines.get(log, 0) :]):
                for name, scalars in _by_model(log.relative_to(self.run).parts[:-1], line):
                    self._add(name, line["step"], scalars)
            self._lines[log] = max(len(lines), self._lines.get(log, 0))
        for writer in self._writers.values():
            writer.flush()

    def _add(self, name: str, step: int, scalars: dict[str, float]) -> None:
        if name not in self._writers:
            self._writers[name] = self._writer(name)
        for key, value in scalars.items():
            if step > self._steps.get((name, key), 0):  # the finished log repeats what was followed
                self._writers[name].add_scalar(key, value, step)
                self._steps[name, key] = step

    def _writer(self, name: str) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self.folder / name))


def _by_model(place: tuple[str, ...], line: dict[str, float]) -> Iterator[tuple[str, dict[str, float]]]:
    """The scalars of a line of a log, by the folder of the model that they are about.

    Args:
        place: folders of the log, from the run's. In a working folder the SAEs of a section share one log, with keys
            ``<folder>.<metric>``.
    """
    scalars = {key: value for key, value in line.items() if key not in _POSITION}
    if place[0] != ".work":
        yield "/".join(place), scalars
        return
    kind, _, name = place[1].partition("-")
    folder = _FOLDERS[kind]
    if kind != "sae":
        yield f"{folder}/{name}", scalars
        return
    for one in dict.fromkeys(key.rpartition(".")[0] for key in scalars):
        yield f"{folder}/{one}", {key[len(one) + 1 :]: v for key, v in scalars.items() if key.rpartition(".")[0] == one}
