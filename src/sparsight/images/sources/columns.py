"""The columns of a table beside its image: their values as text, and which of them the manifest keeps."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from sparsight.common.errors import SparsightError
from sparsight.common.progress import log
from sparsight.images import table

_MAX_BYTES = 100
"""Longest text of a further column that is kept, in bytes of UTF-8; captions are longer."""


def kept_name(column: str) -> str:
    """The name under which the manifest keeps a further column: ``source_<name>`` if it has a column of that name."""
    return f"source_{column}" if column in table.RESERVED else column


def check_kept(path: Path, further: Iterable[str], kept: Sequence[str]) -> None:
    """Log which further columns of a data set are not kept.

    Args:
        path: the data set.
        further: all columns but those of image and label.
        kept: those of them that the manifest keeps.

    Raises:
        SparsightError: two columns that would be kept under one name.
    """
    if left_out := [column for column in further if column not in kept]:
        log(
            f"images: {path}: not kept are the columns {', '.join(left_out)}; kept are class labels, whole numbers, "
            f"and text of at most {_MAX_BYTES} bytes"
        )
    for column in kept:
        if kept_name(column) != column and kept_name(column) in kept:
            raise SparsightError(
                f"{path}: the column {column!r} is kept as {kept_name(column)!r}, which exists; rename one"
            )


def is_number(kind: pa.DataType) -> bool:
    """Whether a column of this type holds whole numbers (or booleans, which are 0 and 1)."""
    return pa.types.is_integer(kind) or pa.types.is_boolean(kind)


def is_categorical(kind: pa.DataType) -> bool:
    """Whether a column of this type can hold labels: whole numbers, text, or nothing but nulls."""
    if pa.types.is_dictionary(kind):
        return is_categorical(kind.value_type)
    return is_number(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)


def is_short(column: pa.ChunkedArray) -> bool:
    """Whether no text of a categorical column has more than _MAX_BYTES bytes."""
    longest = pc.max(pc.binary_length(_as_text(column))).as_py()
    return longest is None or longest <= _MAX_BYTES


def texts(column: pa.ChunkedArray, names: Sequence[str] | None, where: str) -> list[str | None]:
    """The values of a categorical column as text, None where they are null.

    Args:
        column: the values.
        names: names of the classes that the column's numbers stand for, with -1 for none; None if there are no names.
        where: what holds the column, for messages.

    Raises:
        SparsightError: a value that stands for no class.
    """
    if names is None:
        found: list[str | None] = _as_text(column).to_pylist()
        return found
    by_value: dict[int | str | None, str | None] = {None: None, -1: None}
    by_value.update(enumerate(names))
    by_value.update(zip(names, names, strict=True))
    values = column.to_pylist()
    for row, value in enumerate(values):
        if value not in by_value:
            raise SparsightError(
                f"{where} row {row} has no class ({value!r}); repair it, or write null if the image has no label"
            )
    return [by_value[value] for value in values]


def _as_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return (column.cast(pa.int8()) if pa.types.is_boolean(column.type) else column).cast(pa.string())
