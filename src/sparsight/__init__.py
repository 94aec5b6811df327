"""Sparse autoencoders on Vision Transformers: activations, SAEs, steering vectors, head pruning.

Importing the package imports neither torch nor timm; its parts load on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsight import backbones, sae
    from sparsight.errors import SparsightError
    from sparsight.images import Manifest
    from sparsight.pruning.policy import HeadPolicy
    from sparsight.store import ActivationStore

__all__ = ["ActivationStore", "HeadPolicy", "Manifest", "SparsightError", "backbones", "sae"]

_HOME = {
    "ActivationStore": "sparsight.store",
    "HeadPolicy": "sparsight.pruning.policy",
    "Manifest": "sparsight.images",
    "SparsightError": "sparsight.errors",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in __all__:
        return importlib.import_module(f"sparsight.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
