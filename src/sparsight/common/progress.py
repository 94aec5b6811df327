"""Progress that suits the reader: a bar on a terminal, a plain line now and then in a log file."""

import sys
import time

from tqdm import tqdm

_SECONDS = 5.0


def log(message: str) -> None:
    """Write one line to the log without tearing a bar."""
    tqdm.write(message, file=sys.stderr)


class Progress:
    """Follows ``total`` units of work: a context manager, called with each number done."""

    def __init__(self, total: int, unit: str, start: int = 0) -> None:
        self.total, self.unit, self.done = total, unit, start
        self._start, self._begin = start, time.monotonic()
        self._said = self._begin
        self._bar = tqdm(total=total, unit=f" {unit}", initial=start) if sys.stderr.isatty() else None

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
        if now - self._said > _SECONDS or self.done >= self.total:
            self._said = now
            rate = (self.done - self._start) / max(now - self._begin, 1e-9)
            left = (self.total - self.done) / max(rate, 1e-9)
            note = note and f", {note}"
            log(f"{self.done}/{self.total} {self.unit}, {rate:.1f} {self.unit}/s, {left:.0f} s left{note}")
