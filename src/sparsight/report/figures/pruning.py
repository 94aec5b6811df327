"""The figures of the pruning chapter."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from safetensors.numpy import load_file

from sparsight.report.figures.svg import (
    AMBER,
    BLUE,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PURPLE,
    QUIET,
    SHARES,
    SIGNED,
    WIDTH,
    svg,
)

_MAIN = "class-latents"
# Class latents and their controls; a control without an SAE has an angular marker. All other strategies are grey.
_STYLES = {
    _MAIN: (BLUE, "o"),
    "random-latents": (AMBER, "v"),
    "random-sae": (PURPLE, "^"),
    "logit-bias": (ORANGE, "s"),
    "class-threshold": (GREEN, "D"),
    "class-static": (INK, "X"),
}
_BOUNDS = ("none", "skip-block", "zero-heads", "all-heads")
_OPENING = {"probe": "class guessed by a probe", "predicted": "class of the unsteered pass", "oracle": "true class"}
CLASSES = 16
"""Classes that the map of classes by heads shows at most."""


def frontiers(rows: list[dict[str, Any]], unpruned: float) -> str:
    """Frontiers chosen on val, evaluated on test, with one panel per kind of label.

    Large markers show the points chosen on val. The bar is the 95 % interval of class latents.
    """
    test = [row for row in rows if row["split"] == "test"]
    kinds = [kind for kind in _OPENING if any(row["labels"] == kind for row in test)]
    span = float(np.ptp([unpruned, *(row["accuracy"] for row in test if row["on_frontier"] or row["chosen"])]))
    others = {row["strategy"] for row in test} - _STYLES.keys() - set(_BOUNDS)
    figure = Figure(figsize=(WIDTH, 3.7), layout="constrained")
    axes = figure.subplots(1, max(1, len(kinds)), sharey=True, squeeze=False)[0]
    for axis, kind in zip(axes, kinds or ["none"], strict=True):
        seen = [row for row in test if row["labels"] in (kind, "none")]
        axis.axhline(unpruned, color=QUIET, linewidth=1, linestyle=":")
        for name in sorted(others):
            _frontier(axis, [row for row in seen if row["strategy"] == name], GREY, "", 0.7)
        for name in reversed(_STYLES):  # class latents last, on top
            _frontier(axis, [row for row in seen if row["strategy"] == name], *_STYLES[name], 1.2)
        _bounds(axis, [row for row in seen if row["strategy"] in _BOUNDS], 0.05 * span)
        axis.set(title=_OPENING.get(kind, ""), xlabel="share of heads kept in the last block", xlim=(-0.06, 1.06))
        axis.set_xticks(np.linspace(0, 1, 5))
    axes[0].set(ylabel="accuracy on test")
    figure.legend(handles=_legend({row["strategy"] for row in test}, bool(others)), loc="outside lower left", ncols=4)
    chosen = [row for row in test if row["chosen"] and row["strategy"] == _MAIN]
    said = "; ".join(
        f"{_OPENING[row['labels']]}: {row['usage']:.2f} of the heads, accuracy {100 * row['accuracy']:.1f} %"
        for row in sorted(chosen, key=lambda row: list(_OPENING).index(row["labels"]))
    )
    said = f"Without pruning the accuracy is {100 * unpruned:.1f} %. Class latents as chosen on val, {said}."
    return svg(figure, "Accuracy against the share of heads kept in the last block", said)


def _frontier(axis: Axes, rows: list[dict[str, Any]], colour: str, marker: str, width: float) -> None:
    """The frontier of one strategy, and its point chosen on val."""
    line = sorted((row for row in rows if row["on_frontier"]), key=lambda row: row["usage"])
    style: dict[str, Any] = {"color": colour, "marker": marker, "linewidth": width, "markeredgewidth": 0}
    axis.plot([row["usage"] for row in line], [row["accuracy"] for row in line], markersize=3.5, **style)
    for row in (row for row in rows if row["chosen"]):
        style["marker"] = marker or "."
        axis.plot(row["usage"], row["accuracy"], markersize=9 if marker else 7, **style)
        if row["strategy"] == _MAIN:  # bars of all strategies would hide the points
            axis.vlines(row["usage"], row["lo"], row["hi"], color=colour, linewidth=1.2)


def _bounds(axis: Axes, rows: list[dict[str, Any]], near: float) -> None:
    """Policies without a choice, named where they are; those within ``near`` of each other share a line of text."""
    places: list[tuple[float, float, list[str]]] = []
    for row in rows:
        x, y = row["usage"], row["accuracy"]
        axis.plot(x, y, "+", color=INK, markersize=7)
        shared = next((names for u, v, names in places if abs(x - u) < 0.2 and abs(y - v) <= near), None)
        if shared is None:
            places.append((x, y, [row["strategy"]]))
        else:
            shared.append(row["strategy"])
    for x, y, names in places:
        right = x > 0.75
        place: dict[str, Any] = (
            {"ha": "right", "va": "top", "xytext": (-6, -4)} if right else {"va": "center", "xytext": (7, 0)}
        )
        axis.annotate(", ".join(names), (x, y), textcoords="offset points", color=QUIET, fontsize=8, **place)


def _legend(strategies: set[str], others: bool) -> list[Line2D]:
    styles = {name: style for name, style in _STYLES.items() if name in strategies}
    handles = [
        Line2D([], [], color=colour, marker=marker, linewidth=1.2, markeredgewidth=0, label=name)
        for name, (colour, marker) in styles.items()
    ]
    if others:
        handles.append(Line2D([], [], color=GREY, marker=".", linewidth=0.7, label="other strategies"))
    return [*handles, Line2D([], [], color=QUIET, linestyle=":", linewidth=1, label="no head pruned")]


def head_latents(path: Path, sae: str, shown: int = 40) -> str:
    """W_head W_dec of one SAE: the latents that push the heads' logits most, by head."""
    push_HF = load_file(path)[sae]
    order = np.argsort(-np.abs(push_HF).max(axis=0), kind="stable")[:shown]
    first, most = int(order[0]), int(np.abs(push_HF[:, order[0]]).argmax())
    order = order[np.argsort(push_HF[:, order].argmax(axis=0), kind="stable")]
    figure = Figure(figsize=(WIDTH, 0.9 + 0.25 * len(push_HF)), layout="constrained")
    axis, limit = figure.subplots(), float(np.abs(push_HF[:, order]).max())
    image = axis.imshow(push_HF[:, order], vmin=-limit, vmax=limit, cmap=SIGNED, aspect="auto")
    axis.set_yticks(range(len(push_HF)), [f"h{h}" for h in range(len(push_HF))])
    axis.set_xticks(range(len(order)), [str(i) for i in order], rotation=90, fontsize=8)
    axis.set(xlabel="latent")
    figure.colorbar(image, ax=axis, label="logit per unit")
    said = (
        f"The largest of {push_HF.shape[1]} latents by effect is {first}: {push_HF[most, first]:+.2f} on head {most}."
    )
    return svg(figure, f"What each latent of {sae} adds to the logit of each head", said)


