"""Mutual feature regularisation (MFR; Marks et al. 2024, arXiv 2411.01220): SAEs trained together become alike.

P = 1 - mean over pairs of SAEs of MMCS, where MMCS is the mean over decoder rows of the largest cosine to a row of the
other decoder, here the mean of both directions. The gradient is written out, so that only a block of the F x F cosines
exists at a time.

Shapes: D width (d_in), F latents (d_sae), R rows of a block.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from sparsight.common.slices import row_slices

_ENTRIES = 2**24  # cosines that exist at a time: 64 MiB in fp32


@torch.no_grad()
def penalty(decoders: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """P of two or more decoders (F, D), a scalar, and its gradient to each of them, (F, D)."""
    units = [torch.nn.functional.normalize(W_FD, dim=1) for W_FD in decoders]
    gradients = [torch.zeros_like(W_FD) for W_FD in decoders]
    directed = list(itertools.permutations(range(len(decoders)), 2))
    similarity = decoders[0].new_zeros(())
    for one, other in directed:
        a_FD, b_FD = units[one], units[other]
        share = 1 / (len(directed) * len(a_FD))
        for rows in row_slices(len(a_FD), max(1, _ENTRIES // len(b_FD))):
            cosine_R, match_R = (a_FD[rows] @ b_FD.T).max(dim=1)
            a_RD, b_RD, c_R1 = a_FD[rows], b_FD[match_R], cosine_R.unsqueeze(1)
            similarity += share * cosine_R.sum()
            gradients[one][rows] -= share * (b_RD - c_R1 * a_RD)
            gradients[other].index_add_(0, match_R, a_RD - c_R1 * b_RD, alpha=-share)
    for W_FD, gradient in zip(decoders, gradients, strict=True):
        gradient.div_(torch.linalg.vector_norm(W_FD, dim=1, keepdim=True))
    return 1 - similarity, gradients
