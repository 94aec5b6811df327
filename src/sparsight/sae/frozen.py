"""SAEs of which a part stays as it was drawn: controls of training (Korznikov et al. 2026, arXiv 2602.14111).

* ``decoder``: the rows keep their random directions.
* ``encoder``: the columns keep their random directions.
* ``soft-decoder``: rows are trained, but keep a cosine of at least 0.8 to their random directions (the paper's bound).

Everything else is trained: biases, thresholds, gates, routers. How the bound is kept is our choice: after every step, a
row that has left the cone around its random direction returns to the nearest point of the cone.

Shapes: D width (d_in), F latents (d_sae).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sparsight.config.sae import Frozen
from sparsight.sae.base import SAE, blocks

LEAST_COSINE = 0.8
"""Of a row of a soft-frozen decoder and its random direction."""
_SLACK = 1e-6  # rounding, so that a row on the cone stays where it is


class Cones:
    """The random directions of decoder rows, and the way back to them.

    Args:
        decoders: parts of the decoder, (F, D) each, with rows of unit norm, before training.
    """

    def __init__(self, decoders: Sequence[Tensor]) -> None:
        self._decoders = list(decoders)
        self.axes = [W_FD.detach().clone() for W_FD in decoders]
        """The random directions."""

    @torch.no_grad()
    def project(self) -> None:
        """Move every row that has left its cone to the nearest unit vector on it."""
        for W_FD, axes_FD in zip(self._decoders, self.axes, strict=True):
            for rows, axes in zip(blocks(W_FD), blocks(axes_FD), strict=True):
                cosines = torch.linalg.vecdot(rows, axes).unsqueeze(1)
                across = rows - cosines * axes
                across.div_(torch.linalg.vector_norm(across, dim=1, keepdim=True).clamp(min=1e-30))
                on_cone = LEAST_COSINE * axes + math.sqrt(1 - LEAST_COSINE**2) * across
                rows.copy_(torch.where(cosines < LEAST_COSINE - _SLACK, on_cone, rows))


def freeze(sae: SAE, frozen: Frozen) -> Cones | None:
    """Keep a part of an SAE from being trained.

    Args:
        sae: the SAE before training, or the part of it that a process holds.
        frozen: what is frozen.

    Returns:
        For ``soft-decoder``, what brings rows back after every step.
    """
    name = {"none": "", "encoder": "W_enc"}.get(frozen, "W_dec")
    weights = [p for path, p in sae.named_parameters() if path.rpartition(".")[2] == name]
    if frozen == "soft-decoder":
        return Cones(weights)
    for p in weights:
        p.requires_grad_(False)
    return None
