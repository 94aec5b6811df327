"""Sparse autoencoders (SAEs): base class, variants, training, evaluation. Listing the variants imports no torch."""

from pathlib import Path
from typing import TYPE_CHECKING

from sparsight.common.lazy import lazy_names

if TYPE_CHECKING:
    from sparsight.sae.base import SAE, Loss, create, load
    from sparsight.sae.center import geometric_median
    from sparsight.sae.codes import Codes, DenseCodes, SparseCodes
    from sparsight.sae.trainer import Trainer

__all__ = [
    "SAE", "Codes", "DenseCodes", "Loss", "SparseCodes", "Trainer", "create", "geometric_median", "load", "names",
]  # fmt: skip

__getattr__ = lazy_names(
    __name__,
    {
        **dict.fromkeys(("SAE", "Loss", "create", "load"), "sparsight.sae.base"),
        "geometric_median": "sparsight.sae.center",
        **dict.fromkeys(("Codes", "DenseCodes", "SparseCodes"), "sparsight.sae.codes"),
        "Trainer": "sparsight.sae.trainer",
    },
)


def names() -> list[str]:
    """Names of the variants, which are the names of their files."""
    files = (Path(__file__).parent / "variants").glob("*.py")
    return sorted(path.stem for path in files if path.stem != "__init__")
