"""The class term of the PASS loss (arXiv 2506.01247, appendix L): it draws codes to the mean code of their class.

Shapes: B batch, F latents (d_sae), C classes.
"""

import torch
from torch import Tensor

from sparsight.sae.codes import Codes, SparseCodes

_MEMORY = 0.9  # weight of a class's old mean, per batch with the class; the paper does not give its update rule


class ClassMeans:
    """Running mean codes per class; no gradient passes through them."""

    def __init__(self, d_sae: int, device: torch.device) -> None:
        self.means_CF = torch.zeros(0, d_sae, device=device)
        self.seen_C = torch.zeros(0, dtype=torch.bool, device=device)

    def term(self, codes: Codes, labels_B: Tensor) -> Tensor:
        """Batch mean of ||z - mean code of its class||^2. A class without a mean yet adds nothing."""
        has_mean_B = self.seen_C[labels_B]
        if isinstance(codes, SparseCodes):
            # ||z - m||^2 = ||m||^2 + sum over active of z (z - 2 m), which needs no (B, F) array.
            mean_BK = self.means_CF[codes.of_rows(labels_B).unsqueeze(1), codes.indices]
            square_B = self.means_CF.square().sum(dim=1)[labels_B]
            distance_B = square_B + codes.sum_rows((codes.values * (codes.values - 2 * mean_BK)).sum(dim=1))
        else:
            distance_B = (codes.dense() - self.means_CF[labels_B]).square().sum(dim=1)
        return (distance_B * has_mean_B).sum() / len(labels_B)

    @torch.no_grad()
    def learn(self, codes: Codes, labels_B: Tensor) -> None:
        """Move the mean of each class in the batch towards the class's mean in the batch."""
        n_classes = len(self.seen_C)
        of_class_CB = labels_B == torch.arange(n_classes, device=labels_B.device).unsqueeze(1)
        count_C1 = of_class_CB.sum(dim=1, keepdim=True)
        mean_CF = codes.sums(labels_B, n_classes).float() / count_C1.clamp(min=1)
        weight_C1 = torch.where(self.seen_C.unsqueeze(1), 1 - _MEMORY, 1.0) * (count_C1 > 0)
        self.means_CF.lerp_(mean_CF, weight_C1)
        self.seen_C = self.seen_C | (count_C1.squeeze(1) > 0)

    def grow(self, n_classes: int) -> None:
        """Make room for classes 0 to ``n_classes`` - 1; :meth:`term` and :meth:`learn` need it for their labels."""
        missing = n_classes - len(self.seen_C)
        if missing > 0:
            self.means_CF = torch.nn.functional.pad(self.means_CF, (0, 0, 0, missing))
            self.seen_C = torch.nn.functional.pad(self.seen_C, (0, missing))
