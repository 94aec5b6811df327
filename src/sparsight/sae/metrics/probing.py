"""Sparse probing: how much of the labels a few features tell (Gurnee et al. 2023, arXiv 2305.01610; SAEBench).

For each class the n features whose mean on the class differs most from their mean on all training images, in standard
deviations. Their ridge regression on membership of the class is its score, and the class of the largest score is the
answer. Features and weights come from the train split alone. An image counts with the mean of its tokens.

Shapes: I images, D width (d_in), F features, C classes, P features of a probe.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from scipy import sparse

from sparsight.sae.metrics.latents import ByClass
from sparsight.sae.metrics.sparse import Matrix, by_class
from sparsight.statistics import wilson

COUNTS = (1, 2, 5, 20)
"""Features a class."""
RIDGE = 1e-3
"""Weight of the squared weights of standardised features, relative to the number of images."""


@dataclasses.dataclass
class Probe:
    """Scores (I, C) = features (I, F) W + b, and on which test images the largest one is right."""

    method: str
    features: int
    W: Any
    """(F, C), sparse or dense as the features are."""
    b: np.ndarray
    """(C,)."""
    hits: list[np.ndarray] = dataclasses.field(default_factory=list)

    def update(self, z_IF: Any, labels: np.ndarray) -> None:
        """Add test images."""
        scores: Any = z_IF @ self.W
        dense = scores.toarray() if sparse.issparse(scores) else np.asarray(scores)
        self.hits.append((dense + self.b).argmax(axis=1) == labels)

    def row(self) -> dict[str, int | float | str]:
        """features, method, n, accuracy, lo, hi: a row of the table."""
        return {"features": self.features, "method": self.method, **wilson(np.concatenate(self.hits))}


class DenseMoments:
    """Sums over training images of dense features (I, D), enough for every probe on them and on their projections."""

    def __init__(self, width: int, n_classes: int) -> None:
        self.images = np.zeros(n_classes, np.int64)
        self.total, self.products = np.zeros((n_classes, width)), np.zeros((width, width))

    def update(self, x_ID: np.ndarray, labels: np.ndarray) -> None:
        """Add images, float64 (I, D), and their classes, int (I,)."""
        self.images += np.bincount(labels, minlength=len(self.images))
        self.total += by_class(labels, len(self.images)) @ x_ID
        self.products += x_ID.T @ x_ID

    def probes(self, method: str, basis_DP: np.ndarray, counts: tuple[int, ...]) -> Iterator[Probe]:
        """Probes on the features x basis, as probes on x.

        Args:
            method: name of the features.
            basis_DP: columns of the features.
            counts: features a class; numbers above P are left out.
        """
        n = self.images.sum()
        mean = basis_DP.T @ self.total.sum(axis=0) / n
        means = self.total @ basis_DP / np.maximum(self.images, 1)[:, None]
        covariance = basis_DP.T @ self.products @ basis_DP / n - np.outer(mean, mean)
        chosen = select(means, mean, np.sqrt(np.maximum(covariance.diagonal(), 0)), self.images, max(counts))
        for count in counts:
            if count > basis_DP.shape[1]:
                continue
            W, b = np.zeros((len(basis_DP), len(means))), np.zeros(len(means))
            for c, at in enumerate(chosen[:, :count]):
                w, b[c] = ridge(covariance[np.ix_(at, at)], mean[at], means[c, at], self.images[c] / n)
                W[:, c] = basis_DP[:, at] @ w
            yield Probe(method, count, W, b)


def sparse_probes(
    method: str, train: ByClass, chosen: np.ndarray, columns: Matrix, union: np.ndarray
) -> Iterator[Probe]:
    """Probes on sparse codes.

    Args:
        method: name of the features.
        train: sums over the training images.
        chosen: int (C, P), the features of each class, best first.
        columns: codes of all training images at the features ``union``, CSC (I, U).
        union: every chosen feature, rising.
    """
    n, width = train.images.sum(), train.total.shape[1]
    for count in COUNTS:
        if count > width:
            continue
        W, b = sparse.lil_array((width, len(chosen))), np.zeros(len(chosen))
        for c, at in enumerate(chosen[:, :count]):
            own = columns[:, np.searchsorted(union, at)]
            mean = train.mean[at]
            covariance = (own.T @ own).toarray() / n - np.outer(mean, mean)
            w, b[c] = ridge(covariance, mean, train.means[c, at], train.images[c] / n)
            W[at, [c]] = w
        yield Probe(method, count, W.tocsc(), b)


def select(means: np.ndarray, mean: np.ndarray, deviation: np.ndarray, images: np.ndarray, count: int) -> np.ndarray:
    """The features of each class, best first, int (C, P): by |mean of the class - mean| in standard deviations.

    Args:
        means: by class, (C, F).
        mean: of all, (F,).
        deviation: standard deviation over all images, (F,); a feature with none is chosen last.
        images: of each class, (C,).
        count: P, if there are as many features.
    """
    varies = deviation > 1e-6 * (np.abs(mean) + deviation.max(initial=0))
    score = np.abs(means - mean) / np.where(varies, deviation, np.inf) * (images > 0)[:, None]
    return np.argsort(-score, axis=1, kind="stable")[:, :count]


def ridge(covariance: np.ndarray, mean: np.ndarray, class_mean: np.ndarray, share: float) -> tuple[np.ndarray, float]:
    """Weights (P,) and bias of the ridge regression of membership of a class on features, standardised.

    Args:
        covariance: of the features, (P, P).
        mean: of the features, (P,).
        class_mean: their mean on the class, (P,).
        share: of the images that are of the class.
    """
    deviation = np.sqrt(np.maximum(covariance.diagonal(), 0))
    varies = deviation > 1e-6 * (np.abs(mean) + deviation.max(initial=0))
    scale = np.where(varies, 1 / np.where(varies, deviation, 1), 0)
    system = covariance * np.outer(scale, scale) + RIDGE * np.eye(len(mean))
    weights = scale * np.linalg.solve(system, scale * share * (class_mean - mean))
    return weights, float(share - weights @ mean)
