"""The columns of a table beside its image: their values as text, and which of them the manifest keeps."""

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from sparsight.common.errors import SparsightError

MAX_BYTES = 100
"""Longest text of a further column that is kept, in bytes of UTF-8; captions are longer."""
_OWN = ("image_id", "uri", "sha256", "label", "label_name", "split")


def kept_name(column: str) -> str:
    """The name under which the manifest keeps a further column: ``source_<name>`` if it has a column of that name."""
    return f"source_{column}" if column in _OWN else column


def is_number(kind: pa.DataType) -> bool:
    """Whether a column of this type holds whole numbers (or booleans, which are 0 and 1)."""
    return pa.types.is_integer(kind) or pa.types.is_boolean(kind)


def is_categorical(kind: pa.DataType) -> bool:
    """Whether a column of this type can hold labels: whole numbers, text, or nothing but nulls."""
    if pa.types.is_dictionary(kind):
        return is_categorical(kind.value_type)
    return is_number(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)


def is_short(column: pa.ChunkedArray) -> bool:
    """Whether no text of a categorical column has more than MAX_BYTES bytes."""
    longest = pc.max(pc.binary_length(_as_text(column))).as_py()
    return longest is None or longest <= MAX_BYTES


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
