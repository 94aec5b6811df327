"""Archetypal SAE, relaxed (RA-SAE; Fel et al. 2025, arXiv 2502.12892): decoder rows are mixtures of data points.

z = TopK(ReLU((x - b_dec) W_enc + b_enc)),  x_hat = z W_dec + b_dec,  W_dec = exp(s) (W A + Lambda)

A are candidates, the centroids of training activations minus their mean. The rows of W are not negative and sum to 1,
so that W A lies in the convex hull of the candidates. No row of Lambda is longer than delta. W, Lambda and the one
scale s are trained. As in the official package (overcomplete, RelaxedArchetypalDictionary), the constraints are
restored after every step, and rows do not have unit norm, because that would leave the hull.

Shapes: B batch, D width (d_in), F latents (d_sae), K active latents (k), N candidates.
"""

from typing import Any

import torch
from torch import Tensor, nn

from sparsight.common.errors import SparsightError
from sparsight.sae.base import SAE, Loss, variant
from sparsight.sae.codes import SparseCodes


@variant
class Archetypal(SAE):
    """A TopK SAE whose decoder rows stay near the convex hull of data.

    Args:
        d_in: D.
        d_sae: F.
        k: K.
        seed: seed of the initial weights, and of the candidates until :meth:`set_points`: random directions.
        candidates: N.
        delta: largest norm of a row of Lambda, in units of the candidates; 0 keeps rows in the hull (A-SAE).
        options: see :class:`SAE`.
    """

    options = (*SAE.options, "candidates", "delta")

    def __init__(self, *sizes: int, candidates: int = 256, delta: float = 1.0, **options: Any) -> None:
        self.candidates, self.delta = candidates, delta
        super().__init__(*sizes, **options)

    def _make_weights(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.weights = nn.Parameter(_one_or_two(self.d_sae, self.candidates, generator))
        self.deviation = nn.Parameter(torch.zeros(self.d_sae, self.d_in))
        self.log_scale = nn.Parameter(torch.zeros(1))
        self.W_enc = nn.Parameter(torch.zeros(self.d_sae, self.d_in).T)
        self.b_enc = nn.Parameter(torch.zeros(self.d_sae))
        self.register_buffer("points", torch.randn(self.candidates, self.d_in, generator=generator))
        self.register_buffer("W_dec", torch.zeros(self.d_sae, self.d_in))
        self.points: Tensor
        """A, (N, D)."""
        self.set_points(nn.functional.normalize(self.points, dim=1))

    @torch.no_grad()
    def set_points(self, points_ND: Tensor) -> None:
        """Begin with these candidates, in the units of x minus its mean.

        Encoder columns become d / |d|^2 of the decoder rows d: the code of d is then 1.

        Raises:
            SparsightError: another number of candidates, or of another width.
        """
        if points_ND.shape != self.points.shape:
            raise SparsightError(f"candidates: expected {tuple(self.points.shape)}, got {tuple(points_ND.shape)}")
        self.points.copy_(points_ND)
        self.bound()
        squares_F = self.W_dec.square().sum(dim=1).clamp(min=torch.finfo(self.W_dec.dtype).tiny)
        self.W_enc.copy_((self.W_dec / squares_F.unsqueeze(1)).T)

    def encode(self, x: Any) -> SparseCodes:
        return SparseCodes(*self._topk(self.validate(x), self.k), self.d_sae)

    def training_codes(self, x: Tensor) -> tuple[SparseCodes, None]:
        return SparseCodes(*self._topk(x, self.k), self.d_sae), None

    def loss(self, x: Any) -> Loss:
        """See :meth:`SAE.loss`. Inside, W_dec is a function of W, Lambda and s; elsewhere it is their value."""
        value = self.W_dec
        self.W_dec = self._rows_of_decoder()  # type: ignore[assignment]  # a buffer here
        try:
            return super().loss(x)
        finally:
            self.W_dec = value

    def _rows_of_decoder(self) -> Tensor:
        return (self.weights @ self.points + self.deviation) * self.log_scale.exp()

    def _dead_latents(self) -> Tensor | None:
        return None if self.W_dec.is_cuda else super()._dead_latents()

    def constrain(self) -> None:
        self.bound()

    @torch.no_grad()
    def bound(self) -> None:
        """Make the rows of W not negative with sum 1 and those of Lambda no longer than delta; W_dec follows."""
        weights = self.weights.relu_()
        sums = weights.sum(dim=1, keepdim=True)
        weights.copy_(torch.where(sums > 0, weights / sums, 1 / self.candidates))
        norms = torch.linalg.vector_norm(self.deviation, dim=1, keepdim=True)
        self.deviation.mul_((self.delta / norms.clamp(min=1e-30)).clamp(max=1))
        self.W_dec.copy_(self._rows_of_decoder())

    def remove_parallel_gradient(self) -> None:
        """Nothing: rows have any length."""


def _one_or_two(rows: int, candidates: int, generator: torch.Generator) -> Tensor:
    """Weights (F, N): a candidate for each row, all in turn; when they repeat, a point between it and another."""
    first = torch.randperm(candidates, generator=generator)[torch.arange(rows) % candidates]
    second = (first + torch.randint(1, max(candidates, 2), (rows,), generator=generator)) % candidates
    share = torch.rand(rows, 1, generator=generator)
    share[:candidates] = 0
    eye = torch.eye(candidates)
    return torch.lerp(eye[first], eye[second], share / 2)
