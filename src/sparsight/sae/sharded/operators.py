"""Where gradients pass between the shards of an SAE: all other operations stay within a shard or are the same in all.

Shapes: B batch, D width (d_in).
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsight.training.ranks import Ranks


class _Total(torch.autograd.Function):
    """The sum over all shards; every shard gets the whole gradient."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, *shards: Tensor) -> Tensor:
        ctx.n = len(shards)
        return ranks.total(shards)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        return None, *[g] * ctx.n


class _Copies(torch.autograd.Function):
    """A copy for every own shard; the gradient is the sum over all shards."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, whole: Tensor) -> tuple[Tensor, ...]:
        ctx.ranks = ranks
        return tuple(whole.clone() for _ in ranks.own)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *g: Tensor) -> tuple[None, Tensor]:
        return None, ctx.ranks.total(g)


def total(ranks: Ranks, shards: list[Tensor]) -> Tensor:
    """The sum over all shards of what each own shard contributes, the same on every rank."""
    return _Total.apply(ranks, *shards)


def copies(ranks: Ranks, whole: Tensor) -> tuple[Tensor, ...]:
    """What every rank holds, once for every own shard, so that a shard's gradient reaches all ranks."""
    return _Copies.apply(ranks, whole)
