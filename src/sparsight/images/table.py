"""The table in ``manifest.parquet``: written and read by row groups, each of which holds images of one split."""

import json
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sparsight.common.errors import SparsightError

ROW_GROUP = 2**16
"""Rows of a row group at most. One takes some 10 MB in memory (uri and sha256)."""
SCHEMA = pa.schema(
    {
        "image_id": pa.int64(), "uri": pa.string(), "sha256": pa.string(), "label": pa.int32(),
        "label_name": pa.string(), "split": pa.string(),
    }
)  # fmt: skip
"""The columns of every manifest; further label columns follow them, as strings."""
MASK = "mask_sha256"
"""A last column, where the images have masks."""
RESERVED = {*SCHEMA.names, MASK}
"""Names that no label column may have."""
_KEEP = 2
"""Row groups in memory: that of the current images, and that of the images that a reader fetches ahead of them."""


def write(path: Path, splits: Iterable[pa.Table], columns: Sequence[str], about: Mapping[str, Any]) -> None:
    """Write tables with images of one split each, one after another.

    Args:
        path: the file.
        splits: tables with the columns of ``SCHEMA`` and ``columns``.
        columns: names of the further columns.
        about: the metadata, a JSON value.
    """
    schema = pa.schema([*SCHEMA, *(pa.field(name, pa.string()) for name in columns)])
    schema = schema.with_metadata({"sparsight": json.dumps(about, sort_keys=True)})
    repeated = ["label_name", "split", *(name for name in columns if name != MASK)]
    with pq.ParquetWriter(path, schema, use_dictionary=repeated, write_statistics=["split"]) as writer:
        for rows in splits:
            writer.write_table(rows.cast(schema), row_group_size=ROW_GROUP)


class SplitTable:
    """The rows of one split. Only the row groups and columns that are asked for are read.

    Pickles as its arguments, so that worker processes open the file themselves. Safe to use from threads.

    Args:
        path: ``manifest.parquet``.
        split: name of the split.
        keep: number of row groups that stay in memory.

    Raises:
        SparsightError: a row group that holds several splits.
    """

    def __init__(self, path: Path, split: str, keep: int = _KEEP) -> None:
        self._path, self._split, self._keep = path, split, keep
        metadata = pq.read_metadata(path)
        names = metadata.schema.names
        place = names.index("split")
        groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
        self._groups = [i for i, group in enumerate(groups) if _only(group.column(place).statistics, path) == split]
        self.label_columns = ["label_name", *(name for name in names if name not in RESERVED)]
        """Columns of names: ``label_name``, and the source's further label columns."""
        self._starts = np.cumsum([0, *(groups[i].num_rows for i in self._groups)])
        self._lock = threading.Lock()
        self._read: OrderedDict[int, pa.Table] = OrderedDict()

    def __reduce__(self) -> tuple[Any, ...]:
        return SplitTable, (self._path, self._split, self._keep)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def in_memory(self) -> "SplitTable":
        """The same rows, of which every row group that has been read stays in memory, for reading in random order."""
        return SplitTable(self._path, self._split, len(self._groups))

    def column(self, name: str) -> pa.ChunkedArray:
        """A whole column."""
        with self._lock:
            return self._file.read_row_groups(self._groups, columns=[name], use_threads=False)[name]

    def images(self, rows: np.ndarray) -> tuple[list[str], list[str]]:
        """Uri and sha256 of the images ``rows``, int64 (B,).

        Raises:
            IndexError: a row that is not in the split.
        """
        if len(rows) and not 0 <= rows.min() <= rows.max() < len(self):
            raise IndexError(f"images from {rows.min()} to {rows.max()}; there are {len(self)} in {self._split}")
        group_B = np.searchsorted(self._starts, rows, side="right") - 1
        uris, sha256 = np.empty(len(rows), object), np.empty(len(rows), object)
        for number in np.unique(group_B).tolist():
            here = np.flatnonzero(group_B == number)
            found = self._group(number).take(rows[here] - self._starts[number])
            uris[here], sha256[here] = found["uri"].to_pylist(), found["sha256"].to_pylist()
        return uris.tolist(), sha256.tolist()

    @cached_property
    def _file(self) -> pq.ParquetFile:
        return pq.ParquetFile(self._path)

    def _group(self, number: int) -> pa.Table:
        """Uri and sha256 of the split's row group of this number; those used last stay in memory."""
        with self._lock:
            if number not in self._read:
                if len(self._read) == self._keep:
                    self._read.popitem(last=False)
                group = self._groups[number]
                self._read[number] = self._file.read_row_groups([group], columns=["uri", "sha256"], use_threads=False)
            self._read.move_to_end(number)
            return self._read[number]


def _only(statistics: pq.Statistics | None, path: Path) -> str:
    """The one split of a row group, from the statistics of its column ``split``."""
    if statistics is None or not statistics.has_min_max or statistics.min != statistics.max:
        raise SparsightError(f"{path}: a row group holds images of several splits; run the images stage again")
    return str(statistics.min)
