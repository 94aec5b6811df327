"""The figure of a backbone's training."""

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from sparsight.report.figures.svg import BLUE, ORANGE, svg


def training(folder: Path) -> str:
    """Loss and validation accuracy of a backbone by epoch; empty if it was not trained here."""
    lines = _log(folder / "training.jsonl")
    if not lines:
        return ""
    figure = Figure(figsize=(7.5, 2.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    loss, val = [line for line in lines if "loss" in line], [line for line in lines if "val_accuracy" in line]
    left.plot([line["epoch"] for line in loss], [line["loss"] for line in loss], color=BLUE)
    right.plot([line["epoch"] for line in val], [line["val_accuracy"] for line in val], color=ORANGE)
    left.set(xlabel="epoch", title="training loss")
    right.set(xlabel="epoch", title="accuracy on val")
    said = f"Training loss {loss[-1]['loss']:.3f} after {loss[-1]['epoch']:g} epochs."
    if val:
        said += f" Accuracy on val {100 * val[-1]['val_accuracy']:.1f} %."
    return svg(figure, f"Training of the backbone {folder.name}", said)


def _log(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
