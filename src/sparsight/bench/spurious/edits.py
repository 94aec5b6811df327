"""Ways to remove a feature from the activation at a site, and what the model then predicts.

Shapes: B images, R edited rows of a batch, D width (d_in), n images, S latents.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from sparsight.bench.at_site import Classifier
from sparsight.common.progress import followed
from sparsight.common.slices import row_slices
from sparsight.sae.metrics.baselines import Method

_IMAGES, _ROWS = 125, 4096  # at most so many images, and edited rows, at a time
Encode = Callable[[Method], Any]
"""Codes of a batch, CSC (R, F), computed once for all edits."""


METHODS = ("none", "sae", "random_latents", "mean_difference", "leace", "last_layer")


class Key(NamedTuple):
    """A method with its settings."""

    method: str
    sae: str = ""
    """The SAE; empty for methods without one."""
    latents: int = 0
    """Number of ablated latents."""
    strength: float = 0.0
    """Strength of the ablation; of the last layer the inverse penalty."""
    draw: int = 0
    """Number of the random set of latents, from 1; 0 for other methods."""


class Edit(Protocol):
    """An edit of the rows."""

    def __call__(self, rows_RD: Tensor, encode: Encode) -> Tensor:
        """The edited rows, (R, D)."""


@dataclass(frozen=True)
class Nothing:
    """The untouched model."""

    def __call__(self, rows_RD: Tensor, encode: Encode) -> Tensor:
        return rows_RD


@dataclass(frozen=True)
class WithoutLatents:
    """x - strength sum_i z_i row_i over some latents; the SAE's error stays. At strength 1 they are zero."""

    method: Method
    latents_S: np.ndarray
    strength: float

    def __call__(self, rows_RD: Tensor, encode: Encode) -> Tensor:
        z_RS = encode(self.method)[:, self.latents_S].toarray()
        return rows_RD - self.strength * torch.from_numpy(z_RS @ self.method.rows[self.latents_S]).to(rows_RD)


@dataclass(frozen=True)
class WithoutDirection:
    """x - strength <x - centre, u> u for a unit vector u. At strength 1 the coordinate along u is the centre's."""

    direction_D: Tensor
    centre_D: Tensor
    strength: float

    def __call__(self, rows_RD: Tensor, encode: Encode) -> Tensor:
        along_R = (rows_RD - self.centre_D) @ self.direction_D
        return rows_RD - self.strength * along_R[:, None] * self.direction_D


@dataclass(frozen=True)
class Erased:
    """An affine eraser, such as that of LEACE."""

    eraser: Callable[[Tensor], Tensor]

    def __call__(self, rows_RD: Tensor, encode: Encode) -> Tensor:
        return self.eraser(rows_RD.double()).to(rows_RD.dtype)


@torch.no_grad()
def predictions(model: Classifier, n_images: int, edits: Mapping[Key, Edit]) -> dict[Key, np.ndarray]:
    """The class that the model predicts for each image after each edit, int (n,).

    Args:
        model: the model with the images.
        n_images: n, all images.
        edits: the edits by key.
    """
    found: dict[Key, list[np.ndarray]] = {key: [] for key in edits}
    windows = list(row_slices(n_images, max(1, min(_IMAGES, _ROWS // model.rows_per_image))))
    for window in followed(windows, len(windows), "batches of images"):
        stream = model.stream(np.arange(window.start, window.stop))
        rows_RD = model.rows(stream)
        codes: dict[int, Any] = {}

        def encode(method: Method, rows_RD: Tensor = rows_RD, codes: dict[int, Any] = codes) -> Any:
            if id(method) not in codes:
                codes[id(method)] = method.encode(rows_RD).tocsc()
            return codes[id(method)]

        for key, edit in edits.items():
            logits_BC = model.logits(stream, edit(rows_RD, encode))
            found[key].append(logits_BC.argmax(dim=1).cpu().numpy())
    return {key: np.concatenate(parts) for key, parts in found.items()}
