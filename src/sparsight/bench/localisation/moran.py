"""Moran's I of the maps of features: whether patches that lie together have similar values.

Shapes: I images, P patches of an image, N = I P patches, F features.
"""

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from sparsight.common.slices import row_slices
from sparsight.sae.metrics.sparse_codes import Matrix

_LEAST, _MOST = 5, 0.9
"""Number and share of active patches between which a map is valid, as in visaebench."""
_ENTRIES = 2**21
"""Largest number of (image, feature) pairs at a time."""
_DIRECTIONS = ((0, 1), (1, 0), (1, 1), (1, -1))
"""To half of a patch's eight neighbours."""


@dataclass(frozen=True)
class Moran:
    """Sums over the valid maps of every feature, (F,)."""

    total: np.ndarray
    """Sum of Moran's I."""
    maps: np.ndarray
    """Number of valid maps."""

    @property
    def mean(self) -> np.ndarray:
        """Mean over the valid maps; NaN without one."""
        return np.where(self.maps > 0, self.total / np.maximum(self.maps, 1), np.nan)


def moran(codes_NF: Matrix, grid: tuple[int, int]) -> Moran:
    """Moran's I, P / S x'Wx / x'x (Moran 1950), of every image's map of every feature.

    x is the map minus its mean over the patches. W is 1 between a patch and its up to eight neighbours (queen), and S
    the sum of W. Maps with at least 5 active patches and at most 90 % count.

    Args:
        codes_NF: values of the features, none negative, sparse; the patches of each image follow each other.
        grid: rows and columns of patches.
    """
    patches, features = grid[0] * grid[1], codes_NF.shape[1]
    codes = codes_NF.tocsr()
    total, maps = np.zeros(features), np.zeros(features, np.int64)
    for window in row_slices(codes.shape[0] // patches, max(1, _ENTRIES // features)):
        value, valid = _of_images(codes[window.start * patches : window.stop * patches], grid)
        total += np.where(valid, value, 0).sum(axis=0)
        maps += valid.sum(axis=0)
    return Moran(total, maps)


def _of_images(z: Matrix, grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Moran's I of each map, and whether it is valid, (I, F)."""
    patches = grid[0] * grid[1]
    images = z.shape[0] // patches
    z = z.astype(np.float64)
    degree = np.zeros(patches)
    cross = np.zeros((images, z.shape[1]))  # half of z'Wz
    starts = np.arange(images)[:, None] * patches
    for pair in (_pairs(grid, *step) for step in _DIRECTIONS):
        degree += np.bincount(np.concatenate(pair), minlength=patches)
        one, other = (z[(starts + place).ravel()] for place in pair)
        cross += _sum(one.multiply(other), np.ones(len(pair[0])), images)
    ones = np.ones(patches)
    active = _sum(z.astype(bool).astype(np.float64), ones, images)
    mean, squares = _sum(z, ones, images) / patches, _sum(z.multiply(z), ones, images)
    weights = degree.sum()
    above = 2 * cross - 2 * mean * _sum(z, degree, images) + mean**2 * weights
    below = squares - patches * mean**2
    valid = (active >= _LEAST) & (active <= _MOST * patches) & (below > 1e-12 * squares)
    return patches / max(weights, 1) * above / np.where(valid, below, 1), valid


def _pairs(grid: tuple[int, int], down: int, right: int) -> tuple[np.ndarray, np.ndarray]:
    """The patches that have a neighbour in a direction, and those neighbours."""
    place = np.arange(grid[0] * grid[1]).reshape(grid)
    rows = slice(0, grid[0] - down), slice(down, grid[0])
    left, moved = slice(max(0, -right), grid[1] - max(0, right)), slice(max(0, right), grid[1] + min(0, right))
    return place[rows[0], left].ravel(), place[rows[1], moved].ravel()


def _sum(z: Matrix, weights: np.ndarray, images: int) -> np.ndarray:
    """Weighted sum over the rows of each image, (I, F)."""
    n = len(weights)
    by_image = (np.tile(weights, images), np.arange(images * n), np.arange(images + 1) * n)
    return np.asarray((sparse.csr_array(by_image, shape=(images, images * n)) @ z.tocsr()).toarray())
