"""The backend that tests compare the others with: plain dense PyTorch, any device, any floating-point type.

Shapes: B batch, D width (d_in), F latents (d_sae), K active latents (k).
"""

import torch
from torch import Tensor


def select(x_BD: Tensor, W_enc_DF: Tensor, b_enc_F: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """See :class:`sparsight.kernels.functions.Backend`."""
    pre_BF = x_BD @ W_enc_DF if b_enc_F is None else torch.addmm(b_enc_F, x_BD, W_enc_DF)
    pre_BK, indices_BK = pre_BF.topk(k, dim=1)
    return pre_BK, indices_BK


def combine(values_BK: Tensor, indices_BK: Tensor, W_FD: Tensor) -> Tensor:
    """See :class:`sparsight.kernels.functions.Backend`."""
    return _dense(values_BK, indices_BK, len(W_FD)) @ W_FD


def dots(g_BD: Tensor, W_FD: Tensor, indices_BK: Tensor, active_BK: Tensor) -> Tensor:
    """See :class:`sparsight.kernels.functions.Backend`."""
    return (g_BD @ W_FD.T).gather(1, indices_BK) * (active_BK != 0)


def accumulate(values_BK: Tensor, indices_BK: Tensor, g_BD: Tensor, n_rows: int) -> tuple[Tensor, Tensor]:
    """See :class:`sparsight.kernels.functions.Backend`."""
    z_BF = _dense(values_BK, indices_BK, n_rows)
    return z_BF.T @ g_BD, z_BF.sum(dim=0)


def _dense(values_BK: Tensor, indices_BK: Tensor, n_latents: int) -> Tensor:
    """Codes as a dense (B, F) tensor.

    Values are added, because padding may repeat the index of an active latent. index_put_ adds in a fixed order.
    """
    z_BF = values_BK.new_zeros(len(values_BK), n_latents)
    rows_B1 = torch.arange(len(values_BK), device=values_BK.device).unsqueeze(1)
    return z_BF.index_put_((rows_B1, indices_BK), values_BK, accumulate=True)
