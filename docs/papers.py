"""Write docs/papers.md, the papers' numbers beside ours: python docs/papers.py [record RUN...].

``record`` first copies the numbers of results/RUN into experiments/measured.json.
"""

import hashlib
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml
from matplotlib.figure import Figure

from sparsight.common.errors import SparsightError
from sparsight.common.intervals import mean_of_seeds
from sparsight.report.figures.svg import CYCLE, QUIET, svg

ROOT = Path(__file__).parent.parent
PAPERS, MEASURED = ROOT / "experiments" / "papers.yaml", ROOT / "experiments" / "measured.json"
HEAD = """# The papers' numbers and ours

This page puts what the papers report beside what was measured here. It begins with the findings, a paragraph each: what
holds, what does not, at what size, against which control, and what would change our mind. Then come the tables, with a
longer answer below each. Experiments that nobody has run are listed at the end.

How to read the tables:

* *ours* is the mean over SAE seeds on the test split, with the range over the seeds in brackets. All choices were made
  on val.
* A change against a control is computed seed by seed. Its brackets hold the 95 % interval over seeds (Student's t).

`python docs/papers.py` writes this page from `experiments/papers.yaml` and, for our numbers,
`experiments/measured.json`. To add a run: `snakemake --cores 8 --configfile experiments/<experiment>.yaml`, then
`python docs/papers.py record <experiment>`.

Every number is of the commit that [Runs](#runs) names for its experiment. `steered-heads-cifar10` was run again after
three things changed that move numbers ([changelog](../CHANGELOG.md)): the warm-up of backbones and head policies, the
stream on which pruning fits its methods and controls, and the rows on which quantisation steps are chosen. Those on
Tiny-ImageNet and CUB, `coloured-digits` and `coloured-shapes` came after these changes. The others are older; the
second change concerns none of them.
"""
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
                raise SparsightError(f"{self.experiment}: {MEASURED.name} has no {key}; record the run again")
        own, *control = (list(matching(key, metrics).values()) for key in self.keys)
        factor = UNITS[self.unit][0]
        if not control:
            return [factor * value for value in own]
        return [factor * (a / b - 1 if self.over else a - b) for a, b in zip(own, control[0], strict=True)]


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
        ours.append(Table(_name(run), run["note"], entries, run.get("answer", "")))
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
        yield _name(system), tables


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


def _name(about: dict[str, Any]) -> str:
    """The heading of a system or of a study of our own."""
    if "system" in about:
        return f"{about['system']} ({about['paper']})"
    return str(about.get("title", about["experiment"]))


def _filled(key: str, column: dict[str, Any]) -> str:
    """A key with every <name> replaced by the column's value of that name."""
    for name, value in column.items():
        key = key.replace(f"<{name}>", str(value))
    return key


def page(papers: Any, measured: dict[str, Any]) -> str:
    """The text of docs/papers.md."""
    lines = [HEAD, *_findings(papers, measured), *_sections(papers, measured), *_runs(measured)]
    lines += _not_run(papers, measured)
    return "\n".join(lines).rstrip("\n") + "\n"


def _findings(papers: Any, measured: dict[str, Any]) -> Iterator[str]:
    """A paragraph for each paper and for each study of our own, with its figures; the papers first."""
    yield from ("## Findings", "")
    for about in (*papers["systems"], *papers["ours"]):
        if "finding" in about:
            name = _name(about)
            yield from (f"**{name}{'' if name.endswith('?') else '.'}** {about['finding'].strip()}", "")
        for figure in figures(about):
            if figure.measured(measured):
                yield from (f"![{figure.title}]({figure.name}.svg)", "")


def _sections(papers: Any, measured: dict[str, Any]) -> Iterator[str]:
    """The tables that have measured numbers."""
    for title, tables in read(papers):
        chosen = [table for table in tables if any(e.experiment in measured for e in table.entries)]
        if chosen:
            yield from (f"## {title}", "")
        for table in chosen:
            yield from (f"### {table.title}", "")
            yield from _table(table, measured)


