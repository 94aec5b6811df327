"""A map of an SAE's latents: the directions of its decoder in the plane.

Shapes: F latents (d_sae), D width (d_in).
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparsight.sae.metrics.geometry import unit


class Plane(NamedTuple):
    """Where each latent lies."""

    places_F2: np.ndarray
    """(F, 2) uint16, from 0 to 65535 in both directions; both have one scale, the larger of the two fills it."""
    share: float
    """Share of the variance of the directions that the plane keeps."""


@torch.no_grad()
def plane(W_dec_FD: Tensor) -> Plane:
    """The two principal components of the unit decoder rows around their mean.

    The sign of a component is that of its largest entry, so equal rows give equal maps.
    """
    rows_FD = unit(W_dec_FD).double().cpu()
    centred_FD = rows_FD - rows_FD.mean(dim=0)
    variances_D, axes_DD = torch.linalg.eigh(centred_FD.T @ centred_FD)
    axes_D2 = axes_DD[:, -2:].flip(1)
    axes_D2 = axes_D2 * axes_D2.gather(0, axes_D2.abs().argmax(dim=0, keepdim=True)).sign()
    at_F2 = (centred_FD @ axes_D2).numpy()
    at_F2 = np.pad(at_F2, ((0, 0), (0, 2 - at_F2.shape[1])))  # of width 1
    half = max(float(np.ptp(at_F2, axis=0).max()) / 2, np.finfo(np.float32).tiny)
    middle = (at_F2.max(axis=0) + at_F2.min(axis=0)) / 2
    places_F2 = np.round(65535 * ((at_F2 - middle) / half + 1) / 2).clip(0, 65535).astype(np.uint16)
    total = float(variances_D.sum())
    return Plane(places_F2, float(variances_D[-2:].sum()) / total if total > 0 else 0.0)
