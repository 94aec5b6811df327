"""What an image source is, and how the bytes of an image become an 8-bit picture.

Shapes: H height, W width, C channels (1 grey, 3 RGB).
"""

import io
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageOps

SPLITS = ("train", "val", "test")
MAX_PIXELS = 200_000_000
"""Pictures with more pixels are taken for damaged or hostile files and refused before they are decoded."""
_BAND = 128
"""Rows that are copied out of Pillow at a time; np.array would fill as much memory twice more."""
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit warns at a number of its own; the one above decides


@dataclass(frozen=True)
class Item:
    """One image of a source, not yet read."""

    uri: str
    label_name: str
    split: str | None
    """None where the source leaves the split to us."""
    member: int = 0
    """Which data set of several it is of: each keeps its splits, and what it lacks is drawn from its own train."""


class Reader(Protocol):
    """Gives the bytes of images."""

    def read(self, uri: str) -> bytes:
        """The bytes that the manifest's sha256 is taken of; may raise OSError."""


class Source(Reader, Protocol):
    """A place images come from; a new one is one class and one line in ``SINGLE``.

    It is made from its path alone, opens files when they are needed, and pickles as its path, so that worker
    processes can open their own.
    """

    def items(self) -> list[Item]:
        """Every image, in an order that depends on the source alone.

        Raises:
            SparsightError: nothing there, or labels that do not fit the images.
        """

    def class_names(self) -> list[str]:
        """Label names in the source's official order; the position is the label."""

    def reader(self, uris: Iterable[str]) -> Reader:
        """What reads these images best, each once and about in this order: it may fetch what lies together."""

    def decode(self, uri: str, data: bytes) -> np.ndarray:
        """The picture in the bytes of an image, uint8 (H, W, C), upright; may raise OSError or ValueError."""


class Reopening(ABC):
    """Pickles as its class and path; whatever was opened is opened again."""

    path: Any

    @abstractmethod
    def read(self, uri: str) -> bytes: ...

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (None if self.path is None else str(self.path),)

    def reader(self, uris: Iterable[str]) -> Reader:
        """Images one at a time."""
        return self

    def decode(self, uri: str, data: bytes) -> np.ndarray:
        """A picture file's content, see :func:`decode_file`."""
        return decode_file(data)


def decode_file(data: bytes) -> np.ndarray:
    """Decode a picture file: uint8 (H, W, C), turned as its EXIF orientation says, first frame only.

    Transparent pixels are laid on white; 16-bit grey is divided by 257; CMYK and palettes become RGB.

    Raises:
        OSError: not a picture, or cut short.
        ValueError: more than MAX_PIXELS pixels, or pixels without a known range (32-bit, floating point).
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data))
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
    except (OSError, ValueError):
        raise
    except Exception as error:  # Pillow's plugins raise whatever they stumble on in a damaged file
        raise OSError(None, f"{type(error).__name__}: {error}") from None
    return _array(_eight_bit(image))


def _array(image: Image.Image) -> np.ndarray:
    pixels = np.empty((image.height, image.width, len(image.getbands())), np.uint8)
    for top in range(0, image.height, _BAND):
        band = image.crop((0, top, image.width, min(top + _BAND, image.height)))
        pixels[top : top + _BAND] = np.asarray(band).reshape(band.height, image.width, -1)
    return pixels


def _eight_bit(image: Image.Image) -> Image.Image:
    if image.mode in ("L", "RGB") and not image.has_transparency_data:
        return image
    if image.mode == "1":
        return image.convert("L")
    if image.mode.startswith("I;16"):
        return Image.fromarray(np.rint(np.asarray(image).astype(np.float32) / 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"32-bit pixels (mode {image.mode}) have no known range; store 8 or 16 bits")
    if image.has_transparency_data:
        grey = image.mode in ("LA", "La", "L")
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("L" if grey else "RGB")
    return image.convert("RGB")
