"""The figures of steering. Curves are means over the seeds of a section; a row says the seed of its SAE."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sparsight.report.figures.svg import AMBER, BLUE, GREEN, GREY, INK, ORANGE, PURPLE, QUIET, WIDTH, svg

Rows = list[dict[str, Any]]

# What steers by an SAE is blue with a round marker, or grey where it is the second such way; the rest are controls.
_STYLES = {
    "class-latents": (BLUE, "o"),
    "vs2": (BLUE, "o"),
    "vs2-pass": (BLUE, "o"),
    "vs2-gated": (BLUE, "."),
    "vs2-pass-gated": (BLUE, "."),
    "vs2++-majority": (BLUE, "o"),
    "vs2++-query": (PURPLE, "d"),
    "random-latents": (AMBER, "v"),
    "mean-difference": (GREEN, "s"),
    "mean-extrapolation": (GREEN, "s"),
    "pca-extrapolation": (ORANGE, "^"),
    "retrieval": (GREEN, "s"),
    "embedding-steering": (ORANGE, "^"),
    "nearest-neighbours": (GREY, "x"),
    "reconstruct": (GREY, ""),
    "none": (INK, ""),
}
_EFFECTS = {"changed": "share of changed predictions", "kl": "KL of the predictions (nats)",
            "cosine": "cosine with the unsteered embedding"}  # fmt: skip
_LABELS = {"none": "val: every strength", "predicted": "val: predicted class", "oracle": "val: true class"}


def effects(title: str, rows: Rows, gate: Rows) -> str:
    """How much each method changes by strength on a split, and the gate's curves on test if there is a gate.

    It is for a result without accuracies, see :func:`steering`. What changes are the predictions (share and KL) or,
    without a classifier, the embedding.
    """
    panels = [key for key in _EFFECTS if any(row[key] is not None for row in rows)]
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    axes = figure.subplots(1, len(panels) + bool(gate), squeeze=False)[0]
    for axis, key in zip(axes, panels, strict=False):
        _by_strength(axis, [row for row in rows if row[key] is not None], key)
        axis.set(title=f"{rows[0]['split']}: {_EFFECTS[key]}", xlabel="strength")
    figure.legend(handles=_legend(rows), loc="outside lower left", ncols=5)
    if gate:
        lines = _groups(gate, "strength")
        for ((strength,), group), opacity in zip(lines.items(), np.linspace(0.35, 1, len(lines)), strict=True):
            steered, effect = _over_seeds(group, "quantile", "steered"), _over_seeds(group, "quantile", panels[0])
            axes[-1].plot(list(steered.values()), list(effect.values()), marker=".", color=BLUE, alpha=float(opacity),
                          label=f"strength {strength:g}")  # fmt: skip
        axes[-1].legend()
        axes[-1].set(title="test: the gate, by quantile", xlabel="share of images steered", ylabel=_EFFECTS[panels[0]])
    return svg(
        figure, title, f"{_EFFECTS[panels[0]].capitalize()} at the largest strength, {_at_last(rows, panels[0])}."
    )


def steering(title: str, rows: Rows, classes: Rows, gate: Rows) -> str:
    """Accuracy against strength on val, gains by class on test and, if there is a gate, its curve on test.

    There is a panel per kind of label; levels without a label are in all of them.
    """
    val = [row for row in rows if row["split"] == "val"]
    kinds = [kind for kind in _LABELS if any(row["labels"] == kind for row in val if row["method"] in _main(val))]
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    axes = figure.subplots(1, len(kinds) + 1 + bool(gate), squeeze=False)[0]
    for axis, kind in zip(axes, kinds, strict=False):
        _by_strength(axis, [row for row in val if row["labels"] in (kind, "none")], "accuracy")
        axis.set(title=_LABELS[kind], xlabel="strength")
        if axis is not axes[0]:
            axis.sharey(axes[0])
    axes[0].set(ylabel="accuracy")
    figure.legend(handles=_legend(val), loc="outside lower left", ncols=5)
    gains = _gains(axes[len(kinds)], classes)
    if gate:
        _gate(axes[-1], rows, [line for line in gate if line["split"] == "test"])
    said = f"Accuracy on val at the largest strength, {_at_last(val, 'accuracy')}."
    if gains:
        worst, best = min(gains, key=lambda name: gains[name]), max(gains, key=lambda name: gains[name])
        said += f" Gains on test from {gains[worst]:+.1f} points (class {worst}) to {gains[best]:+.1f} (class {best})."
    return svg(figure, title, said)


def _main(rows: Rows) -> set[str]:
    """The methods that are blue: what the result is about."""
    return {row["method"] for row in rows if _STYLES[row["method"]][0] == BLUE}


def _gains(axis: Axes, classes: Rows, named: int = 20) -> dict[str, float]:
    """The gain of each method by class, in points, in the order of the main method's gains, which it returns."""
    shown = [row for row in classes if row["method"] not in ("none", "reconstruct") and row["labels"] != "oracle"]
    by_method = {
        method: _over_seeds(group, "class_name", "delta") for (method,), group in _groups(shown, "method").items()
    }
    main = next((method for method in by_method if method in _main(shown)), next(iter(by_method), None))
    gains = {name: 100 * delta for name, delta in by_method[main].items()} if main else {}
    names = sorted(gains, key=lambda name: gains[name])
    for method, deltas in by_method.items():
        colour, marker = _STYLES[method]
        size = 26 if method == main else 9
        axis.scatter([100 * deltas[name] for name in names], range(len(names)), s=size, color=colour, marker=marker,
                     zorder=2 + (method == main), linewidths=0.8 if marker == "x" else 0)  # fmt: skip
    axis.axvline(0, color=QUIET, linewidth=1)
    axis.set_yticks(range(len(names)) if len(names) <= named else [], names if len(names) <= named else None)
    axis.set(title="test: gain by class", xlabel="points")
    if len(names) > named:
        axis.set(ylabel=f"{len(names)} classes")
    return gains