def _not_run(papers: Any, measured: dict[str, Any]) -> Iterator[str]:
    """The experiments without measured numbers, each with the tables that it would fill."""
    later: dict[str, dict[str, list[str]]] = {}
    for title, tables in read(papers):
        for table in tables:
            for experiment in {entry.experiment: None for entry in table.entries if entry.experiment not in measured}:
                later.setdefault(experiment, {}).setdefault(title, []).append(table.title)
    if later:
        yield from ("## Experiments that nobody has run", "")
        yield from ("Their overlays are in `experiments/`, and the papers' numbers in `experiments/papers.yaml`.", "")
        for name, systems in sorted(later.items()):
            texts = (f"{title}: {', '.join(titles)}" for title, titles in systems.items())
            yield f"* `{name}`: {'; '.join(texts)}"
        yield ""


def draw(figure: Drawn, measured: dict[str, Any]) -> str:
    """The figure as SVG text."""
    sheet = Figure(figsize=(6.5, 3.4), layout="constrained")
    axis, said = sheet.subplots(), []
    for i, (name, points) in enumerate(figure.lines.items()):
        seeds = [entry.values(measured[entry.experiment]["metrics"]) for _, entry in points]
        means = [mean_of_seeds(values) for values in seeds]
        x, y, half = [x for x, _ in points], [m["mean"] for m in means], [m.get("half", 0.0) for m in means]
        colour, marker = CYCLE[i % len(CYCLE)], "osD^v"[i % 5]
        axis.errorbar(x, y, half, label=name, color=colour, marker=marker, markersize=4, capsize=2)
        said.append(f"{name}: {', '.join(f'{b:.4g} at {a:g}' for a, b in zip(x, y, strict=True))}")
    axis.set(xscale="log", yscale="log" if figure.log_y else "linear", xlabel=figure.x, ylabel=figure.y)
    ticks = sorted({x for points in figure.lines.values() for x, _ in points})
    axis.set_xticks(ticks, [f"{tick:,.4g}" if tick < 1e4 else f"{tick / 1e6:.3g} M" for tick in ticks], minor=False)
    axis.minorticks_off()
    if axis.get_ylim()[0] < 0 < axis.get_ylim()[1]:
        axis.axhline(0, color=QUIET, linewidth=1)
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return svg(sheet, figure.title, "; ".join(said) + ".")


def _table(table: Table, measured: dict[str, Any]) -> Iterator[str]:
    """A table with its note above, its answer and the intervals of head policies below."""
    experiments = list(dict.fromkeys(entry.experiment for entry in table.entries))
    names = ", ".join(f"`{name}`" for name in experiments)
    yield from (f"{table.note} Experiment{'s' * (len(experiments) > 1)}: {names}.".strip(), "")
    yield from _lines(table.entries, measured)
    yield ""
    if table.answer:
        yield from (table.answer.strip(), "")
    for name in experiments:
        yield from _steered_heads(measured.get(name, {}).get("pruning", {}))


def _runs(measured: dict[str, Any]) -> Iterator[str]:
    """Of which commit the measured numbers are, and over how many images."""
    yield from ("## Runs", "", "*Data*: sha256 of the manifest, which has the digest of every image.", "")
    yield from ("| experiment | commit | test images | data |", "|---|---|---|---|")
    for name, run in sorted(measured.items()):
        others = "".join(f", {other} {n:,}" for other, n in sorted(run["n_other"].items()))
        yield f"| {name} | {run['commit']} | {run['n']:,}{others} | {run.get('data', '')[:16]} |"
    if not measured:
        yield "| none yet | | | |"
    yield ""


