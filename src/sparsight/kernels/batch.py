"""Selection over a whole batch on a GPU, in shapes that do not depend on where the largest entries are.

A row may hold any number of the B K largest pre-activations, and the host must not ask how many. So the entries are
sorted by group (the row, or row and range of latents) and cut into parts of w entries. Part s // w + g is the first of
group g, whose entries start at s. Its n entries end before the first part of the next group, because
(s + n) // w + 1 >= s // w + ceil(n / w). With N = B K entries and G groups there are N // w + G parts, whatever the data.

Shapes: B batch, D width (d_in), F latents (d_sae), K active latents (k), N entries, G groups, V parts, w entries of a
part.
"""

import math

import torch
from torch import Tensor

_PRODUCT = 2**28  # pre-activations that exist at a time: 1 GiB in fp32
_SLICES = 16  # PyTorch sorts up to ten long slices; of more it selects, at a fraction of the time and memory


def select(x_BD: Tensor, W_enc_DF: Tensor, b_enc_F: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The B K largest entries of x W_enc + b_enc and their places, row * F + latent: (N,) both, in any order."""
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
        values (V, w), latents (V, w) int64, and the group of each part, (V,), rising.
    """
    keys_N, order_N = keys_N.sort()
    n, n_parts = len(keys_N), len(keys_N) // width + n_groups
    steps = torch.arange(max(n, n_parts, n_groups + 1), device=keys_N.device)
    starts = torch.searchsorted(keys_N, steps[: n_groups + 1] * d_sae)
    first = starts // width + steps[: n_groups + 1]
    slot_N = (first * width - starts)[keys_N // d_sae] + steps[:n]
    values_VW = values_N.new_zeros(n_parts * width).index_copy_(0, slot_N, values_N[order_N])
    latents_VW = keys_N.new_zeros(n_parts * width).index_copy_(0, slot_N, keys_N % d_sae)
    groups_V = torch.searchsorted(first[1:], steps[:n_parts], right=True)
    return values_VW.view(n_parts, width), latents_VW.view(n_parts, width), groups_V
