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
    """Difference of two accuracies on the same images, with the interval of Agresti and Min (2005).

    Half an image is added to each of the four outcomes (both right, both wrong, one of them right). Without
    that, two methods that agree on every image of a sample would be given an interval of no width.

    Args:
        hits: bool (n,); n > 0.
        reference: bool (n,), of the row that is compared with.

    Returns:
        delta, delta_lo, delta_hi.
    """
    n = len(hits)
    gained, lost = int((hits & ~reference).sum()), int((reference & ~hits).sum())
    centre = (gained - lost) / (n + 2)
    half = Z * np.sqrt((gained + lost + 1) - (gained - lost) ** 2 / (n + 2)) / (n + 2)
    delta = (gained - lost) / n
    # in tiny samples the shrunken centre can leave delta outside
    return {"delta": delta, "delta_lo": float(min(delta, centre - half)), "delta_hi": float(max(delta, centre + half))}
