"""The chapter on SAEs and chains, by section, with the seeds of a section averaged."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sparsight.common.intervals import mean_of_seeds
from sparsight.config import Sae
from sparsight.report.comparisons import comparisons, particulars
from sparsight.report.figures import saes as figures

Metrics = dict[str, dict[str, float]]
"""For each metric that every seed has, its mean over seeds (see :func:`mean_of_seeds`)."""


def chapter(saes: Iterable[Path], chains: Iterable[Path], stabilities: Iterable[Path]) -> dict[str, Any]:
    """The chapter's numbers and figures.

    Args:
        saes: folders of SAEs.
        chains: folders of chains.
        stabilities: ``<section>-stability.json``.
    """
    singles, chained = _sections(saes), _sections(chains)
    sections = {row["name"]: row for row in (*singles, *chained)}
    drawn = {}
    if singles:
        firsts = {row["folders"][0].name: row["folders"][0] for row in singles}
        drawn["saes"] = figures.training(firsts, "fvu", "FVU of the SAEs during training")
    for row in chained:
        first = row["folders"][0]
        folders = {site: first / site for site in row["sites"]}
        title = f"FVU of each SAE of {row['name']} during training"
        drawn[f"chain-{row['name']}"] = figures.training(folders, "fvu_residual", title)
    for comparison in comparisons({name: row["about"] for name, row in sections.items()}):
        draw = {"tradeoff": figures.tradeoff, "depth": figures.depth, "chains": figures.chains}[comparison.kind]
        drawn[f"{comparison.kind}-{comparison.name}"] = draw([sections[name] for name in comparison.members])
    return {
        "sections": singles,
        "chains": chained,
        "stabilities": [row for path in stabilities for row in _stability(path)],
        "known": {key for row in sections.values() for metrics in _of_row(row) for key in metrics},
        "figures": drawn,
    }


def _sections(folders: Iterable[Path]) -> list[dict[str, Any]]:
    """One row per section: its settings and metrics, for a chain also by site."""
    grouped: dict[str, list[Path]] = {}
    for folder in folders:
        grouped.setdefault(folder.name.rpartition("-s")[0], []).append(folder)
    rows = []
    for name, seeds in grouped.items():
        config = next(path for path in (seeds[0] / "config.json", *seeds[0].glob("*/config.json")) if path.is_file())
        section = Sae.recorded(json.loads(config.read_text())["training"])
        row = {"name": name, "about": section, "folders": seeds, "metrics": _over_seeds(seeds)}
        row["particulars"] = particulars(section)
        row["judge"] = _judge(seeds[0])
        if section.sites:
            row["sites"] = {site: _over_seeds([folder / site for folder in seeds]) for site in section.sites}
        rows.append(row)
    return rows


def _judge(folder: Path) -> str | None:
    """The other backbone by which the images of an SAE, or of a chain's, were compared."""
    files = (path for path in (folder / "metrics.json", *folder.glob("*/metrics.json")) if path.is_file())
    return next((about["judge"] for about in map(json.loads, map(Path.read_text, files)) if "judge" in about), None)


def _of_row(row: dict[str, Any]) -> list[Metrics]:
    """The metrics of a section and, of a chain, of its sites."""
    return [row["metrics"], *row.get("sites", {}).values()]


def _over_seeds(folders: list[Path]) -> Metrics:
    runs = [json.loads((folder / "metrics.json").read_text()) for folder in folders]
    keys = [key for key, value in runs[0].items() if isinstance(value, int | float)]
    return {key: mean_of_seeds([run[key] for run in runs]) for key in keys if all(key in run for run in runs)}


def _stability(path: Path) -> list[dict[str, Any]]:
    """One row per site: how well the features of a section's seeds match."""
    name, sites = path.stem.removesuffix("-stability"), json.loads(path.read_text())["sites"]
    return [{"name": name, "site": site, **metrics} for site, metrics in sites.items()]
