"""JumpReLU SAE (Rajamanoharan et al. 2024, arXiv 2407.14435, equations 3, 9, 11 and 12).

h = (x - b_dec) W_enc + b_enc,  z = h * 1[h > theta],  x_hat = z W_dec + b_dec
loss = ||x - x_hat||^2 + (L0 / K - 1)^2

The step functions have no useful gradient. Theta learns from a straight-through estimate with a rectangle kernel of
width ``_BANDWIDTH`` around theta. The penalty has the form that the paper gives for a fixed target L0.

Shapes: B batch, F latents (d_sae), K active latents (k).
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsight.sae.base import SAE, variant
from sparsight.sae.codes import DenseCodes

_THETA = 0.05  # initial threshold; like the bandwidth, relative to the data's standard deviation
_BANDWIDTH = 0.05


class _Step(torch.autograd.Function):
    """1[h > theta]. The gradient of theta is -(1 / width) times the kernel; h gets none."""

    @staticmethod
    def forward(ctx: Any, h_BF: Tensor, theta_F: Tensor, width: float) -> Tensor:
        ctx.save_for_backward(h_BF, theta_F)
        ctx.width = width
        return (h_BF > theta_F).to(h_BF.dtype)

    @staticmethod
    def backward(ctx: Any, g_BF: Tensor) -> tuple[None, Tensor, None]:
        h_BF, theta_F = ctx.saved_tensors
        near = (h_BF - theta_F).abs() < ctx.width / 2
        return None, -(g_BF * near).sum(dim=0) / ctx.width, None


@variant
class JumpReLU(SAE):
    """A threshold per latent, learnt so that K latents are active on average."""

    has_auxk = False
    scaled = ("b_enc", "b_dec", "theta")

    def __init__(self, *sizes: int, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.theta = nn.Parameter(torch.full((self.d_sae,), _THETA))

    def encode(self, x: Tensor | np.ndarray) -> DenseCodes:
        return self._codes(self.validate(x))[0]

    def training_codes(self, x: Tensor) -> tuple[DenseCodes, Tensor]:
        codes, active = self._codes(x)
        return codes, (active.sum() / (len(x) * self.k) - 1).square()

    def _codes(self, x: Tensor) -> tuple[DenseCodes, Tensor]:
        h_BF = (x - self.b_dec) @ self.W_enc + self.b_enc
        active = _Step.apply(h_BF, self.theta, _BANDWIDTH / math.sqrt(self.loss_scale))
        # At the step h equals theta, so the paper's gradient of the jump, -(theta / width), is theta times the step's.
        return DenseCodes(h_BF * active.detach() + self.theta.detach() * (active - active.detach())), active

    @torch.no_grad()
    def start(self, variance: float) -> None:
        super().start(variance)
        self.theta.mul_(1 / math.sqrt(self.loss_scale))

    @torch.no_grad()
    def bound(self) -> None:
        self.theta.clamp_(min=0)