def _gate(axis: Axes, rows: Rows, lines: Rows) -> None:
    """Accuracy on test against the share of steered images, and the level without steering."""
    shares, accuracy = _over_seeds(lines, "quantile", "steered"), _over_seeds(lines, "quantile", "accuracy")
    axis.plot(list(shares.values()), list(accuracy.values()), color=BLUE, marker="o", markersize=4, linewidth=1)
    if len(_groups(lines, "sae")) == 1:
        axis.vlines([line["steered"] for line in lines], [line["lo"] for line in lines], [line["hi"] for line in lines],
                    color=BLUE, linewidth=1)  # fmt: skip
    none = next(row["accuracy"] for row in rows if row["method"] == "none" and row["split"] == "test")
    axis.axhline(none, color=INK, linewidth=1, linestyle=":")
    axis.set(title="test: the gate, by quantile", xlabel="share of images steered")


def _by_strength(axis: Axes, rows: Rows, key: str) -> None:
    """For each method the mean over seeds and, thinly, each seed; a level for a method of one strength.

    The labels of a method differ where one panel has several: predicted solid, oracle dashed.
    """
    for (method, labels), group in _groups(rows, "method", "labels").items():
        colour, marker = _STYLES[method]
        means = _over_seeds(group, "strength", key)
        if len(means) == 1:
            axis.axhline(next(iter(means.values())), color=colour, linewidth=1, linestyle=":")
            continue
        line = "--" if labels == "oracle" else "-"
        axis.plot(list(means), list(means.values()), color=colour, marker=marker, markersize=4, linewidth=1.2,
                  linestyle=line, markeredgewidth=0.8 if marker == "x" else 0)  # fmt: skip
        seeds = _groups(group, "sae")
        for one in seeds.values() if len(seeds) > 1 else ():
            axis.plot(
                [row["strength"] for row in one], [row[key] for row in one], color=colour, linewidth=0.6, alpha=0.4
            )


def _legend(rows: Rows) -> list[Line2D]:
    strengths = {method: {row["strength"] for row in group} for (method,), group in _groups(rows, "method").items()}
    handles = []
    for method, seen in strengths.items():
        (colour, marker), level = _STYLES[method], len(seen) == 1
        handles.append(Line2D([], [], color=colour, marker="" if level else marker, linestyle=":" if level else "-",
                              markersize=4, linewidth=1.2, label=method))  # fmt: skip
    return handles


def _at_last(rows: Rows, key: str) -> str:
    """A metric of each method at its largest strength, mean over seeds and kinds of label, for the description."""
    said = []
    for (method,), group in _groups([row for row in rows if row[key] is not None], "method").items():
        means = _over_seeds(group, "strength", key)
        said.append(f"{method}: {means[max(means)]:.3f}")
    return "; ".join(said)


def _over_seeds(rows: Rows, by: str, key: str) -> dict[Any, float]:
    """Mean of a column for each value of another."""
    return {value: float(np.mean([row[key] for row in group])) for (value,), group in _groups(rows, by).items()}


def _groups(rows: Rows, *keys: str) -> dict[tuple[Any, ...], Rows]:
    groups: dict[tuple[Any, ...], Rows] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups
