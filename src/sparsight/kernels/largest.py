"""The k largest entries of wide rows on a GPU, where torch.topk reads a row once for each digit of its radix.

A group is a set of 16 latents. The k groups with the largest maxima hold k entries that no entry outside of them
exceeds. So a row is read once, for the maxima of its groups, and only k groups are searched. All shapes are fixed,
and nothing waits for the device. (On a CPU torch.topk is as fast.)

Shapes: B batch, F latents (d_sae), K active latents (k), G groups, M entries that are searched.
"""

import torch
from torch import Tensor

_GROUP = 16


def largest(pre_BF: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest entries of each row and their columns, (B, K) both, in any order; NaN counts as the largest."""
    n_groups = pre_BF.shape[1] // _GROUP
    if n_groups < 4 * k:
        return pre_BF.topk(k, dim=1, sorted=False)
    grouped = n_groups * _GROUP
    maxima_BG = pre_BF[:, :grouped].unflatten(1, (_GROUP, n_groups)).amax(dim=1)
    chosen_BK = maxima_BG.topk(k, dim=1, sorted=False).indices
    offsets = torch.arange(0, grouped, n_groups, device=pre_BF.device).unsqueeze(1)
    columns_BM = (chosen_BK.unsqueeze(1) + offsets).flatten(1)
    if grouped < pre_BF.shape[1]:
        rest = torch.arange(grouped, pre_BF.shape[1], device=pre_BF.device)
        columns_BM = torch.cat([columns_BM, rest.expand(len(pre_BF), -1)], dim=1)
    pre_BK, places_BK = pre_BF.gather(1, columns_BM).topk(k, dim=1, sorted=False)
    return pre_BK, columns_BM.gather(1, places_BK)
