"""Steering methods as edits: of tokens at one site, of the embedding, or of the logits.

Shapes: B batch, R edited rows of a batch (the edited tokens of its images, image by image), D width (d_in), C classes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Input of an edit: a batch of images."""

    x: Tensor
    """The tensor to edit: the tokens at the site, (R, D), the embedding, (B, D), or the logits, (B, C)."""
    classes: Tensor | None = None
    """int64 (R,): classes of the rows' images, predicted by the unsteered model, or true; None for an edit without
    labels."""
    labels: str = "none"
    """Kind of ``classes``: ``none``, ``predicted`` or ``oracle``."""
    images: slice = field(default_factory=lambda: slice(None))
    """Positions of the images in the split."""
    n_tokens: int = 1
    """Rows of one image, R / B."""

    def by_row(self, values: Tensor) -> Tensor:
        """From a value for each image of the split, (n, ...), to the one of each row of the batch, (R, ...)."""
        return values[self.images].repeat_interleave(self.n_tokens, dim=0)


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


Edits = Sequence[Mapping[str, Edit]]
"""By edited site, the methods by name. The first also has those that edit the embedding or the logits."""


def keep_norm(x_RD: Tensor, edit_RD: Tensor) -> Tensor:
    """(x + edit) ||x|| / ||x + edit||: the edited rows, each scaled back to the length of x."""
    moved_RD = x_RD + edit_RD
    return moved_RD * (x_RD.norm(dim=1) / _length(moved_RD)).unsqueeze(1)


def of_size(direction_RD: Tensor, size_R: Tensor) -> Tensor:
    """The directions scaled to lengths ``size_R``. A zero direction stays zero."""
    return direction_RD * (size_R / _length(direction_RD)).unsqueeze(1)


def _length(x_RD: Tensor) -> Tensor:
    return x_RD.norm(dim=1).clamp(min=torch.finfo(x_RD.dtype).tiny)