def _lines(entries: list[Entry], measured: dict[str, Any]) -> Iterator[str]:
    """The rows that have measured numbers."""
    columns = any(entry.column for entry in entries)
    compared = any(entry.paper is not None for entry in entries)
    head = [*([""] if columns else []), "what", "unit", *(["paper", "ours", "difference"] if compared else ["ours"])]
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for entry in entries:
        if entry.experiment not in measured:
            continue
        digits, values = UNITS[entry.unit][1], entry.values(measured[entry.experiment]["metrics"])
        mean = sum(values) / len(values)
        ours = f"{mean:.{digits}f}"
        if len(values) > 1:
            half = mean_of_seeds(values)["half"]
            ends = (mean - half, mean + half) if len(entry.keys) > 1 else (min(values), max(values))
            ours += f" ({ends[0]:.{digits}f} to {ends[1]:.{digits}f})"
        cells = [entry.column, entry.what, entry.unit] if columns else [entry.what, entry.unit]
        paper = "" if entry.paper is None else f"{entry.paper:.{digits}f}"
        difference = "" if entry.paper is None else f"{mean - entry.paper:+.{digits}f}"
        cells += [paper, ours, difference] if compared else [ours]
        yield "| " + " | ".join(cells) + " |"


def _steered_heads(policies: dict[str, Any]) -> Iterator[str]:
    """How class latents change every head policy of a run, with intervals."""
    for name, found in policies.items():
        yield f"Policy `{name}`, on all test images; settings chosen on val. *Lost at most*: one-sided 95 % bound."
        yield from (
            "",
            "| labels | heads kept | unsteered | accuracy, points | lost at most |",
            "|---|---|---|---|---|",
        )
        for row in found["against_none"]:
            cells = [row["labels"], f"{row['usage_last']:.3f}", f"{found['usage_none']:.3f}", _points(row)]
            yield "| " + " | ".join([*cells, f"{100 * row['loss_bound']:.2f}"]) + " |"
        yield from ("", "Steering only the classes whose usage a strategy halves on val without loss there:", "")
        yield "| strategy | labels | classes | heads kept | accuracy, points | lost at most |"
        yield "|---|---|---|---|---|---|"
        for row in found["selected_classes"]:
            cells = [row["strategy"], row["labels"], str(row["classes_selected"]), f"{row['usage_last']:.3f}"]
            yield "| " + " | ".join([*cells, _points(row), f"{100 * row['loss_bound']:.2f}"]) + " |"
        yield from (
            "",
            "Class latents minus a control, at the same share of heads or the nearest that the control reaches:",
            "",
        )
        yield "| control | labels | heads kept | control's heads | class latents minus control, points |"
        yield "|---|---|---|---|---|"
        for row in found["matched_usage"]:
            cells = [row["control"], row["labels"], f"{row['usage']:.3f}", f"{row['usage_control']:.3f}"]
            yield "| " + " | ".join([*cells, _points(row)]) + " |"
        yield ""


def _points(row: dict[str, Any]) -> str:
    return f"{100 * row['delta']:+.2f} ({100 * row['delta_lo']:+.2f} to {100 * row['delta_hi']:+.2f})"


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
    """The numbers of every head policy that :func:`_steered_heads` shows."""
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


def main(words: list[str]) -> None:
    """The command line."""
    papers, measured = yaml.safe_load(PAPERS.read_text()), json.loads(MEASURED.read_text())
    if words:
        if words[0] != "record" or not words[1:]:
            raise SparsightError("usage: python docs/papers.py [record RUN...]")
        measured |= {run: record(run, ROOT / "results" / run, papers) for run in words[1:]}
        MEASURED.write_text(json.dumps(measured, indent=1, sort_keys=True) + "\n")
    (ROOT / "docs" / "papers.md").write_text(page(papers, measured))
    for about in (*papers["systems"], *papers["ours"]):
        for figure in figures(about):
            if figure.measured(measured):
                (ROOT / "docs" / f"{figure.name}.svg").write_text(draw(figure, measured))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except SparsightError as error:
        sys.exit(f"error: {error}")
