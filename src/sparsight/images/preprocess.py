"""Turns a decoded picture into a model's input pixels.

Shapes: H height, W width, C channels.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

from sparsight.common.errors import SparsightError


@dataclass(frozen=True)
class Preprocess:
    """How a picture becomes a model's input; the numbers come from the model's own configuration.

    Raises:
        SparsightError: a filter other than bicubic and bilinear.
    """

    size: tuple[int, int]
    """Height and width in pixels."""
    channels: int
    """1 (grey) or 3 (RGB)."""
    mean: tuple[float, ...]
    """Subtracted from each channel after scaling to [0, 1]."""
    std: tuple[float, ...]
    """Divides each channel after ``mean`` is subtracted."""
    interpolation: str = "bicubic"
    """Filter of the resize, bicubic or bilinear."""
    crop_pct: float = 1.0
    """Share of the resized short side that the centre crop keeps."""
    squash: bool = False
    """Resize both sides to ``size``, whatever the picture's shape (SigLIP), instead of cropping."""

    def __post_init__(self) -> None:
        if self.interpolation not in ("bicubic", "bilinear"):
            raise SparsightError(
                f"preprocess: the model's configuration asks for the filter {self.interpolation!r}; bicubic and "
                "bilinear are known, use another model or tag"
            )

    def pixels(self, picture: np.ndarray) -> np.ndarray:
        """Resize the short side and crop the centre: uint8 (H, W, C) to this size and number of channels."""
        if picture.shape[2] > self.channels:
            picture = np.asarray(Image.fromarray(picture).convert("L"))[:, :, None]
        resized, crop = self._geometry(picture.shape[0], picture.shape[1])
        return np.broadcast_to(_resize(picture, resized, self.interpolation)[crop], (*self.size, self.channels))

    def mask(self, mask: np.ndarray) -> np.ndarray:
        """The same resize and crop for a mask of a picture: uint8 (H, W) to this size, by the nearest pixel."""
        resized, crop = self._geometry(mask.shape[0], mask.shape[1])
        y, x = (((np.arange(new) + 0.5) * old / new).astype(int) for new, old in zip(resized, mask.shape, strict=True))
        return np.asarray(mask[np.ix_(y, x)][crop])

    def _geometry(self, rows: int, columns: int) -> tuple[tuple[int, int], tuple[slice, slice]]:
        """Size after the resize, and the part of it that the crop keeps."""
        height, width = self.size
        scale = max(height / rows, width / columns) / self.crop_pct
        resized = (max(height, round(rows * scale)), max(width, round(columns * scale)))
        if self.squash:
            resized = self.size
        top, left = (resized[0] - height) // 2, (resized[1] - width) // 2
        return resized, (slice(top, top + height), slice(left, left + width))


def _resize(picture: np.ndarray, size: tuple[int, int], interpolation: str) -> np.ndarray:
    """Resize with antialiasing, like Pillow up to rounding; the same bits on every CPU."""
    if picture.shape[:2] == size:
        return picture
    import torch  # slow to import, and not needed to list images

    x = torch.from_numpy(np.require(picture, requirements="W")).permute(2, 0, 1)[None]
    return torch.nn.functional.interpolate(x, size=size, mode=interpolation, antialias=True)[0].permute(1, 2, 0).numpy()
