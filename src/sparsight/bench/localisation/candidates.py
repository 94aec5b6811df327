"""Features among which the best for each region is chosen: an SAE's latents, and those of the controls.

Shapes: N patches, D width (d_in), F features.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy import sparse
from torch import Tensor

from sparsight.common.progress import followed
from sparsight.common.slices import row_slices
from sparsight.sae.base import SAE
from sparsight.sae.metrics import baselines
from sparsight.sae.metrics.baselines import Method
from sparsight.sae.metrics.sparse_codes import Matrix
from sparsight.sae.moments import Moments

_SAMPLE, _CLUSTER_SAMPLE = 4096, 16384
"""Rows of train that fit the random dictionary's factor, and k-means; as in the evaluation of SAEs."""
_COLUMNS = 64
"""Columns of a basis at a time, because each is active everywhere."""
_ROWS = 8192
"""Rows that are encoded at a time."""


@dataclass(frozen=True)
class Block:
    """Features that are encoded together."""

    method: Method
    first: int
    """Number of its first feature."""
    signed: bool
    """Whether a feature's values of either sign are a feature of their own."""

    def feature(self, column: int) -> tuple[int, int]:
        """Number and sign of the feature in a column of the codes."""
        width = len(self.method.rows)
        return self.first + column % width, 1 if column < width else -1

    def encode(self, x_ND: Tensor, device: torch.device) -> Matrix:
        """Values, none negative, sparse (N, F)."""
        windows = list(row_slices(len(x_ND), _ROWS))
        parts = [self.method.encode(x_ND[rows].to(device).float()) for rows in followed(windows, len(windows), "rows")]
        codes = sparse.vstack(parts, format="csr")
        if self.signed:
            codes = sparse.hstack([codes.maximum(0), (-codes).maximum(0)], format="csr")
        codes.eliminate_zeros()
        return codes


Candidates = list[Block]


def of_sae(sae: SAE) -> Candidates:
    """The latents of an SAE."""
    return [Block(baselines.of_sae(sae), 0, False)]


def random(sae: SAE, x_ND: Tensor, seed: int) -> Candidates:
    """A random dictionary as wide and sparse as an SAE."""
    head = x_ND[:_SAMPLE].to(sae.W_dec.device).float()
    return [Block(baselines.random_dictionary(sae, head, seed), 0, False)]


def shared(x_ND: Tensor, clusters: int, device: torch.device, seed: int) -> dict[str, Candidates]:
    """What an SAE's seed does not matter for: all principal components, k-means, and all neurons.

    Args:
        x_ND: activations of train.
        clusters: number of clusters, reduced as in :func:`sparsight.sae.metrics.baselines.kmeans`.
        device: device of the work.
        seed: seed of k-means.
    """
    moments = Moments(["x"])
    for rows in row_slices(len(x_ND), _ROWS):
        moments.update({"x": x_ND[rows].to(device).float()})
    covariance, mean, _ = moments.covariance("x", "x")
    components = torch.linalg.eigh(covariance)[1].flip(1)  # the largest first
    head = x_ND[:_CLUSTER_SAMPLE].to(device).float()
    return {
        "pca": _basis("pca", mean, components),
        "kmeans": [Block(baselines.kmeans(head, clusters, seed), 0, False)],
        "neurons": _basis("neurons", mean, torch.eye(len(mean), device=device)),
    }


def _basis(name: str, mean_D: Tensor, columns_DF: Tensor) -> Candidates:
    parts: Sequence[slice] = list(row_slices(columns_DF.shape[1], _COLUMNS))
    return [Block(baselines.pca(name, mean_D, columns_DF[:, part]), part.start, True) for part in parts]
