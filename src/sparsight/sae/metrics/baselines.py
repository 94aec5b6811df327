"""Baselines of an SAE: other ways to encode an activation as a few weighted features, and to decode it.

Shapes: B batch, D width (d_in), F features (d_sae), K active features (k).
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from sparsight.sae.base import SAE, create
from sparsight.sae.metrics.sparse_codes import Matrix, from_codes, from_entries, times

MAX_CLUSTERS = 512  # of k-means; more would take minutes and have too few rows each
_ROWS_PER_CLUSTER = 8


@dataclasses.dataclass(frozen=True)
class Method:
    """x_hat = encode(x) rows + offset."""

    name: str
    encode: Callable[[Tensor], Matrix]
    """From activations (B, D) to a CSR array (B, F)."""
    rows: np.ndarray
    """What each feature adds to the reconstruction per unit of its value, float32 (F, D)."""
    offset: np.ndarray
    """float32 (D,)."""
    macs_encode: int
    """Multiply-accumulates of encoding an activation."""
    macs_per_active: int
    """Multiply-accumulates of decoding, per active feature."""

    def decode(self, z: Matrix) -> np.ndarray:
        """Reconstructions (B, D)."""
        return times(z, self.rows) + self.offset

    def macs(self, l0: float) -> float:
        """Multiply-accumulates of encoding and decoding an activation with ``l0`` active features."""
        return self.macs_encode + l0 * self.macs_per_active


def of_sae(sae: SAE) -> Method:
    """The SAE as a method."""
    rows, offset = (p.detach().float().cpu().numpy() for p in (sae.W_dec, sae.b_dec))
    return Method("sae", lambda x: from_codes(sae.encode(x)), rows, offset, sae.macs_encode, sae.d_in)


def random_dictionary(sae: SAE, x_ND: Tensor, seed: int) -> Method:
    """TopK with random unit rows, as wide and sparse as the SAE: the baseline that training must beat.

    The rows are not orthogonal, so reconstructions would be too long. One factor, fitted on ``x_ND``, corrects this.

    Args:
        sae: the SAE whose shape it takes.
        x_ND: training activations; their mean is the offset.
        seed: seed of the rows.
    """
    random_sae = create("topk", sae.d_in, sae.d_sae, sae.k, seed).to(x_ND.device).requires_grad_(False)
    random_sae.set_center(x_ND.mean(dim=0))
    method = dataclasses.replace(of_sae(random_sae), name="random")
    x, x_hat = x_ND.cpu().numpy() - method.offset, times(method.encode(x_ND), method.rows)
    squares = float(np.square(x_hat, dtype=np.float64).sum())
    gain = float(np.multiply(x, x_hat, dtype=np.float64).sum()) / squares if squares else 1.0
    return dataclasses.replace(method, rows=np.float32(gain) * method.rows)


def pca(name: str, mean_D: Tensor, components_DK: Tensor) -> Method:
    """Projection on principal components, given as columns."""
    mean, components = mean_D.float(), components_DK.float()
    width = components.shape[1]

    def encode(x: Tensor) -> Matrix:
        z = (x - mean) @ components
        return from_entries(z, torch.arange(width).expand(len(x), -1), width)

    rows = components.T.contiguous().cpu().numpy()
    return Method(name, encode, rows, mean.cpu().numpy(), len(mean) * width, len(mean))


def neurons(mean_D: Tensor, k: int) -> Method:
    """The k dimensions of the activation that are farthest from their mean, unchanged."""
    mean = mean_D.float()

    def encode(x: Tensor) -> Matrix:
        centred = x - mean
        indices = centred.abs().topk(k, dim=1).indices
        return from_entries(centred.gather(1, indices), indices, len(mean))

    return Method("neurons", encode, np.eye(len(mean), dtype=np.float32), mean.cpu().numpy(), 0, 0)


def kmeans(x_ND: Tensor, clusters: int, seed: int) -> Method:
    """The nearest cluster centre (scikit-learn's MiniBatchKMeans): one active feature of value 1.

    Args:
        x_ND: training activations.
        clusters: number of clusters, reduced to at most 512 and at most one per 8 rows.
        seed: seed of the first centres and of the batches.
    """
    clusters = max(1, min(clusters, MAX_CLUSTERS, len(x_ND) // _ROWS_PER_CLUSTER))
    centres = cluster_centres(x_ND, clusters, seed)
    half = centres.square().sum(dim=1) / 2

    def encode(x: Tensor) -> Matrix:
        nearest = (x @ centres.T - half).argmax(dim=1, keepdim=True)
        return from_entries(torch.ones_like(nearest, dtype=torch.float32), nearest, clusters)

    d_in = centres.shape[1]
    return Method("kmeans", encode, centres.cpu().numpy(), np.zeros(d_in, np.float32), clusters * d_in, 0)


def cluster_centres(x_ND: Tensor, clusters: int, seed: int) -> Tensor:
    """Centres of scikit-learn's MiniBatchKMeans, (clusters, D), float32, on the device of the rows.

    Args:
        x_ND: at least as many rows as clusters.
        clusters: number of clusters.
        seed: seed of the first centres and of the batches.
    """
    from sklearn.cluster import MiniBatchKMeans  # slow to import, and only needed here

    # No early stopping: it depends on a sum whose order over threads is not fixed. No k-means++: it needs thousands of
    # tiny products, at each of which all threads wait for each other, and ends within 2 % of the error.
    model = MiniBatchKMeans(
        clusters, init="random", batch_size=2048, max_iter=10, n_init=1, tol=0.0, max_no_improvement=None,
        random_state=seed % 2**32, compute_labels=False,
    )  # fmt: skip
    model.fit(x_ND.cpu().numpy())
    return torch.from_numpy(model.cluster_centers_).float().to(x_ND.device)
