"""What a card asks, and the SAE that it asks about."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sparsight.common import tables
from sparsight.common.verdicts import Comparison, Interval, Measure, pooled, unpaired
from sparsight.report.main_section import main_section


@dataclass(frozen=True)
class Question:
    """A question with the comparisons that answer it."""

    title: str
    chapter: str
    """The section of the page with the tables."""
    groups: list[list[Comparison]]
    """By subject, the card's own first; the least favourable comparison of each is shown."""
    facts: list[str] = field(default_factory=list)
    """Sentences that no verdict is about."""
    unanswered: str = ""
    """Why the run has no answer, if it has none."""


@dataclass(frozen=True)
class MainSae:
    """A section of SAEs. Of a chain, those of its last site."""

    name: str
    folders: list[Path]
    """One for each seed."""
    metrics: list[dict[str, Any]]
    """``metrics.json`` of each seed."""
    about: dict[str, Any]
    """``config.json`` of the first."""

    @property
    def seeds(self) -> str:
        """The number of seeds in words."""
        return counted(len(self.folders), "seed")

    def mean(self, key: str) -> float:
        """Mean of a metric over the seeds."""
        return float(np.mean([metrics[key] for metrics in self.metrics]))

    @property
    def reconstruction_only(self) -> bool:
        """Whether nothing but the reconstruction was measured (``metrics: reconstruction``)."""
        return not self.has("bits")

    def has(self, key: str) -> bool:
        """Whether every seed has a metric."""
        return all(key in metrics for metrics in self.metrics)

    def against(
        self, measure: Measure, keys: tuple[str, str], control: str, n: str, says: str, images: Sequence[Interval] = ()
    ) -> Comparison:
        """A comparison of two metrics of ``metrics.json``.

        Args:
            measure: what they measure.
            keys: that of the SAE and that of the control.
            control: name of the control.
            n: number of rows in words.
            says: the clause, with ``{}`` for each of the two values.
            images: for each seed the difference with its interval over images, if known.
        """
        differences = [metrics[keys[0]] - metrics[keys[1]] for metrics in self.metrics]
        value, control_value = (self.mean(key) for key in keys)
        found = pooled(differences, images)
        clause = says.format(measure.level(value), measure.level(control_value))
        n = f"{n}, {self.seeds}"
        return Comparison(
            self.name, control, measure, value, control_value, found, n, clause, "" if found else ONE_SEED
        )


ONE_SEED = "one seed says nothing about another; give the section more seeds"


def main_sae(inputs: dict[str, Any]) -> MainSae | None:
    """The SAE that the first screen is about: that which steers, else the first section; None without any."""
    run = json.loads(inputs["configuration"].read_text())
    by_name = sections(path.parent for path in inputs["saes"])
    if (name := main_section(run)) in by_name:
        return _loaded(name, by_name[name])
    if by_name:
        return _loaded(*next(iter(by_name.items())))
    for name, folders in sections(path.parent for path in inputs["chains"]).items():
        site = json.loads(next(folders[0].glob("*/config.json")).read_text())["training"]["sites"][-1]
        return _loaded(name, [folder / site for folder in folders])
    return None


def sections(folders: Iterable[Path]) -> dict[str, list[Path]]:
    """Folders or files ``<section>-s<seed>`` by section."""
    grouped: dict[str, list[Path]] = {}
    for folder in folders:
        grouped.setdefault(folder.name.rpartition("-s")[0], []).append(folder)
    return grouped


def probes(folder: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """The rows of ``probing.parquet`` by method and number of features."""
    return {(row["method"], row["features"]): row for row in tables.read(folder / "probing.parquet")}


def of_probes(one: dict[str, Any], other: dict[str, Any]) -> Interval:
    """The difference of two probes' accuracies."""
    return unpaired(*((row["accuracy"], row["lo"], row["hi"]) for row in (one, other)))


def counted(n: int, thing: str) -> str:
    """A number of things in words."""
    return f"{n:,} {thing}{'' if n == 1 else 's'}"


def _loaded(name: str, folders: list[Path]) -> MainSae:
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in folders]
    return MainSae(name, folders, metrics, json.loads((folders[0] / "config.json").read_text()))
