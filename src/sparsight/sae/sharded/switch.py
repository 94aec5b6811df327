"""A part of a Switch SAE: every shard has whole experts, and computes only the rows that are routed to them.

Shapes: B batch, D width (d_in), F latents (d_sae), K active latents (k), E experts.
"""

from typing import Any

from torch import Tensor

from sparsight import kernels
from sparsight.common.errors import SparsightError
from sparsight.config.sae import SHARDS
from sparsight.sae.sharded.base import Sharded
from sparsight.sae.sharded.operators import copies, total
from sparsight.sae.variants.switch import Switch


class ShardedSwitch(Sharded, Switch):
    """See :class:`Switch`. The router is the same on every rank.

    Raises:
        SparsightError: a number of experts that the shards do not divide.
    """

    def __init__(self, *sizes: int, **options: Any) -> None:
        super().__init__(*sizes, **options)
        if self.experts % SHARDS:
            raise SparsightError(f"experts: {self.experts} are not a multiple of {SHARDS} shards")

    _from_dead = Switch._from_dead

    def _routed(self, x: Tensor, p_BE: Tensor, bias_F: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
        p_B, expert_B = p_BE.max(dim=1)
        n_experts = self.experts // SHARDS
        centers, factors = copies(self.ranks, self.b_dec), copies(self.ranks, p_B)
        values, indices = [], []
        for (n, shard), center, factor_B in zip(self.own, centers, factors, strict=True):
            rows = (expert_B // n_experts == n).nonzero().squeeze(1)
            bias = None if bias_F is None else bias_F[n * self.width : (n + 1) * self.width]
            expert = expert_B[rows] - n * n_experts
            own, columns = kernels.routed_topk(x[rows] - center, shard.W_enc, bias, expert, n_experts, k)
            values.append(x.new_zeros(len(x), k).index_copy(0, rows, own * factor_B[rows].unsqueeze(1)))
            indices.append(expert_B.new_zeros(len(x), k).index_copy(0, rows, columns + n * self.width))
        return total(self.ranks, values), self.ranks.total([column.int() for column in indices]).long()
