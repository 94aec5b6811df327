"""The entries of a batch sorted by latent: both gradients of a step need this order, which is found once.

Shapes: B batch, K active latents (k).
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

Order = TypeVar("Order")
_known: Any = WeakTensorKeyDictionary()


def once(sort: Callable[..., Order], indices_BK: Tensor, active_BK: Tensor | None, n_latents: int) -> Order:
    """``sort(indices, active, n_latents)``, remembered as long as the indices live and are what they were."""
    if indices_BK.is_inference():  # has no version, and no gradients
        return sort(indices_BK, active_BK, n_latents)
    key = (sort, indices_BK._version, n_latents)
    found = _known.get(indices_BK)
    if found is None or found[0] != key or not (active_BK is None or torch.equal(found[1], active_BK)):
        found = _known[indices_BK] = (key, active_BK, sort(indices_BK, active_BK, n_latents))
    order: Order = found[2]
    return order
