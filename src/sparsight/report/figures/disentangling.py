"""The figure of interchanges of attributes. A method with several seeds has a curve of their means."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sparsight.report.figures.svg import AMBER, BLUE, GREEN, GREY, INK, ORANGE, WIDTH, svg

Rows = list[dict[str, Any]]

STYLES = {
    "sae": (BLUE, "o"), "random": (AMBER, "v"), "neurons": (GREY, "x"), "pca": (ORANGE, "^"), "das": (GREEN, "s"),
    "everything": (INK, "*"),
}  # fmt: skip
"""By method, colour and marker, in the order of the legend."""


def disentangling(title: str, rows: Rows) -> str:
    """For each attribute, score against number of features, and cause against isolate, with intervals over pairs."""
    attributes = list(dict.fromkeys(row["attribute"] for row in rows))
    figure = Figure(figsize=(WIDTH, 3.2 * len(attributes)), layout="constrained")
    axes = figure.subplots(len(attributes), 2, squeeze=False)
    said = []
    for (left, right), attribute in zip(axes, attributes, strict=True):
        for method, (colour, marker) in STYLES.items():
            groups = _by_features([row for row in rows if (row["attribute"], row["method"]) == (attribute, method)])
            style = {"color": colour, "marker": marker, "markersize": 4, "linewidth": 1.2, "elinewidth": 0.8,
                     "markeredgewidth": 0.8 if marker == "x" else 0}  # fmt: skip
            if method == "everything":
                for group in groups.values():
                    left.axhline(_mean(group, "score"), color=colour, linewidth=1, linestyle=":")
            elif groups:
                score, error = _points(groups.values(), "score")
                left.errorbar(list(groups), score, yerr=error, **style)
                said.append(f"{attribute}, {method}: {score[-1]:.3f} with {max(groups)} features")
            if groups:
                isolate, wide = _points(groups.values(), "isolate")
                cause, high = _points(groups.values(), "cause")
                right.errorbar(isolate, cause, xerr=wide, yerr=high, **style)
        left.set(xscale="log", xlabel="features", ylabel="mean of cause and isolate", title=f"{attribute}: score")
        left.set_xticks(ticks := sorted({row["features"] for row in rows if row["method"] == "sae"}), map(str, ticks))
        left.minorticks_off()
        right.set(xlabel="isolate", ylabel="cause", title=f"{attribute}: cause against isolate")
    handles = [
        Line2D([], [], color=colour, marker=marker, markersize=4, linewidth=1.2, label=method)
        for method, (colour, marker) in STYLES.items()
        if any(row["method"] == method for row in rows)
    ]
    figure.legend(handles=handles, loc="outside lower left", ncols=len(STYLES))
    return svg(figure, title, f"Score on test. {'; '.join(said)}.")


def _by_features(rows: Rows) -> dict[int, Rows]:
    groups: dict[int, Rows] = {}
    for row in sorted(rows, key=lambda row: row["features"]):
        groups.setdefault(row["features"], []).append(row)
    return groups


def _points(groups: Any, key: str) -> tuple[list[float], np.ndarray]:
    """Means over the seeds, and the lengths of the means of their intervals below and above, (2, n)."""
    ends = [[_mean(group, name) for name in (key, f"{key}_lo", f"{key}_hi")] for group in groups]
    middle, low, high = np.array(ends).T
    return middle.tolist(), np.maximum(np.stack([middle - low, high - middle]), 0)


def _mean(rows: Sequence[dict[str, Any]], key: str) -> float:
    return float(np.mean([row[key] for row in rows]))
