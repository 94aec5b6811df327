"""The chapter on the attribution of class logits: its main sentence, its table and its figure."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from sparsight.common import tables
from sparsight.report.figures import attribution as figures

DIRECTIONS = ("deletion", "insertion")


def chapter(path: Path) -> dict[str, Any]:
    """The chapter's numbers and figure.

    Args:
        path: ``<name>.parquet``, beside the other files of the result.
    """
    summary = json.loads(path.with_suffix(".json").read_text())
    of_saes: dict[str, dict[str, float]] = summary["saes"]
    return {
        "name": path.stem,
        "summary": summary,
        "means": {
            f"{direction}_{method}": float(np.mean([flat[f"{direction}_{method}"] for flat in of_saes.values()]))
            for direction in DIRECTIONS
            for method in figures.STYLES
        },
        "rows": [
            {"sae": sae, "method": figures.NAMES[method], **_part(flat, method)}
            for sae, flat in of_saes.items()
            for method in figures.STYLES
        ],
        "figures": {f"attribution-{path.stem}": figures.attribution(f"Attribution {path.stem}", tables.read(path))},
    }


def _part(flat: dict[str, float], method: str) -> dict[str, float]:
    """Areas of a method with their intervals."""
    keys = [f"{direction}{end}" for direction in DIRECTIONS for end in ("", "_lo", "_hi")]
    return {key: flat[key.replace("tion", f"tion_{method}", 1)] for key in keys}
