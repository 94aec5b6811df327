"""Copies from the host to a device, and what a device computes fast."""

import torch
from torch import Tensor

from sparsight.common.progress import log


def sent(x: Tensor, device: torch.device) -> Tensor:
    """``x`` on the device. For a GPU the copy is from page-locked memory, so that the host does not wait for it."""
    if device.type != "cuda" or x.is_cuda:
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def log_slow_bf16(device: torch.device, setting: str) -> None:
    """Log that a setting asks for bf16 on a CPU for which oneDNN has no bf16 products."""
    if device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        log(f"{setting}: this processor has no instructions for bf16; fp32 is many times faster")
