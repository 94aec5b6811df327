"""Top-k selection by the full encoder product, one block of rows at a time.

Shapes: B batch, D width (d_in), F latents (d_sae), K active latents (k).
"""

import torch
from torch import Tensor


def select(x_BD: Tensor, W_enc_DF: Tensor, b_enc_F: Tensor | None, k: int, rows: int) -> tuple[Tensor, Tensor]:
    """See :class:`sparsight.kernels.functions.Backend`; at most ``rows`` x F pre-activations exist at a time."""
    pre_BK = x_BD.new_empty(len(x_BD), k)
    indices_BK = torch.empty(len(x_BD), k, dtype=torch.int64, device=x_BD.device)
    for x, pre, indices in zip(x_BD.split(rows), pre_BK.split(rows), indices_BK.split(rows), strict=True):
        product = x @ W_enc_DF if b_enc_F is None else torch.addmm(b_enc_F, x, W_enc_DF)
        torch.topk(product, k, dim=1, sorted=False, out=(pre, indices))
    return pre_BK, indices_BK
