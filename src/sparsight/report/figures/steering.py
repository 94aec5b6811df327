"""The figures of steering, as SVG text that is identical in equal runs."""

from typing import Any

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


def steering(rows: list[dict[str, Any]], classes: list[dict[str, Any]], gate: list[dict[str, Any]]) -> str:
    """Accuracy against strength on val, gains by class on test and, if there is a gate, its curve on test."""
    figure = Figure(figsize=(10.5, 3.9), layout="constrained")
    axes = figure.subplots(1, 3 if gate else 2, squeeze=False)[0]
    val = [row for row in rows if row["split"] == "val"]
    for (method, labels), group in _groups(val, "method", "labels").items():
        style = {"color": _COLOURS[method], "marker": _MARKERS[labels], "markersize": 4, "linewidth": 1}
        label = method if labels == "none" else f"{method}, {labels}"
        if len(group) == 1:
            axes[0].axhline(group[0]["accuracy"], color=_COLOURS[method], linewidth=1, linestyle=":", label=label)
        else:
            axes[0].plot([r["strength"] for r in group], [r["accuracy"] for r in group], label=label, **style)
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


def _groups(rows: list[dict[str, Any]], *keys: str) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups
