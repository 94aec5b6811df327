"""Directions of decoder rows: duplicates, redundancy between layers, and matches between seeds.

Shapes: F latents (d_sae), D width (d_in).
"""

from collections.abc import Iterator

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from sparsight.common.slices import row_slices

DUPLICATE = 0.9
"""Decoder rows with a larger cosine are duplicates (Mudide et al. 2024, arXiv 2410.08201)."""
MATCHED = 0.7
"""Rows of two SAEs with a larger cosine count as the same feature."""
_ENTRIES = 2**26  # largest cost matrix: half a gigabyte of float64


def unit(rows_FD: Tensor) -> Tensor:
    """Rows scaled to unit length, float32. Zero rows stay zero."""
    return torch.nn.functional.normalize(rows_FD.detach().float(), dim=1)


def _cosines(a_FD: Tensor, b_FD: Tensor, entries: int = 2**24) -> Iterator[tuple[slice, Tensor]]:
    """Cosines of all rows of a with all rows of b, in blocks of rows of a."""
    a, b = unit(a_FD), unit(b_FD)
    for rows in row_slices(len(a), max(1, entries // len(b))):
        yield rows, a[rows] @ b.T


def nearest(W_dec: Tensor, experts: int = 1) -> tuple[Tensor, Tensor]:
    """For each decoder row, the largest cosine to another row, (F,), and the index of that row, (F,).

    Args:
        W_dec: (F, D).
        experts: number of experts of a Switch SAE. If there are several, rows of the same expert are ignored.

    Returns:
        Both arrays; -inf and 0 if there is no other row.
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
    """How much of a later decoder is already in an earlier one: the mean over later rows of the largest cosine.

    Args:
        later: decoder rows (F, D).
        earlier: decoder rows (F', D).
        transport: A (D, D) of the affine map between the layers; it replaces the earlier rows d by A d.

    Returns:
        mean, over_0.7, over_0.9 (shares of later rows above that cosine).
    """
    if transport is not None:
        earlier = earlier.detach().double() @ transport.T.to(earlier.device)
    best = torch.cat([block.max(dim=1).values for _, block in _cosines(later, earlier)])
    shares = {f"over_{bar:g}": float((best > bar).double().mean()) for bar in (MATCHED, DUPLICATE)}
    return {"mean": float(best.double().mean()), **shares}


def pairs(a_FD: Tensor, b_FD: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One-to-one matching of the rows of two decoders that maximises the sum of cosines.

    The assignment is optimal (Jonker and Volgenant's algorithm, scipy). If the cost matrix would have more than 2**26
    entries, only the first rows of ``a`` are matched, each with any row of ``b``.

    Returns:
        For each pair the row of ``a``, the row of ``b``, and their cosine in float64.
    """
    a = unit(a_FD)[: max(1, _ENTRIES // len(b_FD))]
    cosines = torch.cat([block.cpu() for _, block in _cosines(a, b_FD)]).numpy()
    rows, columns = linear_sum_assignment(cosines, maximize=True)
    return rows, columns, cosines[rows, columns].astype(np.float64)


def matching(a_FD: Tensor, b_FD: Tensor) -> dict[str, float]:
    """How well the rows of two decoders match, by :func:`pairs`.

    Returns:
        matched: number of matched rows; cosine: mean cosine; over_0.7: share of cosines above 0.7.
    """
    _, _, cosines = pairs(a_FD, b_FD)
    return {
        "matched": len(cosines),
        "cosine": float(cosines.mean()),
        f"over_{MATCHED:g}": float((cosines > MATCHED).mean()),
    }


def random_rows(like_FD: Tensor, seed: int) -> Tensor:
    """Random rows of the same shape, uniform on the unit sphere. They give the chance level of the numbers above."""
    return unit(torch.randn(like_FD.shape, generator=torch.Generator().manual_seed(seed)))
