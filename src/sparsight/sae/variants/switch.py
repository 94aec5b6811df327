"""Switch SAE (Mudide et al. 2024, arXiv 2410.08201, equations 5 to 9): each activation uses one expert's latents.

p = softmax((x - b_router) W_router),  e = argmax p,  z = p_e * TopK(ReLU((x - b_dec) W_enc[e])),
x_hat = z W_dec + b_dec,  loss = ||x - x_hat||^2 + balance * E * sum over e of (share of rows) * (mean p_e)

Expert e owns the latents from e F / E to (e + 1) F / E. Only the chosen expert is computed. The factor p_e trains the
router. Two controls have no router (:mod:`sparsight.sae.fixed_routing`); their p_e is 1, and no load is balanced.

Shapes: B batch, D width (d_in), F latents (d_sae), K active latents (k), E experts.
"""

import math
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from sparsight import kernels
from sparsight.common.errors import SparsightError
from sparsight.sae.base import SAE, variant
from sparsight.sae.codes import Codes, SparseCodes
from sparsight.sae.fixed_routing import PROJECTIONS, FixedRouter


@variant
class Switch(SAE):
    """More latents at the same compute per activation.

    Args:
        d_in: D.
        d_sae: F.
        k: K.
        seed: seed of the initial weights.
        experts: E; None takes the largest divisor of d_sae up to 16 that leaves each expert 4 k latents, or 1.
        balance: weight of the load-balance loss, against a reconstruction error relative to the data's variance.
            0.025 is the paper's alpha = 3 without its data's variance and its factor d_in.
        routing: ``learned``; ``hash``, a fixed expert for each activation; or ``random``, in training another expert at
            every step (THOR, arXiv 2110.04260), at inference a fixed one.
        options: see :class:`SAE`.

    Raises:
        SparsightError: a number of experts that does not divide d_sae, or leaves fewer than k latents each.
    """

    options = (*SAE.options, "experts", "balance", "routing")
    has_b_enc = False
    scaled = ("b_dec", "b_router")

    def __init__(
        self, d_in: int, d_sae: int, k: int, seed: int = 0,
        experts: int | None = None, balance: float = 0.025,
        routing: Literal["learned", "random", "hash"] = "learned", **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(d_in, d_sae, k, seed, **options)
        if experts is None:
            experts = max((e for e in range(2, 17) if d_sae % e == 0 and d_sae // e >= 4 * k), default=1)
        if experts < 1 or d_sae % experts or d_sae // experts < k:
            raise SparsightError(
                f"experts: {experts} must divide d_sae = {d_sae} and leave each at least k = {k} latents"
            )
        self.experts, self.balance, self.routing, self.learned = experts, balance, routing, routing == "learned"
        if not self.learned:
            self.router = FixedRouter(d_in, experts, seed, redraw=routing == "random")
            self.register_buffer("b_router", torch.zeros(d_in))
            return
        router = torch.rand(d_in, experts, generator=torch.Generator().manual_seed(seed))
        self.W_router = nn.Parameter((2 * router - 1) / math.sqrt(d_in))
        self.b_router = nn.Parameter(torch.zeros(d_in))

    @property
    def macs_encode(self) -> int:
        return self.d_in * ((self.experts if self.learned else PROJECTIONS) + self.d_sae // self.experts)

    def encode(self, x: Tensor | np.ndarray) -> SparseCodes:
        x = self.validate(x)
        return self._codes(x, self._route(x))

    def training_codes(self, x: Tensor) -> tuple[SparseCodes, Tensor | None]:
        p_BE = self._route(x, training=True)
        if not self.learned:
            return self._codes(x, p_BE), None
        experts_E = torch.arange(self.experts, device=x.device)  # bincount would wait for a GPU
        share_E = (p_BE.argmax(dim=1, keepdim=True) == experts_E).mean(dim=0, dtype=p_BE.dtype)
        return self._codes(x, p_BE), self.balance * self.experts * (share_E * p_BE.mean(dim=0)).sum()

    def learn(self, codes: Codes) -> None:
        if not self.learned:
            self.router.steps.add_(1)

    def _route(self, x: Tensor, training: bool = False) -> Tensor:
        if not self.learned:
            return self.router(x - self.b_router, training)
        return ((x - self.b_router) @ self.W_router).float().softmax(dim=1)

    def _codes(self, x: Tensor, p_BE: Tensor) -> SparseCodes:
        return SparseCodes(*self._routed(x, p_BE, None, self.k), self.d_sae)

    def _routed(self, x: Tensor, p_BE: Tensor, bias_F: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
        """Values and indices, (B, K) both, of the ``k`` largest p_e ReLU((x - b_dec) W_enc[e] + bias[e])."""
        p_B, expert_B = p_BE.max(dim=1)
        values, indices = kernels.routed_topk(x, self.W_enc, bias_F, expert_B, self.experts, k, self.b_dec)
        return values * p_B.unsqueeze(1), indices

    def _from_dead(self, x: Tensor, dead: Tensor | None) -> Tensor:
        """The same from dead latents of the routed expert only."""
        only_dead = x.new_zeros(self.d_sae).masked_fill_(~self.dead, -torch.inf)
        k = min(self.aux_k, self.d_sae // self.experts)
        return self._combine(*self._routed(x, self._route(x, training=True), only_dead, k))

    @torch.no_grad()
    def set_center(self, center_D: Tensor | np.ndarray) -> None:
        super().set_center(center_D)
        self.b_router.copy_(self.b_dec)

    @torch.no_grad()
    def fold_scale(self, scale: float) -> None:
        super().fold_scale(scale)
        if self.learned:
            self.W_router.div_(scale)
