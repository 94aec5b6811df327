"""Parquet tables in the layout of Hugging Face: an image struct (bytes, path) and a class label."""

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
from sparsight.images.sources.listing import Tree, log_files, log_rows, read_tree
from sparsight.images.sources.parquet_columns import ParquetColumns
from sparsight.images.sources.splits import NAMES, split_of_file

_CACHE_BYTES = 128 * 2**20
"""Memory for decoded row groups. A larger row group is kept alone."""
_WINDOW_BYTES = 256 * 2**20
"""Bytes of the images fetched together. The next window, as large, is prefetched."""


class ParquetTables(Reopening):
    """A .parquet file, or a folder of them; the start of a file's or folder's name gives the split.

    The schema metadata ``huggingface`` names the columns: the one of type Image and the one of type ClassLabel
    (``label`` or ``fine_label`` if there are several). Without metadata they are ``image`` and ``label``. Class
    names come from the metadata; without it, labels are their own names. A table without a label column, a null and
    a -1 mean no label. Further columns of class labels, whole numbers and short text are kept.

    Args:
        path: the file or the folder.
        label_column: the column of the label; None for the one described above.
    """

    def __init__(self, path: str | None, label_column: str | None = None) -> None:
        assert path is not None
        self.path, self.label_column = Path(path), label_column
        self._lock = threading.Lock()
        self._groups: OrderedDict[tuple[str, int], pa.Array] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return ParquetTables, (str(self.path), self.label_column)

    @cached_property
    def _tree(self) -> Tree:
        """The folder of the tables; of a single table, nothing but that table."""
        return Tree(self.path.parent, other=[self.path.as_posix()]) if self.path.is_file() else read_tree(self.path)

    @cached_property
    def _files(self) -> dict[str, pq.ParquetFile]:
        """The tables by their paths below ``path``."""
        files = [Path(file) for part in self._tree.walk() for file in part.other]
        paths = [self.path] if self.path.is_file() else sorted(file for file in files if file.suffix == ".parquet")
        if not paths:
            raise SparsightError(f"{self.path}: no .parquet file here")
        try:
            return {path.relative_to(self._tree.path).as_posix(): pq.ParquetFile(path) for path in paths}
        except (pa.ArrowException, OSError) as error:
            raise SparsightError(f"{self.path}: not readable as Parquet ({reason(error)})") from None

    @cached_property
    def _splits(self) -> dict[str, str | None]:
        """The split of every table."""
        splits = {name: split_of_file(Path(name)) for name in self._files}
        none = [name for name, split in splits.items() if split is None]
        if none and len(none) < len(splits):
            raise SparsightError(
                f"{self.path}: {none[0]} is of no split ({NAMES}), unlike other tables; rename it or move it away"
            )
        return splits

    @cached_property
    def _columns(self) -> ParquetColumns:
        return ParquetColumns(self.path, self._files, self._splits, self.label_column)

    def items(self) -> list[Item]:
        items: list[Item] = []
        for file_name, labels in self._columns.labels.items():
            further = self._columns.further(file_name)
            for row, label in enumerate(labels):
                values = {name: text for name, column in further.items() if (text := column[row]) is not None}
                items.append(Item(f"{file_name}:{row}", label, self._splits[file_name], columns=values))
        if not items:
            raise SparsightError(f"{self.path}: the tables have no rows")
        log_files(self._tree, [(self._tree.path / name).as_posix() for name in self._files], "tables")
        log_rows(self.path, len(items), sum(item.label_name is None for item in items))
        return items

    def class_names(self) -> list[str]:
        return self._columns.class_names()

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
                contents[uri] = _content(group[offset].as_py())
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
        with self._lock:
            key = (name, group)
            if key not in self._groups:
                try:
                    table = self._files[name].read_row_group(group, columns=[self._columns.image])
                except (pa.ArrowException, OSError) as error:
                    raise OSError(None, f"row group {group} cannot be read: {reason(error)}") from None
                self._groups[key] = table[self._columns.image].combine_chunks()
                while len(self._groups) > 1 and sum(a.nbytes for a in self._groups.values()) > _CACHE_BYTES:
                    self._groups.popitem(last=False)
            self._groups.move_to_end(key)
            return self._groups[key]


def _content(cell: dict[str, Any] | None) -> bytes | OSError:
    """The bytes in an image cell, or the error that says what it holds instead."""
    if cell is None or (cell["bytes"] is None and cell.get("path") is None):
        return OSError(None, "the table's cell is empty: it holds neither bytes nor a path")
    return OSError(None, "the table holds a path but no bytes") if cell["bytes"] is None else cell["bytes"]


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
