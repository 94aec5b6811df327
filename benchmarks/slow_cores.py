"""Run a command as on a machine of more and slower cores: each of its threads gets a share of one core and no more.

    python benchmarks/slow_cores.py 4 python benchmarks/stages.py --cores 8

On two cores that is a machine of eight, each a quarter as fast. Every thread is put into a group of its own whose
quota the kernel enforces, 20 milliseconds at a time; a new thread shares its maker's quota for up to 50. What cores
share with each other (caches, memory) is as it is here. Prints at the end which share of the pretended cores' time the
command used. Needs root and the cpu controller of cgroups, version 1.
"""

import argparse
import contextlib
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup/cpu/slow_cores")
_PERIOD = 20_000  # microseconds
_LOOK = 0.05  # seconds between two looks for new threads


def main() -> None:
    """Run, and place threads until the command ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("slower", type=int, help="how many times slower a thread runs")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    _ROOT.mkdir(exist_ok=True)
    begin = ["sh", "-c", f'echo $$ > {_ROOT}/tasks; exec "$@"', "sh", *arguments.command]
    groups: set[str] = set()
    start = time.monotonic()
    with subprocess.Popen(begin) as process:
        while process.poll() is None:
            groups = _place(groups, _PERIOD // arguments.slower)
            time.sleep(_LOOK)
    took, usage = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    used, cores = usage.ru_utime + usage.ru_stime, (os.cpu_count() or 1) * arguments.slower
    print(
        f"{took:.0f} s, {took / arguments.slower:.0f} at full speed; {used:.0f} CPU s, "
        f"{100 * used * arguments.slower / took / cores:.0f} % of {cores} cores' time"
    )
    while groups := _place(groups, _PERIOD):  # what the command left running is waited for
        time.sleep(_LOOK)
    _ROOT.rmdir()
    sys.exit(process.returncode)


def _place(groups: set[str], quota: int) -> set[str]:
    """Give every thread its own group, named by its number, and remove those that are empty. The groups there are."""
    threads, full = set(_threads(_ROOT)), set()
    for group in groups:
        inside = _threads(_ROOT / group)
        threads.update(inside)
        if inside:
            full.add(group)
        else:
            (_ROOT / group).rmdir()
    for thread in threads:
        folder = _ROOT / thread
        if not folder.exists():  # to set a quota again would fill it up
            folder.mkdir()
            (folder / "cpu.cfs_period_us").write_text(str(_PERIOD))
            (folder / "cpu.cfs_quota_us").write_text(str(quota))
        with contextlib.suppress(ProcessLookupError):  # it has ended
            (folder / "tasks").write_text(thread)
    return threads | full


def _threads(group: Path) -> list[str]:
    return (group / "tasks").read_text().split()


if __name__ == "__main__":
    main()
