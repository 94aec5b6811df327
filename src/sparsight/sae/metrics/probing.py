"""Sparse probing: how well a few features predict the labels (Gurnee et al. 2023, arXiv 2305.01610; SAEBench).

Each class has the n features whose mean on the class differs most from their mean on all training images, in standard
deviations. A ridge regression from these features to membership of the class gives the class's score. The predicted
class is the one with the largest score. Features and weights come from the train split alone. The features of an image
are means over its tokens.

Shapes: I images, D width (d_in), F features, C classes, P features of a probe.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from scipy import sparse

from sparsight.common.intervals import wilson
from sparsight.sae.metrics.firing import ByClass, labelled
from sparsight.sae.metrics.sparse_codes import Matrix, by_class

COUNTS = (1, 2, 5, 20)
"""Numbers of features per class."""
RIDGE = 1e-3
"""Penalty on the squared weights of standardised features, relative to the number of images."""


@dataclasses.dataclass
class SparseProbe:
    """A probe with scores (I, C) = features (I, F) W + b, and its hits on test images."""

    method: str
    features: int
    W: Any
    """(F, C), sparse or dense like the features."""
    b: np.ndarray
    """(C,)."""
    hits: list[np.ndarray] = dataclasses.field(default_factory=list)

    def update(self, z_IF: Any, labels: np.ndarray) -> None:
        """Add test images; those without a label (-1) are left out."""
        z_IF, labels = labelled(z_IF, labels)
        if not len(labels):
            return
        scores: Any = z_IF @ self.W
        dense = scores.toarray() if sparse.issparse(scores) else np.asarray(scores)
        self.hits.append((dense + self.b).argmax(axis=1) == labels)

    def row(self) -> dict[str, int | float | str]:
        """features, method, n, accuracy, lo, hi: a row of the table."""
        return {"features": self.features, "method": self.method, **wilson(np.concatenate(self.hits))}


class DenseMoments:
    """Sums over training images of dense features (I, D), enough to fit any probe on them or on their projections."""

    def __init__(self, width: int, n_classes: int) -> None:
        self.images = np.zeros(n_classes, np.int64)
        self.total, self.products = np.zeros((n_classes, width)), np.zeros((width, width))

    def update(self, x_ID: np.ndarray, labels: np.ndarray) -> None:
        """Add images, float64 (I, D), and their classes, int (I,); those without a label (-1) are left out."""
        x_ID, labels = labelled(x_ID, labels)
        if not len(labels):
            return
        self.images += np.bincount(labels, minlength=len(self.images))
        self.total += by_class(labels, len(self.images)) @ x_ID
        x = torch.from_numpy(x_ID)
        self.products += (x.T @ x).numpy()

    def probes(self, method: str, basis_DP: np.ndarray, counts: tuple[int, ...]) -> Iterator[SparseProbe]:
        """Probes on the features x basis, written as probes on x.

        Args:
            method: name of the features.
            basis_DP: one column per feature.
            counts: numbers of features per class; numbers above P are left out.
        """
        n = self.images.sum()
        mean = basis_DP.T @ self.total.sum(axis=0) / n
        means = self.total @ basis_DP / np.maximum(self.images, 1)[:, None]
        covariance = basis_DP.T @ self.products @ basis_DP / n - np.outer(mean, mean)
        chosen = select(means, mean, np.sqrt(np.maximum(covariance.diagonal(), 0)), max(counts))
        shares = self.images / n
        for count in counts:
            if count > basis_DP.shape[1]:
                continue
            selected = chosen[:, :count]
            selected_covariance = covariance[selected[:, :, None], selected[:, None, :]]
            w, b = ridge(selected_covariance, mean[selected], np.take_along_axis(means, selected, axis=1), shares)
            yield SparseProbe(
                method,
                count,
                np.stack(
                    [basis_DP[:, columns] @ weights for columns, weights in zip(selected, w, strict=True)], axis=1
                ),
                b,
            )

    def probe(self, method: str) -> SparseProbe:
        """The probe on all of x."""
        n = self.images.sum()
        mean = self.total.sum(axis=0) / n
        means = self.total / np.maximum(self.images, 1)[:, None]
        w, b = ridge(self.products / n - np.outer(mean, mean), mean, means, self.images / n)
        return SparseProbe(method, len(mean), w.T, b)


def sparse_probes(
    method: str, train: ByClass, chosen: np.ndarray, columns: Matrix, union: np.ndarray
) -> Iterator[SparseProbe]:
    """Probes on sparse codes.

    Args:
        method: name of the features.
        train: sums over the training images.
        chosen: int (C, P), the features of each class, best first.
        columns: codes of all labelled training images at the features ``union``, CSC (I, U).
        union: every chosen feature, in rising order.
    """
    n, width = train.images.sum(), train.total.shape[1]
    for count in COUNTS:
        if count > width:
            continue
        selected = chosen[:, :count]
        mean = train.mean[selected]
        products = []
        for features in selected:
            block = columns[:, np.searchsorted(union, features)]
            products.append((block.T @ block).toarray())
        covariance = np.stack(products) / n - mean[:, :, None] * mean[:, None, :]
        w, b = ridge(covariance, mean, np.take_along_axis(train.means, selected, axis=1), train.images / n)
        starts = np.arange(0, selected.size + 1, count)
        yield SparseProbe(
            method, count, sparse.csc_array((w.ravel(), selected.ravel(), starts), shape=(width, len(selected))), b
        )


def select(means: np.ndarray, mean: np.ndarray, deviation: np.ndarray, count: int) -> np.ndarray:
    """The features of each class, best first, int (C, P): by |mean of the class - mean| in standard deviations.

    Args:
        means: by class, (C, F).
        mean: of all, (F,).
        deviation: standard deviation over all images, (F,); constant features are chosen last.
        count: P; with fewer features, all of them are chosen.
    """
    varies = deviation > _floor(mean, deviation)
    score = np.abs(means - mean) / np.where(varies, deviation, np.inf)
    return np.argsort(-score, axis=1, kind="stable")[:, :count]


def ridge(
    covariance: np.ndarray, mean: np.ndarray, class_means: np.ndarray, shares: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Weights and biases of ridge regressions from standardised features to membership of each class.

    Args:
        covariance: covariance of the features, (C, P, P), or (P, P) if all classes use the same features.
        mean: mean of the features, (C, P) or (P,).
        class_means: mean of the features on the class, (C, P).
        shares: share of the images that are of the class, (C,).

    Returns:
        Weights (C, P) and biases (C,).
    """
    deviation = np.sqrt(np.maximum(np.diagonal(covariance, axis1=-2, axis2=-1), 0))
    varies = deviation > _floor(mean, deviation)
    scale = varies / np.where(varies, deviation, 1)
    system = covariance * scale[..., :, None] * scale[..., None, :] + RIDGE * np.eye(mean.shape[-1])
    targets = scale * shares[:, None] * (class_means - mean)
    # torch, because numpy's threads would wait for each other at each of many small systems
    columns = torch.from_numpy(targets.T if covariance.ndim == 2 else targets[..., None])
    solved = torch.linalg.solve(torch.from_numpy(system), columns).numpy()
    weights = scale * (solved.T if covariance.ndim == 2 else solved[..., 0])
    return weights, shares - (weights * mean).sum(axis=-1)


def _floor(mean: np.ndarray, deviation: np.ndarray) -> np.ndarray:
    """The deviation up to which a feature is constant, apart from rounding."""
    return 1e-6 * (np.abs(mean) + deviation.max(axis=-1, keepdims=True, initial=0))
