"""The images of one split, decoded in batches.

Shapes: B batch, H height, W width, C channels.
"""

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from sparsight.common.errors import SparsightError, reason
from sparsight.common.slices import row_slices
from sparsight.images.preprocess import Preprocess
from sparsight.images.sources import Reader, Source
from sparsight.images.table import SplitTable

_IN_MEMORY = 2**30
"""Bytes of the decoded images of a split that are kept in memory."""
Rows = np.ndarray | slice
"""Numbers of images within a split."""


@dataclass(frozen=True)
class Split:
    """The images of one split, whose list stays on disk; pickles small, so that worker processes can read them."""

    source: Source
    table: SplitTable
    classes: list[str]

    def __reduce__(self) -> tuple[Any, ...]:  # without the labels, if they have been read
        return Split, (self.source, self.table, self.classes)

    def __len__(self) -> int:
        return len(self.table)

    @cached_property
    def labels(self) -> np.ndarray:
        """int32 (n,), read when first asked for; -1 for an image without a label."""
        return self.table.column("label").fill_null(-1).to_numpy().copy()

    def relabelled(self, classes: list[str]) -> "Split":
        """The same images with labels among other class names: -1 for a class that is not among them."""
        numbers = {name: number for number, name in enumerate(classes)}
        new = np.array([*(numbers.get(name, -1) for name in self.classes), -1], np.int32)  # the last for label -1
        split = dataclasses.replace(self, classes=classes)
        vars(split)["labels"] = new[self.labels]
        return split

    def column(self, name: str) -> list[str | None]:
        """A column of labels: ``label_name``, or a further label column of the source; None where an image has none.

        Raises:
            SparsightError: there is no such column.
        """
        known = self.table.label_columns
        if name not in known:
            raise SparsightError(f"the manifest of the images has no label column {name!r}; use {', '.join(known)}")
        return self.table.column(name).to_pylist()

    def uris(self, rows: Rows) -> list[str]:
        """Uris of the images ``rows``."""
        return self.table.images(self._numbers(rows))[0]

    def _numbers(self, rows: Rows) -> np.ndarray:
        """Numbers of the images ``rows``, int64 (B,)."""
        if not isinstance(rows, slice):
            return rows
        found = range(len(self))[rows]
        return np.arange(found.start, found.stop, found.step)

    def picture(self, row: int) -> np.ndarray:
        """Decode one image and check its sha256: uint8 (H, W, C), at its original size.

        Raises:
            SparsightError: the image is gone, changed, or cannot be decoded.
        """
        (uri,), (sha256,) = self.table.images(np.array([row]))
        return self._picture(uri, sha256, self.source)

    def _picture(self, uri: str, sha256: str, reader: Reader) -> np.ndarray:
        try:
            data = reader.read(uri)
        except OSError as error:
            raise SparsightError(f"image {uri}: {reason(error)}; put it back or run the images stage again") from None
        if hashlib.sha256(data).hexdigest() != sha256:
            raise SparsightError(f"image {uri}: changed since the manifest was made; run the images stage again")
        return decode(self.source, uri, data)

    def batch(self, rows: Rows, preprocess: Preprocess, threads: int = 1) -> np.ndarray:
        """Decoded images of ``rows``: uint8 (B, H, W, C)."""
        return next(self.stream([rows], preprocess, threads))

    def stream(self, windows: Sequence[Rows], preprocess: Preprocess, threads: int = 1) -> Iterator[np.ndarray]:
        """The images of each window, uint8 (B, H, W, C); the next window is decoded in the background.

        Args:
            windows: rows of each batch.
            preprocess: how pictures become pixels.
            threads: number of decoding threads.
        """
        reader = self.source.reader(uri for rows in windows for uri in self.uris(rows))

        def put(uri: str, sha256: str, place: np.ndarray) -> None:
            place[:] = preprocess.pixels(self._picture(uri, sha256, reader))

        def begin(rows: Rows) -> tuple[np.ndarray, Iterator[None]]:
            uris, sha256 = self.table.images(self._numbers(rows))
            pixels = np.empty((len(uris), *preprocess.size, preprocess.channels), np.uint8)
            return pixels, pool.map(put, uris, sha256, pixels)

        with ThreadPoolExecutor(threads) as pool:
            begun = map(begin, windows)
            ahead = next(begun, None)
            while ahead is not None:
                (pixels, done), ahead = ahead, next(begun, None)
                list(done)  # waits, and raises any error of decoding
                yield pixels

    def batches(self, preprocess: Preprocess, batch_size: int, threads: int = 1) -> Iterator[np.ndarray]:
        """All images in order, in batches of uint8 (B, H, W, C)."""
        return self.stream(list(row_slices(len(self), batch_size)), preprocess, threads)


class Pixels:
    """Random access to the decoded images of a split, kept in memory if they fit, else their list."""

    def __init__(self, split: Split, preprocess: Preprocess, threads: int) -> None:
        self._preprocess, self._threads = preprocess, threads
        n_bytes = len(split) * preprocess.size[0] * preprocess.size[1] * preprocess.channels
        self._all = split.batch(slice(None), preprocess, threads) if n_bytes <= _IN_MEMORY else None
        self._split = dataclasses.replace(split, table=split.table.in_memory())

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """uint8 (B, H, W, C)."""
        return self._split.batch(rows, self._preprocess, self._threads) if self._all is None else self._all[rows]


def decode(source: Source, uri: str, data: bytes) -> np.ndarray:
    """Decode the bytes of an image: uint8 (H, W, C).

    Raises:
        SparsightError: the image cannot be decoded.
    """
    try:
        return source.decode(uri, data)
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises all three on broken files
        raise SparsightError(f"image {uri}: cannot be decoded ({reason(error)}); repair or remove it") from None
