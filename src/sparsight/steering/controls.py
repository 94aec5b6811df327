"""Edits of equal size that the class latents are compared with.

Shapes: B batch, D width (d_in), C classes, M latents per class.
"""

import torch
from torch import Tensor

from sparsight.sae.base import SAE
from sparsight.steering.latents import ClassLatents


def random_edit(sae: SAE, classes_B: Tensor, found: ClassLatents, size_B: Tensor) -> Tensor:
    """Each class's random latents at their mean activation, scaled to the norm ``size_B``; (B, D).

    A random latent is seldom active on a given image, so amplifying its own code would do next to
    nothing; its usual push at the size of the real edit is the harder control.
    """
    mean_CM = found.mean_activation.mean(dim=0)[found.random_latents]
    push_CD = torch.einsum("cm,cmd->cd", mean_CM, sae.W_dec[found.random_latents])
    return _scaled(push_CD[classes_B], size_B)


def mean_difference_edit(classes_B: Tensor, found: ClassLatents, size_B: Tensor) -> Tensor:
    """SAE-free: towards the class's mean activation from the mean of all, scaled to ``size_B``; (B, D)."""
    return _scaled((found.class_mean - found.mean)[classes_B], size_B)


def _scaled(direction_BD: Tensor, size_B: Tensor) -> Tensor:
    norm_B1 = direction_BD.norm(dim=1, keepdim=True).clamp(min=torch.finfo(direction_BD.dtype).tiny)
    return direction_BD / norm_B1 * size_B[:, None]
