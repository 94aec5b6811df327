"""The files from which training continues: one, or a part from each of several processes."""

import time
from functools import partial
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsight.common.files import write_atomic
from sparsight.training.ranks import Ranks

PLACE = "loop.position"
"""Name of the tensor with the loop's position: number of steps, bytes of the log, steps of the unfinished log line."""

_SECONDS = 15.0
_PAUSE = 20  # pause in multiples of the last checkpoint's duration, so that writing takes at most 5 % of the time


class Checkpoint:
    """The file from which training continues."""

    def __init__(self, path: Path) -> None:
        self.path, self._step = path, 0
        self._next = time.monotonic() + _SECONDS

    def load(self) -> dict[str, Tensor]:
        """The state that :meth:`save` wrote; empty if there is no file yet."""
        if not self.path.exists():
            return {}
        state = self._read()
        self._step = int(state[PLACE][0])
        return state

    @property
    def due(self) -> bool:
        """Whether the last checkpoint is old enough for a new one."""
        return time.monotonic() > self._next

    def save(self, step: int, state: dict[str, Tensor]) -> None:
        """Write the state after ``step`` steps; readers see either the state before or this one."""
        begin = time.monotonic()
        self._write(step, state)
        self._step, end = step, time.monotonic()
        self._next = end + max(_SECONDS, _PAUSE * (end - begin))

    def _read(self) -> dict[str, Tensor]:
        return load_file(self.path)

    def _write(self, step: int, state: dict[str, Tensor]) -> None:
        write_atomic(self.path, partial(save_file, state))

    def __str__(self) -> str:
        if self._step == 0:
            return "no checkpoint was written before"
        return f"the last good checkpoint is {self.path}, after step {self._step}"


class PartedCheckpoint(Checkpoint):
    """A part from each process, and a file that names the step of which all parts are there.

    Parts of a step are files of their own beside those of the step before. A process that is killed between two parts
    leaves the file as it was, and with it the older parts.
    """

    def __init__(self, state: Path, ranks: Ranks) -> None:
        super().__init__(state / "checkpoint")
        self.ranks = ranks

    def _read(self) -> dict[str, Tensor]:
        return load_file(self._part(int(self.path.read_text()), self.ranks.rank))

    def _write(self, step: int, state: dict[str, Tensor]) -> None:
        save_file(state, self._part(step, self.ranks.rank))
        self.ranks.wait()  # all parts are there
        if self.ranks.first:
            write_atomic(self.path, lambda path: path.write_text(str(step)))
            whole = {self._part(step, rank) for rank in range(self.ranks.size)}
            for part in set(self.path.parent.glob("part-*")) - whole:
                part.unlink()

    def _part(self, step: int, rank: int) -> Path:
        return self.path.parent / f"part-{step}-{rank}.safetensors"
