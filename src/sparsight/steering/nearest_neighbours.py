"""The rows of a bank nearest to each query by cosine similarity: an exact search, without a matrix of all pairs.

Shapes: Q queries, B rows of the bank, N neighbours of a query, W rows of a slice of the bank, D width.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import hardshrink

from sparsight.activations.store import Rows
from sparsight.common.errors import SparsightError
from sparsight.common.progress import followed
from sparsight.common.slices import row_slices

_QUERIES = 512  # a block of similarities, (_QUERIES, _WINDOW), takes 32 MiB
_WINDOW = 8192
_ZERO = 1e-14  # orthogonal rows must tie, but their sums end up to 1e-16 from 0
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

    Rows are scaled to unit norm in fp32. A similarity is the float64 product of two such rows, rounded to fp32, so
    that the order of the sum does not show and equal rows tie. In a tie the lower row of the bank comes first. A query
    that is itself in the bank finds itself; queries are meant to be of another split.

    Args:
        queries: (Q, D), held in memory.
        bank: (B, D), read once.
        n: N, from 1 to B.
        device: where to compute.

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
    windows = list(row_slices(len(bank), _WINDOW))
    for window in followed(windows, len(windows), "windows"):
        bank_WD = _unit(bank, window, "bank", device).double()
        rows_W = torch.arange(window.start, window.stop, device=device)
        for block in row_slices(len(queries), _QUERIES):
            s_QW = hardshrink(q_QD[block].double() @ bank_WD.T, _ZERO).float()
            keys_QN[block] = torch.cat([keys_QN[block], _key(s_QW, rows_W)], dim=1).topk(n, dim=1).values
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
