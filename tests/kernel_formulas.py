"""What every Triton kernel computes, as formulas of the CPU that fill the kernel's outputs.

Each has the name and the arguments of its kernel. The pretended device computes by them.
"""

from typing import Any

import torch
from torch import Tensor

from sparsight.kernels import batch, cpu, triton, update

KERNELS = {
    triton: ("_combine", "_dots", "_accumulate", "_add_parts"),
    update: ("_prepare", "_judge", "_update"),
    batch: ("_cut",),
}
"""The kernels by module."""


def _combine(values: Tensor, indices: Tensor, W: Tensor, out: Tensor, *_: Any) -> None:
    out.copy_(cpu.combine(values, indices, W))


def _dots(g: Tensor, W: Tensor, indices: Tensor, active: Tensor, out: Tensor, *_: Any) -> None:
    out.copy_(cpu.dots(g, W, indices, active))


def _accumulate(
    values: Tensor, order: Tensor, g: Tensor, latents: Tensor, starts: Tensor, out: Tensor, sums: Tensor,
    parts: Tensor, part_sums: Tensor, n_latents: int, k: int, *_: Any,
) -> None:  # fmt: skip
    out.zero_().index_add_(0, latents, values.flatten()[order, None] * g[order // k])
    sums.zero_().index_add_(0, latents, values.flatten()[order])


def _add_parts(*_: Any) -> None:
    """Nothing: the sums above are whole."""


def _prepare(gradient: Tensor, W: Tensor, step: Tensor, norms: Tensor, bias: Tensor, d_in: int, *logs: Any) -> None:
    norms.copy_(_across(gradient, W).norm(dim=1))
    t = step.double() + 1
    bias.copy_(torch.stack([t, *(-torch.expm1(t * log) for log in logs[:2])]))


def _judge(total: Tensor, norm: Tensor, first: Tensor, failed: Tensor, clip: Tensor) -> None:
    if not failed:
        first.copy_(torch.stack([total, norm]))
        failed.fill_(float(not first.isfinite().all()))
    clip.copy_(norm.clamp(min=1))


def _across(gradient: Tensor, W: Tensor) -> Tensor:
    return gradient - torch.linalg.vecdot(gradient, W).unsqueeze(1) * W


def _update(
    gradient: Tensor, W: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: Tensor, bias: Tensor, clip: Tensor,
    failed: Tensor, d_in: int, lr: float, beta1: float, beta2: float, eps: float, *_: Any,
) -> None:  # fmt: skip
    if failed:
        return
    g = _across(gradient, W) / clip
    exp_avg.lerp_(g, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    W.addcdiv_(exp_avg, exp_avg_sq.sqrt() / bias[2].sqrt() + eps, value=-lr / float(bias[1]))
    W.div_(W.norm(dim=1, keepdim=True))
    step.copy_(bias[0])


def _cut(
    values: Tensor, keys: Tensor, order: Tensor, starts: Tensor, out_values: Tensor, out_latents: Tensor,
    out_groups: Tensor, d_sae: int, width: int, *_: Any,
) -> None:  # fmt: skip
    groups = keys // d_sae
    first = starts // width + torch.arange(len(starts))
    slots = (first * width - starts)[groups] + torch.arange(len(keys))
    out_values.zero_().view(-1)[slots] = values[order]
    out_latents.zero_().view(-1)[slots] = keys % d_sae
    out_groups.copy_(torch.repeat_interleave(torch.arange(len(first) - 1), first.diff()))
