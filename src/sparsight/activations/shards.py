"""Shard files of a store: standard Zarr v3 on disk, written chunk by chunk.

An uncompressed shard is a sequence of inner chunks, each followed by its crc32c. At the end is an index of their
offsets and lengths, with a crc32c of its own (Zarr's ``sharding_indexed`` codec). Such a file is written and hashed in
one pass. zarr-python writes the same bytes, but takes twice the size of a shard in memory, for every site.

Shapes: N images, S images in a shard, C images in a chunk; the trailing dimensions are never split.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np

_MISSING = 2**64 - 1  # offset and length of a chunk that is not in the shard
_CHUNK_BYTES = 2**21


def power_of_two(limit: int) -> int:
    """The largest power of two up to ``limit``, at least 1."""
    return 1 << (max(1, limit).bit_length() - 1)


def chunk_size(shape: tuple[int, ...], dtype: np.dtype[Any], shard_images: int) -> int:
    """Images in a chunk, C: a power of two, for chunks of about 2 MB.

    Args:
        shape: shape of one image's activations.
        dtype: type of the values.
        shard_images: S.
    """
    return min(shard_images, power_of_two(_CHUNK_BYTES // (int(np.prod(shape)) * dtype.itemsize)))


def shard_file(shard: int, n_dims: int) -> str:
    """A shard's file, relative to the folder of its array."""
    return "/".join(["c", str(shard), *["0"] * (n_dims - 1)])


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
