"""What every stage of the default run takes, and how busy the run keeps the cores it is given.

    python benchmarks/stages.py [--cores 2]

Runs the default run once more, as results/stages-<cores>, and prints for each job seconds, processor seconds, how many
cores it used on average and peak memory; then the whole run's time and the share of all cores' time that was used,
Snakemake's own included. Snakemake looks at a job twice a second for a quarter of a minute and twice a minute from then
on, so a single job's processor seconds can lack those of up to its last half minute; the sum of all is exact.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

from sparsight import machine


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
        seconds, cpu, peak = (job[key] or 0.0 for key in ("seconds", "cpu_seconds", "peak_memory_mb"))
        print(f"| {name} | {seconds:.0f} | {cpu:.0f} | {cpu / seconds if seconds else 0:.1f} | {peak:.0f} |")
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = usage.ru_utime + usage.ru_stime
    print(
        f"\n{took:.0f} s with --cores {cores}; {used:.0f} CPU s, {100 * used / took / cores:.0f} % of the cores' time"
    )


if __name__ == "__main__":
    main()
