"""A linear probe that predicts the class from what the policy reads at the last block's input.

Only routing by its prediction can save work of the last block, because it needs no pass through that block.

Shapes: N images, D width (d_in), C classes.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

_RIDGE = 1e-3  # penalty on the squared weights, beside the mean cross-entropy
_STEPS = 200


@dataclass(frozen=True)
class LinearProbe:
    """Multinomial logistic regression on centred and scaled activations."""

    weight_CD: Tensor
    bias_C: Tensor

    def __call__(self, x_ND: Tensor) -> np.ndarray:
        """Predicted classes (N,)."""
        return (x_ND.double() @ self.weight_CD.T + self.bias_C).argmax(dim=1).cpu().numpy()


def fit(x_ND: Tensor, labels: np.ndarray, n_classes: int) -> LinearProbe:
    """Fit by L-BFGS in float64, from zero. The problem is convex, so neither seed nor order matters."""
    x = x_ND.double()
    mean, std = x.mean(dim=0), x.std(dim=0, correction=0).clamp(min=1e-6)
    x, y = (x - mean) / std, torch.from_numpy(labels).long().to(x.device)
    weight = torch.zeros(n_classes, x.shape[1], dtype=x.dtype, device=x.device, requires_grad=True)
    bias = torch.zeros(n_classes, dtype=x.dtype, device=x.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=_STEPS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(x @ weight.T + bias, y) + _RIDGE * weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    folded = weight.detach() / std
    return LinearProbe(folded, bias.detach() - folded @ mean)
