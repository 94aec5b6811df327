"""Step time of a Switch SAE against its number of experts, at equal width, on the CPU.

    python benchmarks/switch.py [--width 16384] [--experts 4 8 16 32 64] [--rounds 8] [--threads 2]

The models take turns, step by step; printed are wall and CPU milliseconds of a whole training step (minimum and
median) and the ratios of the CPU minima to plain dense PyTorch's TopK and to our own.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from contestants import LR, Dense, Sparsight
from torch import Tensor

import sparsight as ss
from sparsight.common import machine
from sparsight.config import Compute
from sparsight.pipeline.stage import prepare_torch

_WARM_UP = 2


def main() -> None:
    """Print one line per model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-in", type=int, default=768)
    parser.add_argument("--width", type=int, default=16384)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--experts", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    prepare_torch(Compute(threads=arguments.threads))
    d_in, width, k = arguments.d_in, arguments.width, arguments.k
    print(f"{machine.describe()}, {arguments.threads} threads, torch {torch.__version__}")
    print(f"batch {arguments.batch}, d_in {d_in}, width {width}, k {k}, {arguments.rounds} rounds")
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(width, d_in, generator=generator)
    rows /= rows.norm(dim=1, keepdim=True)
    steps: dict[str, Callable[[Tensor], Any]] = {
        "dense PyTorch TopK": Dense(rows, k).step,
        "our TopK": Sparsight(rows, k).step,
    }
    for experts in arguments.experts:
        one = ss.sae.create("switch", d_in, width, k, experts=experts)
        steps[f"Switch, {experts} experts"] = ss.sae.Trainer([one], lr=LR).step
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for turn in range(arguments.rounds + _WARM_UP):
        x = torch.randn(arguments.batch, d_in, generator=generator)
        for name, step in steps.items():
            wall, cpu = time.perf_counter(), time.process_time()
            step(x)
            if turn >= _WARM_UP:
                seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    best = {name: 1000 * min(cpu for _, cpu in times) for name, times in seconds.items()}
    print(f"{'':20s}{'wall ms min / med':>20s}{'CPU ms min / med':>20s}{'of dense':>10s}{'of our TopK':>13s}")
    for name, times in seconds.items():
        wall_ms, cpu_ms = ([1000 * value for value in column] for column in zip(*times, strict=True))
        print(
            f"{name:20s}{min(wall_ms):10.1f} / {statistics.median(wall_ms):7.1f}"
            f"{best[name]:10.1f} / {statistics.median(cpu_ms):7.1f}"
            f"{best[name] / best['dense PyTorch TopK']:10.2f}{best[name] / best['our TopK']:13.2f}"
        )


if __name__ == "__main__":
    main()
