"""The chapter on where latents fire: means over classes, and a table of every class."""

import json
from pathlib import Path
from typing import Any

from sparsight.common import tables
from sparsight.common.intervals import mean_of_seeds

METHODS = {
    "sae": "SAE", "pca": "principal components", "kmeans": "k-means", "neurons": "neurons",
    "random": "random dictionary", "shuffled": "shuffled patches",
}  # fmt: skip
"""In the order of the table's columns; the last is chance."""
_MEASURES = ("ap", "purity", "moran")


def chapter(path: Path) -> dict[str, Any]:
    """The chapter's numbers, means over the SAEs of a section.

    Args:
        path: ``<section>.parquet``, beside the other file of the result.
    """
    rows, summary = tables.read(path), json.loads(path.with_suffix(".json").read_text())
    of_saes = list(summary["saes"].values())
    keys = {key for flat in of_saes for key in flat}
    means = {key: mean_of_seeds([flat[key] for flat in of_saes if key in flat]) for key in sorted(keys)}
    controls = [method for method in METHODS if method not in ("sae", "shuffled")]
    return {
        "name": path.stem,
        "summary": summary,
        "methods": METHODS,
        "means": means,
        "strongest": max(controls, key=lambda method: means[f"ap_{method}"]["mean"]),
        "classes": [_class(name, [row for row in rows if row["class"] == name]) for name in summary["regions"]],
    }


def _class(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """A class: its patches, and by measure and method the mean over the SAEs."""
    found: dict[str, Any] = {"name": name, "n": rows[0]["n"], "share": rows[0]["share"]}
    for measure in _MEASURES:
        by_method = {
            method: [row[measure] for row in rows if row["method"] == method and row[measure] is not None]
            for method in METHODS
        }
        found[measure] = {method: mean_of_seeds(values) for method, values in by_method.items() if values}
    latents = [row for row in rows if row["method"] == "sae"]
    found["latents"] = ", ".join(f"{row['feature']} of {row['sae']}" for row in latents)
    return found
