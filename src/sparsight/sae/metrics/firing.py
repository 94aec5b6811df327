"""What each latent does: how often and how strongly it fires, and for which class.

Shapes: B rows of a window, I images, F latents (d_sae), C classes, H bins of a histogram.
"""

import numpy as np

from sparsight.sae.metrics.sparse_codes import Matrix, by_class

EDGES = 2.0 ** np.arange(-8, 3)
"""Between the bins of a histogram, in units of the activations' standard deviation; the first bin begins at 0."""
DENSE = 0.1
"""A latent that fires on a larger share of the activations is dense."""


class Firing:
    """Sums over activations, token by token.

    Args:
        d_sae: F.
        unit: what histograms count in: the square root of the activations' variance.
    """

    def __init__(self, d_sae: int, unit: float) -> None:
        self.n = 0
        self.edges = EDGES * unit
        self.total, self.largest = np.zeros(d_sae), np.zeros(d_sae)
        self.histogram = np.zeros((d_sae, len(EDGES) + 1), np.int64)

    def update(self, z: Matrix) -> None:
        """Add codes (B, F)."""
        self.n += z.shape[0]
        self.total += z.sum(axis=0, dtype=np.float64)
        np.maximum.at(self.largest, z.indices, z.data)
        bins = self.histogram.shape[1]
        places = z.indices.astype(np.int64) * bins + np.searchsorted(self.edges, z.data)
        self.histogram += np.bincount(places[z.data > 0], minlength=self.histogram.size).reshape(-1, bins)

    @property
    def count(self) -> np.ndarray:
        """Activations on which each latent fires, (F,)."""
        return self.histogram.sum(axis=1)

    @property
    def frequency(self) -> np.ndarray:
        """Their share, (F,)."""
        return self.count / self.n

    @property
    def mean(self) -> np.ndarray:
        """Mean activation where a latent fires, 0 where it never does, (F,)."""
        return self.total / np.maximum(self.count, 1)


class ByClass:
    """Sums over images, class by class; an image counts with the mean of its tokens."""

    def __init__(self, width: int, n_classes: int) -> None:
        self.images = np.zeros(n_classes, np.int64)
        self.total, self.fired = np.zeros((n_classes, width)), np.zeros((n_classes, width), np.int64)
        self.squares = np.zeros(width)

    def update(self, z: Matrix, labels: np.ndarray) -> None:
        """Add codes (I, F) of images and their classes, int (I,)."""
        sums = by_class(labels, len(self.images))
        self.images += np.bincount(labels, minlength=len(self.images))
        self.total += (sums @ z.astype(np.float64)).toarray()
        self.fired += (sums @ (z > 0).astype(np.float64)).toarray().astype(np.int64)
        self.squares += z.astype(np.float64).power(2).sum(axis=0)

    @property
    def means(self) -> np.ndarray:
        """Mean code by class, (C, F); 0 for a class without images."""
        return self.total / np.maximum(self.images, 1)[:, None]

    @property
    def mean(self) -> np.ndarray:
        """Mean code, (F,)."""
        return self.total.sum(axis=0) / self.images.sum()

    @property
    def deviation(self) -> np.ndarray:
        """Standard deviation over the images, (F,)."""
        return np.sqrt(np.maximum(self.squares / self.images.sum() - self.mean**2, 0))


def class_columns(train: ByClass, test: ByClass) -> dict[str, np.ndarray]:
    """The class that a latent is about, chosen on train, and how well it tells that class on test.

    best_class: the class with the largest mean activation on train; -1 for a latent that never fires there.
    class_precision: of the test images on which the latent fires, the share of that class; NaN where it never fires.
    selectivity: (a - b) / (a + b) of its mean activation a on the class's test images and b on all others (Morcos et
    al. 2018, arXiv 1803.06959); NaN where it never fires.
    """
    fires = train.total.sum(axis=0) > 0
    best = np.where(fires, train.means.argmax(axis=0), -1)
    at = (np.maximum(best, 0), np.arange(len(best)))
    of_all, inside = test.fired.sum(axis=0), test.fired[at]
    others = np.maximum(test.images.sum() - test.images[at[0]], 1)
    a, b = test.means[at], (test.total.sum(axis=0) - test.total[at]) / others
    known = fires & (of_all > 0)
    precision, selectivity = np.full(len(best), np.nan), np.full(len(best), np.nan)
    precision[known] = inside[known] / of_all[known]
    selectivity[known] = (a[known] - b[known]) / (a[known] + b[known])
    return {"best_class": best, "class_precision": precision, "selectivity": selectivity}
