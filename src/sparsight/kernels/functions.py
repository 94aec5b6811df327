"""Differentiable operations on sparse codes, written once for the primitives of any backend.

Shapes: B batch, D width (d_in), F latents (d_sae), K active latents (k), E experts.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsight.kernels import routing

Select = Callable[[Tensor, Tensor, Tensor | None, int], tuple[Tensor, Tensor]]


class Backend(Protocol):
    """Functions that a backend module provides. They do not use autograd; an entry with value 0 is padding."""

    def select(self, x_BD: Tensor, W_enc_DF: Tensor, b_enc_F: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
        """The k largest entries of each row of x W_enc + b_enc and their columns, (B, K) both, in any order."""
        ...

    def combine(self, values_BK: Tensor, indices_BK: Tensor, W_FD: Tensor) -> Tensor:
        """Per row, the sum of values times rows of W, (B, D)."""
        ...

    def dots(self, g_BD: Tensor, W_FD: Tensor, indices_BK: Tensor, active_BK: Tensor) -> Tensor:
        """Products g_b . W[index], (B, K); 0 where ``active``, of any type, is 0."""
        ...

    def accumulate(self, values_BK: Tensor, indices_BK: Tensor, g_BD: Tensor, n_rows: int) -> tuple[Tensor, Tensor]:
        """Per latent, the sum over its entries of value times g_b, (F, D), and the sum of the values, (F,)."""
        ...


class _Encode(torch.autograd.Function):
    """Gradients of (x - center) W_enc + b_enc at chosen latents; the values are already known."""

    @staticmethod
    def forward(
        ctx: Any, x_BD: Tensor, W_enc_DF: Tensor, b_enc_F: Tensor | None, center_D: Tensor | None, pre_BK: Tensor,
        indices_BK: Tensor, backend: Backend,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x_BD, W_enc_DF, center_D, indices_BK)
        ctx.backend = backend
        return pre_BK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_BK: Tensor) -> tuple[Tensor | None, ...]:
        x_BD, W_enc_DF, center_D, indices_BK = ctx.saved_tensors
        dx = dW = db = dcenter = None
        needs_x, needs_W, needs_b, needs_center, *_ = ctx.needs_input_grad
        with _no_autocast(g_BK):
            if needs_x:
                dx = ctx.backend.combine(g_BK, indices_BK, W_enc_DF.T)
            if needs_W or needs_b or needs_center:
                dW, db = ctx.backend.accumulate(g_BK, indices_BK, x_BD, W_enc_DF.shape[1])
                dW = dW.T
                if needs_center:
                    dcenter = torch.addmv(center_D, W_enc_DF, db, beta=0, alpha=-1)  # -W_enc db, in one launch
        return dx, dW, db if needs_b else None, dcenter, None, None, None


class _Decode(torch.autograd.Function):
    """Sum of decoder rows weighted by the values."""

    @staticmethod
    def forward(ctx: Any, values_BK: Tensor, indices_BK: Tensor, W_dec_FD: Tensor, backend: Backend) -> Tensor:
        ctx.save_for_backward(values_BK, indices_BK, W_dec_FD)
        ctx.backend = backend
        return backend.combine(values_BK, indices_BK, W_dec_FD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_BD: Tensor) -> tuple[Tensor | None, ...]:
        values_BK, indices_BK, W_dec_FD = ctx.saved_tensors
        dvalues = dW = None
        with _no_autocast(g_BD):
            if ctx.needs_input_grad[0]:
                dvalues = ctx.backend.dots(g_BD, W_dec_FD, indices_BK, values_BK)
            if ctx.needs_input_grad[2]:
                dW, _ = ctx.backend.accumulate(values_BK, indices_BK, g_BD, len(W_dec_FD))
        return dvalues, None, dW, None


def topk(
    backend: Backend, x_BD: Tensor, W_enc_DF: Tensor, b_enc_F: Tensor, k: int, center_D: Tensor | None
) -> tuple[Tensor, Tensor]:
    """See :func:`sparsight.kernels.topk`."""
    x_BD, center_D = _centered(x_BD, center_D)
    pre_BK, indices_BK = select(backend, x_BD, W_enc_DF, b_enc_F, k)
    return _Encode.apply(x_BD, W_enc_DF, b_enc_F, center_D, pre_BK, indices_BK, backend).relu(), indices_BK


@torch.no_grad()
def select(backend: Backend, x_BD: Tensor, W_enc_DF: Tensor, b_enc_F: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """See :func:`sparsight.kernels.select`."""
    return _select(backend.select, x_BD, W_enc_DF, b_enc_F, k)


def chosen(
    backend: Backend, x_BD: Tensor, W_DF: Tensor, b_F: Tensor | None, pre_BK: Tensor, indices_BK: Tensor,
    center_D: Tensor | None,
) -> Tensor:  # fmt: skip
    """See :func:`sparsight.kernels.chosen`."""
    x_BD, center_D = _centered(x_BD, center_D)
    return _Encode.apply(x_BD, W_DF, b_F, center_D, pre_BK, indices_BK, backend).relu()


def routed_topk(
    backend: Backend, x_BD: Tensor, W_enc_DF: Tensor, b_enc_F: Tensor | None, expert_B: Tensor, n_experts: int, k: int,
    center_D: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See :func:`sparsight.kernels.routed_topk`."""
    width = W_enc_DF.shape[1] // n_experts
    assert width * n_experts == W_enc_DF.shape[1]
    assert k <= width
    x_BD, center_D = _centered(x_BD, center_D)
    with torch.no_grad():
        if x_BD.is_cuda:
            in_blocks = partial(routing.select, expert_B=expert_B, n_experts=n_experts)
            pre_BK, indices_BK = _select(in_blocks, x_BD, W_enc_DF, b_enc_F, k)
        else:
            pre_BK, indices_BK = _expert_by_expert(backend, x_BD, W_enc_DF, b_enc_F, expert_B, n_experts, k)
    return _Encode.apply(x_BD, W_enc_DF, b_enc_F, center_D, pre_BK, indices_BK, backend).relu(), indices_BK


