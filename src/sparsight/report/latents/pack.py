"""Arrays as text in the page: one gzip stream in base64, and a directory of what lies where."""

import base64
import gzip
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

_KINDS = {"u1": "Uint8", "i1": "Int8", "u2": "Uint16", "i2": "Int16", "u4": "Uint32", "i4": "Int32", "f4": "Float32"}
_ALIGNED = 4  # bytes; a typed array of JavaScript begins at a multiple of its element's size


class Pack(NamedTuple):
    """Arrays in the form that the page's script reads (scripts/data.js)."""

    directory: dict[str, list[Any]]
    """By name: the JavaScript type without "Array", first byte, number of elements."""
    text: str
    """base64 of the gzip stream."""


def pack(arrays: Mapping[str, np.ndarray]) -> Pack:
    """Pack arrays of 8 to 32 bits, row by row. Equal arrays give equal bytes."""
    directory, data = {}, bytearray()
    for name, array in arrays.items():
        plain = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        directory[name] = [_KINDS[plain.dtype.str[1:]], len(data), plain.size]
        data += plain.tobytes()
        data += bytes(-len(data) % _ALIGNED)
    return Pack(directory, base64.b64encode(gzip.compress(bytes(data), mtime=0)).decode())


def smallest(numbers: np.ndarray, largest: int) -> np.ndarray:
    """Numbers from -1 (none) to ``largest`` - 1 in 16 bits if they fit, in which none is 65535; else in 32 bits."""
    return numbers.astype(np.uint16 if largest < 2**16 else np.uint32)


def shares(values: np.ndarray, largest: np.ndarray, dtype: type[np.unsignedinteger[Any]]) -> np.ndarray:
    """Values from 0 to ``largest`` as shares of it on the whole range of ``dtype``. Nothing above 0 becomes 0."""
    top = np.iinfo(dtype).max
    scaled = np.round(top * values.astype(np.float64) / np.maximum(largest, np.finfo(np.float32).tiny))
    return np.where(values > 0, scaled.clip(1, top), 0).astype(dtype)
