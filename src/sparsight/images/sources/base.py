"""The interface of image sources, and decoding of image files to 8-bit pictures.

Shapes: H height, W width, C channels (1 grey, 3 RGB).
"""

import io
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from sparsight.common.errors import reason

MAX_PIXELS = 200_000_000
"""Pictures with more pixels are rejected before decoding, as damaged or hostile files."""
IGNORED = 255
"""Number of the pixels of a mask that do not count, such as the borders of Pascal VOC's objects."""
_BAND = 128
"""Number of rows copied out of Pillow at a time. np.array would need memory for two more copies of the picture."""
_OPENING = threading.Lock()


_NO_COLUMNS: Mapping[str, str] = {}


@dataclass(frozen=True, slots=True)
class Item:
    """One image of a source, not yet read."""

    uri: str
    label_name: str | None
    """None if the image has no label."""
    split: str | None
    """None if the source does not assign splits."""
    member: int = 0
    """Number of its data set in a union. Each keeps its own splits; missing ones are drawn from its train images."""
    columns: Mapping[str, str] = field(default_factory=lambda: _NO_COLUMNS)
    """Values of the source's further label columns, by name; the manifest keeps them under these names."""


class Reader(Protocol):
    """Reads the bytes of images."""

    def read(self, uri: str) -> bytes:
        """The bytes of an image, as hashed for the manifest; may raise OSError."""


class Masks(Reader, Protocol):
    """What is where in the images of a source."""

    def names(self) -> list[str]:
        """Names of the regions 1, 2, ..."""

    def decode(self, uri: str, data: bytes) -> np.ndarray:
        """Number of the region at each pixel: uint8 (H, W), 0 background, ``IGNORED`` none that counts.

        May raise OSError or ValueError.
        """


class Source(Reader, Protocol):
    """A source of images. A new one needs one class and one line in ``SINGLE``.

    A source is created from its path alone, opens files when they are needed, and pickles as its path, so that
    worker processes open their own files.
    """

    def items(self) -> list[Item]:
        """Every image, in an order that depends on the source alone.

        Raises:
            SparsightError: no images, or labels that do not fit the images.
        """

    def class_names(self) -> list[str]:
        """Label names in the source's official order; the position is the label."""

    def reader(self, uris: Iterable[str]) -> Reader:
        """A reader for these images, each read once and roughly in this order; it may fetch neighbours together."""

    def decode(self, uri: str, data: bytes) -> np.ndarray:
        """Decode the bytes of an image: uint8 (H, W, C), upright; may raise OSError or ValueError."""

    def masks(self) -> Masks | None:
        """The masks that the source itself has; None if it has none."""


class Reopening(ABC):
    """Base of sources that pickle as class and path; the copy opens its files again."""

    path: Any

    @abstractmethod
    def read(self, uri: str) -> bytes: ...

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (None if self.path is None else str(self.path),)

    def reader(self, uris: Iterable[str]) -> Reader:
        """Read images one at a time."""
        return self

    def decode(self, uri: str, data: bytes) -> np.ndarray:
        """Decode the bytes of a picture file, see :func:`decode_file`."""
        return decode_file(data)

    def masks(self) -> Masks | None:
        """None."""
        return None


def decode_file(data: bytes) -> np.ndarray:
    """Decode a picture file: uint8 (H, W, C), rotated by its EXIF orientation, first frame only.

    Transparent pixels are blended with white; 16-bit grey is divided by 257; CMYK and palettes become RGB.

    Raises:
        OSError: not a picture, or cut short.
        ValueError: more than MAX_PIXELS pixels, or pixels without a known range (32-bit, floating point).
        Either message begins with the image's format, if the header is sound.
    """
    name = "damaged header"
    try:
        image = _open(data)
        name = image.format or name
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return _array(_eight_bit(image))
    except UnidentifiedImageError:  # its message shows the Python object that holds the bytes
        raise OSError(f"cannot identify the image's format from its {len(data)} bytes") from None
    except ValueError as error:
        raise ValueError(f"{name}: {reason(error)}") from None
    except Exception as error:  # Pillow's plugins raise any kind of exception on damaged files
        kind = "" if isinstance(error, OSError) else f"{type(error).__name__}: "
        raise OSError(f"{name}: {kind}{reason(error)}") from None


def decode_mask(data: bytes) -> np.ndarray:
    """Decode a picture file whose values, or places in a palette, are numbers of regions: uint8 (H, W).

    Raises:
        OSError: not a picture, or cut short.
        ValueError: more than MAX_PIXELS pixels, or several channels.
    """
    try:
        image = _open(data)
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
        if image.mode not in ("1", "L", "P"):
            raise ValueError(f"a picture of mode {image.mode}; a mask has one channel of 8 bits, or a palette")
        return np.array(image).astype(np.uint8)
    except UnidentifiedImageError:
        raise OSError(f"cannot identify the image's format from its {len(data)} bytes") from None
    except ValueError:
        raise
    except Exception as error:  # as in decode_file
        raise OSError(reason(error)) from None


def _open(data: bytes) -> Image.Image:
    """Read the header only. MAX_PIXELS replaces Pillow's own limit here and nowhere else in the process."""
    with _OPENING:  # Pillow's limit is one global, and several threads decode
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(io.BytesIO(data))
        finally:
            Image.MAX_IMAGE_PIXELS = limit


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
