"""Reads weights from a file without running code that the file holds."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sparsight.common.errors import SparsightError, reason

# Keys under which training scripts store weights in a checkpoint; averaged weights first, as in timm.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model")


def read_weights(path: Path, checkpoint: IO[bytes] | None = None) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` file, or of a checkpoint written by ``torch.save`` (any other suffix).

    Half precision becomes float32.

    A checkpoint is unpickled with ``weights_only=True``: tensors and plain containers, no code. A wrapper
    (state_dict, model, their averages) and DataParallel's ``module.`` prefix are removed. ``checkpoint`` is one that
    stands inside another file, ``path``.

    Raises:
        SparsightError: no such file, a file of another kind or with code, or NaN or infinite weights.
    """
    if not path.is_file():
        raise SparsightError(f"{path}: there is no such weights file; give null, pretrained or a path")
    state = _safetensors(path) if path.suffix == ".safetensors" else _checkpoint(path, checkpoint or path)
    for key, value in state.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise SparsightError(f"{path}: {key!r} holds NaN or infinite values; the file is damaged")
    return {key: value.float() if value.is_floating_point() else value for key, value in state.items()}


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise SparsightError(f"{path}: not a readable safetensors file ({error})") from None


def _checkpoint(path: Path, file: Path | IO[bytes]) -> dict[str, Tensor]:
    try:
        content: Any = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise SparsightError(
            f"{path}: holds more than tensors (code or objects) and is not loaded; save the state_dict as safetensors"
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise SparsightError(f"{path}: not a readable checkpoint of tensors ({reason(error)})") from None
    while isinstance(content, Mapping) and (wrapper := next((w for w in _WRAPPERS if _is_state(content.get(w))), None)):
        content = content[wrapper]
    if not _is_state(content):
        raise SparsightError(f"{path}: holds no state_dict; save model.state_dict()")
    state = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    if all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state


def _is_state(value: Any) -> bool:
    """Whether a mapping is a state_dict or holds one."""
    return isinstance(value, Mapping) and (
        any(isinstance(v, Tensor) for v in value.values()) or any(_is_state(value.get(w)) for w in _WRAPPERS)
    )
