"""What every stage of the default run takes, and how busy the run keeps the cores it is given.

    python benchmarks/stages.py [--cores 2]

Runs the default run once more, as results/stages-<cores>, and prints for each job seconds, processor seconds, how many
cores it used on average and peak memory; then the whole run's time and the share of all cores' time that was used,
Snakemake's own included. Processor seconds are what the jobs say of themselves at the end of their logs.
"""

import argparse
import json
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

from sparsight.common import machine


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", type=int, default=2)
    cores = parser.parse_args().cores
    run = Path("results", f"stages-{cores}")
    run.mkdir(parents=True, exist_ok=True)
    overlay = run / "overlay.yaml"
    overlay.write_text(f"run: {run.name}\n")
    command = [sys.executable, "-m", "snakemake", "--cores", str(cores), "--forceall", "--quiet", "all"]
    begin = time.monotonic()
    subprocess.run([*command, "--configfile", str(overlay)], check=True)
    took = time.monotonic() - begin
    jobs = json.loads((run / "provenance.json").read_text())["jobs"]
    print(f"{machine.describe()}\n\n| job | s | CPU s | cores used | peak MB |\n|---|---|---|---|---|")
    for name, job in sorted(jobs.items(), key=lambda item: -(item[1]["seconds"] or 0)):
        seconds, peak = job["seconds"] or 0.0, job["peak_memory_mb"] or 0.0
        cpu = float(re.findall(r"^processor time: (.*) s$", (run / "logs" / f"{name}.log").read_text(), re.M)[-1])
        print(f"| {name} | {seconds:.0f} | {cpu:.0f} | {cpu / seconds if seconds else 0:.1f} | {peak:.0f} |")
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = usage.ru_utime + usage.ru_stime
    print(
        f"\n{took:.0f} s with --cores {cores}; {used:.0f} CPU s, {100 * used / took / cores:.0f} % of the cores' time"
    )


if __name__ == "__main__":
    main()
