"""How often and how strongly each latent fires, and for which class.

Shapes: B rows of a window, I images, F latents (d_sae), C classes, H bins of a histogram.
"""

from typing import Any

import numpy as np

from sparsight.sae.metrics.sparse_codes import Matrix, by_class

EDGES = 2.0 ** np.arange(-8, 3)
"""Edges between histogram bins, in units of the activations' standard deviation. The first bin begins at 0."""
DENSE = 0.1
"""A latent is dense if it fires on a larger share of the activations."""


class Firing:
    """Sums over activations; every token counts as one.

    Args:
        d_sae: F.
        unit: unit of the histograms: the square root of the activations' variance.
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
        """Number of activations on which each latent fires, (F,)."""
        return self.histogram.sum(axis=1)

    @property
    def frequency(self) -> np.ndarray:
        """Share of activations on which each latent fires, (F,)."""
        return self.count / self.n

    @property
    def mean(self) -> np.ndarray:
        """Mean of each latent over the activations on which it fires, (F,); 0 if it never fires."""
        return self.total / np.maximum(self.count, 1)


def labelled(features: Any, labels: np.ndarray) -> tuple[Any, np.ndarray]:
    """The rows of images that have a label, and their labels."""
    known = labels >= 0
    return (features, labels) if known.all() else (features[known], labels[known])


class ByClass:
    """Sums over labelled images, by class. The code of an image is the mean over its tokens."""

    def __init__(self, width: int, n_classes: int) -> None:
        self.images = np.zeros(n_classes, np.int64)
        self.total, self.fired = np.zeros((n_classes, width)), np.zeros((n_classes, width), np.int64)
        self.squares = np.zeros(width)
        self.fires = np.zeros(width, bool)
        """Whether each latent fires on any image, labelled or not, (F,)."""

    def update(self, z: Matrix, labels: np.ndarray) -> None:
        """Add codes (I, F) of images and their classes, int (I,); -1 for an image without a label."""
        self.fires[z.indices[z.data > 0]] = True
        z, labels = labelled(z, labels)
        if not len(labels):
            return
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
    """The class of each latent, chosen on train, and how well the latent identifies that class on test.

    best_class: the class with the largest mean activation on train; -1 if the latent never fires on train.
    class_precision: the share of that class among the test images on which the latent fires.
    selectivity: (a - b) / (a + b), with mean activation a on the class's test images and b on all others (Morcos et
    al. 2018, arXiv 1803.06959).

    The last two are NaN if the latent never fires on train or never on test. Without classes all three are None.
    """
    if not len(train.images):
        nothing = np.full(len(train.fires), None)
        return {"best_class": nothing, "class_precision": nothing, "selectivity": nothing}
    fires = train.total.sum(axis=0) > 0
    best = np.where(fires, train.means.argmax(axis=0), -1)
    index = (np.maximum(best, 0), np.arange(len(best)))
    fired_all, fired_inside = test.fired.sum(axis=0), test.fired[index]
    n_others = np.maximum(test.images.sum() - test.images[index[0]], 1)
    a, b = test.means[index], (test.total.sum(axis=0) - test.total[index]) / n_others
    defined = fires & (fired_all > 0)
    precision, selectivity = np.full(len(best), np.nan), np.full(len(best), np.nan)
    precision[defined] = fired_inside[defined] / fired_all[defined]
    selectivity[defined] = (a[defined] - b[defined]) / (a[defined] + b[defined])
    return {"best_class": best, "class_precision": precision, "selectivity": selectivity}
