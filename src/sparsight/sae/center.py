"""The geometric median of activations, a centre that outliers hardly move.

Shapes: N rows, D width (d_in).
"""

import numpy as np
import torch
from torch import Tensor


def geometric_median(x_ND: Tensor | np.ndarray, iterations: int = 100, tolerance: float = 1e-6) -> Tensor:
    """The point with the smallest sum of distances to the rows, (D,), by Weiszfeld's iteration in float64.

    Gao et al. 2024 (section A.1) initialise b_dec with it, on at most 32,768 rows.
    """
    rows = torch.as_tensor(x_ND).double()
    median = rows.mean(dim=0)
    for _ in range(iterations):
        distance_N = (rows - median).norm(dim=1).clamp(min=1e-12)
        previous, median = median, (rows / distance_N.unsqueeze(1)).sum(dim=0) / (1 / distance_N).sum()
        if (median - previous).norm() <= tolerance * median.norm():
            break
    return median.float()
