"""Routes of activations to experts that nobody learns: a hash of the signs of random projections.

The pattern of P signs of x planes is mixed to an integer and taken modulo E. So experts get about equal shares, and x
and 10 x have the same one. Equal rows share an expert, and so do most rows that hardly differ.

Shapes: B batch, D width (d_in), P projections, E experts.
"""

import torch
from torch import Tensor, nn

PROJECTIONS = 16
"""P: so many patterns that shares are about equal, and a product as cheap as a router's."""
_WORD = 2**32 - 1


class FixedRouter(nn.Module):
    """The expert of each row, by a hash of the row alone.

    Args:
        d_in: D.
        experts: E.
        seed: seed of the projections.
        redraw: whether every training step gives all rows other experts.
    """

    def __init__(self, d_in: int, experts: int, seed: int, redraw: bool) -> None:
        super().__init__()
        self.experts, self.redraw = experts, redraw
        planes = torch.randn(d_in, PROJECTIONS, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("planes", planes)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64), persistent=False)
        self.planes: Tensor
        self.steps: Tensor
        """Training steps taken; on the device, so that no step waits for it."""

    def forward(self, centered_BD: Tensor, training: bool) -> Tensor:
        """1 for the expert of each row, 0 for the others, (B, E)."""
        powers_P = 2 ** torch.arange(PROJECTIONS, device=centered_BD.device)
        pattern_B = ((centered_BD @ self.planes > 0) * powers_P).sum(dim=1)
        draw = 1 + self.steps if training and self.redraw else 0
        expert_B = _mixed(_mixed(pattern_B) + draw) % self.experts
        experts_E = torch.arange(self.experts, device=centered_BD.device)
        return (expert_B.unsqueeze(1) == experts_E).to(centered_BD.dtype)


def _mixed(number_B: Tensor) -> Tensor:
    """A bijection of 32-bit integers, held in int64, without visible order (the finaliser of MurmurHash3)."""
    for factor in (0x85EBCA6B, 0xC2B2AE35):
        number_B = ((number_B ^ (number_B >> 16)) * factor) & _WORD
    return number_B ^ (number_B >> 16)
