"""Write docs/papers.md, the papers' numbers beside ours: python docs/papers.py [record RUN...].

``record`` first copies the numbers of results/RUN into experiments/measured.json.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from entries import UNITS, Drawn, Entry, Table, figures, heading, read, record
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

* *ours*, and every column of a table without a paper's numbers, is the mean over SAE seeds on the test split, with the
  range over the seeds in brackets. All choices were made on val.
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
            name = heading(about)
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
    """The rows that have measured numbers: a line for each, or, beside no paper, for each kind of number."""
    entries = [entry for entry in entries if entry.experiment in measured]
    shown = {entry: entry.shown(measured[entry.experiment]["metrics"]) for entry in entries}
    columns = list(dict.fromkeys(entry.column for entry in entries))
    if any(entry.paper is not None for entry in entries):
        yield from _head("", "what", "unit", "paper", "ours", "difference")
        for entry, (mean, ours) in shown.items():
            digits = UNITS[entry.unit][1]
            paper = "" if entry.paper is None else f"{entry.paper:.{digits}f}"
            difference = "" if entry.paper is None else f"{mean - entry.paper:+.{digits}f}"
            yield _cells(entry.column, entry.what, entry.unit, paper, ours, difference)
    else:
        yield from _head("what", "unit", *(column or "ours" for column in columns))
        by_row: dict[tuple[str, str], dict[str, str]] = {}
        for entry, (_, ours) in shown.items():
            by_row.setdefault((entry.what, entry.unit), {})[entry.column] = ours
        for row, found in by_row.items():
            yield _cells(*row, *(found.get(column, "") for column in columns))


def _head(*names: str) -> Iterator[str]:
    yield _cells(*names)
    yield "|" + "---|" * len(names)


def _cells(*texts: str) -> str:
    return "| " + " | ".join(texts) + " |"


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
