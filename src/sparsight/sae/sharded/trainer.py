"""Creating parts of SAEs, and the training step of SAEs that are split over several processes."""

import importlib
from typing import Any

import torch
from torch import Tensor

from sparsight.sae import base
from sparsight.sae.sharded.base import Sharded
from sparsight.sae.trainer import Trainer
from sparsight.training.ranks import Ranks


def create(kind: str, ranks: Ranks, d_in: int, d_sae: int, k: int, seed: int = 0, **options: Any) -> Sharded:
    """The part of this process of the SAE that :func:`sparsight.sae.base.create` creates.

    Raises:
        SparsightError: sizes that cannot be split.
    """
    if kind == "switch":
        cls: type = importlib.import_module("sparsight.sae.sharded.switch").ShardedSwitch
    else:
        cls = type(f"Sharded{kind}", (Sharded, base.variant_class(kind)), {})
    return cls(d_in, d_sae, k, seed, ranks=ranks, **options)


class ShardedTrainer(Trainer):
    """Steps of SAEs that are all split over the same ranks. Every rank makes every step, with the same batch."""

    def _norm(self, i: int) -> Tensor:
        sae = self.saes[i]
        assert isinstance(sae, Sharded)
        of_shards = [_norm(shard).unsqueeze(0) for _, shard in sae.own]
        (norms_S,) = sae.ranks.tree([(norm,) for norm in of_shards], lambda a, b: (torch.cat([a[0], b[0]]),))
        common = [p.grad for name, p in sae.named_parameters() if not name.startswith("shards.") and p.grad is not None]
        return torch.nn.utils.get_total_norm([norms_S, *common])

    def _update(self, i: int, clip: Tensor) -> None:
        super()._update(i, clip)
        # Memory is what a split is for: the next gradients take the place of these instead of standing beside them.
        self.saes[i].zero_grad()


def _norm(module: torch.nn.Module) -> Tensor:
    return torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])
