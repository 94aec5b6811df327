"""Kill stages and Snakemake itself at random moments until the run is done, and compare with a run left alone.

``python tests/chaos.py`` kills 50 times, ``python tests/chaos.py 200 7`` 200 times with another seed, and
``python tests/chaos.py 50 0 default`` does so in the default run instead of one on a tiny model.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from conftest import TINY, snakemake, workspace
from runs import contents, holder, run_in_peace, start

SNAKEMAKE_SHARE = 0.25  # of the kills
KILLS_A_RUN = 25  # in the time that a run takes which is left alone, so that they come to every part of it


def stages(folder: Path) -> dict[int, str]:
    """The stages that are running, by process."""
    work = folder / "results" / "tiny" / ".work"
    names = [path.name for path in work.iterdir()] if work.exists() else []
    return {process: name for name in names if (process := holder(folder, name, "lock"))}


def disturb(folder: Path, generator: random.Random, most: int, mean: float) -> Counter[str]:
    """Give the same command until it succeeds, killing what it is doing; returns how often what was killed.

    Args:
        folder: of the run.
        generator: of moments and stages.
        most: kills after which the run is left alone.
        mean: seconds between kills.
    """
    killed: Counter[str] = Counter()
    while True:
        run = start(folder, cores=2)
        while run.poll() is None:
            try:
                run.wait(generator.expovariate(1 / mean) if killed.total() < most else None)
            except subprocess.TimeoutExpired:
                if generator.random() < SNAKEMAKE_SHARE:
                    run.kill()
                    killed["snakemake"] += 1
                elif running := stages(folder):
                    process, name = generator.choice(sorted(running.items()))
                    os.kill(process, signal.SIGKILL)
                    killed[name] += 1
        if run.returncode == 0:
            return killed
        if run.returncode == -signal.SIGKILL:
            assert snakemake(folder, "--unlock").returncode == 0


def main(kills: str = "50", seed: str = "0", which: str = "tiny") -> None:
    """Run again and again until so much was killed."""
    generator, killed, begin = random.Random(int(seed)), Counter[str](), time.monotonic()
    with tempfile.TemporaryDirectory() as parent:
        overlay = TINY
        if which == "default":
            overlay = Path(parent, "default.yaml")
            overlay.write_text("run: tiny\n")  # params.yaml as it is, under the name that the tests look for
        undisturbed = contents(run_in_peace(workspace(Path(parent, "peace"), overlay)))
        mean = (time.monotonic() - begin) / KILLS_A_RUN
        while killed.total() < int(kills):
            folder = workspace(Path(parent, f"chaos-{killed.total()}"), overlay)
            killed += disturb(folder, generator, int(kills) - killed.total(), mean)
            made = contents(folder)
            differing = [name for name in made.keys() | undisturbed if made.get(name) != undisturbed.get(name)]
            left = [path.name for path in (folder / "results" / "tiny" / ".work").iterdir()]
            print(f"{killed.total()} kills, {time.monotonic() - begin:.0f} s: {killed.most_common()}", flush=True)
            if differing or left:
                sys.exit(f"these files differ: {differing}; working folders left behind: {left}")
    print(f"{killed.total()} kills, of them {killed['snakemake']} of Snakemake: the bytes of the undisturbed run")


if __name__ == "__main__":
    main(*sys.argv[1:])
