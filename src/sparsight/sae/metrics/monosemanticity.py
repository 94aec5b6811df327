"""Whether a feature fires on images that look alike (Pach et al. 2025, arXiv 2504.02821, section 3.2).

With activations a_i of a feature scaled to [0, 1] over the images and embeddings u_i of unit length,

    MS = sum over pairs i < j of a_i a_j <u_i, u_j> / sum over pairs i < j of a_i a_j.

Both sums have a closed form: with s = sum_i a_i u_i and q = sum_i a_i^2, MS = (|s|^2 - q) / ((sum_i a_i)^2 - q). So one
pass over the images is enough, in O(I F E) at most. The scaling is only known after the pass and is applied then:
dividing by the range changes nothing, and subtracting the least activation is linear in the sums.

Shapes: I images of a window, F features, E width of the embedding.
"""

import numpy as np
from scipy import sparse

from sparsight.sae.metrics.sparse_codes import Matrix, times

_LEAST = 1e-10  # smallest sum over pairs, relative to the square of the sum; rounding leaves about 1e-13


class Monosemanticity:
    """Sums over the images of a split."""

    def __init__(self, width: int, d_embedding: int) -> None:
        self.n = 0
        self.total, self.squares = np.zeros(width), np.zeros(width)
        self.low, self.high = np.full(width, np.inf), np.full(width, -np.inf)
        self.weighted, self.embeddings = np.zeros((width, d_embedding)), np.zeros(d_embedding)

    def update(self, z: Matrix, unit_IE: np.ndarray) -> None:
        """Add codes (I, F) and embeddings of unit length, float64 (I, E)."""
        z = z.astype(np.float64)
        self.n += z.shape[0]
        self.total += z.sum(axis=0)
        self.squares += z.power(2).sum(axis=0)
        self.low = np.minimum(self.low, z.min(axis=0).toarray())
        self.high = np.maximum(self.high, z.max(axis=0).toarray())
        self.weighted += times(sparse.csr_array(z.T), unit_IE)
        self.embeddings += unit_IE.sum(axis=0)

    def scores(self) -> np.ndarray:
        """The score of every feature, (F,); NaN if fewer than two images exceed the feature's least activation."""
        total = self.total - self.n * self.low
        squares = self.squares - 2 * self.low * self.total + self.n * self.low**2
        weighted = self.weighted - np.outer(self.low, self.embeddings)
        pairs = total**2 - squares
        defined = (self.high > self.low) & (pairs > _LEAST * (self.total**2 + (self.n * self.low) ** 2))
        scores = np.full(len(total), np.nan)
        np.divide(np.square(weighted).sum(axis=1) - squares, pairs, out=scores, where=defined)
        return scores

    def of_all_images(self) -> float | None:
        """Mean cosine of all pairs of images: the score of a feature that is equally active on every image."""
        pairs = self.n * (self.n - 1)
        return float((np.square(self.embeddings).sum() - self.n) / pairs) if pairs else None


def unit_rows(x_IE: np.ndarray) -> np.ndarray:
    """Rows scaled to unit length, float64. Zero rows stay zero."""
    x = x_IE.astype(np.float64)
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
