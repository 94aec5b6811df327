"""Which columns of Parquet tables are image and label, and the values of the label and of further columns."""

import json
from collections import defaultdict
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sparsight.common.errors import SparsightError
from sparsight.images.sources.columns import check_kept, is_categorical, is_number, is_short, kept_name, texts


class ParquetColumns:
    """The columns of tables that belong together.

    Args:
        path: folder of the tables, for messages.
        files: the tables by name.
        splits: the split of each table.
        label_column: the column of the label; None for the usual one.

    Raises:
        SparsightError: (every member) tables that do not fit together, or columns of unknown types.
    """

    def __init__(
        self,
        path: Path,
        files: Mapping[str, pq.ParquetFile],
        splits: Mapping[str, str | None],
        label_column: str | None,
    ) -> None:
        self._path, self._files, self._splits, self._asked = path, files, splits, label_column

    @cached_property
    def _features(self) -> dict[str, Any]:
        """Hugging Face's description of every column, as far as the tables have one."""
        features: dict[str, Any] = {}
        for file_name, file in self._files.items():
            metadata = json.loads((file.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
            for column, feature in metadata.get("info", {}).get("features", {}).items():
                if features.setdefault(column, feature).get("names") != feature.get("names"):
                    raise SparsightError(f"{self._path}: {file_name} has other class names in {column!r}; repair it")
        return features

    @cached_property
    def _types(self) -> dict[str, dict[str, pa.DataType]]:
        """By column, its type in each table that has it."""
        types: dict[str, dict[str, pa.DataType]] = defaultdict(dict)
        for file_name, file in self._files.items():
            for field in file.schema_arrow:
                types[field.name][file_name] = field.type
        return dict(types)

    def _of_type(self, kind: str) -> list[str]:
        return [name for name, feature in self._features.items() if feature.get("_type") == kind]

    @cached_property
    def image(self) -> str:
        """Name of the image column."""
        known = self._of_type("Image")
        preferred = [name for name in ("image", "img") if name in (known or self._types)]
        if len(known) != 1 and not preferred:
            raise SparsightError(f"{self._path}: no column 'image'; there are: {', '.join(known or self._types)}")
        image = known[0] if len(known) == 1 else preferred[0]
        for name in self._files:
            kind = self._types.get(image, {}).get(name)
            if kind is None:
                raise SparsightError(f"{self._path}: {name} has no column {image!r}, unlike other tables")
            if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
                raise SparsightError(
                    f"{self._path}: {name}: column {image!r} is {kind}, not a struct with bytes and path"
                )
        return image

    @cached_property
    def _label(self) -> str | None:
        """Name of the label column; None if there is none."""
        label = self._asked or self._usual_label()
        if label is None:
            return None
        if label not in self._types or label == self.image:
            others = [column for column in self._types if column != self.image]
            raise SparsightError(f"{self._path}: no label column {label!r}; there are: {', '.join(others) or 'none'}")
        for name, split in self._splits.items():
            with_label = next((n for n in self._types[label] if self._splits[n] == split), None)
            kind = self._types[label].get(name)
            if kind is None and with_label is not None:
                raise SparsightError(f"{self._path}: {name} has no column {label!r}, unlike {with_label}; repair it")
            if kind is not None and not is_categorical(kind):
                raise SparsightError(
                    f"{self._path}: {name}: the label column {label!r} is {kind}; store whole numbers or text, "
                    "with null for an image without label"
                )
        return label

    def _usual_label(self) -> str | None:
        known = self._of_type("ClassLabel")
        if len(known) == 1:
            return known[0]
        preferred = [name for name in ("label", "fine_label") if name in (known or self._types)]
        if known and not preferred:
            raise SparsightError(
                f"{self._path}: several label columns ({', '.join(known)}); choose one with images.label_column"
            )
        return preferred[0] if preferred else None

    def _names(self, column: str) -> list[str] | None:
        """Names of the classes of a ClassLabel column."""
        return self._features.get(column, {}).get("names") or None

    def _is_numbered(self, column: str) -> bool:
        return all(is_number(kind) or pa.types.is_null(kind) for kind in self._types[column].values())

    @cached_property
    def labels(self) -> dict[str, list[str | None]]:
        """The labels of every table."""
        label = self._label
        if label is None:
            return {name: [None] * file.metadata.num_rows for name, file in self._files.items()}
        labels: dict[str, list[str | None]] = {}
        for name, file in self._files.items():
            if name not in self._types[label]:
                labels[name] = [None] * file.metadata.num_rows
                continue
            column, names = self._read(name, label), self._names(label)
            if names is None and self._is_numbered(label):
                names = [str(number) for number in range((pc.max(column.cast(pa.int64())).as_py() or 0) + 1)]
            labels[name] = texts(column, names, f"{self._path}: {name}")
        return labels

    @cached_property
    def _kept(self) -> list[str]:
        """The further columns that are kept."""
        others = [column for column in self._types if column not in (self.image, self._label)]
        kept = [column for column in others if self._is_kept(column)]
        check_kept(self._path, others, kept)
        return kept

    def _is_kept(self, column: str) -> bool:
        types = self._types[column]
        if not all(map(is_categorical, types.values())):
            return False
        return all(is_number(kind) or is_short(self._read(name, column)) for name, kind in types.items())

    def further(self, file_name: str) -> dict[str, list[str | None]]:
        """The further columns of a table, as text, by the names under which the manifest keeps them."""
        return {
            kept_name(column): texts(
                self._read(file_name, column), self._names(column), f"{self._path}: {file_name}: column {column!r}"
            )
            for column in self._kept
            if file_name in self._types[column]
        }

    def _read(self, file_name: str, column: str) -> pa.ChunkedArray:
        return self._files[file_name].read(columns=[column])[column]

    def class_names(self) -> list[str]:
        """Names of the classes in their order; none if no image has a label."""
        found = {text for labels in self.labels.values() for text in labels if text is not None}
        if not found or self._label is None:
            return []
        if names := self._names(self._label):
            return names
        if self._is_numbered(self._label):
            return [str(number) for number in range(max(map(int, found)) + 1)]
        return sorted(found)
