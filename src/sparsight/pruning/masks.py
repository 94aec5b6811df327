"""Head masks as numbers: bit h of a code is set if head h is kept.

Shapes: H heads.
"""

import numpy as np
import torch
from torch import Tensor


def pack(keep: Tensor) -> np.ndarray:
    """Masks, bool (..., H), to codes, int32 (...)."""
    powers = 2 ** torch.arange(keep.shape[-1], device=keep.device)
    return (keep * powers).sum(dim=-1).to(torch.int32).cpu().numpy()


def unpack(codes: np.ndarray, n_heads: int) -> np.ndarray:
    """Codes (...) to masks, bool (..., H)."""
    return (codes[..., None] >> np.arange(n_heads) & 1).astype(bool)
