"""Parquet tables in the layout of Hugging Face: an image struct (bytes, path) and a class label."""

import json
import re
import threading
from bisect import bisect_right
from collections import OrderedDict, defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sparsight.common.errors import SparsightError, reason
from sparsight.images.sources.base import Item, Reader, Reopening

_CACHE_BYTES = 128 * 2**20
"""Memory for decoded row groups. A larger row group is kept alone."""
_WINDOW_BYTES = 256 * 2**20
"""Bytes of the images fetched together. The next window, as large, is prefetched."""
_SPLITS = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip


class ParquetTables(Reopening):
    """A .parquet file, or a folder of them; the start of a file's or folder's name gives the split, see :func:`_split`.

    The schema metadata ``huggingface`` names the columns: the one of type Image and the one of type ClassLabel
    (``label`` or ``fine_label`` if there are several). Without metadata they are ``image`` and ``label``. Class
    names come from the metadata; without it, labels are their own names.
    """

    def __init__(self, path: str | None) -> None:
        assert path is not None
        self.path = Path(path)
        self._lock = threading.Lock()
        self._groups: OrderedDict[tuple[str, int], pa.Array] = OrderedDict()

    @cached_property
    def _files(self) -> dict[str, pq.ParquetFile]:
        paths = [self.path] if self.path.is_file() else sorted(self.path.rglob("*.parquet"))
        if not paths:
            raise SparsightError(f"{self.path}: no .parquet file here")
        root = self.path.parent if self.path.is_file() else self.path
        try:
            return {path.relative_to(root).as_posix(): pq.ParquetFile(path) for path in paths}
        except (pa.ArrowException, OSError) as error:
            raise SparsightError(f"{self.path}: not readable as Parquet ({reason(error)})") from None

    @cached_property
    def _features(self) -> dict[str, Any]:
        file = next(iter(self._files.values()))
        metadata = json.loads((file.schema_arrow.metadata or {}).get(b"huggingface", b"{}"))
        return dict(metadata.get("info", {}).get("features", {}))

    @cached_property
    def _columns(self) -> tuple[str, str]:
        """Names of the image and the label column."""

        def find_column(kind: str, preferred: tuple[str, ...]) -> str:
            names = [name for name, feature in self._features.items() if feature.get("_type") == kind]
            if len(names) == 1:
                return names[0]
            known = names or next(iter(self._files.values())).schema_arrow.names
            for name in preferred:
                if name in known:
                    return name
            raise SparsightError(f"{self.path}: no column {preferred[0]!r}; there are: {', '.join(known)}")

        image, label = find_column("Image", ("image", "img")), find_column("ClassLabel", ("label", "fine_label"))
        for name, file in self._files.items():
            schema = file.schema_arrow
            for column in (image, label):
                if column not in schema.names:
                    raise SparsightError(f"{self.path}: {name} has no column {column!r}, unlike the first table")
            kind = schema.field(image).type
            if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
                raise SparsightError(
                    f"{self.path}: {name}: column {image!r} is {kind}, not a struct with bytes and path"
                )
        return image, label

    def items(self) -> list[Item]:
        names = self.class_names()
        known = set(names)
        _, label = self._columns
        items: list[Item] = []
        for file_name, file in self._files.items():
            split = _split(Path(file_name))
            labels = file.read(columns=[label])[label].to_pylist()
            for row, value in enumerate(labels):
                name = names[value] if isinstance(value, int) and 0 <= value < len(names) else value
                if name not in known:
                    raise SparsightError(f"{self.path}: {file_name} row {row} has no class ({value!r}); repair it")
                items.append(Item(f"{file_name}:{row}", name, split))
        if not items:
            raise SparsightError(f"{self.path}: the tables have no rows")
        return items

    def class_names(self) -> list[str]:
        _, label = self._columns
        names = self._features.get(label, {}).get("names")
        if names:
            return list(names)
        values = {v for file in self._files.values() for v in file.read(columns=[label])[label].to_pylist()} - {None}
        if any(isinstance(value, str) for value in values):
            return sorted(values)
        return [str(number) for number in range(max(values, default=-1) + 1)]

    def reader(self, uris: Iterable[str]) -> Reader:
        """Read one window of images at a time, see :class:`_Ahead`."""
        return _Ahead(self, uris)

    def read(self, uri: str) -> bytes:
        return _bytes(self.fetch([uri])[uri])

    def fetch(self, uris: list[str]) -> dict[str, bytes | OSError]:
        """The bytes of every image, or the error that prevents reading it; each row group is read once."""
        contents: dict[str, bytes | OSError] = {}
        by_group: dict[tuple[str, int], list[tuple[str, int]]] = defaultdict(list)
        for uri in uris:
            name, _, row = uri.rpartition(":")
            if name not in self._starts or int(row) >= self._starts[name][-1]:
                contents[uri] = FileNotFoundError(None, f"No such image in {self.path}")
                continue
            number = bisect_right(self._starts[name], int(row)) - 1
            by_group[name, number].append((uri, int(row) - self._starts[name][number]))
        for key, images in sorted(by_group.items()):
            try:
                group = self._group(*key)
            except OSError as error:
                contents |= {uri: error for uri, _ in images}
                continue
            for uri, offset in images:
                data = group[offset]["bytes"].as_py()
                contents[uri] = OSError(None, "the table holds a path but no bytes") if data is None else data
        return contents

    @cached_property
    def window(self) -> int:
        """Number of average-sized images that fill _WINDOW_BYTES."""
        tables = [file.metadata for file in self._files.values()]
        n_bytes = sum(table.row_group(i).total_byte_size for table in tables for i in range(table.num_row_groups))
        return max(1, _WINDOW_BYTES * sum(table.num_rows for table in tables) // n_bytes)

    @cached_property
    def _starts(self) -> dict[str, list[int]]:
        """Per file, the first row of every row group, followed by the number of rows."""
        by_file = {}
        for name, file in self._files.items():
            starts = [0]
            for i in range(file.metadata.num_row_groups):
                starts.append(starts[-1] + file.metadata.row_group(i).num_rows)
            by_file[name] = starts
        return by_file

    def _group(self, name: str, group: int) -> pa.Array:
        """The images of a row group; the groups used last stay cached."""
        image, _ = self._columns
        with self._lock:
            key = (name, group)
            if key not in self._groups:
                try:
                    table = self._files[name].read_row_group(group, columns=[image])
                except (pa.ArrowException, OSError) as error:
                    raise OSError(None, f"row group {group} cannot be read: {reason(error)}") from None
                self._groups[key] = table[image].combine_chunks()
                while len(self._groups) > 1 and sum(a.nbytes for a in self._groups.values()) > _CACHE_BYTES:
                    self._groups.popitem(last=False)
            self._groups.move_to_end(key)
            return self._groups[key]


def _split(file: Path) -> str | None:
    """The split that a table's name gives, or else that of the nearest folder, in any case; None if there is none.

    The first word of a name counts, as in ``train-00000-of-00002.parquet``, ``Valid.parquet`` or ``testing/0.parquet``.
    """
    for name in (file.name, *(folder.name for folder in file.parents)):
        word = re.match(r"[a-z]*", name.lower())
        if word and word[0] in _SPLITS:
            return _SPLITS[word[0]]
    return None


class _Ahead:
    """Reads images one window at a time, each row group once per window, and prefetches the next window.

    Images are requested in random order. Read one at a time, each would cost a whole row group.
    """

    def __init__(self, tables: ParquetTables, uris: Iterable[str]) -> None:
        self._tables, self._uris = tables, iter(uris)
        self._lock, self._pool = threading.Lock(), ThreadPoolExecutor(1)
        self._found: dict[str, bytes | OSError] = {}
        self._next = self._pool.submit(self._fetch)

    def _fetch(self) -> dict[str, bytes | OSError]:
        return self._tables.fetch(list(islice(self._uris, self._tables.window)))

    def read(self, uri: str) -> bytes:
        with self._lock:
            if uri not in self._found:
                self._found |= self._next.result()
                self._next = self._pool.submit(self._fetch)
            data = self._found.pop(uri, None)
        return self._tables.read(uri) if data is None else _bytes(data)


def _bytes(found: bytes | OSError) -> bytes:
    if isinstance(found, OSError):
        raise found
    return found
