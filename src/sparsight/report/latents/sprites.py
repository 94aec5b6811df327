"""Thumbnails of test images, many in one picture (a sheet).

They show what the model sees, resized and cropped as its input is, so that heat on patches lies where it belongs.
"""

import base64
import dataclasses
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from sparsight.common.slices import row_slices
from sparsight.images.preprocess import Preprocess
from sparsight.images.split import Split

COLUMNS = 10
PER_SHEET = 100
_SIDE = 64  # pixels of a thumbnail; a multiple of 8, so that no JPEG block covers two of them
_LOSSLESS = 32  # pixels up to which they are stored as they are


class Sprites:
    """Makes sheets of a split's images.

    Args:
        split: the images.
        preprocess: the preprocessing of the model that reads them.
    """

    def __init__(self, split: Split, preprocess: Preprocess) -> None:
        scale = min(1.0, _SIDE / max(preprocess.size))
        height, width = (max(1, round(scale * side)) for side in preprocess.size)
        self._split, self.size = split, (height, width)
        self._preprocess = dataclasses.replace(preprocess, size=self.size)

    def sheets(self, rows: np.ndarray) -> list[str]:
        """Data URIs of sheets of the images ``rows``, PER_SHEET each, in lines of COLUMNS."""
        parts = [rows[part] for part in row_slices(len(rows), PER_SHEET)]
        pixels = self._split.stream(parts, self._preprocess)
        return [_encoded(_tiled(images)) for images in pixels]

    def affordable(self, rows: Sequence[int] | np.ndarray, n_bytes: int) -> int:
        """How many images fit into so many bytes, estimated from some of them."""
        sample = np.sort(np.asarray(rows)[:PER_SHEET])
        if not len(sample):
            return 0
        (sheet,) = self.sheets(sample)
        return min(len(rows), int(n_bytes / (1.05 * len(sheet) / len(sample))))


def _tiled(images: np.ndarray) -> np.ndarray:
    """Images uint8 (n, H, W, C) in lines of COLUMNS, white where there is none."""
    n, height, width, channels = images.shape
    lines = -(-n // COLUMNS)
    sheet = np.full((lines * COLUMNS, height, width, channels), 255, np.uint8)
    sheet[:n] = images
    tiled = sheet.reshape(lines, COLUMNS, height, width, channels).swapaxes(1, 2)
    return tiled.reshape(lines * height, COLUMNS * width, channels)


def _encoded(sheet: np.ndarray) -> str:
    picture, buffer = Image.fromarray(sheet[:, :, 0] if sheet.shape[2] == 1 else sheet), io.BytesIO()
    small = sheet.shape[1] <= _LOSSLESS * COLUMNS
    if small:
        picture.save(buffer, "PNG", optimize=True)
    else:
        picture.save(buffer, "JPEG", quality=80, subsampling=0)
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(buffer.getvalue()).decode()}"
