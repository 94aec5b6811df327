"""Pairs of images that differ in both of two attributes.

Shapes: A = 2 attributes, n images, P pairs.
"""

import math
from collections.abc import Sequence

import numpy as np

from sparsight.common.errors import SparsightError


def draw_pairs(values_An: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Pairs of images with different values of both attributes, int (P, 2): base and donor.

    Bases come in random order, each once before any comes again; each has a random donor. Bases without a possible
    donor are left out, so that P may be less than ``count``.

    Args:
        values_An: number of each image's value; images with a -1 are in no pair.
        count: number of bases.
        seed: seed of the draw.

    Raises:
        SparsightError: no two images differ in both attributes.
    """
    generator = np.random.default_rng(seed)
    known = np.flatnonzero((values_An >= 0).all(axis=0))
    rounds = math.ceil(count / max(1, len(known)))
    bases = np.concatenate([known[:0], *(generator.permutation(known) for _ in range(rounds))])[:count]
    donors = np.full(len(bases), -1)
    for combination in np.unique(values_An[:, bases], axis=1).T:
        possible = known[(values_An[:, known] != combination[:, None]).all(axis=0)]
        alike = (values_An[:, bases] == combination[:, None]).all(axis=0)
        if len(possible):
            donors[alike] = generator.choice(possible, int(alike.sum()))
    pairs = np.stack([bases, donors], axis=1)[donors >= 0]
    if not len(pairs):
        raise SparsightError(
            "disentangle: no two images differ in both attributes (of val and test, among those whose attributes are "
            "read rightly from the embedding); choose other attributes or more images"
        )
    return pairs


def usable(values_An: np.ndarray, right: Sequence[np.ndarray]) -> np.ndarray:
    """The values, with -1 for images of which not all attributes are read rightly."""
    return np.where(np.logical_and.reduce(right), values_An, -1)
