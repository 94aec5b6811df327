"""Masks of images: which region each pixel shows, and how much of each patch is which region.

Shapes: H height, W width, P patches of an image, R regions without the background.
"""

from functools import cached_property
from pathlib import Path

import numpy as np

from sparsight.common.errors import SparsightError, reason
from sparsight.images.sources import Masks, Source
from sparsight.images.sources.base import IGNORED, decode_mask

_NAMES = "names.txt"


class MaskFolder:
    """Pictures in a folder that mirrors that of the images, ``<image's relative path without suffix>.png``.

    ``names.txt`` beside them names the regions 1, 2, ..., a line each.

    Args:
        path: folder of the masks.
        images: folder of the images, to which their paths are relative.
    """

    def __init__(self, path: Path, images: Path) -> None:
        self.path, self._images = path, images

    @cached_property
    def _names(self) -> list[str]:
        file = self.path / _NAMES
        try:
            names = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, ValueError) as error:
            raise SparsightError(
                f"{file}: {reason(error)}; write the names of the regions 1, 2, ..., a line each"
            ) from None
        if not 0 < len(names) < IGNORED or len(set(names)) < len(names):
            raise SparsightError(
                f"{file}: holds {len(names)} names; write 1 to {IGNORED - 1} different ones, a line each"
            )
        return names

    def names(self) -> list[str]:
        return self._names

    def file(self, uri: str) -> Path:
        """The mask's file."""
        return self.path / Path(uri).relative_to(self._images).with_suffix(".png")

    def read(self, uri: str) -> bytes:
        return self.file(uri).read_bytes()

    def decode(self, uri: str, data: bytes) -> np.ndarray:
        return decode_mask(data)


def open_masks(source: Source, masks: str | None, path: str | None) -> Masks | None:
    """The masks of the images of a source, if there are any.

    Args:
        source: the source of the images.
        masks: folder of the masks; None takes the source's own.
        path: path of the images.
    """
    if masks is None:
        return source.masks()
    assert path is not None
    return MaskFolder(Path(masks), Path(path))


def read_mask(masks: Masks, uri: str, size: tuple[int, int] | None = None) -> tuple[bytes, np.ndarray]:
    """The mask of an image: its bytes, and the number of the region at each pixel, uint8 (H, W).

    Args:
        masks: where the masks are.
        uri: the image.
        size: the image's height and width, upright; None does not compare them.

    Raises:
        SparsightError: the mask is missing, cannot be decoded, has another size, or a number without a name.
    """
    place = masks.file(uri) if isinstance(masks, MaskFolder) else f"of {uri}"
    try:
        data = masks.read(uri)
        mask = masks.decode(uri, data)
    except (OSError, SyntaxError, ValueError) as error:  # as for images
        raise SparsightError(f"mask {place}: {reason(error)}; put a mask there, or leave out its image") from None
    if size is not None and mask.shape != size:
        raise SparsightError(
            f"mask {place}: {mask.shape[1]} x {mask.shape[0]} pixels, but its image {uri} has {size[1]} x {size[0]}; "
            "make it as large as the image"
        )
    unnamed = np.setdiff1d(np.unique(mask[mask != IGNORED]), np.arange(len(masks.names()) + 1))
    if len(unnamed):
        raise SparsightError(
            f"mask {place}: has the number {unnamed[0]}, but there are {len(masks.names())} names; "
            f"add the name to {_NAMES}, or use {IGNORED} for pixels that do not count"
        )
    return data, mask


def patch_shares(mask_HW: np.ndarray, grid: tuple[int, int], n_regions: int) -> np.ndarray:
    """Share of each region in each patch, float64 (P, R + 1), of the pixels that count; the background is number 0.

    Args:
        mask_HW: number of the region at each pixel of the model's input.
        grid: rows and columns of patches.
        n_regions: number of regions.

    Returns:
        The shares, patches row by row; NaN where at least half of a patch's pixels do not count.
    """
    rows, columns = grid
    height, width = (size // n for size, n in zip(mask_HW.shape, grid, strict=True))
    patches = mask_HW[: rows * height, : columns * width].reshape(rows, height, columns, width).swapaxes(1, 2)
    flat = patches.reshape(rows * columns, height * width).astype(np.int64)
    place = np.arange(len(flat))[:, None] * (IGNORED + 1) + flat
    counts = np.bincount(place.ravel(), minlength=len(flat) * (IGNORED + 1)).reshape(len(flat), IGNORED + 1)
    counted = counts[:, : n_regions + 1]
    total = counted.sum(axis=1, keepdims=True)
    shares = np.full(counted.shape, np.nan)
    np.divide(counted, total, out=shares, where=2 * total > height * width)
    return shares
