"""95 % intervals for accuracies, two-sided unless a name says otherwise."""

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
    # at p = 0 and 1 a bound equals p; rounding must not put p outside the interval
    return {"n": n, "accuracy": p, "lo": float(min(p, centre - half)), "hi": float(max(p, centre + half))}


def paired(hits: np.ndarray, reference: np.ndarray) -> dict[str, float]:
    """Difference of two accuracies on the same images, with the interval of Agresti and Min (2005).

    Half an image is added to each of the four outcomes (both right, both wrong, only the one right, only the
    other). Otherwise two methods that agree on every image of a sample would get an interval of zero width.

    Args:
        hits: bool (n,); n > 0.
        reference: bool (n,), the same for the method to compare with.

    Returns:
        delta, delta_lo, delta_hi.
    """
    delta, centre, error = _agresti_min(hits, reference)
    # in tiny samples the centre is shrunk so far that delta can lie outside the interval
    low, high = min(delta, centre - Z * error), max(delta, centre + Z * error)
    return {"delta": delta, "delta_lo": float(low), "delta_hi": float(high)}


def loss_bound(hits: np.ndarray, reference: np.ndarray) -> float:
    """One-sided 95 % upper bound of the accuracy lost against ``reference``, by the interval of :func:`paired`.

    If the bound is below a margin fixed in advance, ``hits`` is non-inferior at that margin.
    """
    delta, centre, error = _agresti_min(hits, reference)
    return float(-min(delta, centre - Z_ONE_SIDED * error))


def _agresti_min(hits: np.ndarray, reference: np.ndarray) -> tuple[float, float, float]:
    """Difference, centre of its interval (shrunk towards 0), standard error."""
    n = len(hits)
    gained, lost = int((hits & ~reference).sum()), int((reference & ~hits).sum())
    error = np.sqrt((gained + lost + 1) - (gained - lost) ** 2 / (n + 2)) / (n + 2)
    return (gained - lost) / n, (gained - lost) / (n + 2), float(error)


def mean_of_seeds(values: Sequence[float]) -> dict[str, float]:
    """Mean over seeds and half the width of its 95 % interval, Student's t with n - 1 degrees of freedom.

    The interval covers variation over seeds on the same images, not over images. A single value has no ``half``.

    Args:
        values: one per seed.

    Returns:
        n, mean, and half if n > 1.
    """
    n, mean = len(values), float(np.mean(values))
    if n == 1:
        return {"n": n, "mean": mean}
    half = special.stdtrit(n - 1, 0.975) * np.std(values, ddof=1) / np.sqrt(n)
    return {"n": n, "mean": mean, "half": float(half)}


def bootstrap(columns: Sequence[np.ndarray], seed: int) -> list[dict[str, float]]:
    """Means of one number per image with percentile intervals over resampled images (Efron 1979).

    For quantities without a closed form: means over SAE seeds, mixtures of two masks, and their paired
    differences. The intervals cover variation over images only. A column of equal values gets an interval of
    zero width.

    Args:
        columns: each (n,); every resample draws the same images from all of them.
        seed: seed of the resampling.

    Returns:
        Per column mean, lo, hi (two-sided) and low (one-sided lower bound).
    """
    values, generator = np.stack(columns, axis=1).astype(np.float64), np.random.default_rng(seed)
    n = len(values)
    means = np.empty((_RESAMPLES, len(columns)))
    for resample in range(_RESAMPLES):
        means[resample] = np.bincount(generator.integers(n, size=n), minlength=n) @ values / n
    lo, low, hi = np.quantile(means, (0.025, 0.05, 0.975), axis=0)
    summaries = np.stack([values.mean(axis=0), lo, hi, low], axis=1)
    return [dict(zip(("mean", "lo", "hi", "low"), map(float, row), strict=True)) for row in summaries]
