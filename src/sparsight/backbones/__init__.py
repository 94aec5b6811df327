"""Vision Transformers: loading, weights, reading activations at sites, switching heads, training."""

from typing import TYPE_CHECKING

from sparsight.common.lazy import lazy_names

if TYPE_CHECKING:
    from sparsight.backbones.backbone import Backbone, BlockPolicy
    from sparsight.backbones.loading import load, open_folder

__all__ = ["Backbone", "BlockPolicy", "load", "open_folder"]

__getattr__ = lazy_names(
    __name__,
    {
        **dict.fromkeys(("Backbone", "BlockPolicy"), "sparsight.backbones.backbone"),
        **dict.fromkeys(("load", "open_folder"), "sparsight.backbones.loading"),
    },
)
