"""Accuracy of k nearest neighbours on raw pixels: what a trained backbone has to beat.

python benchmarks/pixels_knn.py results/cifar10-vit/images/manifest.parquet [--k 10] [--size 32] [--threads 2]
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from sparsight.common.intervals import wilson
from sparsight.config import Compute
from sparsight.images.manifest import Manifest
from sparsight.images.preprocess import Preprocess
from sparsight.images.split import Split
from sparsight.pipeline.stage import prepare_torch


def main() -> None:
    """Neighbours in train + val, votes of equal weight, ties to the smaller label; accuracy on test."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    prepare_torch(Compute(threads=arguments.threads))
    preprocess = Preprocess((arguments.size, arguments.size), 3, (0.5,) * 3, (0.5,) * 3)
    manifest = Manifest(arguments.manifest)

    def flat(split: Split) -> torch.Tensor:
        pixels = split.batch(slice(None), preprocess, arguments.threads)
        return torch.from_numpy(pixels.reshape(len(split), -1)).float() / 255

    known = [manifest.split(part) for part in ("train", "val")]
    bank_ND, labels_N = torch.cat([flat(split) for split in known]), np.concatenate([split.labels for split in known])
    test = manifest.split("test")
    squares_N, right = bank_ND.square().sum(dim=1), []
    for x_BD, labels_B in zip(flat(test).split(500), np.split(test.labels, range(500, len(test), 500)), strict=True):
        nearest_BK = (squares_N - 2 * x_BD @ bank_ND.T).topk(arguments.k, largest=False).indices.numpy()
        votes = np.stack([np.bincount(row, minlength=len(manifest.classes)) for row in labels_N[nearest_BK]])
        right.append(votes.argmax(axis=1) == labels_B)
    found = wilson(np.concatenate(right))
    print(f"k-NN on pixels, k {arguments.k}, {len(bank_ND)} neighbours: {found}")


if __name__ == "__main__":
    main()
