"""What CUDA says of an operation of PyTorch: whether it launches a kernel, makes the host wait, or is deterministic."""

from typing import Any

import torch
from torch import Tensor

_WAITING = {
    "_local_scalar_dense", "_unique2", "bincount", "equal", "masked_select", "nonzero", "repeat_interleave",
    "unique_consecutive", "unique_dim",
}  # fmt: skip
_NONDETERMINISTIC = {
    "_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward", "_ctc_loss", "adaptive_max_pool2d_backward",
    "avg_pool3d_backward", "fractional_max_pool2d_backward", "grid_sampler_2d_backward", "grid_sampler_3d_backward",
    "histc", "kthvalue", "max_pool3d_with_indices_backward", "max_unpool2d", "median", "nanmedian",
    "nll_loss2d_forward", "put_", "reflection_pad1d_backward", "reflection_pad2d_backward",
    "replication_pad1d_backward", "replication_pad2d_backward", "scatter_reduce", "upsample_bicubic2d_backward",
    "upsample_bilinear2d_backward", "upsample_linear1d_backward", "upsample_trilinear3d_backward",
}  # fmt: skip
_NO_LAUNCH = {"_local_scalar_dense", "_reshape_alias", "_unsafe_view", "empty", "empty_like", "empty_strided",
              "lift_fresh", "new_empty", "new_empty_strided", "set_"}  # fmt: skip


def launches(op: Any) -> bool:
    """Whether an operation starts a kernel: views and memory without content do not."""
    return not op.is_view and op._overloadpacket.__name__ not in _NO_LAUNCH


def waits(name: str, args: Any) -> bool:
    """Whether an operation on device tensors has a result whose size or value the host must wait for."""
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):  # the places of a mask must be counted
        masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
        return bool(masks) and not (name != "index" and args[2].numel() == 1)
    if name == "repeat_interleave":
        return isinstance(args[0], Tensor) and len(args) == 1
    return name in _WAITING


def check_deterministic(op: Any, name: str, args: Any) -> None:
    """Raise RuntimeError for an operation that deterministic mode refuses on CUDA (PyTorch's documented list)."""
    floating_cumsum = name in ("cumsum", "cumprod") and args[0].is_floating_point()
    weighted_bincount = name == "bincount" and len(args) > 1 and args[1] is not None
    listed = name in _NONDETERMINISTIC and (name not in ("median", "nanmedian") or len(args) > 1)
    if torch.get_deterministic_debug_mode() and (floating_cumsum or weighted_bincount or listed):
        raise RuntimeError(f"{op} does not have a deterministic implementation on CUDA")
