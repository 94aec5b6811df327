"""Linear readouts of attributes from the embedding.

Shapes: B images, E width of the embedding, C values.
"""

from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Readout:
    """A linear readout of an attribute: the value of the largest score (ridge regression to membership of a value)."""

    weight_EC: Tensor
    bias_C: Tensor

    def scores(self, embedding_BE: Tensor) -> Tensor:
        """(B, C); about 1 for the image's value and 0 for the others."""
        return embedding_BE @ self.weight_EC + self.bias_C

    def __call__(self, embedding_BE: Tensor) -> np.ndarray:
        """Predicted values, int (B,)."""
        return self.scores(embedding_BE).argmax(dim=1).cpu().numpy()
