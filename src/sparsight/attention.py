"""Attention with some heads switched off, per image: masked (the reference) and gathered (not computed).

Shapes: B batch, T tokens, D width, H heads, K kept heads, C channels of a head.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import Attention
from torch import Tensor, nn

from sparsight.errors import SparsightError

HeadMode = Literal["masked", "gathered"]


def attend(attention: nn.Module, x_BTD: Tensor, keep_BH: Tensor, mode: HeadMode) -> Tensor:
    """Output (B, T, D) of an attention layer in which image b uses the heads with ``keep_BH[b]`` true.

    A head that is off contributes nothing before the output projection; the projection's bias stays, also
    where no head is kept. ``masked`` computes every head and multiplies by 0 or 1, which passes gradients
    to a float ``keep_BH``. ``gathered`` computes the kept heads only, image by image.

    Raises:
        SparsightError: the layer is not timm's plain Attention, or the mask's shape or dtype does not fit.
    """
    # exact class: a subclass computes something else
    if type(attention) is not Attention or attention.gate is not None or not isinstance(attention.norm, nn.Identity):
        raise SparsightError(f"head masks work on timm's plain Attention, not on {type(attention).__name__}")
    if keep_BH.shape != (len(x_BTD), attention.num_heads):
        wanted = (len(x_BTD), attention.num_heads)
        raise SparsightError(f"head mask: expected shape {wanted}, got {tuple(keep_BH.shape)}")
    if mode == "masked":
        return _masked(attention, x_BTD, keep_BH)
    if mode == "gathered":
        if keep_BH.dtype != torch.bool:
            raise SparsightError(f"head mask: gathered heads need a bool mask, got {keep_BH.dtype}")
        return _gathered(attention, x_BTD, keep_BH)
    raise SparsightError(f"heads: {mode!r} is neither 'masked' nor 'gathered'")


def _masked(attention: Attention, x_BTD: Tensor, keep_BH: Tensor) -> Tensor:
    everything = torch.arange(attention.num_heads, device=x_BTD.device)
    out_BHTC = _heads(attention, x_BTD, everything) * keep_BH[:, :, None, None].to(x_BTD.dtype)
    return _project(attention, out_BHTC, everything, attention.proj.bias)


def _gathered(attention: Attention, x_BTD: Tensor, keep_BH: Tensor) -> Tensor:
    """Images are grouped by mask, or by head where there are more masks than heads: the fewer, larger products."""
    masks_GH, group_B = torch.unique(keep_BH, dim=0, return_inverse=True)
    if len(masks_GH) <= attention.num_heads:
        out_BTD = x_BTD.new_empty(*x_BTD.shape[:2], attention.proj.out_features)
        for group, mask_H in enumerate(masks_GH):
            rows, kept = torch.nonzero(group_B == group)[:, 0], torch.nonzero(mask_H)[:, 0]
            out_BTD[rows] = _project(attention, _heads(attention, x_BTD[rows], kept), kept, attention.proj.bias)
        return out_BTD
    out_BTD = x_BTD.new_zeros(*x_BTD.shape[:2], attention.proj.out_features)
    for head in range(attention.num_heads):
        rows, kept = torch.nonzero(keep_BH[:, head])[:, 0], torch.tensor([head], device=x_BTD.device)
        out_BTD[rows] += _project(attention, _heads(attention, x_BTD[rows], kept), kept, None)
    return out_BTD if attention.proj.bias is None else out_BTD + attention.proj.bias


def _heads(attention: Attention, x_BTD: Tensor, kept_K: Tensor) -> Tensor:
    """Outputs of the kept heads before the projection, (B, K, T, C)."""
    (B, T, D), H, C, K = x_BTD.shape, attention.num_heads, attention.head_dim, len(kept_K)
    if K == 0:
        return x_BTD.new_zeros(B, 0, T, C)
    weight, bias = attention.qkv.weight, attention.qkv.bias
    if K < H:
        weight = weight.view(3, H, C, D)[:, kept_K].reshape(3 * K * C, D)
        bias = None if bias is None else bias.view(3, H, C)[:, kept_K].reshape(3 * K * C)
    q, k, v = F.linear(x_BTD, weight, bias).reshape(B, T, 3, K, C).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(attention.q_norm(q), attention.k_norm(k), v)


def _project(attention: Attention, out_BKTC: Tensor, kept_K: Tensor, bias: Tensor | None) -> Tensor:
    B, K, T, C = out_BKTC.shape
    weight = attention.proj.weight
    if attention.num_heads > K:
        weight = weight.view(len(weight), attention.num_heads, C)[:, kept_K].reshape(len(weight), K * C)
    return F.linear(out_BKTC.transpose(1, 2).reshape(B, T, K * C), weight, bias)
