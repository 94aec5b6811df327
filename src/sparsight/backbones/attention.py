"""Attention with some heads switched off per image: masked (the reference), or gathered (only kept heads computed).

Shapes: B batch, T tokens, R tokens that are read, D width, H heads, K kept heads, C channels of a head, G distinct
head masks of a batch.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import Attention, AttentionRope, apply_rot_embed_cat
from timm.models.beit import Attention as BeitAttention
from timm.models.eva import EvaAttention
from torch import Tensor, nn

from sparsight.common.devices import sent
from sparsight.common.errors import SparsightError

HeadMode = Literal["masked", "gathered"]


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


def attend(attention: nn.Module, x_BTD: Tensor, keep_BH: Tensor, mode: HeadMode, **shared: Tensor) -> Tensor:
    """Output (B, T, D) of an attention layer in which image b uses the heads with ``keep_BH[b]`` true.

    A head that is off adds nothing to the input of the output projection. The projection's bias is always added,
    even if no head is kept. ``masked`` computes every head and multiplies by 0 or 1, which passes gradients to a
    float ``keep_BH``; with every head on it gives the layer's own bits. ``gathered`` computes only the heads that
    each image keeps. ``shared`` holds the layer's arguments other than x (``rope``, a position bias).

    Raises:
        SparsightError: the layer's class has no heads that can be switched (gathered: no heads that can be
            computed alone), or the mask's shape or dtype does not fit.
    """
    layer = read_layer(attention, **shared)
    if keep_BH.shape != (len(x_BTD), layer.n_heads):
        expected = (len(x_BTD), layer.n_heads)
        raise SparsightError(f"head mask: expected shape {expected}, got {tuple(keep_BH.shape)}")
    if mode == "masked":
        out_BTHC = _heads(layer, x_BTD, None)
        return _project(layer, out_BTHC * keep_BH[:, None, :, None].to(out_BTHC.dtype), None, layer.proj.bias)
    if mode == "gathered":
        if keep_BH.dtype != torch.bool:
            raise SparsightError(f"head mask: gathered heads need a bool mask, got {keep_BH.dtype}")
        if layer.mix is not None:
            raise SparsightError(
                f"heads: this {type(attention).__name__} normalises or gates all heads together, so none can be left "
                "uncomputed; use heads='masked'"
            )
        return _gathered(layer, x_BTD, keep_BH)
    raise SparsightError(f"heads: {mode!r} is neither 'masked' nor 'gathered'")


@contextmanager
def narrowed(linears: Sequence[nn.Linear], keep_BH: Tensor, mode: HeadMode) -> Iterator[None]:
    """Inside ``with``, these maps read only the channels of the heads that image b keeps (AdaViT's coupling of fc1).

    Channels h C to (h + 1) C belong to head h, with C = D / H. ``mode`` as for :func:`attend`.
    """
    for linear in linears:
        linear.forward = _Narrow(linear, keep_BH, mode)  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        for linear in linears:
            del linear.forward  # deletes the instance's, so the class's own applies again


@dataclass(frozen=True)
class _Narrow:
    linear: nn.Linear
    keep_BH: Tensor
    mode: HeadMode

    def __call__(self, x_BTD: Tensor) -> Tensor:
        H, weight, bias = self.keep_BH.shape[1], self.linear.weight, self.linear.bias
        if self.mode == "masked":
            keep_BD = self.keep_BH.repeat_interleave(x_BTD.shape[2] // H, dim=1)
            return F.linear(x_BTD * keep_BD[:, None].to(x_BTD.dtype), weight, bias)

        def run(rows_b: Tensor, kept_K: Tensor, bias: Tensor | None) -> Tensor:
            channels = torch.arange(x_BTD.shape[2], device=x_BTD.device).view(H, -1)[kept_K].flatten()
            return F.linear(x_BTD[rows_b][:, :, channels], weight[:, channels], bias)

        return _by_group(x_BTD, self.keep_BH, len(weight), bias, run)


def head_outputs(attention: nn.Module, x_BTD: Tensor, n_read: int | None = None, /, **shared: Tensor) -> Tensor:
    """Each head's input to the output projection, (B, T, H, C), or (B, R, H, C) for the first ``n_read`` tokens.

    ``proj(head_outputs.flatten(2))`` is the layer's output; columns h C to (h + 1) C of the projection's
    weight belong to head h. Raises SparsightError like :func:`attend`.
    """
    return _heads(read_layer(attention, **shared), x_BTD, None, n_read)


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


def _gathered(layer: Layer, x_BTD: Tensor, keep_BH: Tensor) -> Tensor:
    def run(rows_b: Tensor, kept_K: Tensor, bias: Tensor | None) -> Tensor:
        return _project(layer, _heads(layer, x_BTD[rows_b], kept_K), kept_K, bias)

    return _by_group(x_BTD, keep_BH, layer.proj.out_features, layer.proj.bias, run)


def _by_group(
    x_BTD: Tensor,
    keep_BH: Tensor,
    width: int,
    bias: Tensor | None,
    run: Callable[[Tensor, Tensor, Tensor | None], Tensor],
) -> Tensor:
    """Group images by mask, or by head if there are more masks than heads, to get fewer and larger products.

    Args:
        x_BTD: the input.
        keep_BH: bool.
        width: width of the output.
        bias: added once to every image.
        run: (images, kept heads, bias) -> their part of the output.
    """
    keep = keep_BH.cpu()  # the one wait for a GPU: the groups decide the sizes of all products
    masks_GH, group_B = torch.unique(keep, dim=0, return_inverse=True)
    H, shape = keep_BH.shape[1], (*x_BTD.shape[:2], width)
    if len(masks_GH) <= H:
        rows_G = _numbers([group_B == g for g in range(len(masks_GH))], x_BTD.device)
        outs = [run(rows, kept, bias) for rows, kept in zip(rows_G, _numbers(masks_GH, x_BTD.device), strict=True)]
        out_BTD = outs[0].new_empty(shape)
        for rows, out in zip(rows_G, outs, strict=True):
            out_BTD[rows] = out
        return out_BTD
    total_BTD = x_BTD.new_zeros(shape)  # float32 like the stream, even if the parts are bfloat16
    heads = torch.arange(H, device=x_BTD.device).split(1)
    for rows, head in zip(_numbers(keep.T, x_BTD.device), heads, strict=True):
        total_BTD[rows] += run(rows, head, None)
    return total_BTD if bias is None else total_BTD + bias


def _numbers(masks: Iterable[Tensor], device: torch.device) -> list[Tensor]:
    """The places where each mask of the host is true, int64, on the device after one copy."""
    places = [torch.nonzero(mask)[:, 0] for mask in masks]
    return list(sent(torch.cat(places), device).split([len(numbers) for numbers in places]))


def _heads(layer: Layer, x_BTD: Tensor, kept_K: Tensor | None, n_read: int | None = None) -> Tensor:
    """Input of the projection from the kept heads (None: all), (B, T, K, C), or (B, R, K, C) for the first tokens."""
    B, T, H = *x_BTD.shape[:2], layer.n_heads
    C = layer.proj.in_features // H
    K = H if kept_K is None else len(kept_K)
    if K == 0:
        return x_BTD.new_zeros(B, T, 0, C)

    def pick(rows: Tensor) -> Tensor:
        """The kept heads' rows of a weight (n H C, D) or bias (n H C)."""
        if kept_K is None or K == H:
            return rows
        return rows.view(-1, H, C, *rows.shape[1:])[:, kept_K].flatten(0, 2)

    x = x_BTD.transpose(0, 1) if layer.tokens_first else x_BTD
    products = [F.linear(x, pick(weight), None if bias is None else pick(bias)) for weight, bias in layer.linears]
    if layer.tokens_first:
        products = [product.transpose(0, 1) for product in products]
    qkv = torch.cat([product.reshape(B, T, 3 // len(products), K, C) for product in products], dim=2).permute(
        2, 0, 3, 1, 4
    )
    q, k, v = qkv
    q, k = q if layer.q_norm is None else layer.q_norm(q), k if layer.k_norm is None else layer.k_norm(k)
    if layer.rope is not None:
        rope = layer.rope[kept_K] if layer.rope.ndim == 3 and kept_K is not None else layer.rope
        q, k = (_rotate(layer, part, rope).type_as(v) for part in (q, k))
    bias = layer.bias_HTT
    bias = bias[kept_K] if bias is not None and kept_K is not None else bias
    if n_read is not None:  # few tokens attend to every token
        q, x_BTD, bias = q[:, :, :n_read], x_BTD[:, :n_read], None if bias is None else bias[:, :n_read]
    out_BKTC = F.scaled_dot_product_attention(q, k, v, attn_mask=None if bias is None else bias[None].to(q.dtype))
    if layer.scale_H11 is not None:
        out_BKTC = out_BKTC * (layer.scale_H11 if kept_K is None else layer.scale_H11[kept_K])
    out_BTKC = out_BKTC.transpose(1, 2)
    if layer.mix is None:
        return out_BTKC
    assert kept_K is None, "attend refuses gathered heads where heads are mixed"
    return layer.mix(x_BTD, out_BTKC.flatten(2)).unflatten(2, (H, C))


def _rotate(layer: Layer, part_BKTC: Tensor, rope: Tensor) -> Tensor:
    prefix, patches = part_BKTC[:, :, : layer.n_prefix], part_BKTC[:, :, layer.n_prefix :]
    return torch.cat([prefix, apply_rot_embed_cat(patches, rope, half=layer.rope_half)], dim=2)


def _project(layer: Layer, out_BTKC: Tensor, kept_K: Tensor | None, bias: Tensor | None) -> Tensor:
    B, T, K, C = out_BTKC.shape
    weight = layer.proj.weight
    if kept_K is not None and layer.n_heads > K:
        weight = weight.view(len(weight), layer.n_heads, C)[:, kept_K].reshape(len(weight), K * C)
    if layer.tokens_first:
        rows = out_BTKC.transpose(0, 1).reshape(T * B, K * C)
        return F.linear(rows, weight, bias).view(T, B, -1).transpose(0, 1)
    return F.linear(out_BTKC.reshape(B, T, K * C), weight, bias)
