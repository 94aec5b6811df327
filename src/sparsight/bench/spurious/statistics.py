"""Accuracy by cell, in the worst cell and in all, with intervals from images that are drawn again within cells.

Shapes: n images, G cells with images, R runs of a method (draws of random latents, else 1), N resamples.
"""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from sparsight.bench.spurious.cells import Cells
from sparsight.bench.spurious.edits import METHODS, Key
from sparsight.common.progress import followed, log

_RESAMPLES = 2000


class Accuracies(NamedTuple):
    """Of one method, means over its runs; arrays of resamples are (N,) and (N, G)."""

    by_cell: np.ndarray
    """(G,)."""
    drawn_by_cell: np.ndarray
    worst: float
    """Accuracy in the worst cell, which each run has of its own."""
    drawn_worst: np.ndarray
    """The same of the resamples, each with its own worst cells."""
    mean: float
    drawn_mean: np.ndarray


def accuracies(hits: Mapping[str, np.ndarray], cells_n: np.ndarray, seed: int) -> dict[str, Accuracies]:
    """Accuracies of all methods on the same images, with the same resamples.

    A resample draws as many images of each cell as it has, with replacement.

    Args:
        hits: by method, whether each run is right, bool (R, n).
        cells_n: cell of every image.
        seed: seed of the bootstrap.
    """
    generator = np.random.default_rng(seed)
    runs = np.concatenate(list(hits.values())).T.astype(np.float64)  # every run of every method a column
    members = [runs[cells_n == cell] for cell in np.unique(cells_n)]
    drawn = np.empty((_RESAMPLES, len(members), runs.shape[1]))
    for resample in followed(range(_RESAMPLES), _RESAMPLES, "resamples"):
        for cell, of_cell in enumerate(members):
            n = len(of_cell)
            drawn[resample, cell] = np.bincount(generator.integers(n, size=n), minlength=n) @ of_cell / n
    share_G = np.array([len(of_cell) for of_cell in members]) / len(cells_n)
    by_cell = np.stack([of_cell.mean(axis=0) for of_cell in members])
    found, first = {}, 0
    for name, of_method in hits.items():
        columns = slice(first, first + len(of_method))
        first = columns.stop
        by_cell_GR, drawn_NGR = by_cell[:, columns], drawn[:, :, columns]
        by_cell_G, drawn_NG = by_cell_GR.mean(axis=1), drawn_NGR.mean(axis=2)
        found[name] = Accuracies(
            by_cell_G, drawn_NG, float(by_cell_GR.min(axis=0).mean()), drawn_NGR.min(axis=1).mean(axis=1),
            float(share_G @ by_cell_G), drawn_NG @ share_G,
        )  # fmt: skip
    return found


def worst(predicted_n: np.ndarray, labels_n: np.ndarray, cells_n: np.ndarray) -> tuple[float, float]:
    """Accuracy in the worst cell, and in all images that are in a cell."""
    known = cells_n >= 0
    hits, cells = (predicted_n == labels_n)[known], cells_n[known]
    return min(float(hits[cells == cell].mean()) for cell in np.unique(cells)), float(hits.mean())


def hits(right: Mapping[Key, np.ndarray], chosen: Collection[Key]) -> dict[str, np.ndarray]:
    """By column (method, or method/SAE) whether each image is right, bool (R, n): a run, of random latents the draws.

    Args:
        right: whether each image is right, bool (n,), by method and settings.
        chosen: the settings that val chose.
    """
    found: dict[str, list[np.ndarray]] = {}
    for key in sorted(right):
        if key in chosen or key.draw:
            found.setdefault(_column(key.method, key.sae), []).append(right[key])
    return {column: np.stack(parts) for column, parts in found.items()}


def _column(method: str, sae: str) -> str:
    return f"{method}/{sae}" if method in ("sae", "random_latents") else method


def tabulate(
    hits: Mapping[str, np.ndarray], chosen: Collection[Key], scores: Mapping[Key, tuple[float, float]],
    cells_n: np.ndarray, cells: Cells, seed: int,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, dict[str, Any]]]:  # fmt: skip
    """Rows by method, rows by method and cell, and flat numbers by SAE.

    Args:
        hits: see :func:`hits`.
        chosen: the settings that val chose.
        scores: accuracy in the worst cell of val and in all of it, by method and settings.
        cells_n: cell of every image.
        cells: the cells' names.
        seed: seed of the bootstrap.
    """
    found, present = accuracies(hits, cells_n, seed), np.unique(cells_n)
    keys = {_column(key.method, key.sae): key for key in chosen}
    keys |= {_column("random_latents", key.sae): key for key in chosen if key.method == "sae"}
    rows: list[dict[str, Any]] = []
    groups: list[dict[str, Any]] = []
    for column in sorted(hits, key=lambda column: (METHODS.index(column.partition("/")[0]), column)):
        one, key, method = found[column], keys[column], column.partition("/")[0]
        about: dict[str, Any] = {"method": method, "sae": key.sae or None}
        label, value = cells.names(int(present[one.by_cell.argmin()]))
        on_val = (None, None) if method == "random_latents" else scores[key]
        rows.append(
            {**about, "latents": key.latents, "strength": key.strength, "n": len(cells_n),
             **_interval("worst", one.worst, one.drawn_worst), **_interval("mean", one.mean, one.drawn_mean),
             "worst_class": label, "worst_group": value, "worst_val": on_val[0], "mean_val": on_val[1]}
        )  # fmt: skip
        for i, cell in enumerate(present):
            label, value = cells.names(int(cell))
            accuracy = _interval("accuracy", float(one.by_cell[i]), one.drawn_by_cell[:, i])
            groups.append({**about, "class": label, "group": value, "n": int((cells_n == cell).sum()), **accuracy})
        log(f"{column}: worst group {one.worst:.3f}, all {one.mean:.3f}")
    of_saes = sorted((key for key in chosen if key.method == "sae"), key=lambda key: key.sae)
    return rows, groups, {key.sae: _flat(found, key, len(cells_n)) for key in of_saes}


def _flat(found: Mapping[str, Accuracies], key: Key, n: int) -> dict[str, Any]:
    """Numbers of one SAE beside all other methods."""
    own = found[_column("sae", key.sae)]
    flat: dict[str, Any] = {"n": n, "latents": key.latents, "strength": key.strength}
    for method in METHODS:
        one = found[_column(method, key.sae)]
        flat |= _interval(f"worst_{method}", one.worst, one.drawn_worst)
        flat |= _interval(f"mean_{method}", one.mean, one.drawn_mean)
        if method != "sae":
            lead = own.worst - one.worst, own.drawn_worst - one.drawn_worst
            flat |= _interval(f"worst_sae_minus_{method}", *lead)
            flat |= _interval(f"mean_sae_minus_{method}", own.mean - one.mean, own.drawn_mean - one.drawn_mean)
    return flat


def _interval(name: str, value: float, drawn: np.ndarray) -> dict[str, float]:
    """The value with the 95 % interval of its resamples, which the value is put into where it lies outside."""
    low, high = np.quantile(drawn, (0.025, 0.975))
    return {name: value, f"{name}_lo": min(float(low), value), f"{name}_hi": max(float(high), value)}
