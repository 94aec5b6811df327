"""The numbers of docs/papers.md: which metrics of which runs experiments/papers.yaml asks for, and what a run has.

experiments/measured.json keeps those of the recorded runs.
"""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from sparsight.common.errors import SparsightError
from sparsight.common.intervals import mean_of_seeds

UNITS = {"%": (100, 2), "share": (1, 4), "points": (100, 2), "cosine": (1, 3), "nats": (1, 4)}
"""Per unit, the factor on a metric and the digits shown."""


@dataclass(frozen=True)
class Entry:
    """One number: what it is, where it comes from, what the paper says."""

    experiment: str
    what: str
    metric: str
    """Key of ``metrics.json``; * stands for the seeds."""
    unit: str
    column: str = ""
    """Data set or model, where an experiment or a table has several."""
    paper: float | None = None
    over: str = ""
    """Key of a control; the relative change against it is shown."""
    minus: str = ""
    """Key of a control; the difference to it is shown."""

    @property
    def keys(self) -> list[str]:
        """All keys to read from ``metrics.json``."""
        return [key for key in (self.metric, self.over, self.minus) if key]

    def values(self, metrics: dict[str, float]) -> list[float]:
        """One value per seed, in the unit shown.

        Raises:
            SparsightError: a metric was not recorded.
        """
        for key in self.keys:
            if not matching(key, metrics):
                raise SparsightError(f"{self.experiment}: measured.json has no {key}; record the run again")
        own, *control = (list(matching(key, metrics).values()) for key in self.keys)
        factor = UNITS[self.unit][0]
        if not control:
            return [factor * value for value in own]
        return [factor * (a / b - 1 if self.over else a - b) for a, b in zip(own, control[0], strict=True)]

    def shown(self, metrics: dict[str, float]) -> tuple[float, str]:
        """Mean over seeds, and its text with the range of the seeds or, of a change, with its 95 % interval."""
        digits, values = UNITS[self.unit][1], self.values(metrics)
        mean = sum(values) / len(values)
        text = f"{mean:.{digits}f}"
        if len(values) > 1:
            half = mean_of_seeds(values)["half"]
            ends = (mean - half, mean + half) if len(self.keys) > 1 else (min(values), max(values))
            text += f" ({ends[0]:.{digits}f} to {ends[1]:.{digits}f})"
        return mean, text


@dataclass(frozen=True)
class Drawn:
    """A figure of measured numbers: means over seeds with 95 % intervals (Student's t) against a setting."""

    name: str
    title: str
    x: str
    y: str
    lines: dict[str, list[tuple[float, Entry]]]
    """By name, the points: a setting and its number."""
    log_y: bool = False

    def measured(self, measured: dict[str, Any]) -> bool:
        """Whether all of its numbers are recorded."""
        return all(entry.experiment in measured for points in self.lines.values() for _, entry in points)


@dataclass(frozen=True)
class Table:
    """A table of a paper, or the numbers of a study of our own."""

    title: str
    note: str = ""
    entries: list[Entry] = field(default_factory=list)
    answer: str = ""
    """In plain words, what our numbers say about the paper's claim."""


def read(papers: Any) -> Iterator[tuple[str, list[Table]]]:
    """Every section of the page with its tables, ours first; ``papers`` is the content of papers.yaml."""
    ours = []
    for run in papers["ours"]:
        entries = [Entry(experiment=run["experiment"], **row) for row in run["rows"]]
        ours.append(Table(heading(run), run["note"], entries, run.get("answer", "")))
    yield "Our own studies, without a paper's numbers", ours
    for system in papers["systems"]:
        tables = []
        for table in system["tables"]:
            found = Table(table["title"], table.get("note", ""), answer=table.get("answer", ""))
            for i, column in enumerate(table["columns"]):
                for row in table["rows"]:
                    paper = row["paper"][i] if "paper" in row else None
                    found.entries.append(_entry(table, row, column, paper))
            tables.append(found)
        yield heading(system), tables


def figures(about: dict[str, Any]) -> Iterator[Drawn]:
    """The figures of a system or of a study of our own."""
    for figure in about.get("figures", []):
        lines = {
            line["what"]: [(column["x"], _entry(figure, line, column)) for column in figure["columns"]]
            for line in figure["lines"]
        }
        kept = {key: figure[key] for key in ("name", "title", "x", "y", "log_y") if key in figure}
        yield Drawn(lines=lines, **kept)


