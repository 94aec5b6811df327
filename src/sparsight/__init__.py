"""Sparse autoencoders on Vision Transformers: activations, SAEs, steering vectors, head pruning.

Importing the package imports neither torch nor timm; its parts load on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

from sparsight.common.lazy import lazy_names

if TYPE_CHECKING:
    from sparsight import backbones, sae
    from sparsight.activations.store import ActivationStore
    from sparsight.common.errors import SparsightError
    from sparsight.images.manifest import Manifest
    from sparsight.pruning.policy import HeadPolicy

__all__ = ["ActivationStore", "HeadPolicy", "Manifest", "SparsightError", "backbones", "sae"]

_name = lazy_names(
    __name__,
    {
        "ActivationStore": "sparsight.activations.store",
        "HeadPolicy": "sparsight.pruning.policy",
        "Manifest": "sparsight.images.manifest",
        "SparsightError": "sparsight.common.errors",
    },
)


def __getattr__(name: str) -> Any:
    return importlib.import_module(f"sparsight.{name}") if name in ("backbones", "sae") else _name(name)
