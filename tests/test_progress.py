"""Progress: a bar on a terminal, lines in a log file."""

import io
from types import SimpleNamespace

import pytest

from sparsight.common import progress
from sparsight.common.progress import Progress


def follow(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO) -> str:
    """What is written about 400 rows, the first 100 of which were done before."""
    monkeypatch.setattr("sys.stderr", stream)
    with Progress(400, "rows", start=100) as done:
        for _ in range(3):
            done(100, "fvu 0.25, l0 8, dead 3")
    return stream.getvalue()


def test_a_terminal_shows_a_bar_with_rate_and_note(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    *_, last = follow(monkeypatch, terminal).rstrip().split("\r")
    assert "| 400/400 [" in last and " rows/s, fvu 0.25, l0 8, dead 3]" in last


def test_a_log_file_gets_lines_now_and_then_and_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 4.0, 6.0, 8.0])
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    assert follow(monkeypatch, io.StringIO()).splitlines() == [
        "300/400 rows, 33.3 rows/s, 3 s left, fvu 0.25, l0 8, dead 3",
        "400/400 rows, 37.5 rows/s, 0 s left, fvu 0.25, l0 8, dead 3",
    ]


def test_what_takes_seconds_is_followed_and_what_does_not_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    for times, lines in (
        ([0.0, 1.0, 2.0, 3.0], []),
        ([0.0, 4.0, 8.0, 9.0], ["2/3 windows, 0.2 windows/s, 4 s left", "3/3 windows, 0.3 windows/s, 0 s left"]),
    ):
        clock, stream = iter(times), io.StringIO()
        monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda clock=clock: next(clock)))
        monkeypatch.setattr("sys.stderr", stream)
        assert list(progress.followed("abc", 3, "windows")) == ["a", "b", "c"]
        assert stream.getvalue().splitlines() == lines
