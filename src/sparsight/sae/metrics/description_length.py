"""Description length: the bits per activation of its quantised codes.

After Ayonrinde et al. 2024 (arXiv 2410.11179). Codes are rounded to multiples of one step, the same for all features.
The bits are the sum over features of the entropy of the rounded value, zero included. So each feature has a code book
of its own.

Shapes: B rows of a window, F features, D width.
"""

import numpy as np

from sparsight.sae.metrics.baselines import Method
from sparsight.sae.metrics.sparse_codes import Matrix

RISE = 0.05
"""Largest relative increase of the squared error by quantisation, on the rows on which the step is chosen."""
_HALVINGS = 16
_RANGE = 24.0  # the finest step is 2**-24 of the largest code


def quantised(z: Matrix, step: float) -> Matrix:
    """Codes rounded to multiples of ``step``, as integers. Entries that become zero are removed."""
    out = z.copy()
    out.data = np.rint(z.data.astype(np.float64) / step)
    out.eliminate_zeros()
    return out


def squared_error(method: Method, x_BD: np.ndarray, z: Matrix) -> float:
    """Sum of squared errors of the reconstructions from codes."""
    return float(np.square(x_BD - method.decode(z), dtype=np.float64).sum())


def restored(symbols: Matrix, step: float) -> Matrix:
    """Codes from quantised ones."""
    out = symbols.astype(np.float32)
    out.data = (symbols.data * step).astype(np.float32)
    return out


def step_for(method: Method, x_BD: np.ndarray, z: Matrix, target: float) -> float:
    """The largest step, to 0.03 %, whose squared error is at most ``target``; 1 if no code is active.

    It is found by bisection, because the error grows with the step, apart from ripples. If even the finest step misses
    the target, the finest step is returned, and the table shows its error.
    """
    largest = float(np.abs(z.data).max(initial=0))
    if largest == 0:
        return 1.0
    fine, coarse = -_RANGE, 2.0  # with a step of four times the largest code, every code becomes zero
    for _ in range(_HALVINGS):
        middle = (fine + coarse) / 2
        step = largest * 2**middle
        if squared_error(method, x_BD, restored(quantised(z, step), step)) <= target:
            fine = middle
        else:
            coarse = middle
    return largest * 2**fine


class Bits:
    """Counts of the rounded values of each feature."""

    def __init__(self, width: int) -> None:
        self.n, self.width = 0, width
        self._features, self._symbols = np.empty(0, np.int64), np.empty(0, np.int64)
        self._counts = np.empty(0, np.int64)

    def update(self, symbols: Matrix) -> None:
        """Add quantised codes (B, F)."""
        self.n += symbols.shape[0]
        features = np.concatenate([self._features, symbols.indices.astype(np.int64)])
        values = np.concatenate([self._symbols, symbols.data.astype(np.int64)])
        counts = np.concatenate([self._counts, np.ones(len(symbols.data), np.int64)])
        order = np.lexsort((values, features))
        features, values, counts = features[order], values[order], counts[order]
        new = np.ones(len(order), bool)
        new[1:] = (np.diff(features) != 0) | (np.diff(values) != 0)
        first = np.flatnonzero(new)
        self._features, self._symbols = features[first], values[first]
        self._counts = np.add.reduceat(counts, first) if len(first) else counts

    def per_activation(self) -> float:
        """Sum over features of the entropy of their rounded value, in bits."""
        silent = self.n - np.bincount(self._features, weights=self._counts, minlength=self.width)
        return float(_surprise(self._counts, self.n).sum() + _surprise(silent, self.n).sum())

    def of_the_choice(self) -> float:
        """Entropy of which feature is active, in bits, for codes with exactly one active feature of one value.

        :meth:`per_activation` would add the entropy of the silent features, which the choice already determines.
        """
        return float(_surprise(self._counts, self.n).sum())


def _surprise(counts: np.ndarray, n: int) -> np.ndarray:
    p = counts / max(n, 1)
    return -p * np.log2(p, out=np.zeros_like(p), where=p > 0)
