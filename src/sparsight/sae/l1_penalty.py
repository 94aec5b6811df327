"""What SAEs with an L1 penalty share: a penalty weight that adapts until K latents are active on average.

Shapes: B batch, F latents (d_sae), K active latents (k).
"""

import math
from typing import Any

import torch
from torch import Tensor

from sparsight.sae.base import SAE
from sparsight.sae.codes import Codes

_SPEED = 0.02  # largest relative change of the weight in a step


class L1Penalised(SAE):
    """An SAE whose sparsity is set by K, as in every other variant; the papers set the weight of the L1 term by hand.

    After each training batch the weight grows by up to two percent if more than K latents were active on average, and
    shrinks if fewer were.
    """

    has_auxk = False

    def __init__(self, *sizes: int, **options: Any) -> None:
        super().__init__(*sizes, **options)
        self.register_buffer("sparsity", torch.tensor(0.1), persistent=False)
        self.sparsity: Tensor

    def l1(self, z_BF: Tensor) -> Tensor:
        """L1 penalty on non-negative codes or gates, relative to the data's standard deviation."""
        return z_BF.sum() / len(z_BF) * (self.sparsity * math.sqrt(self.loss_scale))

    @torch.no_grad()
    def learn(self, codes: Codes) -> None:
        too_many = (codes.l0().float().mean() / self.k).clamp(min=1e-3).log().clamp(-1, 1)
        self.sparsity.mul_((_SPEED * too_many).exp())