def _centered(x_BD: Tensor, center_D: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Rows less the center, and the center if :class:`_Encode` is to compute its gradient.

    Where x needs no gradient, the center's is a product of matrix and vector, which reads the weights once. Its way
    through the gradient of x would read B K rows of them.
    """
    if center_D is None:
        return x_BD, None
    if x_BD.requires_grad:
        return x_BD - center_D, None
    return x_BD - center_D.detach(), center_D


@torch.no_grad()
def batch_topk(
    x_BD: Tensor, W_enc_DF: Tensor, b_enc_F: Tensor, k: int, ends: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`sparsight.kernels.batch_topk`."""
    from sparsight.kernels import batch  # Triton comes with the PyTorch of GPUs only

    pre_N, keys_N = _select(batch.select, x_BD, W_enc_DF, b_enc_F, k)
    n_rows, d_sae, ranges = len(x_BD), W_enc_DF.shape[1], 1
    if ends is not None:
        keys_N = keys_N + torch.bucketize(keys_N % d_sae, ends, right=True) * (n_rows * d_sae)
        ranges += len(ends)
    return batch.cut(pre_N, keys_N, ranges * n_rows, d_sae, math.ceil(k / ranges))


def _expert_by_expert(
    backend: Backend, x_BD: Tensor, W_enc_DF: Tensor, b_enc_F: Tensor | None, expert_B: Tensor, n_experts: int, k: int
) -> tuple[Tensor, Tensor]:
    """The k largest entries of each row among its expert's latents, and their numbers, (B, K) both."""
    width = W_enc_DF.shape[1] // n_experts
    order_B = expert_B.argsort(stable=True)
    counts = torch.bincount(expert_B, minlength=n_experts).tolist()
    pre_BK = x_BD.new_empty(len(x_BD), k)
    indices_BK = expert_B.new_empty(len(x_BD), k)
    for expert, rows in enumerate(order_B.split(counts)):
        if not len(rows):
            continue
        columns = slice(expert * width, (expert + 1) * width)
        bias = None if b_enc_F is None else b_enc_F[columns]
        pre, indices = _select(backend.select, x_BD[rows], W_enc_DF[:, columns], bias, k)
        pre_BK[rows], indices_BK[rows] = pre, indices + columns.start
    return pre_BK, indices_BK


def decode(backend: Backend, values_BK: Tensor, indices_BK: Tensor, W_dec_FD: Tensor) -> Tensor:
    """See :func:`sparsight.kernels.decode`."""
    with _no_autocast(values_BK):
        return _Decode.apply(values_BK, indices_BK, W_dec_FD, backend)


def _select(select: Select, x_BD: Tensor, W_DF: Tensor, b_F: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """What ``select`` selects; under autocast, only the product runs in the lower precision."""
    device = x_BD.device.type
    if not torch.is_autocast_enabled(device):
        return select(x_BD, W_DF, b_F, k)
    dtype = torch.get_autocast_dtype(device)
    with _no_autocast(x_BD):
        bias = None if b_F is None else b_F.to(dtype)
        pre_BK, indices_BK = select(x_BD.to(dtype), W_DF.to(dtype), bias, k)
        return pre_BK.to(W_DF.dtype), indices_BK


def _no_autocast(tensor: Tensor) -> torch.autocast:
    """Disable autocast: sparse operations cost little, so they keep the precision of the weights."""
    return torch.autocast(tensor.device.type, enabled=False)
