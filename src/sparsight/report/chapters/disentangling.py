"""The chapter on interchanges of attributes: its main sentence, its tables and its figure."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from sparsight.common import tables
from sparsight.report.figures import disentangling as figures

_FEATURES = 16
"""Number of features that the sentence speaks of, or the nearest that was tried."""


def chapter(path: Path) -> dict[str, Any]:
    """The chapter's numbers and figure.

    Args:
        path: ``<name>.parquet``, beside the other files of the result.
    """
    rows, summary = tables.read(path), json.loads(path.with_suffix(".json").read_text())
    absorbed = tables.read(path.with_name(f"{path.stem}-absorption.parquet"))
    features = min(summary["features"], key=lambda count: abs(count - _FEATURES))
    return {
        "name": path.stem,
        "summary": summary,
        "features": features,
        "scores": {method: _mean(rows, method, features) for method in figures.STYLES if method != "everything"},
        "leads": [line for line in summary["leads"] if line["features"] == features],
        "rows": rows,
        "absorption": [row for row in absorbed if row["value"] is None],
        "figures": {f"disentangling-{path.stem}": figures.disentangling(f"Interchanges {path.stem}", rows)},
    }


def _mean(rows: list[dict[str, Any]], method: str, features: int) -> float | None:
    """Score of a method, mean over attributes and seeds; None if it has fewer features."""
    found = [row["score"] for row in rows if (row["method"], row["features"]) == (method, features)]
    return float(np.mean(found)) if found else None
