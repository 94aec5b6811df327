"""Copies between the host and a GPU while it computes: each direction has a stream of its own.

The host waits for none of them. It may be ahead of the GPU by as much as its caller lets pass between two calls of what
:meth:`Transfers.so_far` returns. On a CPU there is nothing to wait for.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from sparsight.common.devices import sent


class Transfers:
    """Copies to and from the device that computes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._streams = [torch.cuda.Stream(device) for _ in range(2)] if device.type == "cuda" else []

    def sent(self, x: Tensor) -> Tensor:
        """A tensor of the host on the device, for the stream on which the device computes."""
        if not self._streams:
            return x
        to_device, computes = self._streams[0], torch.cuda.current_stream(self.device)
        with torch.cuda.stream(to_device):
            x = sent(x, self.device)
        computes.wait_stream(to_device)
        x.record_stream(computes)  # its memory is not for the next copy before the GPU has read it
        return x

    def store(self, x: Tensor, out: Tensor) -> None:
        """Copy what the device computes to ``out`` on the host, page-locked beside a GPU, as soon as it is there."""
        if not self._streams:
            out.copy_(x)
            return
        from_device = self._streams[1]
        from_device.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(from_device):
            out.copy_(x, non_blocking=True)
        x.record_stream(from_device)

    def so_far(self) -> Callable[[], None]:
        """What waits until everything stored so far has arrived; any thread may call it."""
        return self._streams[1].record_event().synchronize if self._streams else lambda: None
