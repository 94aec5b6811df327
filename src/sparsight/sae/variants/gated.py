"""Gated SAE (Rajamanoharan et al. 2024, arXiv 2404.16014, equations 7 to 9).

h = (x - b_dec) W_enc,  z = 1[h + b_gate > 0] * ReLU(exp(r_mag) * h + b_mag),  x_hat = z W_dec + b_dec
loss = ||x - x_hat||^2 + sparsity * |ReLU(h + b_gate)|_1 + ||x - ReLU(h + b_gate) W_dec - b_dec||^2

The decoder of the last term is detached. Only this term and the penalty train the gate.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsight.sae.base import variant
from sparsight.sae.codes import DenseCodes
from sparsight.sae.l1_penalty import L1Penalised


@variant
class Gated(L1Penalised):
    """A gate decides which latents are active, separately from their magnitude, so the penalty shrinks no code."""

    has_b_enc = False
    scaled = ("b_gate", "b_mag", "b_dec")

    def __init__(self, *sizes: int, **options: Any) -> None:
        super().__init__(*sizes, **options)
        for name in ("b_gate", "r_mag", "b_mag"):
            setattr(self, name, nn.Parameter(torch.zeros(self.d_sae)))
        self.b_gate: Tensor
        self.r_mag: Tensor
        self.b_mag: Tensor

    def encode(self, x: Tensor | np.ndarray) -> DenseCodes:
        return self._codes((self.validate(x) - self.b_dec) @ self.W_enc)

    def _codes(self, h_BF: Tensor) -> DenseCodes:
        magnitude = (self.r_mag.exp() * h_BF + self.b_mag).relu()
        return DenseCodes(magnitude * (h_BF + self.b_gate > 0))

    def training_codes(self, x: Tensor) -> tuple[DenseCodes, Tensor]:
        h_BF = (x - self.b_dec) @ self.W_enc
        gate = (h_BF + self.b_gate).relu()
        without_gate = x - gate @ self.W_dec.detach()
        error = self._squared_error(without_gate, self.b_dec.detach().expand_as(x), len(x))
        return self._codes(h_BF), self.l1(gate) + error
