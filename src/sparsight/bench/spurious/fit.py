"""What is fitted on train: how latents differ by the spurious feature, its direction, LEACE, and a last layer.

Shapes: I images of a window, n images, T tokens of an image, D width (d_in), E width of the embedding, F latents, C
classes, V values of the spurious feature, G = C V cells.
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparsight.bench.site_rows import SiteRows
from sparsight.sae.metrics.baselines import Method
from sparsight.sae.metrics.firing import ByClass
from sparsight.sae.metrics.probing import DenseMoments
from sparsight.sae.metrics.sparse_codes import pooled

_C = (0.01, 0.1, 1.0, 10.0, 100.0)
"""Inverse penalties of the last layer that are tried on val."""


@dataclass(frozen=True)
class Fitted:
    """What train gives."""

    scores: dict[str, np.ndarray]
    """By SAE, the standardised mean difference of each latent, (F,)."""
    alive: dict[str, np.ndarray]
    """By SAE, the latents that fire on train, int."""
    direction_D: Tensor
    """Unit vector along which the values' means differ."""
    centre_D: Tensor
    """Mean of the cells' means."""
    eraser: Callable[[Tensor], Tensor]
    """LEACE, float64."""
    heads: dict[float, Callable[[np.ndarray], np.ndarray]]
    """By inverse penalty, a last layer: from embeddings (n, E) to predicted classes (n,)."""


def fit(
    rows: SiteRows, cells_n: np.ndarray, shape: tuple[int, int], balanced: np.ndarray, methods: Mapping[str, Method]
) -> Fitted:
    """Read train once.

    Args:
        rows: the rows of train.
        cells_n: cell of every image; -1 for none.
        shape: C, V.
        balanced: images, as many of each cell, for LEACE and the last layer.
        methods: the SAEs.
    """
    n_cells = shape[0] * shape[1]
    device, width = rows.head(1).device, rows.head(1).shape[1]
    sums = {name: ByClass(len(one.rows), n_cells) for name, one in methods.items()}
    means, embeddings = DenseMoments(width, n_cells), []
    leace = _Leace(width, shape[1], device)
    for window, x, means_ID in rows.windows():
        cells_I = cells_n[window]
        means.update(means_ID, cells_I)
        for name, method in methods.items():
            sums[name].update(pooled(method.encode(x), rows.tokens), cells_I)
        own = balanced[(balanced >= window.start) & (balanced < window.stop)] - window.start
        embeddings.append(rows.embeddings(window)[own])
        leace.update(x.unflatten(0, (-1, rows.tokens))[torch.from_numpy(own).to(device)], cells_I[own] % shape[1])
    means_GD = means.total / np.maximum(means.images, 1)[:, None]
    present = means.images > 0
    differences_VD = _within_classes(means_GD, present, shape)
    direction_D = np.linalg.svd(differences_VD, full_matrices=False)[2][0]

    def on_device(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).float().to(device)

    return Fitted(
        {name: _standardised(one, present, shape) for name, one in sums.items()},
        {name: np.flatnonzero(one.fires) for name, one in sums.items()},
        on_device(direction_D), on_device(means_GD[present].mean(axis=0)), leace.eraser(),
        _heads(np.concatenate(embeddings), cells_n[balanced] // shape[1]),
    )  # fmt: skip


def _within_classes(means_GX: np.ndarray, present_G: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Mean of each value minus the mean over the values, both within a class; mean over the classes, (V, X)."""
    means_CVX = np.where(present_G[:, None], means_GX, np.nan).reshape(*shape, -1)
    several = present_G.reshape(shape).sum(axis=1) > 1
    differences = means_CVX[several] - np.nanmean(means_CVX[several], axis=1, keepdims=True)
    lacking = np.isnan(differences).all(axis=0)
    return np.asarray(np.nanmean(np.where(lacking, 0.0, differences), axis=0))


def _standardised(sums: ByClass, present_G: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Largest such difference of each latent over the values, in standard deviations within cells, (F,)."""
    share_G = sums.images / sums.images.sum()
    between_F = share_G @ (sums.means - share_G @ sums.means) ** 2
    within_F = np.maximum(sums.deviation**2 - between_F, 0)
    differences_F = np.abs(_within_classes(sums.means, present_G, shape)).max(axis=0)
    varies = within_F > 1e-12 * within_F.max(initial=0)
    return np.where(varies, differences_F / np.sqrt(np.where(varies, within_F, 1)), 0)


class _Leace:
    """LEACE (Belrose et al. 2023, arXiv 2306.03819) of the value, by the library concept-erasure."""

    def __init__(self, width: int, n_values: int, device: torch.device) -> None:
        with warnings.catch_warnings():  # it uses torch.jit, which torch calls deprecated
            warnings.simplefilter("ignore")
            from concept_erasure import LeaceFitter

        self._n_values = n_values
        self._fitter = LeaceFitter(width, n_values, device=device, dtype=torch.float64)

    def update(self, x_ITD: Tensor, values_I: np.ndarray) -> None:
        """Add images with their values; every token counts."""
        if not len(x_ITD):
            return
        values = torch.from_numpy(values_I).long().to(x_ITD.device).repeat_interleave(x_ITD.shape[1])
        self._fitter.update(x_ITD.flatten(0, 1).double(), torch.nn.functional.one_hot(values, self._n_values).double())

    def eraser(self) -> Callable[[Tensor], Tensor]:
        """The fitted eraser."""
        found: Callable[[Tensor], Tensor] = self._fitter.eraser
        return found


def _heads(embeddings_nE: np.ndarray, classes_n: np.ndarray) -> dict[float, Callable[[np.ndarray], np.ndarray]]:
    """Deep feature reweighting (Kirichenko et al. 2022, arXiv 2204.02937): the last layer on balanced images."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return {
        c: make_pipeline(StandardScaler(), LogisticRegression(C=c, max_iter=1000)).fit(embeddings_nE, classes_n).predict
        for c in _C
    }
