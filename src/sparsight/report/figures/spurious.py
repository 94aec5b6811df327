"""The figure of spurious features: accuracy in the worst group and in all images, by method."""

from typing import Any

from matplotlib.figure import Figure

from sparsight.report.figures.svg import BLUE, GREY, WIDTH, svg

NAMES = {
    "none": "untouched", "sae": "without latents", "random_latents": "without random latents",
    "mean_difference": "without the mean difference", "leace": "LEACE", "last_layer": "last layer trained again",
}  # fmt: skip
"""By method, in the order of the figure."""


def spurious(title: str, rows: list[dict[str, Any]]) -> str:
    """A line per method and SAE, with intervals over images."""
    ordered = [row for method in NAMES for row in rows if row["method"] == method]
    figure = Figure(figsize=(WIDTH, 1.0 + 0.3 * len(ordered)), layout="constrained")
    axis = figure.subplots()
    for key, colour, marker in (("worst", BLUE, "o"), ("mean", GREY, "s")):
        middle = [100 * row[key] for row in ordered]
        error = [[100 * (row[key] - row[f"{key}_lo"]) for row in ordered],
                 [100 * (row[f"{key}_hi"] - row[key]) for row in ordered]]  # fmt: skip
        label = {"worst": "worst group", "mean": "all test images"}[key]
        axis.errorbar(
            middle, range(len(ordered)), xerr=error, fmt=marker, color=colour, markersize=4, elinewidth=0.8, label=label
        )
    axis.set_yticks(range(len(ordered)), [f"{NAMES[row['method']]}{_of(row['sae'])}" for row in ordered])
    axis.invert_yaxis()
    axis.set(xlabel="accuracy, %")
    figure.legend(loc="outside lower left", ncols=2)
    said = "; ".join(f"{NAMES[row['method']]}{_of(row['sae'])} {100 * row['worst']:.1f} %" for row in ordered)
    return svg(figure, title, f"Accuracy in the worst group: {said}.")


def _of(sae: str | None) -> str:
    return f", {sae}" if sae else ""
