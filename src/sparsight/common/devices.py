"""Copies from the host to a device."""

import torch
from torch import Tensor


def sent(x: Tensor, device: torch.device) -> Tensor:
    """``x`` on the device. For a GPU the copy is from page-locked memory, so that the host does not wait for it."""
    if device.type != "cuda" or x.is_cuda:
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)
