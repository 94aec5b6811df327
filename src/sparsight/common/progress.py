"""Progress display: a bar on a terminal, a plain line every few seconds in a log file."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

_T = TypeVar("_T")

_SECONDS = 5.0
_silent = False


def silence() -> None:
    """Write nothing from now on: another process writes the same."""
    global _silent
    _silent = True


def log(message: str) -> None:
    """Write one line to the log (stderr) without breaking a progress bar."""
    if not _silent:
        tqdm.write(message, file=sys.stderr)


class Progress:
    """Progress over ``total`` units of work. Use it as a context manager and call it with the number of units done.

    Args:
        total: units in all.
        unit: what they are.
        start: units that were done before.
        brief: whether to write nothing into a log file about work that is done within seconds.
    """

    def __init__(self, total: int, unit: str, start: int = 0, brief: bool = False) -> None:
        self.total, self.unit, self.done = total, unit, start
        self._start, self._begin = start, time.monotonic()
        self._said, self._brief = self._begin, brief
        self._bar = tqdm(total=total, unit=f" {unit}", initial=start) if sys.stderr.isatty() and not _silent else None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, count: int, note: str = "") -> None:
        self.done += count
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(count)
            return
        now = time.monotonic()
        ends = self.done >= self.total and not (self._brief and self._said == self._begin)
        if now - self._said > _SECONDS or ends:
            self._said = now
            rate = (self.done - self._start) / max(now - self._begin, 1e-9)
            seconds_left = (self.total - self.done) / max(rate, 1e-9)
            note = note and f", {note}"
            log(f"{self.done}/{self.total} {self.unit}, {rate:.1f} {self.unit}/s, {seconds_left:.0f} s left{note}")


def followed(items: Iterable[_T], total: int, unit: str) -> Iterator[_T]:
    """The items one by one, with progress if they take longer than some seconds."""
    with Progress(total, unit, brief=True) as progress:
        for item in items:
            yield item
            progress(1)
