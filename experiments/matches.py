"""How many decoder rows of a section's SAEs have a partner in those of another section.

python experiments/matches.py results/mutual weak further

A line per seed of the first section has the means over the SAEs of the second: the cosine of rows matched one to one,
and the share of rows whose cosine is above 0.7. The last line is the mean over the first section's seeds with its 95 %
interval (Student's t).
"""

import argparse
from pathlib import Path

import numpy as np

from sparsight.common.errors import SparsightError
from sparsight.common.intervals import mean_of_seeds
from sparsight.sae.base import load
from sparsight.sae.metrics.geometry import matching

KEYS = ("cosine", "over_0.7")


def folders(run: Path, section: str) -> list[Path]:
    """Folders of the SAEs of a section, by seed."""
    found = sorted(
        run.glob(f"saes/{section}-s*/sae.safetensors"), key=lambda path: int(path.parent.name.split("-s")[-1])
    )
    if not found:
        raise SparsightError(f"{run}: has no SAEs of {section!r} of one site; name a section of the run")
    return [path.parent for path in found]


def matches(run: Path, first: str, second: str) -> dict[str, dict[str, float]]:
    """By SAE of the first section, the means over the SAEs of the second; an SAE is not compared with itself."""
    others = {folder: load(folder).W_dec for folder in folders(run, second)}
    found = {}
    for folder in folders(run, first):
        rows = load(folder).W_dec
        pairs = [matching(rows, W_dec) for other, W_dec in others.items() if other != folder]
        found[folder.name] = {key: float(np.mean([pair[key] for pair in pairs])) for key in KEYS}
    return found


def main() -> None:
    """Print the lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("first")
    parser.add_argument("second")
    arguments = parser.parse_args()
    try:
        found = matches(arguments.run, arguments.first, arguments.second)
    except SparsightError as error:
        raise SystemExit(f"error: {error}") from None
    for name, numbers in found.items():
        print(f"{name}: " + ", ".join(f"{key} {value:.3f}" for key, value in numbers.items()))
    for key in KEYS:
        mean = mean_of_seeds([numbers[key] for numbers in found.values()])
        half = mean.get("half", float("nan"))
        print(f"{key}: {mean['mean']:.3f} ({mean['mean'] - half:.3f} to {mean['mean'] + half:.3f})")


if __name__ == "__main__":
    main()
