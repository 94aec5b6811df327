"""Reads and writes result tables as Parquet."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq


def write(path: Path, rows: Sequence[Mapping[str, Any]], types: Mapping[str, pa.DataType] | None = None) -> None:
    """Write one row per mapping; the columns are the keys of the first row.

    Args:
        path: the file.
        rows: the rows.
        types: of columns that may hold nothing but None, and of all columns if there may be no rows.
    """
    table = pa.Table.from_pylist([dict(row) for row in rows])
    if types and rows:
        fields = [(field.name, types.get(field.name, field.type)) for field in table.schema]
        table = table.cast(pa.schema(fields))
    elif types:
        table = pa.schema(types.items()).empty_table()
    pq.write_table(table, path)


def read(path: Path) -> list[dict[str, Any]]:
    """The rows of a table that :func:`write` wrote."""
    return list(pq.read_table(path).to_pylist())
