"""The figures of the pruning chapter, as SVG text that is identical in equal runs."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from safetensors.numpy import load_file

from sparsight.report.figures.svg import svg

# Okabe and Ito's palette. Strategies of the same colour differ in their marker.
_STYLES = {
    "class-latents": ("#0072B2", "o"),
    "class-latents-in-stream": ("#000000", "o"),
    "sample-top": ("#56B4E9", "v"),
    "uniform": ("#56B4E9", "x"),
    "targeted": ("#56B4E9", "P"),
    "latent-atlas": ("#56B4E9", "*"),
    "random-latents": ("#E69F00", "^"),
    "random-sae": ("#E69F00", "v"),
    "logit-bias": ("#D55E00", "s"),
    "logit-bias-matched": ("#D55E00", "D"),
    "class-threshold": ("#009E73", "P"),
    "class-static": ("#CC79A7", "X"),
}
_BOUNDS = {"none": "s", "skip-block": "1", "zero-heads": "2", "all-heads": "3"}


def frontiers(rows: list[dict[str, Any]], unpruned: float) -> str:
    """Frontiers chosen on val, evaluated on test, with one panel per kind of label.

    Large markers show the points chosen on val. The bar is the 95 % interval of class latents.
    """
    test = [row for row in rows if row["split"] == "test"]
    kinds = [kind for kind in ("probe", "predicted", "oracle") if any(row["labels"] == kind for row in test)]
    figure = Figure(figsize=(10.5, 3.8), layout="constrained")
    axes = figure.subplots(1, max(1, len(kinds)), sharey=True, squeeze=False)[0]
    for axis, kind in zip(axes, kinds or ["none"], strict=True):
        for name, (colour, marker) in _STYLES.items():
            strategy_rows = [row for row in test if row["strategy"] == name and row["labels"] in (kind, "none")]
            line = sorted((row for row in strategy_rows if row["on_frontier"]), key=lambda row: row["usage"])
            style = {"color": colour, "marker": marker, "linewidth": 1}
            label = name if strategy_rows else None
            axis.plot([r["usage"] for r in line], [r["accuracy"] for r in line], markersize=3, label=label, **style)
            for row in (row for row in strategy_rows if row["chosen"]):
                axis.plot(row["usage"], row["accuracy"], markersize=8, **style)
                if name == "class-latents":  # bars of all strategies would hide the points
                    bars = [[row["accuracy"] - row["lo"]], [row["hi"] - row["accuracy"]]]
                    axis.errorbar(row["usage"], row["accuracy"], yerr=bars, capsize=3, color=colour)
        for row in (row for row in test if row["strategy"] in _BOUNDS):
            marker = _BOUNDS[row["strategy"]]
            axis.plot(row["usage"], row["accuracy"], marker, color="#000000", markersize=7, label=row["strategy"])
        axis.axhline(unpruned, color="#666666", linewidth=1, linestyle=":", label="no head pruned")
        axis.set(title=f"{kind} labels", xlabel="heads kept in the last block")
    axes[0].set(ylabel="accuracy on test")
    axes[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
    return svg(figure)


def head_latents(path: Path, sae: str, shown: int = 40) -> str:
    """W_head W_dec of one SAE: the latents that push the heads' logits most, by head."""
    push_HF = load_file(path)[sae]
    order = np.argsort(-np.abs(push_HF).max(axis=0), kind="stable")[:shown]
    order = order[np.argsort(push_HF[:, order].argmax(axis=0), kind="stable")]
    figure = Figure(figsize=(10.5, 0.8 + 0.25 * len(push_HF)), layout="constrained")
    axis, limit = figure.subplots(), float(np.abs(push_HF[:, order]).max())
    image = axis.imshow(push_HF[:, order], vmin=-limit, vmax=limit, cmap="RdBu", aspect="auto")
    axis.set_yticks(range(len(push_HF)), [f"h{h}" for h in range(len(push_HF))])
    axis.set_xticks(range(len(order)), [str(i) for i in order], rotation=90, fontsize=7)
    axis.set(xlabel="latent")
    figure.colorbar(image, ax=axis, label="logit per unit")
    return svg(figure)


def class_by_head(per_head: list[dict[str, Any]], shown: list[tuple[str, str]]) -> str:
    """How often each class keeps each head of the last block, one map per (strategy, labels)."""
    classes = list(dict.fromkeys(row["class_name"] for row in per_head))
    heads = sorted({row["head"] for row in per_head})
    figure = Figure(figsize=(1.2 + 0.42 * len(heads) * len(shown), 1.2 + 0.28 * len(classes)), layout="constrained")
    axes = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    image: Any = None
    for axis, (strategy, labels) in zip(axes, shown, strict=True):
        share = np.zeros((len(classes), len(heads)))
        rows = [row for row in per_head if (row["strategy"], row["labels"]) == (strategy, labels)]
        for c, name in enumerate(classes):
            for h in heads:
                share[c, h] = np.mean([r["usage_last"] for r in rows if r["class_name"] == name and r["head"] == h])
        image = axis.imshow(share, vmin=0, vmax=1, cmap="cividis", aspect="auto")
        axis.set_title(strategy if labels == "none" else f"{strategy}, {labels}", fontsize=8)
        axis.set_xticks(range(len(heads)), [f"h{h}" for h in heads])
        axis.set_yticks(range(len(classes)), classes)
    figure.colorbar(image, ax=axes, label="share of test images", shrink=0.8)
    return svg(figure)
