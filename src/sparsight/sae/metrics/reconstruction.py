"""Rows of ``baselines.parquet``, one per method: reconstruction error, bits and cost.

Shapes: B rows of a window, I images of it, D width (d_in), E width of the embedding.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from sparsight.sae.metrics import description_length
from sparsight.sae.metrics.baselines import Method
from sparsight.sae.metrics.description_length import RISE, Bits, quantised, restored
from sparsight.sae.metrics.monosemanticity import Monosemanticity
from sparsight.sae.metrics.sparse_codes import Matrix


@dataclasses.dataclass
class ReconstructionScores:
    """Sums over the test split for one method."""

    method: Method
    step: float | None
    """Quantisation step; None for k-means, whose code is the choice of one centre and needs no rounding."""
    widths: Mapping[str, int]
    """Width E of the embeddings of images, by the key of the score that compares images by them."""

    def __post_init__(self) -> None:
        width, d_in = self.method.rows.shape
        self.squares = self.squares_quantised = 0.0
        self.error, self.active = np.zeros(d_in), 0
        self.bits = Bits(width)
        self.monosemanticity = {key: Monosemanticity(width, of) for key, of in self.widths.items()}

    def update(self, x_BD: np.ndarray, z: Matrix, images: Matrix, embeddings: Mapping[str, np.ndarray]) -> None:
        """Add activations, their codes, the images' mean codes and the images' embeddings, (I, E) by score."""
        error = x_BD - self.method.decode(z)
        squares = float(np.square(error, dtype=np.float64).sum())
        self.squares += squares
        self.error += error.sum(axis=0, dtype=np.float64)
        self.active += int(np.count_nonzero(z.data))
        symbols = quantised(z, self.step or 1.0)
        self.bits.update(symbols)
        if self.step is not None:
            squares = description_length.squared_error(self.method, x_BD, restored(symbols, self.step))
        self.squares_quantised += squares
        for key, unit_IE in embeddings.items():
            self.monosemanticity[key].update(images, unit_IE)

    def row(self, n: int, variance: float) -> dict[str, Any]:
        """The row of the table.

        Args:
            n: activations of the split.
            variance: sum of the activations' squared distances from their mean.
        """
        l0 = self.active / n
        return {
            "method": self.method.name,
            "features": len(self.method.rows),
            "fvu": self.squares / variance,
            "explained_variance": 1 - (self.squares - float(np.square(self.error).sum()) / n) / variance,
            "l0": l0,
            "step": self.step,
            "fvu_quantised": self.squares_quantised / variance,
            "bits": self.bits.of_the_choice() if self.step is None else self.bits.per_activation(),
            "macs": self.method.macs(l0),
            **{key: _mean(of.scores()) for key, of in self.monosemanticity.items()},
        }


def _mean(scores: np.ndarray) -> float | None:
    """Mean over the features that have a score."""
    defined = scores[~np.isnan(scores)]
    return float(defined.mean()) if len(defined) else None


def at_own_error(method: Method, x_BD: Tensor, widths: Mapping[str, int]) -> ReconstructionScores:
    """Scores of a method with the step at which its own squared error on ``x_BD`` rises by 5 %."""
    x, z = x_BD.cpu().numpy(), method.encode(x_BD)
    step = None
    if method.name != "kmeans":
        step = description_length.step_for(method, x, z, (1 + RISE) * description_length.squared_error(method, x, z))
    return ReconstructionScores(method, step, widths)


def at_error_of(
    other: ReconstructionScores, method: Method, x_BD: Tensor, widths: Mapping[str, int]
) -> ReconstructionScores:
    """Scores of a method with the step that gives the error of another method's quantised codes.

    The bits of the two methods are then those at equal error.
    """
    x, z, step = x_BD.cpu().numpy(), other.method.encode(x_BD), other.step
    assert step is not None
    error = description_length.squared_error(other.method, x, restored(quantised(z, step), step))
    return ReconstructionScores(method, description_length.step_for(method, x, method.encode(x_BD), error), widths)
