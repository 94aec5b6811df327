"""Cores that share every operation of a small ViT's training, against cores that each take parts of the batch.

    python benchmarks/batch_parts.py [--batch 128] [--rounds 30]

The ViT is the default run's. The contestants take turns step by step; printed are minimum and median milliseconds of a
forward and a backward pass.
"""

import argparse
import os
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor
from turns import take_turns

from sparsight import backbones
from sparsight.common import machine
from sparsight.config import Compute
from sparsight.config.compute import n_microbatches
from sparsight.pipeline.stage import prepare_torch
from sparsight.training.microbatches import MicroBatches


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    prepare_torch(Compute(threads=1))
    vit = yaml.safe_load(Path("params.yaml").read_text())["backbones"]["vit"]
    model = backbones.load(vit["model"], None, 10, **vit["architecture"]).train()
    images, labels = torch.randn(arguments.batch, 1, 28, 28), torch.arange(arguments.batch) % 10

    def loss(logits: Tensor) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(logits, labels)}

    def shared(threads: int) -> None:
        torch.set_num_threads(threads)
        model.zero_grad()
        loss(model(images))["loss"].backward()
        torch.set_num_threads(1)

    def parted(parts: MicroBatches) -> None:
        parts.backward(model, images, loss, model.parameters())

    counts = [n for n in (1, 2, 4, 8) if n <= (os.cpu_count() or 1)]
    contestants: dict[str, Callable[[], None]] = {}
    for n in counts:
        contestants[f"whole batch, {n} threads an operation"] = partial(shared, n)
    for n in counts:
        contestants[f"{n_microbatches(arguments.batch)} parts, {n} at a time"] = partial(parted, MicroBatches(n))
    seconds = take_turns(contestants, arguments.rounds)
    print(f"{machine.describe()}, torch {torch.__version__}; batch {arguments.batch}, milliseconds\n")
    print("| | minimum | median |\n|---|---|---|")
    for name, times in seconds.items():
        print(f"| {name} | {1000 * min(times):.0f} | {1000 * statistics.median(times):.0f} |")


if __name__ == "__main__":
    main()
