"""The figures of steering, as SVG text that is identical in equal runs."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sparsight.report.figures.svg import svg as _svg

# Okabe and Ito's palette, distinguishable with any colour vision.
_COLOURS = {
    "none": "#000000",
    "reconstruct": "#999999",
    "class-latents": "#0072B2",
    "random-latents": "#E69F00",
    "mean-difference": "#009E73",
    "vs2": "#0072B2",
    "vs2-pass": "#0072B2",
    "vs2-gated": "#56B4E9",
    "vs2-pass-gated": "#56B4E9",
    "mean-extrapolation": "#009E73",
    "pca-extrapolation": "#CC79A7",
    "vs2++-majority": "#0072B2",
    "vs2++-query": "#56B4E9",
    "retrieval": "#CC79A7",
    "embedding-steering": "#D55E00",
    "nearest-neighbours": "#F0E442",
}
_MARKERS = {"none": "s", "predicted": "o", "oracle": "^"}


def effects(rows: list[dict[str, Any]], gate: list[dict[str, Any]]) -> str:
    """How much each method changes by strength on a split, and the gate's curves on test if there is a gate.

    It is for a result without accuracies, see :func:`steering`. What changes are the predictions (share and KL) or,
    without a classifier, the embedding.
    """
    titles = {"changed": "share of changed predictions", "kl": "KL of the predictions (nats)",
              "cosine": "cosine with the unsteered embedding"}  # fmt: skip
    panels = [key for key in titles if any(row[key] is not None for row in rows)]
    figure = Figure(figsize=(10.5, 3.9), layout="constrained")
    axes = figure.subplots(1, len(panels) + bool(gate), squeeze=False)[0]
    for axis, key in zip(axes, panels, strict=False):
        _by_strength(axis, [row for row in rows if row[key] is not None], key)
        axis.set(title=f"{rows[0]['split']}: every strength", xlabel="strength", ylabel=titles[key])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False, fontsize=7)
    if gate:
        lines = _groups(gate, "strength")
        for ((strength,), group), opacity in zip(lines.items(), np.linspace(0.25, 1, len(lines)), strict=True):
            axes[-1].plot([line["steered"] for line in group], [line[panels[0]] for line in group], marker=".",
                          color=_COLOURS["vs2"], alpha=float(opacity), label=f"strength {strength:g}")  # fmt: skip
        axes[-1].legend(frameon=False, fontsize=7)
        axes[-1].set(title="test: the gate, by quantile", xlabel="share of images steered", ylabel=titles[panels[0]])
    return _svg(figure)


def steering(rows: list[dict[str, Any]], classes: list[dict[str, Any]], gate: list[dict[str, Any]]) -> str:
    """Accuracy against strength on val, gains by class on test and, if there is a gate, its curve on test."""
    figure = Figure(figsize=(10.5, 3.9), layout="constrained")
    axes = figure.subplots(1, 3 if gate else 2, squeeze=False)[0]
    val = [row for row in rows if row["split"] == "val"]
    _by_strength(axes[0], val, "accuracy")
    axes[0].set(title="val: every strength", xlabel="strength", ylabel="accuracy")
    # Below the axes, because the entries are too many for a corner.
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=7)
    main = next(row["method"] for row in val if row["method"] not in ("none", "reconstruct"))
    shown = [row for row in classes if row["method"] not in ("none", "reconstruct") and row["labels"] != "oracle"]
    names = list(dict.fromkeys(row["class_name"] for row in classes))
    for method, group in _groups(shown, "method").items():
        points = {row["class_name"]: 100 * row["delta"] for row in group}
        size = 28 if method == (main,) else 12
        axes[1].scatter([points.get(name) for name in names], range(len(names)), s=size, color=_COLOURS[method[0]])
    axes[1].axvline(0, color="#666666", linewidth=1)
    axes[1].set_yticks(range(len(names)), names if len(names) <= 25 else [""] * len(names))
    axes[1].set(title="test: gain by class", xlabel="points")
    if gate:
        test = [line for line in gate if line["split"] == "test"]
        bars = [[line["accuracy"] - line["lo"] for line in test], [line["hi"] - line["accuracy"] for line in test]]
        shares = [line["steered"] for line in test]
        axes[2].errorbar(shares, [line["accuracy"] for line in test], yerr=bars, capsize=2, color=_COLOURS["vs2-gated"])
        none = next(row["accuracy"] for row in rows if row["method"] == "none" and row["split"] == "test")
        axes[2].axhline(none, color="#000000", linewidth=1, linestyle=":")
        axes[2].set(title="test: the gate, by quantile", xlabel="share of images steered", ylabel="accuracy")
    return _svg(figure)


def _by_strength(axis: Axes, rows: list[dict[str, Any]], key: str) -> None:
    """A line for each method and kind of label; a level for a method of one strength."""
    for (method, labels), group in _groups(rows, "method", "labels").items():
        style: dict[str, Any] = {"color": _COLOURS[method], "marker": _MARKERS[labels], "markersize": 4, "linewidth": 1}
        label = method if labels == "none" else f"{method}, {labels}"
        if len(group) == 1:
            axis.axhline(group[0][key], color=_COLOURS[method], linewidth=1, linestyle=":", label=label)
        else:
            axis.plot([r["strength"] for r in group], [r[key] for r in group], label=label, **style)


def _groups(rows: list[dict[str, Any]], *keys: str) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups
