"""The file of steering vectors: the tensors that a section's methods took from the train split.

The tensors of the first site have their own names; those of further sites begin with ``<site>/``.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def save(by_site: Mapping[str, Mapping[str, Tensor]], path: Path) -> None:
    """Write the tensors of every site, in the order of the model."""
    tensors = {
        f"{site}/{name}" if m else name: value.contiguous()
        for m, (site, own) in enumerate(by_site.items())
        for name, value in own.items()
    }
    save_file(tensors, path)


def load(path: Path, device: torch.device, further: str | None = None) -> dict[str, Tensor]:
    """The tensors of the first site, or of a further one, by name."""
    begin = f"{further}/" if further else ""
    return {
        name.removeprefix(begin): value
        for name, value in load_file(path, device=str(device)).items()
        if name.startswith(begin) and "/" not in name.removeprefix(begin)
    }
