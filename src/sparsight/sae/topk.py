"""TopK SAE (Gao et al. 2024, arXiv 2406.04093, equation 3, with ReLU as in Appendix A).

z = TopK(ReLU((x - b_dec) W_enc + b_enc)),  x_hat = z W_dec + b_dec
"""

from torch import Tensor

from sparsight.sae.base import SAE, Codes, variant


@variant
class TopK(SAE):
    """Keeps the K largest pre-activations of each activation, those above zero."""

    def preactivations(self, x: Tensor) -> Tensor:
        return (x - self.b_dec) @ self.W_enc + self.b_enc

    def activate(self, pre: Tensor) -> Codes:
        values, indices = pre.topk(self.k, dim=1)
        return Codes(values.relu(), indices, self.d_sae)
