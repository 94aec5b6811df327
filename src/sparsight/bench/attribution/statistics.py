"""Tables of attribution: curves with intervals, areas, the agreement of two estimates, and effects by class.

Shapes: n images, P pairs (a latent on an image).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sparsight.bench.attribution.curves import DIRECTIONS, METHODS, SAE, Found, areas, joined
from sparsight.common.intervals import bootstrap
from sparsight.common.seeds import derive_seed

_RESAMPLES = 2000
CLASSES = 10
"""Classes that are listed of a latent."""


def curve_rows(name: str, found: Found, seed: int) -> list[dict[str, Any]]:
    """Rows of an SAE: direction, method, share of the features, n, and the mean over images with ``_lo``, ``_hi``."""
    curves = joined(found)
    columns = [column for values in curves.values() for column in values.T]
    intervals = iter(bootstrap(columns, derive_seed(seed, "curves")))
    return [
        {"sae": name, "direction": direction, "method": method, "share": step / (values.shape[1] - 1),
         "n": len(values), "value": found["mean"], "value_lo": found["lo"], "value_hi": found["hi"]}
        for (direction, method), values in curves.items()
        for step, found in zip(range(values.shape[1]), intervals, strict=False)
    ]  # fmt: skip


def numbers(found: Found, probabilities_n: np.ndarray, seed: int) -> dict[str, float]:
    """Flat numbers of an SAE: areas, differences from the controls, and the agreement of gradient and ablation.

    Intervals are 95 %, from a bootstrap over images, the same images for all curves.
    """
    area = {key: areas(values) for key, values in joined(found).items()}
    columns = {f"{direction}_{method}": area[direction, method] for direction in DIRECTIONS for method in METHODS}
    for direction in DIRECTIONS:
        for method in METHODS[1:]:
            columns[f"{direction}_{SAE}_minus_{method}"] = area[direction, SAE] - area[direction, method]
    flat = {
        "n": len(probabilities_n),
        "probability": float(probabilities_n.mean()),
        "active": float(np.concatenate(found.counts).mean()),
    }
    intervals = bootstrap(list(columns.values()), derive_seed(seed, "areas"))
    for key, interval in zip(columns, intervals, strict=True):
        flat |= {key: interval["mean"], f"{key}_lo": interval["lo"], f"{key}_hi": interval["hi"]}
    gradient, ablation, images = map(np.concatenate, (found.gradient, found.ablation, found.ablated_images))
    return flat | agreement(gradient, ablation, images, derive_seed(seed, "agreement"))


def agreement(x_P: np.ndarray, y_P: np.ndarray, images_P: np.ndarray, seed: int) -> dict[str, float]:
    """Pearson's and Spearman's correlation of two estimates over all pairs, with intervals over images.

    Nothing where an estimate does not vary. Ranks are those of all pairs, also in resamples.

    Args:
        x_P: gradient times activation.
        y_P: effect of the ablation.
        images_P: image of each pair.
        seed: seed of the bootstrap.
    """
    from scipy.stats import rankdata  # slow to import, and only needed here

    flat: dict[str, float] = {"gradient_ablation_pairs": len(x_P)}
    if not len(x_P) or np.ptp(x_P) == 0 or np.ptp(y_P) == 0:
        return flat
    number_P = np.unique(images_P, return_inverse=True)[1]
    n = int(number_P.max()) + 1
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=_RESAMPLES)
    kinds = {"correlation": (x_P, y_P), "spearman": (rankdata(x_P), rankdata(y_P))}
    for kind, (x, y) in kinds.items():
        x, y = x - x.mean(), y - y.mean()
        terms = (np.ones_like(x), x, y, x * x, y * y, x * y)
        sums_n6 = np.stack([np.bincount(number_P, weights=term, minlength=n) for term in terms], axis=1)
        resampled = _correlation(draws @ sums_n6)
        low, high = np.quantile(resampled[np.isfinite(resampled)], (0.025, 0.975))
        key = f"gradient_ablation_{kind}"
        flat |= {key: float(_correlation(sums_n6.sum(axis=0))), f"{key}_lo": float(low), f"{key}_hi": float(high)}
    return flat


def _correlation(sums: np.ndarray) -> Any:
    """From count and sums of x, y, xx, yy, xy."""
    n, x, y, xx, yy, xy = np.moveaxis(sums, -1, 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.clip((xy - x * y / n) / np.sqrt((xx - x * x / n) * (yy - y * y / n)), -1, 1)


def effects_by_class(name: str, found: Found, predicted_n: np.ndarray, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of an SAE: latent, class, class_name, n images of that predicted class, and the latent's mean effect there.

    At most ten classes of a latent are listed, those of the largest mean effect of either sign, largest effect first.
    Images on which the latent is not active count as 0.
    """
    latents, labels, effects = (np.concatenate(parts) for parts in zip(*found.effects, strict=True))
    images_C = np.bincount(predicted_n)
    keys, place = np.unique(latents * len(images_C) + labels, return_inverse=True)
    own, label = np.divmod(keys, len(images_C))
    mean = np.bincount(place, weights=effects, minlength=len(keys)) / images_C[label]
    order = np.lexsort((label, -np.abs(mean), own))
    rank = np.arange(len(order)) - np.searchsorted(own[order], own[order])
    kept = order[(rank < CLASSES) & (mean[order] != 0)]
    kept = kept[np.lexsort((label[kept], -mean[kept], own[kept]))]
    return [
        {"sae": name, "latent": int(own[i]), "class": int(label[i]),
         "class_name": classes[label[i]] if label[i] < len(classes) else None, "n": int(images_C[label[i]]),
         "attribution": float(mean[i])}
        for i in kept
    ]  # fmt: skip
