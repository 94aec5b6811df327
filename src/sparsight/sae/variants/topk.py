"""TopK SAE (Gao et al. 2024, arXiv 2406.04093, equation 3, with ReLU as in Appendix A).

z = TopK(ReLU((x - b_dec) W_enc + b_enc)),  x_hat = z W_dec + b_dec
"""

import numpy as np
from torch import Tensor

from sparsight.sae.base import SAE, variant
from sparsight.sae.codes import SparseCodes


@variant
class TopK(SAE):
    """Keeps those of the K largest pre-activations of each activation that are above zero."""

    def encode(self, x: Tensor | np.ndarray) -> SparseCodes:
        return self._codes(self.validate(x))

    def training_codes(self, x: Tensor) -> tuple[SparseCodes, None]:
        return self._codes(x), None

    def _codes(self, x: Tensor) -> SparseCodes:
        return SparseCodes(*self._topk(x, self.k), self.d_sae)
