"""Shard files of a store: standard Zarr v3 on disk, written and read at the speed of plain files.

An uncompressed shard is a sequence of inner chunks, each followed by its crc32c. At the end is an index of their
offsets and lengths, with a crc32c of its own (Zarr's ``sharding_indexed`` codec). Such a file can be written in
one pass and read with ``preadv`` straight into its destination. zarr-python takes several times as long for both.

Shapes: N images, S images in a shard, C images in a chunk; the trailing dimensions are never split.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import google_crc32c
import numpy as np

from sparsight.common.errors import SparsightError, reason

_MISSING = 2**64 - 1  # offset and length of a chunk that is not in the shard
_OPEN_SHARDS = 64
_DTYPES = ("float16", "float32")
_BITS = {2: ("<u2", 0x7FFF, 0x7C00), 4: ("<u4", 0x7FFFFFFF, 0x7F800000)}  # integer view, all but the sign, infinity


@dataclass(frozen=True)
class Layout:
    """How one array of the group is cut into shards and chunks."""

    shape: tuple[int, ...]
    """(N, ...)."""
    dtype: str
    """``float16`` or ``float32``."""
    shard_images: int
    """S, a multiple of C."""
    chunk_images: int
    """C."""

    @property
    def chunk_shape(self) -> tuple[int, ...]:
        """(C, ...)."""
        return (self.chunk_images, *self.shape[1:])

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk without its checksum."""
        return int(np.prod(self.chunk_shape)) * np.dtype(self.dtype).itemsize

    def file(self, shard: int) -> str:
        """The shard's file, relative to the array's folder."""
        return "/".join(["c", str(shard), *["0"] * (len(self.shape) - 1)])

    def metadata(self) -> dict[str, Any]:
        """The array's ``zarr.json``."""
        little_endian = {"name": "bytes", "configuration": {"endian": "little"}}
        checked = [little_endian, {"name": "crc32c"}]
        sharding = {
            "chunk_shape": list(self.chunk_shape),
            "codecs": checked,
            "index_codecs": checked,
            "index_location": "end",
        }
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            "data_type": self.dtype,
            "chunk_grid": {
                "name": "regular",
                "configuration": {"chunk_shape": [self.shard_images, *self.shape[1:]]},
            },
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": 0.0,
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "attributes": {},
            "storage_transformers": [],
        }

    @classmethod
    def of(cls, metadata: Mapping[str, Any]) -> "Layout | None":
        """The layout that a ``zarr.json`` describes; None if only zarr can read the array."""
        try:
            sharding = metadata["codecs"][0]["configuration"]
            layout = cls(
                tuple(metadata["shape"]),
                metadata["data_type"],
                metadata["chunk_grid"]["configuration"]["chunk_shape"][0],
                sharding["chunk_shape"][0],
            )
            described = {key: metadata[key] for key in ("chunk_grid", "chunk_key_encoding", "codecs", "fill_value")}
        except (KeyError, IndexError, TypeError):
            return None
        return layout if all(layout.metadata()[key] == value for key, value in described.items()) else None


