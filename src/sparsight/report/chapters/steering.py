"""The chapter on a steering result."""

import json
from pathlib import Path
from typing import Any

from sparsight.common import tables
from sparsight.report.figures import steering as figures


def chapter(path: Path, transfers: list[Path]) -> dict[str, Any]:
    """The chapter's numbers and its figure.

    Args:
        path: ``<name>.parquet``, beside the other files of the result.
        transfers: ``<data set>.json`` of every result on other images.
    """
    rows, summary = tables.read(path), json.loads(path.with_suffix(".json").read_text())
    classes = tables.read(path.with_name(f"{path.stem}-classes.parquet"))
    on_test = [row for row in rows if row["split"] == "test"]
    on_val = [row for row in rows if row["split"] == "val"]
    if on_val and classes:
        svg = figures.steering(rows, classes, summary["gate"])
    else:
        svg = figures.effects(on_val or on_test, [line for line in summary["gate"] if line["split"] == "test"])
    return {
        "name": path.stem,
        "rows": on_test,
        "judged": on_test[0]["accuracy"] is not None,
        "chosen": bool(summary["chosen_on_val"]),
        "summary": summary,
        "figures": {f"steering-{path.stem}": svg},
        "elsewhere": {file.stem: _transfer(file) for file in transfers if file.parent.name == path.stem},
    }


def _transfer(path: Path) -> dict[str, Any]:
    """VS2 on another data set: its rows with and without steering, and the gate's curve."""
    rows = {row["method"]: row for row in tables.read(path.with_suffix(".parquet"))}
    steered = rows.get("vs2") or rows["vs2-pass"]
    return {"unsteered": rows["none"], "steered": steered, **json.loads(path.read_text())}
