"""Top-k selection within each row's expert on a GPU: one batched product, whose shape no expert's share changes.

A loop over the experts would wait for their numbers of rows and launch a dozen operations for each. Here every expert
gets whole blocks of R = B / E rows. At most 2 E blocks have a row, whatever the shares, so 2 E are computed: at most
twice the products that the rows need.

Shapes: B batch, D width (d_in), F latents (d_sae), K active latents (k), E experts, R rows of a block, N blocks.
"""

import math

import torch
from torch import Tensor


def select(
    x_BD: Tensor, W_enc_DF: Tensor, b_enc_F: Tensor | None, k: int, expert_B: Tensor, n_experts: int
) -> tuple[Tensor, Tensor]:
    """The k largest entries of each row of x W_enc + b_enc among its expert's latents, and their numbers, (B, K)."""
    d_in, width = x_BD.shape[1], W_enc_DF.shape[1] // n_experts
    size = math.ceil(len(x_BD) / n_experts)
    n_blocks = len(x_BD) // size + n_experts
    # Expert e begins with block s // R + e, where s is the number of rows before its own: no two share a block.
    sorted_B, order_B = expert_B.sort(stable=True)
    steps = torch.arange(max(len(x_BD), n_blocks, n_experts + 1), device=x_BD.device)
    starts = torch.searchsorted(sorted_B, steps[: n_experts + 1])
    blocks = starts // size + steps[: n_experts + 1]
    before = torch.sub(starts, blocks, alpha=size)
    place_B = torch.empty_like(order_B).index_copy_(0, order_B, steps[: len(x_BD)] - before[sorted_B])
    expert_N = torch.searchsorted(blocks[1:], steps[:n_blocks], right=True)
    x_NRD = x_BD.new_zeros(n_blocks * size, d_in).index_copy_(0, place_B, x_BD).view(n_blocks, size, d_in)
    W_NDP = W_enc_DF.T.unflatten(0, (n_experts, width))[expert_N].transpose(1, 2)
    product = x_NRD @ W_NDP
    if b_enc_F is not None:
        product += b_enc_F.view(n_experts, width)[expert_N].unsqueeze(1)
    pre, columns = product.flatten(0, 1).topk(k, dim=1, sorted=False)
    return pre[place_B], torch.add(columns[place_B], expert_B.unsqueeze(1), alpha=width)
