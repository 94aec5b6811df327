"""The chapter on a spurious feature: its main sentence, its tables and its figure."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from sparsight.common import tables
from sparsight.report.figures import spurious as figures


def chapter(path: Path) -> dict[str, Any]:
    """The chapter's numbers and figure.

    Args:
        path: ``<name>.parquet``, beside the other files of the result.
    """
    rows, summary = tables.read(path), json.loads(path.with_suffix(".json").read_text())
    return {
        "name": path.stem,
        "summary": summary,
        "names": figures.NAMES,
        "worst": {
            method: float(np.mean([row["worst"] for row in rows if row["method"] == method]))
            for method in figures.NAMES
        },
        "rows": rows,
        "figures": {f"spurious-{path.stem}": figures.spurious(f"Spurious {path.stem}", rows)},
    }
