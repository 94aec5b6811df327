"""Steering methods as edits: of the class token at one site, of the embedding, or of the logits.

Shapes: B batch, D width (d_in), C classes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Input of an edit: a batch of images."""

    x: Tensor
    """The tensor to edit: the class token at the site or the embedding, (B, D), or the logits, (B, C)."""
    classes: Tensor | None = None
    """int64 (B,): classes predicted by the unsteered model, or the true classes; None for an edit without labels."""
    labels: str = "none"
    """Kind of ``classes``: ``none``, ``predicted`` or ``oracle``."""
    images: slice = field(default_factory=lambda: slice(None))
    """Positions of the images in the split."""


@dataclass(frozen=True)
class Edit:
    """A steering method."""

    apply: Callable[[Batch, float], Tensor]
    """From a batch and a strength to the edited ``x``."""
    labels: tuple[str, ...] = ("none",)
    """Kinds of label that it takes: ``none``, or ``predicted`` and ``oracle``."""
    at: Literal["site", "embedding", "logits"] = "site"
    """The tensor that it edits."""
    strength: float | None = None
    """Fixed strength of a method whose strength is not chosen; None for all others."""


def keep_norm(x_BD: Tensor, edit_BD: Tensor) -> Tensor:
    """(x + edit) ||x|| / ||x + edit||: the edited activation, scaled back to the length of x."""
    moved_BD = x_BD + edit_BD
    return moved_BD * (x_BD.norm(dim=1) / _length(moved_BD)).unsqueeze(1)


def of_size(direction_BD: Tensor, size_B: Tensor) -> Tensor:
    """The directions scaled to lengths ``size_B``. A zero direction stays zero."""
    return direction_BD * (size_B / _length(direction_BD)).unsqueeze(1)


def _length(x_BD: Tensor) -> Tensor:
    return x_BD.norm(dim=1).clamp(min=torch.finfo(x_BD.dtype).tiny)
