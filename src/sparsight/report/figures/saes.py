"""The figures of the chapter on SAEs. A row is a section, as in :mod:`sparsight.report.chapters.saes`."""

import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from sparsight.common import sites
from sparsight.config import Sae
from sparsight.report.comparisons import particulars
from sparsight.report.figures.svg import CYCLE, INK, QUIET, WIDTH, svg

_MARKERS = "osD^vPX*"
_WAYS = {"forced": "o", "unchained": "s", "online": "D"}


def training(folders: dict[str, Path], level: str, title: str) -> str:
    """FVU on the training batches; for few SAEs also levels of the test FVU (metric ``level``) and of PCA's FVU."""
    figure = Figure(figsize=(WIDTH, max(3, 0.2 * len(folders))), layout="constrained")
    axis, components = figure.subplots(), set()
    last: dict[str, float] = {}
    few = len(folders) <= len(CYCLE)  # more levels than colours are not readable; the table has all numbers
    for i, (name, folder) in enumerate(folders.items()):
        lines = [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]
        style: dict[str, Any] = {
            "color": _colour(i),
            "linestyle": ("-", "-.", (0, (1, 1)), (0, (5, 1)))[i // len(CYCLE) % 4],
        }
        if lines:  # none of an SAE of another tool
            last[name] = lines[-1]["fvu"]
            axis.plot(
                [line["epoch"] for line in lines], [line["fvu"] for line in lines], label=f"{name}, train", **style
            )
        if few:
            metrics = json.loads((folder / "metrics.json").read_text())
            axis.axhline(metrics[level], color=_colour(i), linestyle="--", linewidth=1)
            components.add(metrics["fvu_pca_k"])  # the same for all SAEs of one site and k
    for pca in sorted(components):
        axis.axhline(pca, color=QUIET, linestyle=":", linewidth=1)
    if few:
        axis.plot([], [], color=QUIET, linestyle=":", label="PCA with k components, test")
        axis.plot([], [], color=INK, linestyle="--", label="SAE, test")
    axis.set(yscale="log", xlabel="epoch", ylabel="FVU")
    _plain(axis.yaxis)
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return svg(figure, title, f"FVU on the last training batches, {_named(last) or 'of no SAE'}.")


def tradeoff(rows: list[dict[str, Any]]) -> str:
    """FVU against active latents and against the encoder's multiply-accumulates, for SAEs of one site."""
    figure = Figure(figsize=(WIDTH, 3.1), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    kinds_and_k = [(_kind(row["about"]), row["about"].k) for row in rows]
    kinds: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["about"].k):
        key = _kind(row["about"]), row["about"].k
        kinds.setdefault(key[0] if kinds_and_k.count(key) == 1 else row["name"], []).append(row)
    k_values = sorted({row["about"].k for row in rows})
    for i, (kind, group) in enumerate(kinds.items()):
        line = ("-", "--", ":")[i // len(CYCLE) % 3]
        _bars(left, [row["metrics"]["l0"]["mean"] for row in group], group, "fvu", label=kind, color=_colour(i),
              linestyle=line, marker=".")  # fmt: skip
        for row in group:
            marker = _MARKERS[k_values.index(row["about"].k) % len(_MARKERS)]
            _bars(right, [row["metrics"]["macs_encode"]["mean"]], [row], "fvu", color=_colour(i), marker=marker,
                  fillstyle="none" if line != "-" else "full", linestyle="")  # fmt: skip
    for k in k_values:
        marker = _MARKERS[k_values.index(k) % len(_MARKERS)]
        right.plot([], [], color=QUIET, marker=marker, linestyle="", label=f"k = {k}")
    left.set(xscale="log", yscale="log", xlabel="active latents (L0)", ylabel="FVU on test")
    right.set(xscale="log", xlabel="multiply-accumulates of the encoder, per activation")
    _plain(left.xaxis, left.yaxis, right.xaxis)
    right.legend()
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower left", ncols=4)
    site = rows[0]["about"].site
    return svg(figure, f"FVU against sparsity and cost, SAEs of {site}", f"FVU on test, {_said(rows, 'fvu')}.")


def depth(rows: list[dict[str, Any]]) -> str:
    """FVU, probing accuracy and accuracy with spliced reconstructions by block, for one kind of SAE at many sites.

    Without labels, the share of changed predictions instead of the accuracies.
    """
    titles = {"fvu": "FVU on test", "probing_sae_5": "accuracy of 5 latents a class",
              "accuracy_spliced": "accuracy, reconstruction in place",
              "changed_spliced": "changed predictions, reconstruction in place"}  # fmt: skip
    panels = {key: title for key, title in titles.items() if any(key in row["metrics"] for row in rows)}
    figure = Figure(figsize=(3.5 * len(panels), 3.2), layout="constrained")
    parts: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for row in rows:
        block, part = sites.parse(row["about"].site)
        if block is not None:
            parts.setdefault(part, []).append((block, row))
    for axis, (key, title) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for i, (part, points) in enumerate(parts.items()):
            shown = sorted(((b, row) for b, row in points if key in row["metrics"]), key=lambda point: point[0])
            _bars(axis, [b for b, _ in shown], [row for _, row in shown], key, label=part, color=_colour(i), marker=".")
        axis.set(xlabel="block", title=title)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower left", ncols=4)
    return svg(figure, f"{_kind(rows[0]['about'])}, by block", f"FVU on test, {_said(rows, 'fvu')}.")


def chains(rows: list[dict[str, Any]]) -> str:
    """Chains over the same sites: FVU of each activation, KL of the predictions, redundancy between layers."""
    figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
    by_site, by_way, by_kind = figure.subplots(1, 3)
    places, names = list(rows[0]["about"].sites), [row["name"] for row in rows]
    for i, row in enumerate(rows):
        for key, line in (("fvu", "-"), ("fvu_unchained", ":")):
            fvus = [row["sites"][site][key] for site in places]
            by_site.errorbar(range(len(places)), [m["mean"] for m in fvus], [m.get("half", 0) for m in fvus], capsize=2,
                             color=_colour(i), linestyle=line, label=row["name"] if line == "-" else None)  # fmt: skip
        for w, (way, marker) in enumerate(_WAYS.items()):
            if f"kl_{way}" in row["metrics"]:
                _bars(by_way, [i + 0.2 * (w - 1)], [row], f"kl_{way}", color=_colour(i), marker=marker)
        for key, marker in (("redundancy", "o"), ("redundancy_transported", "s"), ("redundancy_random", "x")):
            if key in row["metrics"]:
                _bars(by_kind, [i], [row], key, color=_colour(i), marker=marker)
    for way, marker in _WAYS.items():
        by_way.plot([], [], color=QUIET, marker=marker, linestyle="", label=way)
    for text, marker in (("as it is", "o"), ("taken along by the map", "s"), ("random", "x")):
        by_kind.plot([], [], color=QUIET, marker=marker, linestyle="", label=text)
    by_site.set(yscale="log", title="FVU (dotted: not chained*)")
    by_site.set_xticks(range(len(places)), places, rotation=30, ha="right")
    by_way.set(yscale="log", title="KL of the predictions (nats)")
    _plain(by_site.yaxis, by_way.yaxis)
    by_kind.set(title="redundancy with the decoder before")
    for axis in (by_way, by_kind):
        axis.set_xticks(range(len(rows)), names, rotation=30, ha="right")
        axis.legend()
    by_site.legend()
    said = f"FVU of all activations, {_said(rows, 'fvu')}."
    if "kl_online" in rows[0]["metrics"]:
        said += f" KL of the predictions with all sites replaced online, in nats, {_said(rows, 'kl_online')}."
    return svg(figure, f"Chains over {', '.join(places)}", said)


def _said(rows: list[dict[str, Any]], key: str) -> str:
    """A metric of each section, for the description."""
    return _named({row["name"]: row["metrics"][key]["mean"] for row in rows})


def _named(numbers: dict[str, float]) -> str:
    """Numbers with their names; of many the smallest and the largest."""
    order = sorted(numbers, key=lambda name: numbers[name])
    shown = numbers if len(numbers) <= 6 else [order[0], order[-1]]
    return "; ".join(f"{name}: {numbers[name]:.3g}" for name in shown)


def _bars(axis: Axes, x: list[float], rows: list[dict[str, Any]], key: str, **style: Any) -> None:
    """Means over seeds with their intervals."""
    metrics = [row["metrics"][key] for row in rows]
    axis.errorbar(x, [m["mean"] for m in metrics], [m.get("half", 0) for m in metrics], capsize=2, markersize=4,
                  linewidth=1, **style)  # fmt: skip


def _plain(*axes: Axis) -> None:
    """Label logarithmic axes with plain numbers where they span few powers of ten."""
    for axis in axes:
        low, high = axis.get_view_interval()
        if high > 100 * low:
            continue
        axis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
        axis.set_major_formatter("{x:,.10g}")
        axis.set_minor_formatter("{x:,.10g}")


def _kind(about: Sae) -> str:
    return ", ".join([about.kind, f"{about.d_sae:,} latents", *particulars(about)])


def _colour(i: int) -> str:
    return CYCLE[i % len(CYCLE)]
