"""Intervals for accuracies: 95 %, two-sided unless a name says otherwise."""

from collections.abc import Sequence

import numpy as np
from scipy import special

Z = 1.959963984540054
Z_ONE_SIDED = 1.6448536269514722
_RESAMPLES = 2000


def wilson(hits: np.ndarray) -> dict[str, float]:
    """Accuracy with its Wilson score interval (Wilson 1927).

    Args:
        hits: bool (n,), whether each image is correct; n > 0.

    Returns:
        n, accuracy, lo, hi.
    """
    n, p = len(hits), float(np.mean(hits))
    centre = (p + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * np.sqrt(p * (1 - p) / n + Z**2 / (4 * n**2))
    # at p = 0 and 1 the bound is p itself; rounding must not put p outside
    return {"n": n, "accuracy": p, "lo": float(min(p, centre - half)), "hi": float(max(p, centre + half))}


def paired(hits: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Difference of two accuracies on the same images, with the interval of Agresti and Min (2005).

    Half an image is added to each of the four outcomes (both right, both wrong, one of them right). Without
    that, two methods that agree on every image of a sample would be given an interval of no width.

    Args:
        hits: bool (n,); n > 0.
        reference: bool (n,), of the row that is compared with.

    Returns:
        delta, delta_lo, delta_hi.
    """
    delta, centre, error = _agresti_min(hits, reference)
    # in tiny samples the shrunken centre can leave delta outside
    low, high = min(delta, centre - Z * error), max(delta, centre + Z * error)
    return {"delta": delta, "delta_lo": float(low), "delta_hi": float(high)}


def loss_bound(hits: np.ndarray, reference: np.ndarray) -> float:
    """One-sided 95 % upper bound of the accuracy lost against ``reference``, by the interval of :func:`paired`.

    Below a margin fixed in advance it says that ``hits`` is not inferior by more than that margin.
    """
    delta, centre, error = _agresti_min(hits, reference)
    return float(-min(delta, centre - Z_ONE_SIDED * error))


def _agresti_min(hits: np.ndarray, reference: np.ndarray) -> tuple[float, float, float]:
    """Difference, shrunken centre, standard error."""
    n = len(hits)
    gained, lost = int((hits & ~reference).sum()), int((reference & ~hits).sum())
    error = np.sqrt((gained + lost + 1) - (gained - lost) ** 2 / (n + 2)) / (n + 2)
    return (gained - lost) / n, (gained - lost) / (n + 2), float(error)


def mean_of_seeds(values: Sequence[float]) -> dict[str, float]:
    """Mean over seeds and half the width of its 95 % interval, Student's t with n - 1 degrees of freedom.

    It is about other seeds on the same images, not about other images. With one value there is no ``half``.

    Args:
        values: one a seed.

    Returns:
        n, mean, and half where n > 1.
    """
    n, mean = len(values), float(np.mean(values))
    if n == 1:
        return {"n": n, "mean": mean}
    half = special.stdtrit(n - 1, 0.975) * np.std(values, ddof=1) / np.sqrt(n)
    return {"n": n, "mean": mean, "half": float(half)}


def bootstrap(columns: Sequence[np.ndarray], seed: int) -> list[dict[str, float]]:
    """Means of one number per image with percentile intervals over resampled images (Efron 1979).

    For what has no closed form: means over SAE seeds and mixtures of two masks, and their paired differences.
    It is over images only; a column whose values are all equal gets an interval of no width.

    Args:
        columns: each (n,); all of them are resampled together.
        seed: of the resampling.

    Returns:
        Per column mean, lo, hi (two-sided) and low (one-sided lower bound).
    """
    values, generator = np.stack(columns, axis=1).astype(np.float64), np.random.default_rng(seed)
    n = len(values)
    means = np.empty((_RESAMPLES, len(columns)))
    for turn in range(_RESAMPLES):
        means[turn] = np.bincount(generator.integers(n, size=n), minlength=n) @ values / n
    lo, low, hi = np.quantile(means, (0.025, 0.05, 0.975), axis=0)
    found = np.stack([values.mean(axis=0), lo, hi, low], axis=1)
    return [dict(zip(("mean", "lo", "hi", "low"), map(float, row), strict=True)) for row in found]