def write_shard(path: Path, values: np.ndarray, layout: Layout) -> str:
    """Write one whole shard; returns the sha256 of the file.

    Args:
        path: the file to write; the caller renames it into its place.
        values: (n, ...), n <= S. Only the last shard may have n < S; its last chunk is padded with zeros.
        layout: layout of the array.

    Raises:
        OSError: the disk is full, or a file-size limit is reached.
    """
    assert values.dtype == layout.dtype and values.flags.c_contiguous and len(values) <= layout.shard_images
    index = np.full((layout.shard_images // layout.chunk_images, 2), _MISSING, dtype="<u8")
    checksum, offset = hashlib.sha256(), 0

    with path.open("wb") as file:

        def put(data: np.ndarray) -> None:
            for piece in (data, np.array([google_crc32c.value(data)], dtype="<u4").view(np.uint8)):
                checksum.update(piece.data)
                file.write(piece.data)

        for number, start in enumerate(range(0, len(values), layout.chunk_images)):
            chunk = values[start : start + layout.chunk_images]
            if len(chunk) < layout.chunk_images:
                chunk = np.concatenate(
                    [chunk, np.zeros((layout.chunk_images - len(chunk), *chunk.shape[1:]), chunk.dtype)]
                )
            put(chunk.reshape(-1).view(np.uint8))
            index[number] = offset, layout.chunk_bytes + 4
            offset += layout.chunk_bytes + 4
        put(index.reshape(-1).view(np.uint8))
    return checksum.hexdigest()


class Array(Protocol):
    """Read access to one array of a store."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunk_images: int

    def read(self, first: int, last: int, out: np.ndarray | None = None) -> np.ndarray:
        """Images ``first`` to ``last`` - 1, (last - first, ...), written to ``out`` if given."""

    def close(self) -> None:
        """Close all open files; reading opens them again."""


class RawArray:
    """Reads an array of uncompressed shards; see :class:`Array`.

    The first read of a chunk checks its crc32c, and that every value is finite. Safe to use from several
    threads, in forked processes and, pickled, in spawned ones.
    """

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.folder, self.layout = folder, layout
        self.shape, self.dtype, self.chunk_images = layout.shape, np.dtype(layout.dtype), layout.chunk_images
        self._checked = np.zeros(-(-layout.shape[0] // layout.chunk_images), dtype=bool)
        self._row_bytes = layout.chunk_bytes // layout.chunk_images
        self._shards: dict[int, _Shard] = {}

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_shards": {}}

    def close(self) -> None:
        """Close all open shards; reading opens them again."""
        self._shards.clear()

    def read(self, first: int, last: int, out: np.ndarray | None = None) -> np.ndarray:
        """Images ``first`` to ``last`` - 1.

        Raises:
            SparsightError: a damaged shard, with its path, or an image with a value that is not finite.
        """
        if out is None:
            out = np.empty((last - first, *self.shape[1:]), self.dtype)
        flat = out.reshape(-1).view(np.uint8)
        for number in range(first // self.chunk_images, -(-last // self.chunk_images)):
            start = number * self.chunk_images
            begin, end = max(first, start), min(last, start + self.chunk_images)
            target = flat[(begin - first) * self._row_bytes : (end - first) * self._row_bytes]
            self._read_rows(number, (begin - start) * self._row_bytes, target)
        return out

    def _read_rows(self, number: int, skip: int, target: np.ndarray) -> None:
        """Fill ``target`` with the bytes of a chunk, starting at byte ``skip``."""
        shard, place = self._shard(number)
        if self._checked[number]:
            shard.read(place, skip, target)
            return
        chunk = target if len(target) == self.layout.chunk_bytes else np.empty(self.layout.chunk_bytes, np.uint8)
        shard.read_checked(place, chunk)
        check_finite(chunk.view(self.dtype).reshape(self.layout.chunk_shape), self.folder, number * self.chunk_images)
        self._checked[number] = True
        if chunk is not target:
            target[:] = chunk[skip : skip + len(target)]

    def _shard(self, number: int) -> tuple["_Shard", int]:
        per_shard = self.layout.shard_images // self.chunk_images
        key, place = divmod(number, per_shard)
        shard = self._shards.get(key)
        if shard is None:  # no lock, as a fork could copy it while held: at worst a shard is opened twice
            shard = _Shard(self.folder / self.layout.file(key), per_shard, self.layout.chunk_bytes)
            if len(self._shards) >= _OPEN_SHARDS:
                self._shards.clear()  # each stays open while a thread still reads it
            self._shards[key] = shard
        return shard, place


class _Shard:
    """One open shard file and its index."""

    def __init__(self, path: Path, n_chunks: int, chunk_bytes: int) -> None:
        self.path, self._chunk_bytes = path, chunk_bytes
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise SparsightError(damaged(path, reason(error))) from None
        length = 16 * n_chunks + 4
        start = os.fstat(self._descriptor).st_size - length
        index = np.empty(length, np.uint8)
        self._fill(index, start)
        if google_crc32c.value(index[:-4]) != int(index[-4:].view("<u4")[0]):
            raise SparsightError(damaged(path, "its index does not match its checksum"))
        self._index = index[:-4].view("<u8").reshape(n_chunks, 2)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def read(self, place: int, skip: int, target: np.ndarray) -> None:
        self._fill(target, self._offset(place) + skip)

    def read_checked(self, place: int, target: np.ndarray) -> None:
        checksum = np.empty(4, np.uint8)
        self._fill(target, self._offset(place), checksum)
        if google_crc32c.value(target) != int(checksum.view("<u4")[0]):
            raise SparsightError(damaged(self.path, f"chunk {place} does not match its checksum"))

    def _offset(self, place: int) -> int:
        offset, length = (int(value) for value in self._index[place])
        if length != self._chunk_bytes + 4:
            raise SparsightError(damaged(self.path, f"chunk {place} is missing"))
        return offset

    def _fill(self, target: np.ndarray, offset: int, *more: np.ndarray) -> None:
        n_bytes = len(target) + sum(map(len, more))
        if offset < 0 or os.preadv(self._descriptor, [target.data, *(part.data for part in more)], offset) != n_bytes:
            raise SparsightError(damaged(self.path, "it is too short"))


class ZarrArray:
    """Reads an array of another layout (a compressor, other codecs) through zarr; see :class:`Array`."""

    def __init__(self, folder: Path) -> None:
        import zarr

        self.folder = folder
        self._array = zarr.open_array(folder, mode="r")
        self.shape, self.dtype, self.chunk_images = self._array.shape, self._array.dtype, self._array.chunks[0]

    def read(self, first: int, last: int, out: np.ndarray | None = None) -> np.ndarray:
        """Images ``first`` to ``last`` - 1."""
        try:
            values = np.asarray(self._array[first:last])
        except (ValueError, OSError, RuntimeError) as error:
            raise SparsightError(damaged(self.folder, f"images {first} to {last - 1}: {error}")) from error
        check_finite(values, self.folder, first)
        if out is None:
            return values
        out.reshape(values.shape)[:] = values
        return out

    def close(self) -> None:
        """Nothing stays open."""


def open_array(folder: Path) -> RawArray | ZarrArray:
    """The fastest reader for the array in ``folder``.

    Raises:
        SparsightError: its ``zarr.json`` cannot be read, or it holds other values than float16 or float32.
    """
    try:
        metadata = json.loads((folder / "zarr.json").read_text())
    except (OSError, ValueError) as error:
        raise SparsightError(damaged(folder / "zarr.json", str(error))) from None
    kind = metadata.get("data_type") if isinstance(metadata, dict) else None
    if kind not in _DTYPES:
        raise SparsightError(
            f"{folder}: holds {kind}, a store holds {' or '.join(_DTYPES)}; write it again as one of these"
        )
    layout = Layout.of(metadata)
    return ZarrArray(folder) if layout is None else RawArray(folder, layout)


def check_finite(x: np.ndarray, folder: Path, first: int) -> None:
    """Raise SparsightError if a value of (n, ...) is not finite; ``first`` is the number of the first image."""
    # Tests for exponent bits that are all set: ten times as fast as np.isfinite on half precision.
    bits, magnitude, infinity = _BITS[x.itemsize]
    if x.size and int((np.ascontiguousarray(x).view(bits) & magnitude).max()) >= infinity:
        row = first + int(np.flatnonzero(~np.isfinite(x).reshape(len(x), -1).all(axis=1))[0])
        raise SparsightError(
            f"{folder}: NaN or infinite activation, image {row}; make the store again from sound weights"
        )


def damaged(path: Path, why: str) -> str:
    """The error message for a damaged file of a store."""
    return f"{path}: damaged ({why}); delete the store's manifest beside it and give the same command again"
