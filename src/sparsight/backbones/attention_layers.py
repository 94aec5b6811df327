"""The parts of an attention layer, under the same names for every class that has heads.

Shapes: B batch, T tokens, D width, H heads, C channels of a head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import Attention, AttentionRope
from timm.models.beit import Attention as BeitAttention
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from sparsight.common.errors import SparsightError


@dataclass(frozen=True)
class Layer:
    """The parts of an attention layer, under the same names for every class."""

    n_heads: int
    linears: list[tuple[Tensor, Tensor | None]]
    """Weight and bias of queries, keys, values: one fused pair, rows ordered (3, H, C), or three pairs (H, C)."""
    proj: nn.Linear
    q_norm: Callable[[Tensor], Tensor] | None = None
    k_norm: Callable[[Tensor], Tensor] | None = None
    bias_HTT: Tensor | None = None
    """Added to the attention scores."""
    rope: Tensor | None = None
    """Rotary embedding of the patches, (patches, 2C), or (H, patches, 2C) if heads differ."""
    n_prefix: int = 0
    """Number of leading tokens that are not rotated."""
    rope_half: bool = False
    """Rotary layout: halves instead of interleaved pairs."""
    scale_H11: Tensor | None = None
    """Factor on each head's output."""
    mix: Callable[[Tensor, Tensor], Tensor] | None = None
    """(input, heads' outputs (B, T, HC)) -> input of the projection; needs the outputs of all heads."""
    tokens_first: bool = False
    """Whether products take rows in the order (T, B), like torch's MultiheadAttention, to give the same bits."""


def read_layer(attention: nn.Module, **shared: Tensor) -> Layer:
    """The parts of a layer of timm (Attention, AttentionRope, EVA, BEiT), torch or open_clip.

    Raises:
        SparsightError: another class, or an option of these classes with which heads cannot be separated.
    """
    if isinstance(attention, nn.MultiheadAttention):
        weight, bias = attention.in_proj_weight, attention.in_proj_bias
        return Layer(attention.num_heads, [(weight, bias)], attention.out_proj, tokens_first=True)
    reader = _READERS.get(f"{type(attention).__module__}.{type(attention).__qualname__}")
    if reader is None:
        raise SparsightError(f"heads of {type(attention).__name__} cannot be switched; known layers: {_KNOWN}")
    return reader(attention, **shared)


def _plain(attention: Any) -> Layer:
    return Layer(
        attention.num_heads,
        [(attention.qkv.weight, attention.qkv.bias)],
        attention.proj,
        attention.q_norm,
        attention.k_norm,
        mix=_mix(attention),
    )


def _rope(attention: Any, rope: Tensor | None = None) -> Layer:
    """Timm's EvaAttention and AttentionRope: one fused or three separate products, rotary positions."""
    if getattr(attention, "num_kv_groups", 1) > 1:
        raise SparsightError("heads that share keys and values (grouped-query attention) cannot be switched")
    if attention.qkv is None:
        linears = [(linear.weight, linear.bias) for linear in (attention.q_proj, attention.k_proj, attention.v_proj)]
    else:
        linears = [(attention.qkv.weight, _separate_bias(attention, attention.qkv.bias))]
    return Layer(
        attention.num_heads,
        linears,
        attention.proj,
        attention.q_norm,
        attention.k_norm,
        rope=rope,
        n_prefix=attention.num_prefix_tokens,
        rope_half=attention.rotate_half,
        mix=_mix(attention),
    )


def _beit(attention: Any, shared_rel_pos_bias: Tensor | None = None) -> Layer:
    bias = None if attention.relative_position_bias_table is None else attention._get_rel_pos_bias()[0]
    if shared_rel_pos_bias is not None:
        bias = shared_rel_pos_bias if bias is None else bias + shared_rel_pos_bias
    linears = [(attention.qkv.weight, _separate_bias(attention, None))]
    return Layer(attention.num_heads, linears, attention.proj, bias_HTT=bias)


def _open_clip(attention: Any) -> Layer:
    if attention.logit_scale is not None:
        raise SparsightError("heads of open_clip's scaled-cosine attention cannot be switched")
    inner = attention.ln_inner
    return Layer(
        attention.num_heads,
        [(attention.in_proj_weight, attention.in_proj_bias)],
        attention.out_proj,
        attention.ln_q,
        attention.ln_k,
        scale_H11=attention.head_scale,
        mix=None if isinstance(inner, nn.Identity) else lambda x_BTD, out: inner(out),
    )


_READERS: dict[str, Callable[..., Layer]] = {
    f"{cls.__module__}.{cls.__qualname__}": reader
    for cls, reader in ((Attention, _plain), (AttentionRope, _rope), (EvaAttention, _rope), (BeitAttention, _beit))
} | {"open_clip.transformer.Attention": _open_clip}  # by name: importing open_clip takes seconds
_KNOWN = "timm's Attention, AttentionRope, EvaAttention and BEiT attention, torch's MultiheadAttention, open_clip's own"


def _separate_bias(attention: Any, fused: Tensor | None) -> Tensor | None:
    """EVA and BEiT store the biases of queries and values separately and have none for keys."""
    if getattr(attention, "q_bias", None) is None:
        return fused
    return torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))


def _mix(attention: Any) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Timm's norm and sigmoid gate between the heads and the projection."""
    if attention.gate is None and isinstance(attention.norm, nn.Identity):
        return None

    def mix(x_BTD: Tensor, out: Tensor) -> Tensor:
        out = attention.norm(out)
        return out if attention.gate is None else out * attention.gate(x_BTD).sigmoid()

    return mix
