"""What a run is doing: ``python -m sparsight.follow results/<run>``, while Snakemake or SLURM works on it.

Everything is read from files, so it works in another terminal, and on any node that sees them:

* the last plan names all stages (its marks, in ``.snakemake/sparsight/<run>``);
* a finished stage has a record, an unfinished one a working folder, whose lock names the process that holds it;
* the last line of a log says how far a stage is and what its training has reached, such as FVU, L0 and dead latents.
"""

import argparse
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sparsight.common.curves import Curves
from sparsight.common.errors import SparsightError

_SECONDS = 2.0
_BAR = 20
_TAIL = 4000  # bytes at the end of a log
_PROGRESS = re.compile(r"(\d+)/(\d+) (?:\S+), [\d.]+ (?:\S+)/s, (\d+) s left(?:, (.*))?")


@dataclass(frozen=True)
class Stage:
    """A stage of the last plan, as its files show it."""

    name: str
    state: str
    """``done``, ``running``, ``stopped`` (it failed or was killed; the same command continues it) or ``waiting``."""
    share: float | None = None
    """Share of the part at hand that is done."""
    seconds_left: float | None = None
    note: str = ""
    """What its training has reached, or the last line of its log."""


def stages(run: Path) -> list[Stage]:
    """The stages of a run, in the order of their names.

    Args:
        run: the run's folder, ``results/<run>``.

    Raises:
        SparsightError: nothing was planned for such a run in this folder.
    """
    marks = run.resolve().parents[1] / ".snakemake" / "sparsight" / run.resolve().name / "marks"
    names = sorted(path.name for path in marks.glob("*"))
    if not names:
        raise SparsightError(f"{run}: no run was planned here; start it with snakemake, and give its folder in results")
    return [_stage(run, name, marks / name / "mark") for name in names]


def _stage(run: Path, name: str, mark: Path) -> Stage:
    work, record = run / ".work" / name, run / "records" / f"{name}.json"
    if work.exists():
        last = _last_line(run / "logs" / f"{name}.log")
        state = "running" if _alive(work / "lock") else "stopped"
        if state == "running" and (found := _PROGRESS.fullmatch(last)):
            done, total, seconds, note = found.groups()
            return Stage(name, state, int(done) / max(int(total), 1), float(seconds), note or "")
        return Stage(name, state, note=last)
    try:
        done = record.stat().st_mtime >= mark.stat().st_mtime  # a stage that is to run again has a newer mark
    except OSError:
        done = False
    return Stage(name, "done" if done else "waiting")


def _alive(lock: Path) -> bool:
    """Whether the process that holds a lock lives; on another host it is taken to."""
    try:
        holder = re.fullmatch(r"process (\d+) on (.*)", lock.read_text())
    except OSError:
        return False
    if holder is None or holder[2] != socket.gethostname():
        return holder is not None
    try:
        os.kill(int(holder[1]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it lives, and belongs to someone else
    return True


def _last_line(log: Path) -> str:
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL))
            lines = file.read().decode(errors="replace").split("\n")[:-1]
    except OSError:
        return ""
    return lines[-1].strip() if lines else ""


def screen(run: Path, found: list[Stage], width: int) -> Iterator[str]:
    """The lines to show, at most ``width`` characters each."""
    count = {state: sum(stage.state == state for stage in found) for state in ("done", "running", "stopped", "waiting")}
    counted = ", ".join(f"{n} {state}" for state, n in count.items() if n)
    yield f"{run}: {len(found)} stages: {counted}"[:width]
    shown = [stage for stage in found if stage.state in ("running", "stopped")]
    longest = max((len(stage.name) for stage in shown), default=0)
    for stage in shown:
        yield f"{stage.state:8s} {stage.name:{longest}s}  {_progress(stage)}"[:width].rstrip()
    if not count["waiting"] and not shown:
        yield f"the report: {run / 'report' / 'index.html'}"


def _progress(stage: Stage) -> str:
    if stage.share is None or stage.seconds_left is None:
        return stage.note
    full = round(_BAR * stage.share)
    left = time.strftime("%H:%M:%S" if stage.seconds_left >= 3600 else "%M:%S", time.gmtime(stage.seconds_left))
    return f"[{'#' * full}{'.' * (_BAR - full)}] {100 * stage.share:3.0f} %  {left} left  {stage.note}"


def main() -> None:
    """Show what a run is doing until it is finished."""
    parser = argparse.ArgumentParser(prog="python -m sparsight.follow", description=main.__doc__)
    parser.add_argument("run", type=Path, help="results/<run>")
    parser.add_argument("--once", action="store_true", help="show it once and end")
    arguments = parser.parse_args()
    curves, drawn = Curves(arguments.run), 0
    try:
        while True:
            found = stages(arguments.run)
            curves.write()
            size = shutil.get_terminal_size()
            lines = list(screen(arguments.run, found, size.columns - 1))[: size.lines - 1]
            if drawn and sys.stdout.isatty():
                print(f"\x1b[{drawn}F\x1b[J", end="")  # back to the first line, and clear from there on
            print("\n".join(lines), flush=True)
            drawn = len(lines)
            if arguments.once or all(stage.state == "done" for stage in found):
                return
            time.sleep(_SECONDS)
    except SparsightError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
