"""What a steering method is: a change of the class token at one site, of the embedding, or of the logits.

Shapes: B batch, D width (d_in), C classes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """The images that an edit sees."""

    x: Tensor
    """What it changes: the class token at the site or the embedding, (B, D), or the logits, (B, C)."""
    classes: Tensor | None = None
    """int64 (B,): the class that the unsteered model predicts, or the true one; None for an edit without labels."""
    labels: str = "none"
    """Which of these: ``none``, ``predicted``, ``oracle``."""
    images: slice = field(default_factory=lambda: slice(None))
    """Which images of the split these are."""


@dataclass(frozen=True)
class Edit:
    """A steering method."""

    apply: Callable[[Batch, float], Tensor]
    """What becomes of ``x`` of a batch at a strength."""
    labels: tuple[str, ...] = ("none",)
    """Which classes it takes: ``none``, or ``predicted`` and ``oracle``."""
    at: Literal["site", "embedding", "logits"] = "site"
    """What it changes."""
    strength: float | None = None
    """The one strength of a method that has none to choose."""


def keep_norm(x_BD: Tensor, edit_BD: Tensor) -> Tensor:
    """(x + edit) ||x|| / ||x + edit||: the edited activation at its old length; x itself where the edit is zero."""
    moved_BD = x_BD + edit_BD
    return moved_BD * (x_BD.norm(dim=1) / _length(moved_BD)).unsqueeze(1)


def of_size(direction_BD: Tensor, size_B: Tensor) -> Tensor:
    """The directions scaled to lengths ``size_B``; zero stays zero."""
    return direction_BD * (size_B / _length(direction_BD)).unsqueeze(1)


def _length(x_BD: Tensor) -> Tensor:
    return x_BD.norm(dim=1).clamp(min=torch.finfo(x_BD.dtype).tiny)
