"""A stage in several processes: the stage starts its own script once for each, and watches over them.

torchrun does much of this, but it kills the processes 30 s after SIGTERM, when a large checkpoint may not be written
yet. Here

* SIGTERM is passed on, and the stage waits until every process has ended;
* a process that fails ends all others, and the stage fails with one line that names it;
* a process ends by itself when the stage is gone, because its standard input then ends;
* every process holds the lock of the working folder, so no other stage begins before the last one has ended.
"""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from sparsight.common.errors import SparsightError
from sparsight.common.files import remove, write_json
from sparsight.common.member import Member
from sparsight.common.progress import silence
from sparsight.common.work import Work

_VARIABLE = "SPARSIGHT_MEMBER"
_POLL_SECONDS = 0.02
_GRACE_SECONDS = 2.0
_TERMINATED = 128 + signal.SIGTERM


def this_member() -> Member:
    """The place of this process among those of its stage; the only one, unless :func:`run_all` has started it."""
    text = os.environ.pop(_VARIABLE, None)  # not for the programs that it starts
    if text is None:
        return Member()
    rank, size, folder = json.loads(text)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the stage hears Ctrl-C as well, and ends all its processes
    threading.Thread(target=_end_with_the_stage, daemon=True).start()
    if rank:
        silence()
    return Member(rank, size, Path(folder))


def _end_with_the_stage() -> None:
    os.read(sys.stdin.fileno(), 1)  # returns when no process holds the other end any more
    os.kill(os.getpid(), signal.SIGKILL)


def report(member: Member, error: str | None) -> None:
    """Leave for the stage why this process fails: an error for the user, or None for the traceback of the exception."""
    write_json(member.report, {"error": error, "traceback": None if error else traceback.format_exc()})


def run_all(n: int, work: Work, cards: Sequence[str]) -> None:
    """Run this script in ``n`` processes, with the same arguments, and wait until all have ended.

    Args:
        n: number of processes.
        work: the stage's working folder, which is locked.
        cards: a GPU for each process, or none.

    Raises:
        SparsightError: a process has failed; the message is its own, or says how it ended.
        SystemExit: all processes have stopped after SIGTERM.
    """
    folder = work.folder / "processes"
    if folder.exists():
        remove(folder)
    folder.mkdir()
    processes: list[subprocess.Popen[bytes]] = []
    stopping: list[int] = []

    def stop(number: int, _: object) -> None:
        stopping.append(number)
        for process in processes:
            process.send_signal(signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        for rank in range(n):
            variables = {_VARIABLE: json.dumps([rank, n, str(folder.absolute())])}
            if cards:
                variables["CUDA_VISIBLE_DEVICES"] = cards[rank]
            command, environment = [sys.executable, *sys.argv], {**os.environ, **variables}
            if not stopping:
                process = subprocess.Popen(command, stdin=subprocess.PIPE, env=environment, pass_fds=[work.lock])
                processes.append(process)
        if stopping:  # perhaps while the last of them was being started
            stop(stopping[0], None)
        _wait(processes)
        codes = [process.poll() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
            assert process.stdin is not None
            process.stdin.close()
        signal.signal(signal.SIGTERM, before)
    _judge(codes, [Member(rank, n, folder) for rank in range(n)], bool(stopping))


def _wait(processes: Sequence["subprocess.Popen[bytes]"]) -> None:
    """Until all have ended, or one has failed; then a moment longer, for what one loses by another's end."""
    end = math.inf
    while None in (codes := [process.poll() for process in processes]) and time.monotonic() < end:
        if end == math.inf and not {None, 0, _TERMINATED}.issuperset(codes):
            end = time.monotonic() + _GRACE_SECONDS
        time.sleep(_POLL_SECONDS)


def _judge(codes: Sequence[int | None], members: Sequence[Member], stopping: bool) -> None:
    """Raise what the processes' exit statuses (None: it still ran) and reports amount to."""
    if codes and not any(code != 0 for code in codes):
        return
    reports = {m.rank: json.loads(m.report.read_text()) for m in members if m.report.exists()}
    killed = {rank: -code for rank, code in enumerate(codes) if code is not None and code < 0}
    if stopping or _TERMINATED in codes:
        killed = {rank: number for rank, number in killed.items() if number != signal.SIGTERM}
    for rank, number in killed.items():
        cause = f"{signal.Signals(number).name}{' (out of memory?)' if number == signal.SIGKILL else ''}"
        which = f"process {rank} of {len(members)} was killed by {cause}"
        raise SparsightError(f"{which}; the same command continues from the last checkpoint")
    for content in reports.values():
        if content["error"]:
            raise SparsightError(content["error"])
    if stopping or _TERMINATED in codes:
        raise SystemExit(_TERMINATED)
    failed = next(rank for rank, code in enumerate(codes) if code)
    if reports:
        failed = min(reports, key=lambda rank: members[rank].report.stat().st_mtime_ns)
        print(reports[failed]["traceback"], file=sys.stderr)
    raise SparsightError(f"process {failed} of {len(members)} failed with status {codes[failed]}")
