"""What BatchTopK and Matryoshka SAEs share: selection over the batch in training, a threshold at inference.

Shapes: B batch, F latents (d_sae), K active latents (k), M candidates per row, V parts of rows, W entries of a part.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsight import kernels
from sparsight.sae.base import SAE
from sparsight.sae.codes import Codes, DenseCodes, SparseCodes

_MEMORY = 0.95  # weight of the old threshold in its exponential mean, per batch


class BatchSelection(SAE):
    """Keeps the B * K largest codes of a batch in training, and codes above a learnt threshold at inference.

    Until the threshold is learnt, inference selects as training does.
    """

    scaled = ("b_enc", "b_dec", "threshold")

    def __init__(self, *sizes: int, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.register_buffer("threshold", torch.tensor(-1.0))
        self.threshold: Tensor

    def encode(self, x: Tensor | np.ndarray) -> Codes:
        x = self.validate(x)
        if self.threshold < 0:
            return self._largest(x)
        pre = (x - self.b_dec) @ self.W_enc + self.b_enc
        return DenseCodes(pre * (pre > self.threshold))

    def training_codes(self, x: Tensor) -> tuple[SparseCodes, Tensor | None]:
        if not self.gpu_step:
            return self._largest(x), None
        pre, indices, rows = kernels.batch_topk(x - self.b_dec, self.W_enc, self.b_enc, self.k)
        return self._codes_in_parts(x, pre, indices, rows), None

    def _codes_in_parts(self, x: Tensor, pre_VW: Tensor, indices_VW: Tensor, rows_V: Tensor) -> SparseCodes:
        """Codes of what a GPU selects, which does not tell the host how long the longest row is."""
        values = kernels.chosen(x[rows_V], self.W_enc, self.b_enc, pre_VW, indices_VW, self.b_dec)
        return SparseCodes(values, indices_VW, self.d_sae, (rows_V, len(x)))

    def _largest(self, x: Tensor) -> SparseCodes:
        """The B * K largest codes of the batch, found among the M largest of each row. M doubles while too small."""
        m, n = min(4 * self.k, self.d_sae), len(x) * self.k
        while True:
            values, indices = self._topk(x, m)
            kept = values.detach().flatten().topk(n, sorted=False).indices
            keep = torch.zeros_like(values, dtype=torch.bool)
            keep.view(-1)[kept] = True
            longest = int((keep & (values > 0)).sum(dim=1).max())
            if m == self.d_sae or longest < m:
                break
            m = min(2 * m, self.d_sae)
        # Kept entries first, cut at the longest row; shorter rows are padded.
        order = (values.detach() * keep).argsort(dim=1, descending=True, stable=True)[:, : max(longest, 1)]
        return SparseCodes((values * keep).gather(1, order), indices.gather(1, order), self.d_sae)

    @torch.no_grad()
    def learn(self, codes: Codes) -> None:
        assert isinstance(codes, SparseCodes)
        smallest = torch.where(codes.values > 0, codes.values, torch.inf).min()
        previous = torch.where(self.threshold < 0, smallest, self.threshold)
        self.threshold.copy_(
            torch.where(smallest < torch.inf, _MEMORY * previous + (1 - _MEMORY) * smallest, self.threshold)
        )
