"""Data sets of Hugging Face's library ``datasets``, as saved by ``save_to_disk`` or kept in its cache."""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from sparsight.common.errors import SparsightError, reason
from sparsight.images.class_names import in_order
from sparsight.images.sources.base import Item, Reopening
from sparsight.images.sources.listing import log_rows
from sparsight.images.sources.splits import split_of

if TYPE_CHECKING:
    from datasets import Dataset

_SCALARS = ("string", "large_string", "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
_UNNAMED = "rows"
"""The place of a split's name in the uris of a Dataset, which has no splits."""


class HuggingFace(Reopening):
    """A folder of ``save_to_disk``, or a data set's folder in the cache; uris are ``<split>:<row>``.

    The library maps the Arrow files into memory. It downloads nothing, runs no code of the data set and decodes no
    image: the bytes are those stored. Where a row has a path instead of bytes, as ``imagefolder`` leaves it in the
    cache, they are those of the file.

    A DatasetDict gives the splits; a single Dataset has none. The image is the column of type Image (``image`` or
    ``img`` if there are several), the label that of type ClassLabel (``label`` or ``fine_label``), or else a column
    ``label`` of numbers or texts. Null and -1 mean no label. Further columns of class labels, numbers and texts are
    kept in ``Item.columns``.
    """

    def __init__(self, path: str | None) -> None:
        assert path is not None
        self.path = Path(path)

    @cached_property
    def _parts(self) -> "dict[str, Dataset]":
        """The rows of every split, by the data set's own name of the split."""
        try:
            import datasets
        except ImportError:
            raise SparsightError(
                f"{self.path}: to read it, the package datasets is needed; install the extra sources: "
                "uv sync --extra sources, or pip install 'sparsight[sources]'"
            ) from None
        try:
            if (self.path / "state.json").is_file() or (self.path / "dataset_dict.json").is_file():
                loaded = datasets.load_from_disk(str(self.path))
            else:
                loaded = self._cached()
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            if isinstance(error, SparsightError):
                raise
            raise SparsightError(f"{self.path}: not readable by datasets ({reason(error)}); save it again") from None
        parts = {_UNNAMED: loaded} if isinstance(loaded, datasets.Dataset) else dict(loaded)
        return {name: rows.with_format(None) for name, rows in parts.items()}

    def _cached(self) -> "dict[str, Dataset]":
        """The data set of the one folder at or below the path that the library's cache filled."""
        from datasets import Dataset, DatasetInfo
        from datasets.arrow_reader import ArrowReader

        folders = sorted(file.parent for file in self.path.rglob("dataset_info.json"))
        if len(folders) != 1:
            found = f"holds {len(folders)} of them, e.g. {folders[0]}" if folders else "has no dataset_info.json"
            raise SparsightError(
                f"{self.path}: not the folder of one data set of Hugging Face ({found}); give one that save_to_disk "
                "wrote, or the folder in the cache that has dataset_info.json"
            )
        folder = str(folders[0])
        info = DatasetInfo.from_directory(folder)
        parts = {}
        for name, about in (info.splits or {}).items():
            files = ArrowReader(folder, info).read(info.dataset_name or info.builder_name, name, info.splits.values())
            parts[name] = Dataset(**files)
            if len(parts[name]) != about.num_examples:
                raise SparsightError(
                    f"{folder}: the split {name} has {len(parts[name])} of {about.num_examples} rows; load it again"
                )
        return parts

    @cached_property
    def _splits(self) -> dict[str, str | None]:
        """The split that each of the data set's own names stands for."""
        splits: dict[str, str | None] = {}
        for name in self._parts:
            split = None if name == _UNNAMED else split_of(name)
            if split is None and name != _UNNAMED:
                raise SparsightError(
                    f"{self.path}: the split {name!r} is none of train, val and test; save the data set without it "
                    "or under one of these names"
                )
            if split in splits.values():
                raise SparsightError(f"{self.path}: {' and '.join(self._parts)} name one split twice; merge them")
            splits[name] = split
        return splits

    @cached_property
    def _features(self) -> dict[str, Any]:
        """Type of every column."""
        features: dict[str, Any] = {}
        for split, rows in self._parts.items():
            for name, feature in rows.features.items():
                if features.setdefault(name, feature) != feature:
                    raise SparsightError(f"{self.path}: the column {name!r} of {split} is of another type than before")
        return features

    def _column(self, kind: str, preferred: tuple[str, str]) -> str | None:
        """The column of a type; with several, the first of the preferred names."""
        names = [name for name, feature in self._features.items() if type(feature).__name__ == kind]
        if len(names) <= 1:
            return next(iter(names), None)
        chosen = next((name for name in preferred if name in names), None)
        if chosen is None:
            raise SparsightError(
                f"{self.path}: {', '.join(names)} are all of type {kind}; name the one to use {preferred[0]!r}"
            )
        return chosen

    @cached_property
    def _image(self) -> str:
        column = self._column("Image", ("image", "img"))
        for split, rows in self._parts.items():
            if column is None or column not in rows.features:
                columns = ", ".join(f"{name} ({type(kind).__name__})" for name, kind in rows.features.items())
                raise SparsightError(f"{self.path}: no column of type Image in {split}; there are: {columns}")
        assert column is not None
        return column

    @cached_property
    def _label(self) -> str | None:
        column = self._column("ClassLabel", ("label", "fine_label"))
        return "label" if column is None and self._is_label(self._features.get("label")) else column

    @staticmethod
    def _is_label(feature: Any) -> bool:
        return hasattr(feature, "names") or getattr(feature, "dtype", None) in _SCALARS

    def items(self) -> list[Item]:
        further = [name for name, kind in self._features.items() if name != self._label and self._is_label(kind)]
        items: list[Item] = []
        for name, rows in self._parts.items():
            labels = self._texts(name, self._label) if self._label in rows.features else [None] * len(rows)
            columns = {column: self._texts(name, column) for column in further if column in rows.features}
            for row, label in enumerate(labels):
                values = {column: texts[row] for column, texts in columns.items()}
                known = {column: text for column, text in values.items() if text is not None}
                items.append(Item(f"{name}:{row}", label, self._splits[name], columns=known))
            log_rows(f"{self.path} {name}", len(rows), labels.count(None))
        if not items or not self._image:
            raise SparsightError(f"{self.path}: the data set has no rows")
        return items

    def _texts(self, split: str, column: str | None) -> list[str | None]:
        """The values of a column as text: class names where it has them; None where it is null or -1."""
        assert column is not None
        names = getattr(self._features[column], "names", None)
        texts: list[str | None] = []
        for row, value in enumerate(self._parts[split][column][:]):
            if value is None or (value == -1 and (names or column == self._label)):
                texts.append(None)
            elif names and not 0 <= value < len(names):
                raise SparsightError(
                    f"{self.path}: {split} row {row}: {column} is {value}, but {len(names)} classes have names; "
                    "repair it"
                )
            else:
                texts.append(str(names[value] if names else value))
        return texts

    def class_names(self) -> list[str]:
        if self._label is None:
            return []
        names = getattr(self._features[self._label], "names", None)
        if names:
            return list(names)
        labels = (self._texts(name, self._label) for name, rows in self._parts.items() if self._label in rows.features)
        return in_order(label for texts in labels for label in texts if label is not None)

    @cached_property
    def _images(self) -> "dict[str, Dataset]":
        from datasets import Image

        return {
            name: rows.select_columns([self._image]).cast_column(self._image, Image(decode=False))
            for name, rows in self._parts.items()
        }

    def read(self, uri: str) -> bytes:
        split, _, row = uri.rpartition(":")
        if split not in self._images or int(row) >= len(self._images[split]):
            raise FileNotFoundError(None, f"No such image in {self.path}")
        cell = self._images[split][int(row)][self._image] or {}
        if cell.get("bytes") is not None:
            return bytes(cell["bytes"])
        if not cell.get("path"):
            raise OSError(None, "the row holds neither the bytes of an image nor a path")
        try:
            return Path(cell["path"]).read_bytes()
        except OSError as error:
            raise OSError(None, f"the row holds a path but no bytes, and {cell['path']}: {reason(error)}") from None