def every_entry(papers: Any) -> Iterator[Entry]:
    """The numbers of all tables and figures."""
    for _, tables in read(papers):
        for table in tables:
            yield from table.entries
    for about in (*papers["systems"], *papers["ours"]):
        for figure in figures(about):
            for points in figure.lines.values():
                yield from (entry for _, entry in points)


def _entry(about: dict[str, Any], row: dict[str, Any], column: dict[str, Any], paper: float | None = None) -> Entry:
    """The number of one row (of a table) or line (of a figure) in one column."""
    keys = {key: _filled(row.get(key, ""), column) for key in ("metric", "over", "minus")}
    unit, name = row.get("unit", about["unit"]), column.get("name", "")
    return Entry(column["experiment"], row["what"], unit=unit, column=name, paper=paper, **keys)


def heading(about: dict[str, Any]) -> str:
    """The heading of a system or of a study of our own."""
    if "system" in about:
        return f"{about['system']} ({about['paper']})"
    return str(about.get("title", about["experiment"]))


def _filled(key: str, column: dict[str, Any]) -> str:
    """A key with every <name> replaced by the column's value of that name."""
    for name, value in column.items():
        key = key.replace(f"<{name}>", str(value))
    return key


def matching(metric: str, metrics: dict[str, float]) -> dict[str, float]:
    """The metrics that a key names, one per seed if it has a *."""
    pattern = re.compile(re.escape(metric).replace(r"\*", r"\d+"))
    return {key: value for key, value in metrics.items() if pattern.fullmatch(key)}


def record(run: str, folder: Path, papers: Any) -> dict[str, Any]:
    """The entry of a run in measured.json: commit, number of test images, the metrics that papers.yaml names.

    Raises:
        SparsightError: a run that papers.yaml does not name, that is not finished, or that lacks a metric.
    """
    entries = [entry for entry in every_entry(papers) if entry.experiment == run]
    named = {key for entry in entries for key in entry.keys}
    if not named:
        raise SparsightError(f"{run}: experiments/papers.yaml does not name this experiment; add it there")
    try:
        metrics = json.loads((folder / "metrics.json").read_text())
        commit = json.loads((folder / "provenance.json").read_text())["commit"]
    except OSError as error:
        raise SparsightError(f"{error.filename}: {error.strerror}; let the run finish first") from None
    kept: dict[str, float] = {}
    for metric in sorted(named):
        found = matching(metric, metrics)
        if not found:
            raise SparsightError(f"{folder / 'metrics.json'}: has no {metric}; mend experiments/papers.yaml")
        kept |= found
    return {
        "commit": commit,
        "data": hashlib.sha256((folder / "images" / "manifest.parquet").read_bytes()).hexdigest(),
        "n": _test_images(folder / "images" / "manifest.parquet"),
        "n_other": {path.parent.name: _test_images(path) for path in (folder / "images").glob("*/manifest.parquet")},
        "metrics": kept,
        **({"pruning": pruning} if (pruning := _pruning(folder)) else {}),
    }


def _pruning(folder: Path) -> dict[str, Any]:
    """The numbers of every head policy that the page shows."""
    columns = (
        "strategy",
        "labels",
        "control",
        "usage",
        "usage_control",
        "usage_last",
        "classes_selected",
        "loss_bound",
    )
    shown = (*columns, "delta", "delta_lo", "delta_hi")
    kept = {}
    for path in sorted(folder.glob("pruning/*/metrics.json")):
        metrics = json.loads(path.read_text())
        tables = {
            name: [{key: row[key] for key in shown if key in row} for row in metrics[name]]
            for name in ("against_none", "selected_classes", "matched_usage")
        }
        tables["against_none"] = [row for row in tables["against_none"] if row["strategy"] == "class-latents"]
        kept[path.parent.name] = {"usage_none": metrics["policy"]["usage_last"], **tables}
    return kept


def _test_images(manifest: Path) -> int:
    return int(pc.sum(pc.equal(pq.read_table(manifest, columns=["split"])["split"], "test")).as_py())
