"""Intervals for accuracies: 95 %, two-sided."""

import numpy as np

Z = 1.959963984540054


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
    """Difference of two accuracies on the same images, with its normal interval over the paired differences.

    Args:
        hits: bool (n,).
        reference: bool (n,), of the row that is compared with.

    Returns:
        delta, delta_lo, delta_hi.
    """
    difference = hits.astype(np.float64) - reference.astype(np.float64)
    delta = float(difference.mean())
    half = Z * float(difference.std(ddof=1)) / np.sqrt(len(difference)) if len(difference) > 1 else np.inf
    return {"delta": delta, "delta_lo": float(delta - half), "delta_hi": float(delta + half)}
