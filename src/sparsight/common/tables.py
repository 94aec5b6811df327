"""Reads and writes result tables as Parquet."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write one row per mapping; the columns are the keys of the first row."""
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), path)


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a table that :func:`write` wrote."""
    return list(pq.read_table(path).to_pylist())
