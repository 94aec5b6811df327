"""Latents whose decoder rows point the same way: in the same SAE, and in the SAEs of other seeds.

Shapes: F latents (d_sae), D width (d_in), k neighbours.
"""

import numpy as np
import torch
from torch import Tensor

from sparsight.common.slices import row_slices
from sparsight.sae.metrics.geometry import unit

_ENTRIES = 2**24  # largest number of cosines at a time


@torch.no_grad()
def nearest_rows(a_FD: Tensor, b_FD: Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """For each row of a, the k rows of b of the largest cosine and these cosines, (F, k); of equal ones any.

    If both are the same tensor, no row is its own neighbour. There are at most as many neighbours as other rows.
    """
    a, b, same = unit(a_FD), unit(b_FD), a_FD is b_FD
    k = min(k, len(b) - same)
    numbers, cosines = np.empty((len(a), k), np.int64), np.empty((len(a), k), np.float32)
    for rows in row_slices(len(a), max(1, _ENTRIES // len(b))):
        block = a[rows] @ b.T
        if same:
            block[torch.arange(len(block)), torch.arange(rows.start, rows.stop)] = -torch.inf
        values, indices = block.topk(k, dim=1)
        numbers[rows], cosines[rows] = indices.cpu().numpy(), values.cpu().numpy()
    return numbers, cosines
