"""Which features an attribute's interchange takes: a ranking by how the features' means differ between its values.

Shapes: C values, F features, D width (d_in).
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from sparsight.sae.metrics.firing import ByClass
from sparsight.sae.metrics.probing import DenseMoments

Rule = Literal["share", "surplus"]
"""``share``: variance between the attribute's values, as a share of the feature's variance (eta squared). ``surplus``:
variance between its values minus variance between the values of the other attribute."""
RULES: tuple[Rule, ...] = get_args(Rule)


@dataclass(frozen=True)
class Separation:
    """How much features separate the values of an attribute on train. The feature of an image is its tokens' mean."""

    between: np.ndarray
    """Variance of the means of the values, each weighted by its share of the images, (F,)."""
    variance: np.ndarray
    """Variance over the images, (F,)."""

    @classmethod
    def of_codes(cls, sums: ByClass) -> "Separation":
        """Of the codes of a dictionary."""
        return cls(_between(sums.means, sums.images), sums.deviation**2)

    @classmethod
    def of_basis(cls, moments: DenseMoments, basis_DF: np.ndarray) -> "Separation":
        """Of the coordinates along the columns of a basis."""
        n, images = moments.images.sum(), np.maximum(moments.images, 1)
        mean = basis_DF.T @ moments.total.sum(axis=0) / n
        squares = (basis_DF * (moments.products @ basis_DF)).sum(axis=0) / n
        means_CF = moments.total @ basis_DF / images[:, None]
        return cls(_between(means_CF, moments.images), np.maximum(squares - mean**2, 0))


def _between(means_CF: np.ndarray, images_C: np.ndarray) -> np.ndarray:
    share_C = images_C / images_C.sum()
    return np.asarray(share_C @ (means_CF - share_C @ means_CF) ** 2)


def ranked(own: Separation, other: Separation, rule: Rule) -> np.ndarray:
    """The features, best first, int (F,); features of equal rank, such as those that never fire, by their number.

    Args:
        own: separation of the attribute that is interchanged.
        other: that of the attribute that should not change.
        rule: the ranking.
    """
    if rule == "surplus":
        score = own.between - other.between
    else:
        varies = own.variance > 1e-12 * own.variance.max(initial=0)
        score = np.where(varies, own.between / np.where(varies, own.variance, 1), 0)
    return np.argsort(-score, kind="stable")
