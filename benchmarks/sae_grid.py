"""A grid of SAEs in one step against the same SAEs stepped one by one, on the CPU.

    python benchmarks/sae_grid.py [--saes 8] [--d-in 384] [--d-sae 8192] [--k 32] [--rounds 10] [--threads 2]

Both take turns on the same rows. Printed are wall and CPU milliseconds (minimum and median) of the grid's step and of
the sum of the single ones, their ratio, and whether every SAE of the grid ends with the bytes that it has alone.

Shapes: B batch, D width (d_in).
"""

import argparse
import statistics
import time
from collections.abc import Sequence

import torch

from sparsight import sae
from sparsight.common import machine
from sparsight.config import Compute
from sparsight.pipeline.stage import prepare_torch
from sparsight.sae import Trainer

_WARM_UP = 2


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--saes", type=int, default=8)
    parser.add_argument("--d-in", type=int, default=384)
    parser.add_argument("--d-sae", type=int, default=8192)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    prepare_torch(Compute(threads=arguments.threads))

    def trainers(*groups: range) -> list[Trainer]:
        sizes = (arguments.d_in, arguments.d_sae, arguments.k)
        return [Trainer([sae.create("topk", *sizes, seed=seed) for seed in group]) for group in groups]

    contestants = {
        "grid": trainers(range(arguments.saes)),
        "one by one": trainers(*(range(seed, seed + 1) for seed in range(arguments.saes))),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    generator = torch.Generator().manual_seed(0)
    for turn in range(arguments.rounds + _WARM_UP):
        x_BD = torch.randn(arguments.batch, arguments.d_in, generator=generator)
        for name in sorted(contestants, reverse=turn % 2 == 1):  # neither is always the one that finds x in the cache
            spent = _spent(contestants[name], x_BD)
            if turn >= _WARM_UP:
                times[name].append(spent)
    print(f"{machine.describe()}, {arguments.threads} threads, torch {torch.__version__}")
    print(f"{arguments.saes} SAEs, batch {arguments.batch}, d_in {arguments.d_in}, d_sae {arguments.d_sae}", end="")
    print(f", k {arguments.k}\n{'':12s}{'wall ms min / med':>22s}{'CPU ms min / med':>22s}")
    for name, spent_each in times.items():
        columns = ([1000 * spent[i] for spent in spent_each] for i in range(2))
        print(f"{name:12s}" + "".join(f"{min(c):13.1f} / {statistics.median(c):6.1f}" for c in columns))
    for i, clock in enumerate(("wall", "CPU")):
        own, others = ([spent[i] for spent in times[name]] for name in contestants)
        ratios = min(own) / min(others), statistics.median(own) / statistics.median(others)
        print(f"grid over one by one, {clock}: {ratios[0]:.3f} of the minima, {ratios[1]:.3f} of the medians")
    grid, alone = ([p for t in own for one in t.saes for p in one.parameters()] for own in contestants.values())
    same = all(torch.equal(a, b) for a, b in zip(grid, alone, strict=True))
    print(f"the bytes of an SAE in the grid and alone: {'same' if same else 'differ'}")


def _spent(trainers: Sequence[Trainer], x_BD: torch.Tensor) -> tuple[float, float]:
    """Wall and CPU seconds of one step of each."""
    wall, cpu = time.perf_counter(), time.process_time()
    for trainer in trainers:
        trainer.step(x_BD)
    return time.perf_counter() - wall, time.process_time() - cpu


if __name__ == "__main__":
    main()
