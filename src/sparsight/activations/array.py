"""Reads one array of a store through zarr-python, and stops at whatever is damaged.

Shapes: N images, C images in a chunk.
"""

import dataclasses
from pathlib import Path

import numpy as np
import zarr

from sparsight.activations.shards import shard_file
from sparsight.common.errors import SparsightError

_BITS = {2: ("<u2", 0x7FFF, 0x7C00), 4: ("<u4", 0x7FFFFFFF, 0x7F800000)}  # integer view, all but the sign, infinity
_PIECE_BYTES = 16 * 2**20  # read at a time, several chunks side by side


class Array:
    """An array (N, ...) of a store. Safe to use from several threads, in forked and in spawned processes.

    Args:
        folder: the array's folder.

    Raises:
        SparsightError: its ``zarr.json`` cannot be read, or it holds other values than float16 or float32.
    """

    def __init__(self, folder: Path) -> None:
        try:
            array = zarr.open_array(folder, mode="r")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SparsightError(damaged(folder / "zarr.json", str(error))) from None
        if array.dtype.name not in ("float16", "float32"):
            raise SparsightError(
                f"{folder}: holds {array.dtype.name}, a store holds float16 or float32; write it again as one of these"
            )
        # Chunks that are not there would be read as the fill value without an error: NaN gives them away.
        metadata = dataclasses.replace(array.metadata, fill_value=array.dtype.type(np.nan))
        self._array = zarr.Array(zarr.AsyncArray(metadata, array.store_path))
        self.folder, self.shape, self.dtype, self.chunk_images = folder, array.shape, array.dtype, array.chunks[0]
        self.shard_images = (array.shards or array.chunks)[0]
        chunk_bytes = int(np.prod(array.chunks)) * array.dtype.itemsize
        self.piece_images = self.chunk_images * max(1, _PIECE_BYTES // chunk_bytes)

    def read(self, first: int, last: int, out: np.ndarray | None = None) -> np.ndarray:
        """Images ``first`` to ``last`` - 1, (last - first, ...), written to ``out`` if given.

        Raises:
            SparsightError: a damaged shard, with its path, or an image with a value that is not finite.
        """
        if out is None:
            out = np.empty((last - first, *self.shape[1:]), self.dtype)
        images = out.reshape(-1, *self.shape[1:])
        for start in range(first // self.chunk_images * self.chunk_images, last, self.piece_images):
            begin, end = max(first, start), min(last, start + self.piece_images)
            images[begin - first : end - first] = self._chunks(start, end)[begin - start :]
        return out

    def _chunks(self, start: int, end: int) -> np.ndarray:
        """Images ``start`` to ``end`` - 1 with matching checksums and finite values; a chunk begins at ``start``."""
        try:
            x = np.asarray(self._array[start:end])
        except (ValueError, OSError, RuntimeError) as error:
            if end - start > self.chunk_images:
                for first in range(start, end, self.chunk_images):  # finds the chunk
                    self._chunks(first, min(end, first + self.chunk_images))
            why = "does not match its checksum" if "checksum" in str(error) else f"cannot be read: {error}"
            raise SparsightError(self._damaged(start, why)) from error
        # Tests for exponent bits that are all set: ten times as fast as np.isfinite on half precision.
        bits, magnitude, infinity = _BITS[x.itemsize]
        if x.size and int((x.view(bits) & magnitude).max()) >= infinity:
            image = start + int(np.flatnonzero(~np.isfinite(x).reshape(len(x), -1).all(axis=1))[0])
            chunk = image // self.chunk_images * self.chunk_images - start
            if np.isnan(x[chunk : chunk + self.chunk_images]).all():
                raise SparsightError(self._damaged(image, "is missing"))
            raise SparsightError(
                f"{self.folder}: NaN or infinite activation, image {image}; make the store again from sound weights"
            )
        return x

    def _damaged(self, image: int, why: str) -> str:
        shard, place = divmod(image, self.shard_images)
        file = self.folder / shard_file(shard, len(self.shape))
        return damaged(file, f"chunk {place // self.chunk_images} {why}")


def damaged(path: Path, why: str) -> str:
    """The error message for a damaged file of a store."""
    return f"{path}: damaged ({why}); delete the store's manifest beside it and give the same command again"
