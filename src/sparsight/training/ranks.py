"""Processes that train together, and sums whose bits do not depend on the number of processes.

What is to be summed consists of a fixed number of logical shards. Each process ("rank") holds as many consecutive
shards as every other. The shards are combined two by two in a binary tree: every process combines its own, then
neighbours exchange what they have until all have the whole. Every number of processes makes the same tree.
"""

import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from sparsight.config.sae import SHARDS

Parts = tuple[Tensor, ...]
_DAY = timedelta(days=1)  # whoever started the processes ends them when one dies, so none waits in vain


class Ranks:
    """One process among those that train together.

    Args:
        rank: number of this process, from 0.
        size: number of processes, a divisor of ``SHARDS``.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        assert SHARDS % size == 0
        self.rank, self.size = rank, size
        n_own = SHARDS // size
        self.own = range(rank * n_own, (rank + 1) * n_own)
        """Numbers of the shards that this process holds."""

    @property
    def first(self) -> bool:
        """Whether this process writes what all have in common."""
        return self.rank == 0

    def join(self, meeting: Path) -> "Ranks":
        """Connect the processes: by gloo for tensors of the host, by NCCL for those of a card.

        Args:
            meeting: a path of a new file by which the processes, all on one machine, find each other.
        """
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, f"file://{meeting}", _DAY, self.size, self.rank)
        return self

    def leave(self) -> None:
        """Disconnect, once no process waits for this one."""
        dist.destroy_process_group()

    def tree(self, shards: Sequence[Parts], combine: Callable[[Parts, Parts], Parts]) -> Parts:
        """All shards combined, on every process.

        Args:
            shards: tensors of each own shard, of the same shapes in all processes.
            combine: makes one of two neighbours; the first has the lower shards.
        """
        level = list(shards)
        while len(level) > 1:
            level = [combine(a, b) for a, b in zip(level[::2], level[1::2], strict=True)]
        mine, step = level[0], 1
        while step < self.size:
            other = self.rank ^ step
            theirs = tuple(_exchange(tensor.contiguous(), other) for tensor in mine)
            mine = combine(mine, theirs) if self.rank < other else combine(theirs, mine)
            step *= 2
        return mine

    def total(self, shards: Sequence[Tensor]) -> Tensor:
        """The sum over all shards."""
        return self.tree([(tensor,) for tensor in shards], lambda a, b: (a[0] + b[0],))[0]

    def wait(self) -> None:
        """Return when every process has come as far as this."""
        self.any(False)

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether any process has it set."""
        assert flags, "nothing would be sent, and nothing waited for"
        if self.size == 1:
            return list(flags)
        counts = torch.tensor(flags, dtype=torch.int32)
        dist.all_reduce(counts)
        return [count > 0 for count in counts.tolist()]


def _exchange(tensor: Tensor, other: int) -> Tensor:
    """Send a tensor to another process, and receive its."""
    theirs = torch.empty_like(tensor)
    both = [dist.P2POp(dist.isend, tensor, other), dist.P2POp(dist.irecv, theirs, other)]
    for work in dist.batch_isend_irecv(both):
        work.wait()
    return theirs
