"""The figure of a backbone's training, as SVG text that is identical in equal runs."""

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from sparsight.report.figures.svg import svg as _svg


def training(folder: Path) -> str:
    """Loss and validation accuracy of a backbone by epoch; empty if it was not trained here."""
    lines = _log(folder / "training.jsonl")
    if not lines:
        return ""
    figure = Figure(figsize=(6, 2.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    loss, val = [line for line in lines if "loss" in line], [line for line in lines if "val_accuracy" in line]
    left.plot([line["epoch"] for line in loss], [line["loss"] for line in loss], color="#0072B2")
    right.plot([line["epoch"] for line in val], [line["val_accuracy"] for line in val], color="#D55E00")
    left.set(xlabel="epoch", ylabel="training loss")
    right.set(xlabel="epoch", ylabel="accuracy on val")
    return _svg(figure)


def _log(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
