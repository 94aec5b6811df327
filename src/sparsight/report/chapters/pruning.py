"""The chapter on a head policy."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from sparsight.common import tables
from sparsight.report.figures import pruning as figures
from sparsight.report.grid import end_of_grid
from sparsight.report.summary import by_strategy

_MAIN = "class-latents"
_DEPLOYABLE = "probe"
_SHOWN = 3  # classes named at either end
_MAPS = ("class-latents", "random-latents", "logit-bias", "class-static")


def chapter(folder: Path) -> dict[str, Any]:
    """The chapter's numbers and figures, from the folder of the pruning stage."""
    metrics = json.loads((folder / "metrics.json").read_text())
    read = {path.stem: tables.read(path) for path in folder.glob("*.parquet")}
    by_key = by_strategy(read["overall"])
    maps = [("none", "none"), *((name, _DEPLOYABLE) for name in _MAPS)]
    saes = list(metrics["fvu_on_pruned_stream"])
    subsets = _subsets(read["class_subsets"], read["false_positives"])
    return {
        "name": folder.name,
        "metrics": metrics,
        "rows": [_row(key, rows, read["frontier"], metrics["against_none"]) for key, rows in by_key.items()],
        "deployable": ("none", _DEPLOYABLE),
        "matched": [{"at_usage": _alike(row), **row} for row in metrics["matched_usage"]],
        "selected": metrics["selected_classes"],
        "subsets": subsets,
        "extremes": _extremes(subsets),
        "figures": {
            f"frontier-{folder.name}": figures.frontiers(read["frontier"], metrics["unpruned"]["accuracy"]),
            f"heads-{folder.name}": figures.class_by_head(read["per_head"], [key for key in maps if key in by_key]),
            f"latents-{folder.name}": figures.head_latents(folder / "head_latents.safetensors", saes[0]),
        },
    }


def _row(
    key: tuple[str, str], rows: list[dict[str, Any]], frontier: list[dict[str, Any]], against_none: list[dict[str, Any]]
) -> dict[str, Any]:
    """One row of the headline table: means over SAE seeds, with their intervals over images, and ranges over seeds.

    The interval of a mean is that of the chosen point in ``frontier.parquet`` and ``metrics.json``, not a mean of the
    seeds' intervals.
    """
    line: dict[str, Any] = {"strategy": key[0], "labels": key[1], "strength": rows[0]["strength"], "n": rows[0]["n"]}
    line |= {"saes": len(rows) if rows[0]["sae"] else 0, "latents": rows[0]["latents"]}
    for name in ("accuracy", "delta", "usage_last", "usage_all", "macs"):
        values = [row[name] for row in rows]
        line[name] = float(np.mean(values))
        line[f"{name}_range"] = (min(values), max(values))
    (of_accuracy,) = rows if len(rows) == 1 else (row for row in frontier if _is_chosen(row, key))
    (of_delta,) = rows if len(rows) == 1 else (row for row in against_none if (row["strategy"], row["labels"]) == key)
    line |= {name: of_accuracy[name] for name in ("lo", "hi")}
    tried = [row for row in frontier if row["split"] == "val" and (row["strategy"], row["labels"]) == key]
    line |= {f"{name}_end": end_of_grid(line[name], (row[name] for row in tried)) for name in ("strength", "latents")}
    return line | {name: of_delta[name] for name in ("delta_lo", "delta_hi")}


def _alike(row: dict[str, Any]) -> bool:
    """Whether class latents and the control keep as many heads, to 0.01."""
    return bool(abs(row["usage"] - row["usage_control"]) <= 0.01)


def _is_chosen(row: dict[str, Any], key: tuple[str, str]) -> bool:
    return bool(row["chosen"] and row["split"] == "test" and (row["strategy"], row["labels"]) == key)


def _subsets(rows: list[dict[str, Any]], counted: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Class latents of the first SAE by class, with the false positives of the same configuration."""
    main_rows = [{**line, **row} for row, line in zip(rows, counted, strict=True) if row["strategy"] == _MAIN]
    return [row for row in main_rows if row["sae"] == main_rows[0]["sae"]]


def _extremes(subsets: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The classes that gain most and those that lose most accuracy; empty if the table is short enough to read."""
    if len(subsets) <= 4 * _SHOWN:
        return {}
    order = sorted(subsets, key=lambda row: row["delta"])
    return {"gain most": order[: -_SHOWN - 1 : -1], "lose most": order[:_SHOWN]}
