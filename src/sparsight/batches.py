"""Which rows a training step sees: a seeded permutation per epoch, cut into batches, the tail kept."""

import math
from collections.abc import Iterator

import numpy as np

from sparsight.seeds import derive_seed


def n_batches(n_rows: int, batch_size: int) -> int:
    """Batches in one pass over ``n_rows`` rows."""
    return math.ceil(n_rows / batch_size)


def shuffled(n_rows: int, batch_size: int, seed: int, epoch: int, skip: int = 0) -> Iterator[np.ndarray]:
    """Row numbers of each batch of one epoch, int64 (batch_size,), the last one possibly shorter.

    The order depends on ``seed`` and ``epoch`` alone, so ``skip`` batches can be left out to continue
    exactly where an interrupted epoch stood.
    """
    order = np.random.default_rng(derive_seed(seed, "order", epoch)).permutation(n_rows)
    for start in range(skip * batch_size, n_rows, batch_size):
        yield order[start : start + batch_size]


def in_order(n_rows: int, batch_size: int) -> Iterator[slice]:
    """Slices that cover ``range(n_rows)`` in order, the last one possibly shorter."""
    for start in range(0, n_rows, batch_size):
        yield slice(start, min(start + batch_size, n_rows))
