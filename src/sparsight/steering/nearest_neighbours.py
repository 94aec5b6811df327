"""The rows of a bank nearest to each query by cosine similarity: an exact search at the speed of fp32.

The search computes a block of similarities in fp32. It computes those near or above the n-th best again in float64.
Let s' be the fp32 similarity of two unit rows, s its float64 value, u = 2^-24 the unit round-off of fp32. Whatever
the order of the sum, |s' - s| <= D u to first order. If n rows have s' >= m, the n-th best s rounded to fp32 is at
least m - (D + 1) u. So every row among the n best has s' >= m - (2 D + 2) u. The search sets m to the n-th largest of
two sets together: the similarities kept so far, and the maxima over disjoint groups of columns. This needs only one
pass over the block.

Shapes: Q queries, B rows of the bank, N neighbours of a query, W rows of a slice of the bank, D width, G groups of
columns, P columns of a group, M candidates.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparsight import kernels
from sparsight.activations.store import Rows
from sparsight.common.errors import SparsightError
from sparsight.common.slices import row_slices

_QUERIES = 512  # larger blocks are a little faster, but take more memory if most rows of the bank are alike
_WINDOW = 8192
_GROUP = 16
_SLACK = 8  # in units of u: terms of second order, norms not quite 1, rounding of the floor itself
_LAST = 2**32 - 1  # largest row number that a key can hold


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

    Rows are scaled to unit norm in fp32. A similarity is the float64 product of two such rows, rounded to fp32. It
    depends on the two rows alone, so equal rows tie. In a tie the lower row of the bank comes first. A query that is
    itself in the bank finds itself; queries are meant to be of another split.

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
    for block in row_slices(len(queries), _WINDOW):
        q_QD[block] = _unit(queries, block, "queries", device)
    keys_QN = _key(torch.full((len(queries), n), -torch.inf, device=device), torch.zeros((), dtype=torch.int64))
    for window in row_slices(len(bank), _WINDOW):
        _search(q_QD, _unit(bank, window, "bank", device), window.start, keys_QN)
    return Neighbours(_LAST - (keys_QN & _LAST), _similarity(keys_QN))


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
    """Update the best keys in place with a window of the bank that begins at row ``first``."""
    n, n_rows = keys_QN.shape[1], len(bank_WD)
    group = max(1, min(_GROUP, n_rows // n))
    n_groups = -(-n_rows // group)
    # One buffer for all blocks, because fresh memory costs page faults. Columns that pad the last group keep -inf.
    s_QW = q_QD.new_full((min(_QUERIES, len(q_QD)), group * n_groups), -torch.inf)
    exact_WD, no_bias = bank_WD.double(), bank_WD.new_zeros(n_rows, dtype=torch.float64)
    for block in row_slices(len(q_QD), _QUERIES):
        q, kept_QN = q_QD[block], keys_QN[block]
        s = s_QW[: len(q)]
        torch.mm(q, bank_WD.T, out=s[:, :n_rows])
        columns_QM, real_QM = _candidates(s.view(len(q), group, n_groups), _similarity(kept_QN), q.shape[1])
        exact_QM = kernels.encode_at(q.double(), exact_WD.T, no_bias, columns_QM).float()
        window_keys_QM = _key(exact_QM.masked_fill(~real_QM, -torch.inf), first + columns_QM)
        keys_QN[block] = torch.cat([kept_QN, window_keys_QM], dim=1).topk(n, dim=1).values


def _candidates(s_QPG: Tensor, kept_QN: Tensor, d_in: int) -> tuple[Tensor, Tensor]:
    """Columns (Q, M) that contain all of the N best, and which of these entries are real, not padding."""
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
    """int64 keys in the order of the similarities, and in reverse order of the rows for equal similarities."""
    bits = (similarity + 0.0).view(torch.int32)  # turns -0.0 into 0.0, which is equal but has other bits
    return (_ordered(bits).long() << 32) + (_LAST - rows)


def _similarity(keys: Tensor) -> Tensor:
    """The similarities in keys."""
    return _ordered((keys >> 32).int()).view(torch.float32)


def _ordered(bits: Tensor) -> Tensor:
    """Bits of fp32 numbers as integers of the same order, and back. Negative numbers get inverted magnitude bits."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
