"""Matryoshka SAE (Bussmann et al. 2025, arXiv 2503.17547, equation 5): BatchTopK with nested prefixes.

For each prefix m, the first m latents reconstruct alone: loss = sum over m of ||x - b_dec - z[:m] W_dec[:m]||^2, with
equal weights. Selection is one BatchTopK over all latents.

Shapes: B batch, D width (d_in), F latents (d_sae), K active latents (k), P prefixes without the last, M entries per
row.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsight import kernels
from sparsight.common.errors import SparsightError
from sparsight.sae.base import SAE, variant
from sparsight.sae.batch_selection import BatchSelection
from sparsight.sae.codes import SparseCodes


@variant
class Matryoshka(BatchSelection):
    """Orders latents from general to special.

    Args:
        sizes: d_in, d_sae, k, seed.
        prefixes: shares of d_sae, rising to 1; the defaults are the paper's.
        options: see :class:`SAE`.

    Raises:
        SparsightError: prefixes that do not rise to 1.
    """

    options = (*SAE.options, "prefixes")

    def __init__(
        self, *sizes: int, prefixes: Sequence[float] = (1 / 32, 3 / 32, 7 / 32, 15 / 32, 1.0), **options: Any
    ) -> None:
        super().__init__(*sizes, **options)
        if list(prefixes) != sorted({*prefixes}) or not 0 < min(prefixes) <= max(prefixes) == 1:
            raise SparsightError(f"prefixes: expected shares of d_sae rising to 1, got {list(prefixes)}")
        self.prefixes = tuple(prefixes)
        ends = sorted({math.ceil(share * self.d_sae) for share in self.prefixes})[:-1]
        self.register_buffer("ends", torch.tensor(ends, dtype=torch.int64), persistent=False)
        self.ends: Tensor
        """Ends of the prefixes without the last, (P,)."""

    def training_codes(self, x: Tensor) -> tuple[SparseCodes, Tensor | None]:
        if self.gpu_step:
            codes, _, penalty = self._forward(x)
            return codes, penalty
        codes, _ = super().training_codes(x)
        n_ends = len(self.ends)
        if not n_ends:
            return codes, None
        # One decode of P * B rows covers all prefixes, so the decoder's gradient is computed once.
        values_PBM = codes.values * (codes.indices < self.ends[:, None, None])
        indices_PBM = codes.indices.expand(values_PBM.shape)
        x_hat = self._combine(values_PBM.flatten(0, 1), indices_PBM.flatten(0, 1)) + self.b_dec
        return codes, self._squared_error(x_hat, x.repeat(n_ends, 1), len(x_hat)) * n_ends

    def _forward(self, x: Tensor) -> tuple[SparseCodes, Tensor, Tensor | None]:
        """On a GPU, every code is decoded once: a prefix is the sum of the ranges of latents between the ends."""
        if not self.gpu_step:
            codes, penalty = self.training_codes(x)
            return codes, self.decode(codes), penalty
        n_ends, n = len(self.ends), len(x)
        pre, indices, groups = kernels.batch_topk(x - self.b_dec, self.W_enc, self.b_enc, self.k, self.ends)
        codes = self._codes_in_parts(x, pre, indices, groups % n)
        decoded = self._combine(codes.values, indices)
        ranges = decoded.new_zeros((n_ends + 1) * n, self.d_in).index_add(0, groups, decoded).view(n_ends + 1, -1)
        with torch.autocast("cuda", enabled=False):
            sums = torch.ones(n_ends + 1, n_ends + 1, device=x.device).tril() @ ranges
        prefixes, (x_hat,) = (sums.view(-1, n, self.d_in) + self.b_dec).split([n_ends, 1])
        if not n_ends:
            return codes, x_hat, None
        return codes, x_hat, self._squared_error(prefixes, x.expand_as(prefixes), n)
