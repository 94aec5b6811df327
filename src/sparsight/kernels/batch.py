"""Selection over a whole batch on a GPU, in shapes that do not depend on where the largest entries are.

A row may hold any number of the B K largest pre-activations, and the host must not ask how many. So the entries are
sorted by group (the row, or row and range of latents) and cut into parts of W entries. Part s // W + g is the first of
group g, whose entries start at s. Its n entries end before the first part of the next group, because
(s + n) // W + 1 >= s // W + ceil(n / W). N = B K entries in G groups thus have N // W + G parts, wherever they are.

Shapes: B batch, D width (d_in), F latents (d_sae), K active latents (k), N entries, G groups, V parts, W entries of a
part.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

_PRODUCT = 2**28  # pre-activations that exist at a time: 1 GiB in fp32
_SLICES = 16  # PyTorch sorts slices of 100,000 entries where there are up to ten (should_use_sort); of more it selects


def select(x_BD: Tensor, W_enc_DF: Tensor, b_enc_F: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """The B K largest entries of x W_enc + b_enc and their places, row * F + latent: (N,) both, in any order."""
    assert b_enc_F is not None
    n, d_sae = len(x_BD) * k, W_enc_DF.shape[1]
    found: list[tuple[Tensor, Tensor]] = []
    rows = max(1, _PRODUCT // d_sae)
    for start in range(0, len(x_BD), rows):
        pre = torch.addmm(b_enc_F, x_BD[start : start + rows], W_enc_DF).flatten()
        slices = pre.view(math.gcd(len(pre), _SLICES), -1)
        width = slices.shape[1]
        values, places = slices.topk(min(n, width), dim=1, sorted=False)
        offset = torch.arange(start * d_sae, start * d_sae + len(pre), width, device=pre.device)
        found.append((values.flatten(), (places + offset.unsqueeze(1)).flatten()))
    values, places = (torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*found, strict=True))
    values, best = values.topk(n, sorted=False)
    return values, places[best]


def cut(values_N: Tensor, keys_N: Tensor, n_groups: int, d_sae: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Entries in parts of ``width``; the rest of a part is padding of value 0.

    Args:
        keys_N: group * F + latent of each entry.

    Returns:
        values (V, W), latents (V, W) int64, and the group of each part, (V,) int64, rising.
    """
    keys_N, order_N = keys_N.sort()
    starts = torch.searchsorted(keys_N, torch.arange(0, (n_groups + 1) * d_sae, d_sae, device=keys_N.device))
    n_parts = len(keys_N) // width + n_groups
    values_VW, latents_VW = values_N.new_empty(n_parts, width), keys_N.new_empty(n_parts, width)
    groups_V = keys_N.new_empty(n_parts)
    _cut[(n_groups,)](
        values_N, keys_N, order_N, starts, values_VW, latents_VW, groups_V, d_sae, width, 32, enable_fp_fusion=True
    )
    return values_VW, latents_VW, groups_V


@triton.jit
def _cut(values, keys, order, starts, out_values, out_latents, out_groups, d_sae, width, BLOCK: tl.constexpr):
    """One group: its parts, and padding up to the first part of the next group."""
    group = tl.program_id(0).to(tl.int64)
    start = tl.load(starts + group)
    end = tl.load(starts + group + 1)
    first = (start // width + group) * width
    last = (end // width + group + 1) * width
    for block in range(first, last, BLOCK):
        slot = block + tl.arange(0, BLOCK)
        n = start + slot - first
        key = tl.load(keys + n, mask=n < end, other=0)
        place = tl.load(order + n, mask=n < end, other=0)
        tl.store(out_values + slot, tl.load(values + place, mask=n < end, other=0.0), mask=slot < last)
        tl.store(out_latents + slot, key % d_sae, mask=slot < last)
        tl.store(out_groups + slot // width, group + tl.zeros((BLOCK,), tl.int64), mask=slot < last)
