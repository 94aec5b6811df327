"""Seconds in which Snakemake plans a sweep of 1,000 SAEs, the default run, and as many jobs of rules that do nothing.

    python benchmarks/planning.py [--sections 250] [--seeds 4] [--rounds 3]

``bare`` is a Snakefile with as many jobs, inputs and outputs as the sweep, without functions and without the few jobs
that gather them: about what Snakemake needs by itself. The three take turns; minimum and median are printed.
Nothing is run.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from turns import take_turns

from sparsight.common import machine

BARE = """
rule all:
    input: expand("evaluated/{{section}}-{{seed}}.a", section=range({sections}), seed=range({seeds})),
        expand("alike/{{section}}", section=range({sections}))

rule train:
    input: [f"source/{{i}}" for i in range(4)]
    output: expand("trained/{{{{section}}}}-{{seed}}.{{file}}", seed=range({seeds}), file=[*"abc"]),
        "trained/{{section}}"
    shell: "true"

rule evaluate:
    input: [f"source/{{i}}" for i in range(6)],
        expand("trained/{{{{section}}}}-{{seed}}.{{file}}", seed=range({seeds}), file=[*"ab"])
    output: expand("evaluated/{{{{section}}}}-{{seed}}.{{file}}", seed=range({seeds}), file=[*"abcd"]),
        "evaluated/{{section}}"
    shell: "true"

rule compare:
    input: [f"source/{{i}}" for i in range(2)],
        expand("trained/{{{{section}}}}-{{seed}}.{{file}}", seed=range({seeds}), file=[*"ab"])
    output: "alike/{{section}}", "alike/{{section}}.a"
    shell: "true"
"""


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", type=int, default=250)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as parent:
        bare = Path(parent, "bare")
        (bare / "source").mkdir(parents=True)
        for number in range(6):
            (bare / "source" / str(number)).touch()
        (bare / "Snakefile").write_text(BARE.format(sections=arguments.sections, seeds=arguments.seeds))
        overlay = Path(parent, "sweep.yaml")
        overlay.write_text(sweep(arguments.sections, arguments.seeds))
        contestants = {
            "sweep": ["--configfile", str(overlay)],
            "bare": ["--directory", str(bare), "--snakefile", str(bare / "Snakefile"), "--workflow-profile", "none"],
            "default run": ["--forceall"],
        }
        runs = {name: partial(plan, words) for name, words in contestants.items()}
        seconds = take_turns(runs, arguments.rounds, warm_up=0)
    print(f"{machine.describe()}\n\n| | minimum, s | median, s |\n|---|---|---|")
    for name, times in seconds.items():
        print(f"| {name} | {min(times):.1f} | {statistics.median(times):.1f} |")


def plan(words: list[str]) -> None:
    """Let Snakemake plan and print nothing."""
    command = [sys.executable, "-m", "snakemake", "--cores", "8", "--dry-run", "--quiet", "all", *words]
    subprocess.run(command, check=True, capture_output=True)


def sweep(sections: int, seeds: int) -> str:
    """An overlay of so many sections, each of so many SAEs."""
    lines = ["run: planning", "saes:", *(f"  {name}: null" for name in ("topk", "switch", "resae", "plain", "final"))]
    for number in range(sections):
        lines.append(
            f"  s{number}: {{kind: topk, backbone: vit, site: blocks.5.input, d_sae: 384, k: {1 + number % 64}, "
            f"seeds: {list(range(seeds))}, epochs: 60, batch_size: 128, lr: 1.0e-3}}"
        )
    return "\n".join([*lines, "steering: {class-latents: {sae: s0}, vs2: null, neighbours: null}", ""])


if __name__ == "__main__":
    main()
