"""The chapter on the steering results of one section: its seeds pooled, and each of them."""

import json
from pathlib import Path
from typing import Any

from sparsight.common import tables
from sparsight.common.intervals import mean_of_seeds
from sparsight.report.figures import steering as figures
from sparsight.report.grid import end_of_grid

Rows = list[dict[str, Any]]

_METRICS = ("accuracy", "delta", "top5", "changed", "kl", "cosine")
_ENDS = {"accuracy_lo": "lo", "accuracy_hi": "hi", **{f"{key}_{end}": f"{key}_{end}" for key in ("delta", "changed")
                                                    for end in ("lo", "hi")}}  # fmt: skip
"""The ends of intervals over images, and their columns in the tables of steering."""


def chapter(name: str, paths: list[Path], transfers: list[Path]) -> dict[str, Any]:
    """The chapter's numbers and its figure.

    Args:
        name: name of the section.
        paths: ``<name>-s<seed>.parquet`` of every seed, beside the other files of the result.
        transfers: ``<data set>.json`` of every result on other images.
    """
    summaries = {path.stem: json.loads(path.with_suffix(".json").read_text()) for path in paths}
    rows = [{"sae": path.stem, **row} for path in paths for row in tables.read(path)]
    classes = [row for path in paths for row in tables.read(path.with_name(f"{path.stem}-classes.parquet"))]
    gate = [{"sae": seed, **line} for seed, summary in summaries.items() for line in summary["gate"]]
    on_test, on_val = ([row for row in rows if row["split"] == split] for split in ("test", "val"))
    summary = summaries[paths[0].stem]
    chosen = bool(summary["chosen_on_val"])
    against = [{"sae": seed, **line} for seed, one in summaries.items() for line in one["against_controls"]]
    pooled = _pooled(on_test, on_val, against, chosen)
    title = f"Steering {name}"
    if on_val and classes:
        svg = figures.steering(title, rows, classes, gate)
    else:
        svg = figures.effects(title, on_val or on_test, [line for line in gate if line["split"] == "test"])
    return {
        "name": name,
        "seeds": len(paths),
        "rows": pooled,
        "oracle": [row for row in pooled if row["labels"] == "oracle"],
        "each": [{"end": _end(row, on_val) if chosen else "", **row} for row in on_test],
        "judged": on_test[0]["accuracy"] is not None,
        "chosen": chosen,
        "summary": summary,
        "main": against[0]["method"] if against else "",
        "against": against,
        "figures": {f"steering-{name}": svg},
        "elsewhere": [
            {"sae": file.parent.name, "images": file.stem, **_transfer(file)}
            for file in transfers
            if file.parent.name in summaries
        ],
    }


def by_section(paths: list[Path]) -> dict[str, list[Path]]:
    """Results of seeds, ``<section>-s<seed>.parquet``, by section."""
    sections: dict[str, list[Path]] = {}
    for path in paths:
        sections.setdefault(path.stem.rpartition("-s")[0], []).append(path)
    return sections


def _pooled(rows: Rows, on_val: Rows, against: Rows, chosen: bool) -> Rows:
    """Means over seeds by method and kind of label, and by strength if val did not choose one for each seed.

    ``metrics`` is as in the chapter on SAEs, with the ends of the intervals over images; ``less`` is the same of the
    main method minus this one.
    """
    groups: dict[tuple[Any, ...], Rows] = {}
    for row in rows:
        groups.setdefault((row["method"], row["labels"], None if chosen else row["strength"]), []).append(row)
    pooled = []
    for (method, labels, _), group in groups.items():
        columns = {**dict(zip(_METRICS, _METRICS, strict=True)), **_ENDS}
        known = {key: [row[column] for row in group if row.get(column) is not None] for key, column in columns.items()}
        ends = [_end(row, on_val) for row in group] if chosen else []
        pooled.append(
            {
                "method": method,
                "labels": labels,
                "strengths": sorted({row["strength"] for row in group}),
                "at_end": {end: ends.count(end) for end in ("largest", "smallest") if end in ends},
                "metrics": {key: mean_of_seeds(values) for key, values in known.items() if values},
                "less": _less(method, labels, against),
            }
        )
    return pooled


def _end(row: dict[str, Any], on_val: Rows) -> str:
    """Whether val chose the end of the grid of strengths."""
    key = ("sae", "method", "labels")
    return end_of_grid(row["strength"], (other["strength"] for other in on_val if all(other[k] == row[k] for k in key)))


def _less(control: str, labels: str, against: Rows) -> dict[str, dict[str, float]]:
    """The main method minus a control, mean over seeds; empty if they were not compared.

    Both have the same labels. Beside a control without labels stands the main method that does not know the true one.
    """
    kinds = (labels, "predicted") if labels == "none" else (labels,)
    lines = [line for line in against if line["control"] == control and line["labels"] in kinds]
    lines = [line for line in lines if line["method"] == lines[0]["method"]]
    return {key: mean_of_seeds([line[key] for line in lines]) for key in ("delta", "delta_lo", "delta_hi") if lines}


def _transfer(path: Path) -> dict[str, Any]:
    """VS2 on another data set: its rows with and without steering, and the gate's curve."""
    rows = {row["method"]: row for row in tables.read(path.with_suffix(".parquet"))}
    steered = rows.get("vs2") or rows["vs2-pass"]
    return {"unsteered": rows["none"], "steered": steered, **json.loads(path.read_text())}
