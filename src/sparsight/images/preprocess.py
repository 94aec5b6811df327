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
        height, width = self.size
        scale = max(height / picture.shape[0], width / picture.shape[1]) / self.crop_pct
        resized = (max(height, round(picture.shape[0] * scale)), max(width, round(picture.shape[1] * scale)))
        picture = _resize(picture, self.size if self.squash else resized, self.interpolation)
        top, left = (picture.shape[0] - height) // 2, (picture.shape[1] - width) // 2
        return np.broadcast_to(picture[top : top + height, left : left + width], (height, width, self.channels))


def _resize(picture: np.ndarray, size: tuple[int, int], interpolation: str) -> np.ndarray:
    """Resize with antialiasing, like Pillow up to rounding; the same bits on every CPU."""
    if picture.shape[:2] == size:
        return picture
    import torch  # slow to import, and not needed to list images

    x = torch.from_numpy(np.require(picture, requirements="W")).permute(2, 0, 1)[None]
    return torch.nn.functional.interpolate(x, size=size, mode=interpolation, antialias=True)[0].permute(1, 2, 0).numpy()
