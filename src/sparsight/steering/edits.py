"""What a steering method is: a change of the class token at one site.

Shapes: B batch, D width (d_in).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """The images that an edit sees."""

    x: Tensor
    """Class token at the site, (B, D)."""
    classes: Tensor | None
    """int64 (B,): the class that the unsteered model predicts, or the true one; None for an edit without labels."""


@dataclass(frozen=True)
class Edit:
    """A steering method."""

    apply: Callable[[Batch, float], Tensor]
    """The steered class token (B, D) of a batch at a strength."""
    labels: tuple[str, ...] = ("none",)
    """Which classes it takes: ``none``, or ``predicted`` and ``oracle``."""


def keep_norm(x_BD: Tensor, edit_BD: Tensor) -> Tensor:
    """(x + edit) ||x|| / ||x + edit||: the edited activation at its old length; x itself where the edit is zero."""
    moved_BD = x_BD + edit_BD
    return moved_BD * (x_BD.norm(dim=1) / _length(moved_BD)).unsqueeze(1)


def of_size(direction_BD: Tensor, size_B: Tensor) -> Tensor:
    """The directions scaled to lengths ``size_B``; zero stays zero."""
    return direction_BD * (size_B / _length(direction_BD)).unsqueeze(1)


def _length(x_BD: Tensor) -> Tensor:
    return x_BD.norm(dim=1).clamp(min=torch.finfo(x_BD.dtype).tiny)
