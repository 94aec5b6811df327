"""Sparse autoencoders. A variant is one file here, named as the variant, with one ``@variant`` class.

Reading the list of variants does not import torch; everything else loads on first use.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsight.sae.base import SAE, Codes, Loss, create, load
    from sparsight.sae.train import Trainer

__all__ = ["SAE", "Codes", "Loss", "Trainer", "create", "load", "names"]

_HOME = dict.fromkeys(("SAE", "Codes", "Loss", "create", "load"), "sparsight.sae.base")
_HOME["Trainer"] = "sparsight.sae.train"


def names() -> list[str]:
    """The variants, by the files that declare one."""
    files = Path(__file__).parent.glob("*.py")
    return sorted(path.stem for path in files if "\n@variant\n" in path.read_text())


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
