"""Attention with some heads switched off per image: masked (the reference), or gathered (only kept heads computed).

Shapes: B batch, T tokens, R tokens that are read, U other tokens, D width, H heads, K kept heads, C channels of a
head, G distinct head masks of a batch, S versions of images.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat
from torch import Tensor, nn

from sparsight.backbones.attention_layers import Layer, read_layer
from sparsight.common.devices import sent
from sparsight.common.errors import SparsightError

HeadMode = Literal["masked", "gathered"]


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
    q, k, v = _qkv(layer, x_BTD, kept_K, layer.n_prefix)
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


def _qkv(layer: Layer, x_BTD: Tensor, kept_K: Tensor | None, n_prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, (B, K, T, C) each, of tokens of which the first ``n_prefix`` are not rotated."""
    (B, T), H = x_BTD.shape[:2], layer.n_heads
    C = layer.proj.in_features // H
    K = H if kept_K is None else len(kept_K)

    def pick(rows: Tensor) -> Tensor:
        """The kept heads' rows of a weight (n H C, D) or bias (n H C)."""
        if kept_K is None or K == H:
            return rows
        return rows.view(-1, H, C, *rows.shape[1:])[:, kept_K].flatten(0, 2)

    x = x_BTD.transpose(0, 1) if layer.tokens_first else x_BTD
    products = [F.linear(x, pick(weight), None if bias is None else pick(bias)) for weight, bias in layer.linears]
    if layer.tokens_first:
        products = [product.transpose(0, 1) for product in products]
    qkv = torch.cat([product.reshape(B, T, 3 // len(products), K, C) for product in products], dim=2)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    q, k = q if layer.q_norm is None else layer.q_norm(q), k if layer.k_norm is None else layer.k_norm(k)
    if layer.rope is not None and n_prefix < T:
        rope = layer.rope[kept_K] if layer.rope.ndim == 3 and kept_K is not None else layer.rope
        q, k = (_rotate(layer, part, rope, n_prefix).type_as(v) for part in (q, k))
    return q, k, v


def _rotate(layer: Layer, part_BKTC: Tensor, rope: Tensor, n_prefix: int) -> Tensor:
    prefix, patches = part_BKTC[:, :, :n_prefix], part_BKTC[:, :, n_prefix:]
    return torch.cat([prefix, apply_rot_embed_cat(patches, rope, half=layer.rope_half)], dim=2)


class FixedPatches:
    """Attention of the first R tokens of images whose other tokens do not change.

    Keys and values of the other tokens are computed once. After that, a version of the first tokens costs their own
    products and one look at the others, however many tokens there are.

    Args:
        attention: the layer.
        x_BTD: its input.
        n_read: R, at most the number of tokens in front of the patches.
        shared: see :func:`attend`.
    """

    def __init__(self, attention: nn.Module, x_BTD: Tensor, n_read: int, **shared: Tensor) -> None:
        self.layer, self.n_read = read_layer(attention, **shared), n_read
        rest = _qkv(self.layer, x_BTD[:, n_read:], None, max(0, self.layer.n_prefix - n_read))
        self._k_BHUC, self._v_BHUC = (part.contiguous() for part in rest[1:])

    def attend(self, x_SRD: Tensor, images_S: Tensor, keep_SH: Tensor) -> Tensor:
        """Output (S, R, D) like :func:`attend`, masked.

        Args:
            x_SRD: versions of the first tokens.
            images_S: the image that each is a version of, int64.
            keep_SH: the heads that each uses.
        """
        layer = self.layer
        q, k_own, v_own = _qkv(layer, x_SRD, None, self.n_read)
        k, v = (torch.cat(parts, dim=2) for parts in ((k_own, self._k_BHUC[images_S]), (v_own, self._v_BHUC[images_S])))
        bias = None if layer.bias_HTT is None else layer.bias_HTT[None, :, : self.n_read].to(q.dtype)
        out_SHRC = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        if layer.scale_H11 is not None:
            out_SHRC = out_SHRC * layer.scale_H11
        out_SRHC = out_SHRC.transpose(1, 2)
        if layer.mix is not None:
            out_SRHC = layer.mix(x_SRD, out_SRHC.flatten(2)).unflatten(2, (layer.n_heads, -1))
        return _project(layer, out_SRHC * keep_SH[:, None, :, None].to(out_SRHC.dtype), None, layer.proj.bias)


def _project(layer: Layer, out_BTKC: Tensor, kept_K: Tensor | None, bias: Tensor | None) -> Tensor:
    B, T, K, C = out_BTKC.shape
    weight = layer.proj.weight
    if kept_K is not None and layer.n_heads > K:
        weight = weight.view(len(weight), layer.n_heads, C)[:, kept_K].reshape(len(weight), K * C)
    if layer.tokens_first:
        rows = out_BTKC.transpose(0, 1).reshape(T * B, K * C)
        return F.linear(rows, weight, bias).view(T, B, -1).transpose(0, 1)
    return F.linear(out_BTKC.reshape(B, T, K * C), weight, bias)
