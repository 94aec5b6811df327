"""The active latents of a batch, stored sparse (k per row) or dense.

Shapes: B batch, D width (d_in), F latents (d_sae), K active latents (k).
"""

import dataclasses
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from sparsight import kernels


class Codes(ABC):
    """What :meth:`SAE.encode` returns; no code is negative."""

    @abstractmethod
    def dense(self) -> Tensor:
        """Codes (B, F), zero where a latent is not active."""

    @abstractmethod
    def sums(self, groups: Tensor, n: int) -> Tensor:
        """Sum of the codes of each of ``n`` groups, (n, F); ``groups`` (B,) has the number of each code's, from 0."""

    @abstractmethod
    def l0(self) -> Tensor:
        """Latents above zero per activation, (B,)."""

    @abstractmethod
    def fired(self) -> Tensor:
        """Whether each latent is above zero for any activation of the batch, bool (F,)."""

    @abstractmethod
    def combine(self, W_dec: Tensor) -> Tensor:
        """Codes times decoder rows (F, D), without bias: (B, D)."""


@dataclasses.dataclass(frozen=True)
class SparseCodes(Codes):
    """At most K active latents per row; an entry of value 0 is padding.

    A row is an activation, or one of the parts of an activation that has more entries than fit into a row.
    """

    values: Tensor
    """(B, K), not negative, in no particular order."""
    indices: Tensor
    """(B, K) int64, the numbers of the latents."""
    d_sae: int
    """F."""
    parts: tuple[Tensor, int] | None = None
    """The activation of each row, int64, and the number of activations; None: they are the rows."""

    def of_rows(self, y: Tensor) -> Tensor:
        """For each row, what ``y`` (B, ...) has for its activation."""
        return y if self.parts is None else y[self.parts[0]]

    def sum_rows(self, y: Tensor) -> Tensor:
        """Sum of what the rows of each activation have, (B, ...)."""
        if self.parts is None:
            return y
        rows, n = self.parts
        return y.new_zeros(n, *y.shape[1:]).index_add(0, rows, y)

    def dense(self) -> Tensor:
        n = len(self.values) if self.parts is None else self.parts[1]
        return self.sums(torch.arange(n, device=self.values.device), n)

    def sums(self, groups: Tensor, n: int) -> Tensor:
        rows = self.of_rows(groups).unsqueeze(1)
        return self.values.new_zeros(n, self.d_sae).index_put((rows, self.indices), self.values, accumulate=True)

    def l0(self) -> Tensor:
        return self.sum_rows((self.values > 0).sum(dim=1))

    def fired(self) -> Tensor:
        # Entries that are not active go to an extra place. A boolean index would wait for the device.
        fired = torch.zeros(self.d_sae + 1, dtype=torch.bool, device=self.values.device)
        fired[torch.where(self.values > 0, self.indices, self.d_sae)] = True
        return fired[:-1]

    def combine(self, W_dec: Tensor) -> Tensor:
        return self.sum_rows(kernels.decode(self.values, self.indices, W_dec))


@dataclasses.dataclass(frozen=True)
class DenseCodes(Codes):
    """Any number of active latents per activation."""

    z_BF: Tensor
    """(B, F), not negative."""

    def dense(self) -> Tensor:
        return self.z_BF

    def sums(self, groups: Tensor, n: int) -> Tensor:
        return (groups == torch.arange(n, device=groups.device).unsqueeze(1)).to(self.z_BF.dtype) @ self.z_BF

    def l0(self) -> Tensor:
        return (self.z_BF > 0).sum(dim=1)

    def fired(self) -> Tensor:
        return (self.z_BF > 0).any(dim=0)

    def combine(self, W_dec: Tensor) -> Tensor:
        return self.z_BF @ W_dec
