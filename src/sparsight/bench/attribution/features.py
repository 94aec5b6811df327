"""The features of a method that are active on images, and what each adds to the activation there.

Shapes: B images, T edited tokens of an image, R = B T rows, D width (d_in), F features, E entries (a feature on a row),
P pairs (a feature on an image, over all of its tokens), S steps.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import sparse
from torch import Tensor

from sparsight.sae.metrics.baselines import Method
from sparsight.sae.metrics.sparse_codes import Matrix, times

_NUMBERS = 2**24  # at most so many gathered at a time


@dataclass(frozen=True)
class Active:
    """Some features of a method on some images. Pairs are in the order of the images, then of the features."""

    method: Method
    z: Matrix
    """Codes, CSR (R, F), with nothing but the entries of the pairs."""
    n_images: int
    """B."""

    @cached_property
    def _rows_E(self) -> np.ndarray:
        return np.repeat(np.arange(self.z.shape[0]), np.diff(self.z.indptr))

    @cached_property
    def _pairs(self) -> tuple[np.ndarray, np.ndarray]:
        """Image and feature of every pair as one number (P,), and the pair of every entry (E,)."""
        tokens = self.z.shape[0] // max(1, self.n_images)
        keys, pair_E = np.unique(self._rows_E // tokens * self.z.shape[1] + self.z.indices, return_inverse=True)
        return keys, pair_E

    @property
    def images(self) -> np.ndarray:
        """Number of each pair's image, from 0, int (P,)."""
        return np.asarray(self._pairs[0] // self.z.shape[1])

    @property
    def features(self) -> np.ndarray:
        """Feature of each pair, int (P,)."""
        return np.asarray(self._pairs[0] % self.z.shape[1])

    @property
    def counts(self) -> np.ndarray:
        """Pairs of each image, int (B,)."""
        return np.bincount(self.images, minlength=self.n_images)

    @property
    def sizes(self) -> np.ndarray:
        """Length of what each pair adds to the activation, summed over the tokens, float64 (P,)."""
        lengths_F = np.linalg.norm(self.method.rows.astype(np.float64), axis=1)
        return self._summed(np.abs(self.z.data) * lengths_F[self.z.indices])

    def effects(self, gradient_RD: np.ndarray) -> np.ndarray:
        """Gradient times activation, float64 (P,): z_i <gradient, row i>, summed over the tokens."""
        found_E = np.empty(self.z.nnz)
        for start in range(0, self.z.nnz, step := max(1, _NUMBERS // gradient_RD.shape[1])):
            some = slice(start, start + step)
            products = gradient_RD[self._rows_E[some]].astype(np.float64) * self.method.rows[self.z.indices[some]]
            found_E[some] = self.z.data[some] * products.sum(axis=1)
        return self._summed(found_E)

    def ranks(self, scores_P: np.ndarray) -> np.ndarray:
        """Rank of each pair in its image, from 0, largest score first, of equal ones the first; int (P,)."""
        order = np.lexsort((-scores_P, self.images))
        ranks = np.empty(len(order), np.int64)
        ranks[order] = np.arange(len(order)) - np.repeat(np.cumsum(self.counts) - self.counts, self.counts)
        return ranks

    def sums(self, steps_P: np.ndarray, n_steps: int) -> np.ndarray:
        """What the pairs of each step add to the activation, float32 (R, S, D); pairs of step -1 are left out."""
        step_E = steps_P[self._pairs[1]]
        kept = step_E >= 0
        places = self._rows_E[kept] * n_steps + step_E[kept]
        shape = self.z.shape[0] * n_steps, self.z.shape[1]
        z = sparse.csr_array((self.z.data[kept], (places, self.z.indices[kept])), shape=shape)
        return times(z, self.method.rows).reshape(self.z.shape[0], n_steps, -1)

    def largest(self, most_B: np.ndarray) -> "Active":
        """The pairs of the largest size: at most so many of each image."""
        kept_E = (self.ranks(self.sizes) < most_B[self.images])[self._pairs[1]]
        entries = self.z.data[kept_E], (self._rows_E[kept_E], self.z.indices[kept_E])
        return Active(self.method, sparse.csr_array(entries, shape=self.z.shape), self.n_images)

    def _summed(self, values_E: np.ndarray) -> np.ndarray:
        return np.bincount(self._pairs[1], weights=values_E, minlength=len(self._pairs[0]))


def active(method: Method, x_RD: Tensor, n_images: int) -> Active:
    """All features of a method that are active on rows of ``n_images`` images."""
    z = method.encode(x_RD)
    z.eliminate_zeros()
    return Active(method, z, n_images)


def steps_of(ranks_P: np.ndarray, counts_P: np.ndarray, n_steps: int) -> np.ndarray:
    """The step (from 0) at which each pair is removed, int (P,).

    After step s (from 1) the first round(s n / S) pairs of an image are removed, halves rounded up.

    Args:
        ranks_P: rank of each pair in its image.
        counts_P: number n of pairs that are removed of its image in all.
        n_steps: S.
    """
    removed_PS = np.floor(np.arange(1, n_steps + 1) * counts_P[:, None] / n_steps + 0.5)
    return np.asarray((ranks_P[:, None] >= removed_PS).sum(axis=1))