def class_by_head(per_head: list[dict[str, Any]], shown: list[tuple[str, str]]) -> str:
    """How often each class keeps each head of the last block, one map per (strategy, labels).

    Of many classes the figure shows the ``CLASSES`` whose heads differ most between the first map and the second.
    """
    classes = list(dict.fromkeys(row["class_name"] for row in per_head))
    heads = sorted({row["head"] for row in per_head})
    maps = [_shares(per_head, key, classes, heads) for key in shown]
    n = len(classes)
    if n > CLASSES and len(maps) > 1:
        change = np.abs(maps[1] - maps[0]).sum(axis=1)
        kept = np.sort(np.argsort(-change, kind="stable")[:CLASSES])
        classes, maps = [classes[i] for i in kept], [share[kept] for share in maps]
    width = min(WIDTH, 2.2 + 0.4 * len(heads) * len(shown))
    figure = Figure(figsize=(width, 1.1 + 0.22 * len(classes)), layout="constrained")
    axes = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    image: Any = None
    for axis, (strategy, labels), share in zip(axes, shown, maps, strict=True):
        image = axis.imshow(share, vmin=0, vmax=1, cmap=SHARES, aspect="auto")
        axis.set_title(strategy if labels == "none" else f"{strategy},\n{labels}", fontsize=8)
        every = -(-len(heads) * len(shown) // 30)  # as many labels as there is room for
        axis.set_xticks(range(0, len(heads), every), [f"h{h}" for h in heads[::every]], fontsize=8)
        axis.set_yticks(range(len(classes)), [_short(name) for name in classes])
    figure.colorbar(image, ax=axes, label="share of test images", shrink=0.8)
    said = "Share of heads kept, mean over the classes shown. " + "; ".join(
        f"{strategy}: {share.mean():.2f}" for (strategy, _), share in zip(shown, maps, strict=True)
    )
    if len(classes) < n:
        said += f". Shown are the {len(classes)} of {n} classes whose heads {shown[1][0]} changes most"
    return svg(figure, "Share of test images that keep each head of the last block, by class", f"{said}.")


def _shares(per_head: list[dict[str, Any]], key: tuple[str, str], classes: list[str], heads: list[int]) -> np.ndarray:
    """Share of the images of each class that keep each head, mean over SAEs, (classes, heads)."""
    values: defaultdict[tuple[str, int], list[float]] = defaultdict(list)
    for row in per_head:
        if (row["strategy"], row["labels"]) == key:
            values[row["class_name"], row["head"]].append(row["usage_last"])
    return np.array([[np.mean(values[name, head]) for head in heads] for name in classes])


def _short(name: str, letters: int = 24) -> str:
    return name if len(name) <= letters else f"{name[: letters - 1]}\u2026"
