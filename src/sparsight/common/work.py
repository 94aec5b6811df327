"""The working folder of a stage: locked, and kept outside all declared outputs until the results are complete.

Snakemake deletes a job's outputs before the job runs, so checkpoints and half-written shards must lie elsewhere:

    results/<run>/.work/<stage>/lock      held with flock while the stage runs
                               /key       digest of all that decides the result; another key empties the folder
                               /state/    checkpoints
                               /out/      finished files, put into their place at the end
                               /record    what they were made from, put into its place after them
                               /complete  written when out/ is complete: only putting files into place is left
"""

import fcntl
import os
import shutil
import socket
from functools import partial
from pathlib import Path
from types import TracebackType

from sparsight.common.errors import SparsightError
from sparsight.common.files import remove, write_atomic


class Work:
    """A stage's working folder; a context manager that holds its lock.

    Args:
        folder: the working folder, created if missing.
        key: digest of everything that decides the result; state under another key is deleted.

    Raises:
        SparsightError: another process holds the folder.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder, key
        self.state, self.out, self.record = folder / "state", folder / "out", folder / "record"

    def __enter__(self) -> "Work":
        self.lock = self._acquire()
        if _read(self.folder / "key") != self.key:
            for entry in self.folder.iterdir():
                if entry.name != "lock":
                    remove(entry)
            write_atomic(self.folder / "key", lambda path: path.write_text(self.key))
        self.state.mkdir(exist_ok=True)
        self.out.mkdir(exist_ok=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        os.close(self.lock)

    def _acquire(self) -> int:
        path = self.folder / "lock"
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = _read(path) or "unknown process"
                os.close(descriptor)
                raise SparsightError(
                    f"{self.folder} is in use by {holder}: this stage is still running. "
                    "Wait for it or stop it, then run the same command again"
                ) from None
            # A stage that finished in the meantime has removed the file that was just locked: try again.
            if path.exists() and path.stat().st_ino == os.fstat(descriptor).st_ino:
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
                return descriptor
            os.close(descriptor)

    @property
    def complete(self) -> bool:
        """Whether ``out`` is complete, so that only putting its files into place is left."""
        return (self.folder / "complete").exists()

    def finish(self, destination: Path, record: Path | None = None) -> None:
        """Put every file of ``out``, also in subfolders, into ``destination`` and remove the working folder.

        Files are linked, not moved: if the process is killed in between, Snakemake deletes the outputs that
        are already in place, and the next run links them again.

        Args:
            destination: folder of the results.
            record: path for the stage's record, if it wrote one.
        """
        (self.folder / "complete").touch()
        destination.mkdir(parents=True, exist_ok=True)
        for entry in sorted(path for path in self.out.rglob("*") if path.is_file()):
            target = destination / entry.relative_to(self.out)
            target.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(target, partial(_link, entry))
        if record is not None:
            record.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(record, partial(_link, self.record))
        for entry in self.folder.iterdir():
            if entry.name not in ("lock", "complete"):
                remove(entry)
        remove(self.folder)


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # the file system has no hard links
        shutil.copy2(source, target)


def _read(path: Path) -> str | None:
    return path.read_text() if path.exists() else None
