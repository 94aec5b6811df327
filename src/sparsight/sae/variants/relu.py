"""ReLU SAE with an L1 penalty (Bricken et al. 2023, Towards Monosemanticity).

z = ReLU((x - b_dec) W_enc + b_enc),  x_hat = z W_dec + b_dec,  loss = ||x - x_hat||^2 + sparsity * |z|_1

The decoder's rows have unit norm, so a latent cannot escape the penalty by a longer row.
"""

import numpy as np
from torch import Tensor

from sparsight.sae.base import variant
from sparsight.sae.codes import DenseCodes
from sparsight.sae.l1_penalty import L1Penalised


@variant
class ReLU(L1Penalised):
    """Any number of active latents; the L1 penalty keeps it near K."""

    def encode(self, x: Tensor | np.ndarray) -> DenseCodes:
        return self._codes(self.validate(x))

    def training_codes(self, x: Tensor) -> tuple[DenseCodes, Tensor]:
        codes = self._codes(x)
        return codes, self.l1(codes.z_BF)

    def _codes(self, x: Tensor) -> DenseCodes:
        return DenseCodes(((x - self.b_dec) @ self.W_enc + self.b_enc).relu())
