"""The figure of attribution: curves of deletion and insertion, of several seeds the mean of their curves."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from sparsight.report.figures.svg import AMBER, BLUE, GREEN, GREY, ORANGE, PURPLE, WIDTH, svg

STYLES = {
    "sae": (BLUE, "o"), "random_order": (GREEN, "s"), "activation_order": (PURPLE, "D"), "random": (AMBER, "v"),
    "pca": (ORANGE, "^"), "neurons": (GREY, "x"),
}  # fmt: skip
"""By method, colour and marker, in the order of the legend."""
NAMES = {
    "sae": "latents", "random_order": "latents in random order", "activation_order": "latents by activation",
    "random": "random dictionary", "pca": "principal components", "neurons": "neurons",
}  # fmt: skip


def attribution(title: str, rows: list[dict[str, Any]]) -> str:
    """For deletion and insertion, the probability of the class against the share of the features."""
    figure = Figure(figsize=(WIDTH, 3.6), layout="constrained")
    said = []
    for axis, direction in zip(figure.subplots(1, 2, sharey=True), ("deletion", "insertion"), strict=True):
        for method, (colour, marker) in STYLES.items():
            points: dict[float, list[dict[str, Any]]] = {}
            for row in rows:
                if (row["direction"], row["method"]) == (direction, method):
                    points.setdefault(row["share"], []).append(row)
            ends = [[np.mean([row[key] for row in some]) for key in ("value", "value_lo", "value_hi")]
                    for some in points.values()]  # fmt: skip
            middle, low, high = np.array(ends).T
            axis.errorbar(
                list(points), middle, yerr=np.maximum([middle - low, high - middle], 0), color=colour, marker=marker,
                markersize=4, linewidth=1.2, elinewidth=0.8, markeredgewidth=0.8 if marker == "x" else 0,
                label=NAMES[method],
            )  # fmt: skip
            said.append(f"{direction}, {NAMES[method]}: {middle[-1]:.3f} at the end")
        axis.set(xlabel="share of the features", title=direction)
    figure.axes[0].set_ylabel("probability of the class (1: untouched)")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=len(STYLES))
    return svg(figure, title, f"{'; '.join(said)}.")
