"""Data sets of Hugging Face's library ``datasets``, as saved by ``save_to_disk`` or kept in its cache."""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from sparsight.common.errors import SparsightError, reason
from sparsight.images.class_names import in_order
from sparsight.images.sources.base import Item, Reopening
from sparsight.images.sources.columns import check_kept, is_categorical, is_number, is_short, kept_name, texts
from sparsight.images.sources.listing import log_rows
from sparsight.images.sources.splits import split_of

if TYPE_CHECKING:
    from datasets import Dataset

_UNNAMED = "rows"
"""The place of a split's name in the uris of a Dataset, which has no splits."""


class HuggingFace(Reopening):
    """A folder of ``save_to_disk``, or a data set's folder in the cache; uris are ``<split>:<row>``.

    The library maps the Arrow files into memory. It downloads nothing, runs no code of the data set and decodes no
    image: the bytes are those stored. Where a row has a path instead of bytes, as ``imagefolder`` leaves it in the
    cache, they are those of the file.

    A DatasetDict gives the splits; a single Dataset has none. The image is the column of type Image (``image`` or
    ``img`` if there are several). Label and further columns are chosen as in Parquet tables.

    Args:
        path: the folder.
        label_column: the column of the label; None for the one described above.
    """

    def __init__(self, path: str | None, label_column: str | None = None) -> None:
        assert path is not None
        self.path, self.label_column = Path(path), label_column

    def __reduce__(self) -> tuple[Any, ...]:
        return HuggingFace, (str(self.path), self.label_column)

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

    def _of_type(self, kind: str, preferred: tuple[str, str], remedy: str) -> str | None:
        """The column of a type; with several, the first of the preferred names."""
        names = [name for name, feature in self._features.items() if type(feature).__name__ == kind]
        if len(names) <= 1:
            return next(iter(names), None)
        chosen = next((name for name in preferred if name in names), None)
        if chosen is None:
            raise SparsightError(f"{self.path}: {', '.join(names)} are all of type {kind}; {remedy}")
        return chosen

    @cached_property
    def _image(self) -> str:
        column = self._of_type("Image", ("image", "img"), "name the one to use 'image'")
        for split, rows in self._parts.items():
            if column not in rows.features:
                columns = ", ".join(f"{name} ({type(kind).__name__})" for name, kind in rows.features.items())
                raise SparsightError(f"{self.path}: no column of type Image in {split}; there are: {columns}")
        assert column is not None, "a data set has at least one split"
        return column

    @cached_property
    def _label(self) -> str | None:
        if self.label_column is not None:
            if not self._is_categorical(self.label_column):
                known = ", ".join(filter(self._is_categorical, self._features)) or "none"
                raise SparsightError(
                    f"{self.path}: no column {self.label_column!r} of classes, whole numbers or text; there are: "
                    f"{known}"
                )
            return self.label_column
        usual = ("label", "fine_label")
        column = self._of_type("ClassLabel", usual, "choose one with images.label_column")
        return column or next(filter(self._is_categorical, usual), None)

    def _is_categorical(self, column: str) -> bool:
        kinds = [rows.data.schema.field(column).type for rows in self._parts.values() if column in rows.features]
        return bool(kinds) and all(map(is_categorical, kinds))

    def _texts(self, split: str, column: str) -> list[str | None]:
        """The values of a column as text; None where there is no class, no value or no such column."""
        rows = self._parts[split]
        if column not in rows.features:
            return [None] * len(rows)
        names = getattr(self._features[column], "names", None)
        found = texts(rows.data[column], names, f"{self.path}: {split}: column {column!r}")
        if column == self._label and is_number(rows.data.schema.field(column).type):
            return [None if text == "-1" else text for text in found]
        return found

    @cached_property
    def _further(self) -> list[str]:
        """The further columns that are kept."""
        others = [name for name in self._features if name not in (self._image, self._label)]
        kept = [name for name in others if self._is_categorical(name) and self._is_short(name)]
        check_kept(self.path, others, kept)
        return kept

    def _is_short(self, column: str) -> bool:
        return all(is_short(rows.data[column]) for rows in self._parts.values() if column in rows.features)

    def items(self) -> list[Item]:
        items: list[Item] = []
        for name, rows in self._parts.items():
            labels: list[str | None] = [None] * len(rows) if self._label is None else self._texts(name, self._label)
            further = {kept_name(column): self._texts(name, column) for column in self._further}
            for row, label in enumerate(labels):
                values = {column: text for column, found in further.items() if (text := found[row]) is not None}
                items.append(Item(f"{name}:{row}", label, self._splits[name], columns=values))
            log_rows(f"{self.path} {name}", len(rows), labels.count(None))
        if not items:
            raise SparsightError(f"{self.path}: the data set has no rows")
        return items

    def class_names(self) -> list[str]:
        if self._label is None:
            return []
        names = getattr(self._features[self._label], "names", None)
        found = {text for name in self._parts for text in self._texts(name, self._label)} - {None}
        return list(names) if names and found else in_order(text for text in found if text is not None)

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
