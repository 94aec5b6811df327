"""One of the processes in which a stage runs."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Member:
    """A process and its place among those of its stage."""

    rank: int = 0
    """Its number, from 0."""
    size: int = 1
    """Number of processes."""
    folder: Path = Path()
    """Where the processes find each other and leave their errors; of no meaning for a single process."""

    @property
    def meeting(self) -> Path:
        """The file by which the processes find each other."""
        return self.folder / "meeting"

    @property
    def report(self) -> Path:
        """The file in which this process says why it has failed."""
        return self.folder / f"error-{self.rank}.json"
