"""Directions of decoder rows: duplicates, what two layers share, and what two seeds find alike.

Shapes: F latents (d_sae), D width (d_in).
"""

from collections.abc import Iterator

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from sparsight.common.slices import row_slices

DUPLICATE = 0.9
"""Decoder rows of a larger cosine are duplicates (Mudide et al. 2024, arXiv 2410.08201)."""
MATCHED = 0.7
"""Rows of two dictionaries of a larger cosine are taken for the same feature."""
_ENTRIES = 2**26  # of a matrix of costs: half a gigabyte of float64


def unit(rows_FD: Tensor) -> Tensor:
    """Rows of unit length, float32; rows of zeros stay."""
    return torch.nn.functional.normalize(rows_FD.detach().float(), dim=1)


def _cosines(a_FD: Tensor, b_FD: Tensor, entries: int = 2**24) -> Iterator[tuple[slice, Tensor]]:
    """Cosines of all rows of a with all rows of b, some rows of a at a time."""
    a, b = unit(a_FD), unit(b_FD)
    for rows in row_slices(len(a), max(1, entries // len(b))):
        yield rows, a[rows] @ b.T


def nearest(W_dec: Tensor, experts: int = 1) -> tuple[Tensor, Tensor]:
    """For each decoder row the largest cosine to another one, (F,), and which that is, (F,).

    Args:
        W_dec: (F, D).
        experts: of a Switch SAE: then rows of the same expert do not count. With 1, only the row itself does not.

    Returns:
        -inf and 0 where there is no other row.
    """
    group = torch.arange(len(W_dec), device=W_dec.device)
    if experts > 1:
        group = group * experts // len(W_dec)
    cosine, index = torch.empty(len(W_dec)), torch.empty(len(W_dec), dtype=torch.int64)
    for rows, block in _cosines(W_dec, W_dec):
        best = block.masked_fill(group[rows, None] == group, -torch.inf).max(dim=1)
        cosine[rows], index[rows] = best.values.cpu(), best.indices.cpu()
    return cosine, index


def redundancy(later: Tensor, earlier: Tensor, transport: Tensor | None = None) -> dict[str, float]:
    """How much of a dictionary the one of an earlier layer has: the mean over later rows of the largest cosine.

    Args:
        later: decoder rows (F, D).
        earlier: decoder rows (F', D).
        transport: A (D, D) of the affine map between the layers, which takes the earlier rows d to A d.

    Returns:
        mean, over_0.7, over_0.9 (shares of the later rows).
    """
    if transport is not None:
        earlier = earlier.detach().double() @ transport.T.to(earlier.device)
    best = torch.cat([block.max(dim=1).values for _, block in _cosines(later, earlier)])
    shares = {f"over_{bar:g}": float((best > bar).double().mean()) for bar in (MATCHED, DUPLICATE)}
    return {"mean": float(best.double().mean()), **shares}


def matching(a_FD: Tensor, b_FD: Tensor) -> dict[str, float]:
    """Two dictionaries laid beside each other, row by row, so that the sum of cosines is as large as it can be.

    The assignment is optimal (Jonker and Volgenant's algorithm, scipy). Of dictionaries so large that its matrix would
    have more than 2**26 entries only the first rows of ``a`` are matched, each with any of ``b``.

    Returns:
        matched: how many rows were; cosine: their mean; over_0.7: the share of larger cosines.
    """
    a = unit(a_FD)[: max(1, _ENTRIES // len(b_FD))]
    cosines = torch.cat([block.cpu() for _, block in _cosines(a, b_FD)]).numpy()
    rows, columns = linear_sum_assignment(cosines, maximize=True)
    found = cosines[rows, columns].astype(np.float64)
    return {"matched": len(found), "cosine": float(found.mean()), f"over_{MATCHED:g}": float((found > MATCHED).mean())}


def random_rows(like_FD: Tensor, seed: int) -> Tensor:
    """Rows of the same shape from the unit sphere: what chance makes of the numbers above."""
    return unit(torch.randn(like_FD.shape, generator=torch.Generator().manual_seed(seed)))
