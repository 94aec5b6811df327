"""Weights of a part of an SAE: drawn as for the whole, and written into the file of the whole.

Shapes: D width (d_in), F latents (d_sae), P latents of a shard.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

_BLOCK = 2**20  # numbers drawn at a time; PyTorch's normal numbers come in groups of 16


def unit_rows(d_sae: int, d_in: int, seed: int, first: int, last: int) -> Tensor:
    """The decoder rows ``first`` to ``last`` - 1 of a new :class:`sparsight.sae.base.SAE`, without the others."""
    generator = torch.Generator().manual_seed(seed)
    begin, end, drawn = first * d_in, last * d_in, 0
    flat = torch.empty(end - begin)
    while drawn < end:
        left = d_sae * d_in - drawn
        size = _BLOCK if left >= 2 * _BLOCK else left
        block = torch.randn(size, generator=generator)
        low, high = max(begin, drawn), min(end, drawn + size)
        if low < high:
            flat[low - begin : high - begin] = block[low - drawn : high - drawn]
        drawn += size
    rows = flat.view(last - first, d_in)
    return rows / rows.norm(dim=1, keepdim=True)


class WeightsFile:
    """A safetensors file of fp32 tensors that several processes fill. Its bytes are those of ``save_file``.

    Args:
        path: the file.
        shapes: shape of every tensor by name.
    """

    def __init__(self, path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.path, self.shapes = path, dict(sorted(shapes.items()))
        entries, end = {}, 0
        self._starts = {}
        for name, shape in self.shapes.items():
            self._starts[name], end = end, end + 4 * int(np.prod(shape))
            entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [self._starts[name], end]}
        header = json.dumps(entries, separators=(",", ":")).encode()
        self._header = header + b" " * (-len(header) % 8)
        self._size = end

    def create(self) -> None:
        """Write the header and make room for the tensors."""
        with self.path.open("wb") as file:
            file.write(len(self._header).to_bytes(8, "little") + self._header)
            file.truncate(8 + len(self._header) + self._size)

    def write(self, name: str, rows: Tensor, first: int = 0, stride: int = 0) -> None:
        """Write rows (n, w) of a tensor: row r from its entry ``first`` + r * ``stride`` on."""
        assert rows.dtype == torch.float32
        start = 8 + len(self._header) + self._starts[name]
        with self.path.open("r+b") as file:
            for number, row in enumerate(rows.detach().cpu().contiguous().numpy()):
                _write_all(file.fileno(), memoryview(row).cast("B"), start + 4 * (first + number * stride))


def _write_all(descriptor: int, data: memoryview, position: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, position)
        data, position = data[written:], position + written
