"""How pictures become a model's input, by the model's own configuration."""

from functools import lru_cache
from typing import Any

import torch
from timm.data import resolve_model_data_config
from torch import Tensor

from sparsight.images.preprocess import Preprocess


def published(model: Any, size: tuple[int, int]) -> Preprocess:
    """The preprocessing that a timm or open_clip model was published with, for images of ``size`` (height, width)."""
    if hasattr(model, "visual"):
        data: dict[str, Any] = dict(model.visual.preprocess_cfg)
        squash = data["resize_mode"] == "squash"
        return Preprocess(size, 3, tuple(data["mean"]), tuple(data["std"]), data["interpolation"], squash=squash)
    data = resolve_model_data_config(model)
    mean, std = tuple(data["mean"]), tuple(data["std"])
    if model.in_chans == 1:  # timm gives RGB statistics whatever in_chans is
        mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)
    original_size = size == tuple(data["input_size"][-2:])
    crop_pct = data["crop_pct"] if original_size else 1.0
    squash = data.get("crop_mode") == "squash"
    return Preprocess(size, model.in_chans, mean, std, data["interpolation"], crop_pct, squash)


@lru_cache
def mean_and_std(preprocess: Preprocess, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the pixels, (1, C, 1, 1). Kept: each copy of them to a GPU would make the host wait."""
    mean_C, std_C = (torch.tensor(numbers, device=device) for numbers in (preprocess.mean, preprocess.std))
    return mean_C.view(1, -1, 1, 1), std_C.view(1, -1, 1, 1)
