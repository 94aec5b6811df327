"""Cuts a range of rows into slices."""

from collections.abc import Iterator


def row_slices(n_rows: int, batch_size: int) -> Iterator[slice]:
    """Slices of ``batch_size`` rows that cover ``range(n_rows)`` in order; the last one may be shorter."""
    for start in range(0, n_rows, batch_size):
        yield slice(start, min(start + batch_size, n_rows))
