"""The images of one split, decoded in batches.

Shapes: B batch, H height, W width, C channels.
"""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from sparsight.common.errors import SparsightError, reason
from sparsight.common.slices import row_slices
from sparsight.images.preprocess import Preprocess
from sparsight.images.sources import Reader, Source

Rows = np.ndarray | slice
"""Numbers of images within a split."""


@dataclass(frozen=True)
class Split:
    """The images of one split; picklable, so that worker processes can read them."""

    source: Source
    _uris: pa.ChunkedArray
    _sha256: pa.ChunkedArray
    labels: np.ndarray
    """int32 (n,); -1 for an image without a label."""
    classes: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def uris(self, rows: Rows) -> list[str]:
        """Uris of the images ``rows``."""
        return (self._uris[rows] if isinstance(rows, slice) else self._uris.take(rows)).to_pylist()

    def picture(self, row: int) -> np.ndarray:
        """Decode one image and check its sha256: uint8 (H, W, C), at its original size.

        Raises:
            SparsightError: the image is gone, changed, or cannot be decoded.
        """
        return self._picture(row, self.source)

    def _picture(self, row: int, reader: Reader) -> np.ndarray:
        uri = self._uris[row].as_py()
        try:
            data = reader.read(uri)
        except OSError as error:
            raise SparsightError(f"image {uri}: {reason(error)}; put it back or run the images stage again") from None
        if hashlib.sha256(data).hexdigest() != self._sha256[row].as_py():
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

        def put(row: int, place: np.ndarray) -> None:
            place[:] = preprocess.pixels(self._picture(row, reader))

        def begin(rows: Rows) -> tuple[np.ndarray, Iterator[None]]:
            numbers = range(len(self))[rows] if isinstance(rows, slice) else rows.tolist()
            pixels = np.empty((len(numbers), *preprocess.size, preprocess.channels), np.uint8)
            return pixels, pool.map(put, numbers, pixels)

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
    """Random access to the decoded images of a split, kept in memory if they fit into 1 GiB."""

    def __init__(self, split: Split, preprocess: Preprocess, threads: int) -> None:
        self.split, self._preprocess, self._threads = split, preprocess, threads
        n_bytes = len(split) * preprocess.size[0] * preprocess.size[1] * preprocess.channels
        self._all = split.batch(slice(None), preprocess, threads) if n_bytes <= 2**30 else None

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """uint8 (B, H, W, C)."""
        return self.split.batch(rows, self._preprocess, self._threads) if self._all is None else self._all[rows]


def decode(source: Source, uri: str, data: bytes) -> np.ndarray:
    """Decode the bytes of an image: uint8 (H, W, C).

    Raises:
        SparsightError: the image cannot be decoded.
    """
    try:
        return source.decode(uri, data)
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises all three on broken files
        raise SparsightError(f"image {uri}: cannot be decoded ({reason(error)}); repair or remove it") from None
