"""One training step of one or many SAEs.

Shapes: B batch, D width (d_in), F latents (d_sae).
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from sparsight.sae.base import SAE, Loss


class Trainer:
    """Optimises one or many SAEs on the same activations.

    Args:
        saes: the SAEs; their decoder rows have unit norm and keep it.
        lr: learning rate of Adam (betas 0.9 and 0.999, eps 6.25e-10, as Gao et al.).
        dead_after: activations without firing after which a latent counts as dead (AuxK revives it).
    """

    def __init__(self, saes: Sequence[SAE], lr: float, dead_after: int = 10_000_000) -> None:
        self.saes, self.dead_after = list(saes), dead_after
        parameters = [p for one in self.saes for p in one.parameters()]
        self.optimizer = torch.optim.Adam(parameters, lr=lr, betas=(0.9, 0.999), eps=6.25e-10, fused=True)
        self.since_fired = [torch.zeros(one.d_sae, dtype=torch.int64, device=one.W_enc.device) for one in self.saes]
        """Per SAE, activations seen since each latent fired last, (F,)."""

    def step(self, x: Tensor | np.ndarray) -> list[Loss]:
        """One step on activations (B, D): losses, gradients, decoder constraint, clipping, Adam, dead counters."""
        losses = []
        self.optimizer.zero_grad()
        for one, counter in zip(self.saes, self.since_fired, strict=True):
            loss = one.loss(x)
            loss.total.backward()
            one.remove_parallel_gradient()
            torch.nn.utils.clip_grad_norm_(one.parameters(), 1.0)
            fired = torch.zeros_like(one.dead)
            fired[loss.codes.indices[loss.codes.values > 0]] = True
            counter += len(loss.x_hat)
            counter[fired] = 0
            one.dead = counter >= self.dead_after
            losses.append(loss)
        self.optimizer.step()
        for one in self.saes:
            one.normalize_decoder()
        return losses
