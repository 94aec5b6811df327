"""VS2++: steering towards retrieved neighbours of one label and away from the others, and baselines without an SAE.

The headroom analysis of VS2 (arXiv 2506.01247, sections 3.3 and 4.2). The bank is the train split, embedded by the
backbone that retrieves; the paper's is DINOv2. Whatever is read of the bank is read window by window, in order.

The search takes a block of similarities in fp32 and computes again, in float64, those near or above the n-th best.
Let s' be the fp32 similarity of two unit rows, s its float64 value, u = 2^-24 the unit round-off of fp32. Whatever
the order of the sum, |s' - s| <= D u to first order. If n rows have s' >= m, the n-th best s rounded to fp32 is at
least m - (D + 1) u, so every row among the n best has s' >= m - (2 D + 2) u. For m serves the n-th largest among the
similarities kept so far and maxima over disjoint groups of columns, which leaves one pass over the block.

Shapes: Q queries, B rows of the bank, N neighbours of a query, W rows of a window of the bank, D width, G groups of
columns, P columns of a group, M candidates.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparsight import kernels
from sparsight.errors import SparsightError
from sparsight.sae.base import SAE
from sparsight.store import Rows
from sparsight.windows import in_order

_QUERIES = 512  # larger blocks are a little faster, and take more memory where most rows of the bank are alike
_WINDOW = 8192
_GROUP = 16
_SLACK = 8  # in units of u: terms of second order, norms not quite 1, rounding of the floor itself
_LAST = 2**32 - 1  # row that a key can name
_ENCODED = 4096  # rows whose codes, dense for some SAEs, exist at a time


@dataclass(frozen=True)
class Neighbours:
    """The rows of the bank nearest to each query, nearest first; the first n columns are the n nearest."""

    indices: Tensor
    """(Q, N) int64, rows of the bank."""
    similarity: Tensor
    """(Q, N) fp32, cosine similarity."""


@torch.no_grad()
def nearest(queries: Rows | np.ndarray, bank: Rows | np.ndarray, n: int, device: torch.device) -> Neighbours:
    """The ``n`` rows of the bank with the largest cosine similarity, exactly (section 4.2: n = 50).

    A similarity is the float64 product, rounded to fp32, of two rows brought to unit norm in fp32: it depends on the
    two rows alone, so that equal rows tie. Of equal similarities the lower row of the bank comes first. A query that
    is itself in the bank finds itself; queries are meant to be of another split.

    Args:
        queries: (Q, D), held in memory.
        bank: (B, D), read once.
        n: N, from 1 to B.
        device: where to compute, with full fp32 products.

    Raises:
        SparsightError: n out of range, widths that differ, a row that is zero, NaN or infinite (named).
    """
    if not 1 <= n <= len(bank):
        raise SparsightError(f"retrieval: {n} neighbours out of a bank of {len(bank)} rows; ask for 1 to {len(bank)}")
    if queries.shape[1] != bank.shape[1]:
        raise SparsightError(
            f"retrieval: queries of width {queries.shape[1]}, bank of width {bank.shape[1]}; embed both with one model"
        )
    q_QD = torch.empty(queries.shape, device=device)
    for block in in_order(len(queries), _WINDOW):
        q_QD[block] = _unit(queries, block, "queries", device)
    keys_QN = _key(torch.full((len(queries), n), -torch.inf, device=device), torch.zeros((), dtype=torch.int64))
    for window in in_order(len(bank), _WINDOW):
        _search(q_QD, _unit(bank, window, "bank", device), window.start, keys_QN)
    return Neighbours(_LAST - (keys_QN & _LAST), _similarity(keys_QN))


def positives(labels_QN: Tensor, label_Q: Tensor | None = None) -> Tensor:
    """Which neighbours are positives, bool (Q, N); all others are negatives.

    Section 3.3 takes those with the query's own pseudo-label, section 4.2 those with the pseudo-label most frequent
    among the neighbours. Oracle labels are true labels in the place of pseudo-labels.

    Args:
        labels_QN: labels of the neighbours, nearest first.
        label_Q: labels of the queries; None takes the most frequent one, of several the one of the nearest neighbour.
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

    The vector of VS2++ (section 3.3) is gamma - 1 times this. A side without neighbours contributes nothing.

    Args:
        sae: of the site that is steered.
        bank: activations (B, D) of that site, in the order of the bank that was searched.
        neighbours: of the Q queries.
        positives_QN: see :func:`positives`.
        W_dec: another decoder (d_sae, D) in the place of the SAE's, for controls.

    Raises:
        SparsightError: a bank too short for the neighbours; activations of another width, NaN or infinite.
    """

    def decoded(x_WD: Tensor) -> Tensor:
        return sae.encode(x_WD).combine(sae.W_dec if W_dec is None else W_dec)

    return _weighted(_difference_of_means(positives_QN), neighbours, bank, decoded)


def embedding_steering(bank: Rows | np.ndarray, neighbours: Neighbours, positives_QN: Tensor) -> Tensor:
    """Mean embedding of the positives minus mean embedding of the negatives, (Q, D): VS2++ without an SAE.

    "CLIP steering" in section 4.2. A side without neighbours contributes nothing.

    Args:
        bank: embeddings (B, D) of the space that is steered, in the order of the bank that was searched.
        neighbours: of the Q queries.
        positives_QN: see :func:`positives`.

    Raises:
        SparsightError: a bank too short for the neighbours.
    """
    return _weighted(_difference_of_means(positives_QN), neighbours, bank)


def weighted_retrieval(
    queries_QD: Tensor, bank: Rows | np.ndarray, neighbours: Neighbours, query_weight: float
) -> Tensor:
    """Weighted RAG of section 4.2: a q + (1 - a) sum_j w_j r_j with w_j = s_j / sum s, (Q, D).

    Neighbours of negative similarity get no weight; a query without any other stays as it is.

    Args:
        queries_QD: embeddings of the queries, q.
        bank: embeddings (B, D) of the same space, r, in the order of the bank that was searched.
        neighbours: of the Q queries.
        query_weight: a, from 0 to 1.

    Raises:
        SparsightError: a bank too short for the neighbours.
    """
    similarity_QN = neighbours.similarity.clamp(min=0)
    sum_Q1 = similarity_QN.sum(dim=1, keepdim=True)
    retrieved_QD = _weighted(similarity_QN / sum_Q1.masked_fill(sum_Q1 == 0, 1), neighbours, bank)
    return torch.where(sum_Q1 > 0, query_weight * queries_QD + (1 - query_weight) * retrieved_QD, queries_QD)


def _unit(rows: Rows | np.ndarray, window: slice, name: str, device: torch.device) -> Tensor:
    """Rows of unit norm in fp32, (W, D)."""
    x_WD = torch.tensor(rows[window], dtype=torch.float64, device=device)
    norm_W1 = x_WD.norm(dim=1, keepdim=True)
    bad_W = ~((norm_W1 > 0) & (norm_W1 < torch.inf)).squeeze(1)
    if bad_W.any():
        row = window.start + int(bad_W.nonzero()[0])
        raise SparsightError(f"retrieval: row {row} of the {name} is zero, NaN or infinite; check where it is from")
    return (x_WD / norm_W1).float()


def _search(q_QD: Tensor, bank_WD: Tensor, first: int, keys_QN: Tensor) -> None:
    """Let the rows of a window, which begins at row ``first`` of the bank, take the places that they deserve."""
    n, n_rows = keys_QN.shape[1], len(bank_WD)
    group = max(1, min(_GROUP, n_rows // n))
    n_groups = -(-n_rows // group)
    # Reused, as fresh memory costs page faults; columns that only fill up the groups keep their -inf.
    s_QW = q_QD.new_full((min(_QUERIES, len(q_QD)), group * n_groups), -torch.inf)
    exact_WD, no_bias = bank_WD.double(), bank_WD.new_zeros(n_rows, dtype=torch.float64)
    for block in in_order(len(q_QD), _QUERIES):
        q, kept_QN = q_QD[block], keys_QN[block]
        s = s_QW[: len(q)]
        torch.mm(q, bank_WD.T, out=s[:, :n_rows])
        columns_QM, real_QM = _candidates(s.view(len(q), group, n_groups), _similarity(kept_QN), q.shape[1])
        exact_QM = kernels.encode_at(q.double(), exact_WD.T, no_bias, columns_QM).float()
        found_QM = _key(exact_QM.masked_fill(~real_QM, -torch.inf), first + columns_QM)
        keys_QN[block] = torch.cat([kept_QN, found_QM], dim=1).topk(n, dim=1).values


def _candidates(s_QPG: Tensor, kept_QN: Tensor, d_in: int) -> tuple[Tensor, Tensor]:
    """Columns, (Q, M), among which are all that belong to the N best; and which of them are real."""
    maxima_QG = s_QPG.amax(dim=1)
    reached_Q1 = torch.cat([kept_QN, maxima_QG], dim=1).topk(kept_QN.shape[1], dim=1).values[:, -1:]
    floor_Q1 = reached_Q1 - 2 * (d_in + _SLACK) * 2.0**-24
    rows, groups = (maxima_QG >= floor_Q1).nonzero(as_tuple=True)
    hits, places = (s_QPG[rows, :, groups] >= floor_Q1[rows]).nonzero(as_tuple=True)
    count_Q = torch.bincount(rows[hits], minlength=len(s_QPG))
    real_QM = torch.arange(int(count_Q.max()), device=rows.device) < count_Q[:, None]
    columns_QM = rows.new_zeros(real_QM.shape)
    return columns_QM.masked_scatter_(real_QM, places * s_QPG.shape[2] + groups[hits]), real_QM


def _key(similarity: Tensor, rows: Tensor) -> Tensor:
    """int64 in the order of the similarities and, where those are equal, in the reverse order of the rows."""
    bits = (similarity + 0.0).view(torch.int32)  # no -0.0, which is equal to 0.0 and has other bits
    return (_ordered(bits).long() << 32) + (_LAST - rows)


def _similarity(keys: Tensor) -> Tensor:
    """The similarities that the keys were made of."""
    return _ordered((keys >> 32).int()).view(torch.float32)


def _ordered(bits: Tensor) -> Tensor:
    """Bits of fp32 numbers as integers of the same order, and back: the negative ones count downwards."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _difference_of_means(positives_QN: Tensor) -> Tensor:
    """Weights, (Q, N), of a mean over the positives minus a mean over the negatives."""
    of_positives, of_negatives = (
        side.float() / side.sum(dim=1, keepdim=True).clamp(min=1) for side in (positives_QN, ~positives_QN)
    )
    return of_positives - of_negatives


def _weighted(
    weights_QN: Tensor, neighbours: Neighbours, bank: Rows | np.ndarray, of: Callable[[Tensor], Tensor] = Tensor.float
) -> Tensor:
    """Per query the weighted sum of what ``of`` makes of its neighbours' rows, (Q, D)."""
    if (last := int(neighbours.indices.max())) >= len(bank):
        raise SparsightError(
            f"retrieval: neighbour {last} in a bank of {len(bank)} rows; give the one that was searched"
        )
    total_QD = weights_QN.new_zeros(len(weights_QN), bank.shape[1])
    for window in in_order(len(bank), _ENCODED):
        vectors_WD = of(torch.tensor(bank[window], device=weights_QN.device))
        inside_QN = (neighbours.indices >= window.start) & (neighbours.indices < window.stop)
        weights, indices = weights_QN * inside_QN, (neighbours.indices - window.start) * inside_QN
        total_QD += kernels.decode(weights, indices, vectors_WD)
    return total_QD
