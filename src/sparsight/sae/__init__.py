"""Sparse autoencoders. A variant is one file here, named as the variant, with one ``@variant`` class.

Reading the list of variants does not import torch; everything else loads on first use.
"""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsight.sae.base import SAE, Loss, create, geometric_median, load
    from sparsight.sae.codes import Codes, DenseCodes, SparseCodes
    from sparsight.sae.train import Trainer

__all__ = [
    "SAE", "Codes", "DenseCodes", "Loss", "SparseCodes", "Trainer", "create", "geometric_median", "load", "names",
]  # fmt: skip

_HOME = {
    **dict.fromkeys(("SAE", "Loss", "create", "geometric_median", "load"), "sparsight.sae.base"),
    **dict.fromkeys(("Codes", "DenseCodes", "SparseCodes"), "sparsight.sae.codes"),
    "Trainer": "sparsight.sae.train",
}


def names() -> list[str]:
    """The variants, by the files that declare one."""
    files = Path(__file__).parent.glob("*.py")
    return sorted(path.stem for path in files if "\n@variant\n" in path.read_text())


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
