"""Mean and root mean square of activations, summed in one order: shard by shard, chunk by chunk.

Some tokens of a site that stores more of them have the same statistics, to the bit, as a store of these tokens alone.
So an SAE that is trained on them is the same, too.

Shapes: R rows, D width.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np


class Sums(NamedTuple):
    """Sums over the rows of a shard."""

    total: np.ndarray
    """float64 (D,)."""
    square: float
    """Sum of the squares of all entries; not finite if one of them is not."""


class Statistics(NamedTuple):
    """Over all rows of a site."""

    mean: np.ndarray
    """float64 (D,)."""
    rms: float
    """Root mean square of all entries."""


def sums(chunks: Iterable[np.ndarray], width: int) -> Sums:
    """Sums over a shard, from its chunks (..., D) in order."""
    total, square = np.zeros(width), 0.0
    for chunk in chunks:
        wide = chunk.astype(np.float64).reshape(-1, width)
        total += wide.sum(axis=0)
        square += float(np.square(wide, out=wide).sum())
    return Sums(total, square)


def combined(shards: Sequence[Sums], n_rows: int) -> Statistics:
    """Statistics over ``n_rows`` rows in these shards, given in order."""
    total = np.sum([shard.total for shard in shards], axis=0)
    square = np.sum([shard.square for shard in shards])
    return Statistics(total / n_rows, float(np.sqrt(square / (n_rows * len(total)))))
