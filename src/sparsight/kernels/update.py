"""The decoder's update on a GPU: parallel gradient, clipping, Adam and unit rows in one pass over the weights.

    g' = g - (g . w) w,   v = Adam(w, g' / clip),   w <- v / |v|

Clipping needs the norm of all gradients first, so :func:`prepare` reads gradient and weights once before. g' is never
written. A program holds a row, and its sums run in a fixed order.

Shapes: D width (d_in), F latents (d_sae).
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


def prepare(gradient_FD: Tensor, W_FD: Tensor, step: Tensor, betas: tuple[float, float], bias_3: Tensor) -> Tensor:
    """What :func:`update` needs to know of all rows together, and of the step.

    Args:
        gradient_FD: the gradient of W.
        W_FD: rows of unit norm.
        step: scalar, the number of steps taken.
        betas: those of Adam.
        bias_3: receives the number of the next step t, 1 - beta1^t and 1 - beta2^t.

    Returns:
        the norm of each row's gradient without its part along the row, (F,).
    """
    (n_rows, d_in), norms_F = W_FD.shape, W_FD.new_empty(len(W_FD))
    _prepare[(n_rows,)](
        gradient_FD.contiguous(), W_FD, step, norms_F, bias_3, d_in, math.log(betas[0]), math.log(betas[1]),
        _sum_type(W_FD), **_options(d_in),
    )  # fmt: skip
    return norms_F


def judge(total: Tensor, norm: Tensor, first_2: Tensor, failed: Tensor) -> Tensor:
    """Keep the first loss and norm that are not finite, or else these, and set ``failed`` to 1 where they are not.

    Args:
        total: scalar, the loss.
        norm: scalar, the norm of all gradients.
        first_2: receives both, unless a step before has failed.
        failed: scalar, 1 from the first such step on.

    Returns:
        scalar, what divides the gradients so that their norm is at most 1.
    """
    clip = norm.new_empty(())
    _judge[(1,)](total, norm, first_2, failed, clip, enable_fp_fusion=True)
    return clip


def update(
    gradient_FD: Tensor, W_FD: Tensor, state: Mapping[str, Tensor], bias_3: Tensor, clip: Tensor, failed: Tensor,
    lr: float, betas: tuple[float, float], eps: float,
) -> None:  # fmt: skip
    """One step of Adam (Kingma and Ba 2015, algorithm 1) on rows that keep their unit norm, in place.

    Args:
        gradient_FD: the gradient; its part along the rows takes no part.
        W_FD: rows of unit norm.
        state: Adam's ``exp_avg`` and ``exp_avg_sq``, (F, D) both, and ``step``.
        bias_3: what :func:`prepare` left there.
        clip: scalar that divides the gradient.
        failed: scalar; unless it is 0, everything stays as it is.
        lr: learning rate.
        betas: those of Adam.
        eps: that of Adam.
    """
    n_rows, d_in = W_FD.shape
    _update[(n_rows,)](
        gradient_FD.contiguous(), W_FD, state["exp_avg"], state["exp_avg_sq"], state["step"], bias_3, clip, failed,
        d_in, lr, *betas, eps, _sum_type(W_FD), **_options(d_in),
    )  # fmt: skip


def _options(d_in: int) -> dict[str, Any]:
    """A block that holds a row, and warps that keep its numbers in registers."""
    size = triton.next_power_of_2(d_in)
    # Triton's default of fusion depends on its version, and so would the bits of the sums.
    return {"BLOCK_D": size, "num_warps": min(max(size // 128, 1), 16), "enable_fp_fusion": True}


def _sum_type(tensor: Tensor) -> tl.dtype:
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


@triton.jit
def _prepare(
    gradient, W, step, norms, bias, d_in, log1: tl.constexpr, log2: tl.constexpr,
    SUM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One row: norms[row] = |g - (g . w) w|. The first also computes the bias of Adam's moments."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    g = tl.load(gradient + row * d_in + d, mask=d < d_in, other=0.0).to(SUM)
    w = tl.load(W + row * d_in + d, mask=d < d_in, other=0.0).to(SUM)
    g -= tl.sum(g * w, axis=0) * w
    tl.store(norms + row, tl.sqrt(tl.sum(g * g, axis=0)))
    if row == 0:
        t = tl.load(step).to(tl.float64) + 1
        tl.store(bias, t)
        tl.store(bias + 1, 1 - tl.exp(t * log1))  # fp64, because fp32 has few digits of 1 - 0.999^1
        tl.store(bias + 2, 1 - tl.exp(t * log2))


@triton.jit
def _judge(total, norm, first, failed, clip):
    loss = tl.load(total).to(tl.float32)
    length = tl.load(norm).to(tl.float32)
    if tl.load(failed) == 0:
        tl.store(first, loss)
        tl.store(first + 1, length)
        finite = (tl.abs(loss) < float("inf")) & (tl.abs(length) < float("inf"))  # false for NaN
        tl.store(failed, tl.where(finite, 0.0, 1.0))
    tl.store(clip, tl.maximum(length, 1.0))


@triton.jit
def _update(
    gradient, W, exp_avg, exp_avg_sq, step, bias, clip, failed, d_in, lr,
    beta1: tl.constexpr, beta2: tl.constexpr, eps: tl.constexpr, SUM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One row."""
    if tl.load(failed) == 0:
        row = tl.program_id(0).to(tl.int64)
        d = tl.arange(0, BLOCK_D)
        mask = d < d_in
        g = tl.load(gradient + row * d_in + d, mask=mask, other=0.0).to(SUM)
        w = tl.load(W + row * d_in + d, mask=mask, other=0.0).to(SUM)
        g = (g - tl.sum(g * w, axis=0) * w) / tl.load(clip).to(SUM)
        first = tl.load(exp_avg + row * d_in + d, mask=mask, other=0.0).to(SUM)
        second = tl.load(exp_avg_sq + row * d_in + d, mask=mask, other=0.0).to(SUM)
        first = beta1 * first + (1 - beta1) * g
        second = beta2 * second + (1 - beta2) * g * g
        tl.store(exp_avg + row * d_in + d, first, mask=mask)
        tl.store(exp_avg_sq + row * d_in + d, second, mask=mask)
        size = lr / tl.load(bias + 1).to(SUM)
        root = tl.sqrt(tl.load(bias + 2).to(SUM))
        w -= size * first / (tl.sqrt(second) / root + eps)
        w /= tl.sqrt(tl.sum(w * w, axis=0))
        tl.store(W + row * d_in + d, w, mask=mask)
        if row == 0:
            tl.store(step, tl.load(bias))
