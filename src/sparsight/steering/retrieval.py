"""Steering vectors of VS2++ from an image's nearest train images, and baselines without an SAE.

This is the headroom analysis of VS2 (arXiv 2506.01247, sections 3.3 and 4.2). Neighbours with one label are the
positives, all others the negatives. The bank is the train split; it is read in slices, in order.

Shapes: Q queries, B rows of the bank, N neighbours of a query, W rows of a slice of the bank, S tokens of a
row's image, D width.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from sparsight import kernels
from sparsight.activations.store import Rows
from sparsight.common.errors import SparsightError
from sparsight.sae.base import SAE
from sparsight.steering import stored
from sparsight.steering.nearest_neighbours import Neighbours

_ENCODED = 4096  # rows encoded at a time; codes are dense for some SAEs


def positives(labels_QN: Tensor, label_Q: Tensor | None = None) -> Tensor:
    """Which neighbours are positives, bool (Q, N); all others are negatives.

    In section 3.3 the positives have the query's own pseudo-label. In section 4.2 they have the most frequent
    pseudo-label among the neighbours. With oracle labels, true labels replace pseudo-labels.

    Args:
        labels_QN: labels of the neighbours, nearest first.
        label_Q: labels of the queries; None takes the most frequent label, in a tie that of the nearest neighbour.
    """
    if label_Q is None:
        count_QN = torch.stack([(labels_QN == label_Q1).sum(dim=1) for label_Q1 in labels_QN.split(1, dim=1)], dim=1)
        label_Q = labels_QN.gather(1, count_QN.argmax(dim=1, keepdim=True)).squeeze(1)  # argmax takes the first
    return labels_QN == label_Q[:, None]


@torch.no_grad()
def contrast(
    sae: SAE, bank: Rows | np.ndarray, neighbours: Neighbours, positives_QN: Tensor, W_dec: Tensor | None = None
) -> Tensor:
    """W_dec^T (mean code of the positives - mean code of the negatives), (Q, D), in units of the activations.

    The vector of VS2++ (section 3.3) is gamma - 1 times this. A side without neighbours contributes nothing. A
    neighbour of which several tokens are stored counts with its mean code over them.

    Args:
        sae: the SAE of the steered site.
        bank: activations of that site, of one or several tokens of each image, in the order of the searched bank.
        neighbours: neighbours of the Q queries.
        positives_QN: see :func:`positives`.
        W_dec: a decoder (d_sae, D) to use instead of the SAE's, for controls.

    Raises:
        SparsightError: a bank too short for the neighbours; activations of another width, NaN or infinite.
    """

    def decoded(x_WD: Tensor) -> Tensor:
        return sae.encode(x_WD).combine(sae.W_dec if W_dec is None else W_dec)

    return _weighted(_difference_of_means(positives_QN), neighbours, bank, decoded)


def embedding_steering(bank: Rows | np.ndarray, neighbours: Neighbours, positives_QN: Tensor) -> Tensor:
    """Mean embedding of the positives minus mean embedding of the negatives, (Q, D): VS2++ without an SAE.

    Section 4.2 calls it "CLIP steering". A side without neighbours contributes nothing.

    Args:
        bank: embeddings (B, D) of the steered space, in the order of the searched bank; of several tokens of an image
            their mean is taken.
        neighbours: neighbours of the Q queries.
        positives_QN: see :func:`positives`.

    Raises:
        SparsightError: a bank too short for the neighbours.
    """
    return _weighted(_difference_of_means(positives_QN), neighbours, bank)


def weighted_retrieval(
    queries_QD: Tensor, bank: Rows | np.ndarray, neighbours: Neighbours, query_weight: float
) -> Tensor:
    """Weighted RAG of section 4.2: a q + (1 - a) sum_j w_j r_j with w_j = s_j / sum s, (Q, D).

    Neighbours with negative similarity get no weight. A query without any positive similarity stays unchanged.

    Args:
        queries_QD: embeddings of the queries, q.
        bank: embeddings (B, D) of the same space, r, in the order of the searched bank.
        neighbours: neighbours of the Q queries.
        query_weight: a, from 0 to 1.

    Raises:
        SparsightError: a bank too short for the neighbours.
    """
    similarity_QN = neighbours.similarity.clamp(min=0)
    sum_Q1 = similarity_QN.sum(dim=1, keepdim=True)
    retrieved_QD = _weighted(similarity_QN / sum_Q1.masked_fill(sum_Q1 == 0, 1), neighbours, bank)
    return torch.where(sum_Q1 > 0, query_weight * queries_QD + (1 - query_weight) * retrieved_QD, queries_QD)


def _difference_of_means(positives_QN: Tensor) -> Tensor:
    """Weights, (Q, N), of a mean over the positives minus a mean over the negatives."""
    of_positives, of_negatives = (
        side.float() / side.sum(dim=1, keepdim=True).clamp(min=1) for side in (positives_QN, ~positives_QN)
    )
    return of_positives - of_negatives


def _weighted(
    weights_QN: Tensor, neighbours: Neighbours, bank: Rows | np.ndarray, of: Callable[[Tensor], Tensor] = Tensor.float
) -> Tensor:
    """For each query, the weighted sum over its neighbours of their means over tokens after applying ``of``, (Q, D)."""
    n_images = stored.count(bank)
    if (last := int(neighbours.indices.max())) >= n_images:
        raise SparsightError(
            f"retrieval: neighbour {last} in a bank of {n_images} rows; give the one that was searched"
        )
    total_QD = weights_QN.new_zeros(len(weights_QN), bank.shape[1])
    for window, x_WSD in stored.images(bank, weights_QN.device, _ENCODED):
        vectors_WD = of(x_WSD.flatten(0, 1)).unflatten(0, x_WSD.shape[:2]).mean(dim=1)
        inside_QN = (neighbours.indices >= window.start) & (neighbours.indices < window.stop)
        weights, indices = weights_QN * inside_QN, (neighbours.indices - window.start) * inside_QN
        total_QD += kernels.decode(weights, indices, vectors_WD)
    return total_QD
