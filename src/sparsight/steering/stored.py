"""Stored activations, some images at a time.

Shapes: N images, S stored tokens of an image, D width (d_in).
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from sparsight.activations.store import Rows
from sparsight.common.slices import row_slices


def count(rows: Rows | np.ndarray) -> int:
    """Number of images."""
    return len(rows) // _tokens(rows)


def images(rows: Rows | np.ndarray, device: torch.device, at_once: int) -> Iterator[tuple[slice, Tensor]]:
    """In order, positions of images and their activations (N, S, D), of about ``at_once`` rows.

    Args:
        rows: of a store, or an array (N, D) with one row per image.
        device: where to put them.
        at_once: rows in memory at a time; always whole images.
    """
    tokens = _tokens(rows)
    for window in row_slices(count(rows), max(1, at_once // tokens)):
        block = rows[window.start * tokens : window.stop * tokens]
        yield window, torch.from_numpy(np.ascontiguousarray(block)).to(device).unflatten(0, (-1, tokens))


def _tokens(rows: Rows | np.ndarray) -> int:
    return rows.tokens_per_image if isinstance(rows, Rows) else 1
