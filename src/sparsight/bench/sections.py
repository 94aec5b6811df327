"""The SAEs of a finished run by section, with the sections that are their controls."""

import json
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from sparsight.common.errors import SparsightError

Metrics = dict[int, dict[str, Any]]
"""Numbers by seed."""


@dataclass(frozen=True)
class SaeSection:
    """A section of SAEs of one site, which differ in their seeds."""

    run: Path
    name: str
    metrics: Metrics
    """``metrics.json`` of every seed."""
    about: dict[str, Any]
    """``config.json`` of the first seed."""
    controls: dict[str, "SaeSection"] = field(default_factory=dict)
    """The sections that were trained as its controls, by what they are: ``frozen decoder``."""

    @property
    def control_of(self) -> str | None:
        """The section that this one is a control of."""
        parent: str | None = self.about["training"].get("control_of")
        return parent

    @cached_property
    def stability(self) -> dict[str, Any] | None:
        """How alike the seeds are; None for a single seed."""
        path = self.run / "saes" / f"{self.name}-stability.json"
        return json.loads(path.read_text())["sites"][self.about["site"]] if path.exists() else None

    @cached_property
    def localisation(self) -> Metrics:
        """Where its latents fire, by seed; empty if the images have no masks."""
        return self._by_seed(self.run / "localisation" / f"{self.name}.json")

    @cached_property
    def attribution(self) -> Metrics:
        """What its latents cause, by seed; empty if the run has no such section of it."""
        return self._first("attribution")

    @cached_property
    def spurious(self) -> Metrics:
        """Accuracy without the latents of a spurious feature, by seed; empty if the run has no such section of it."""
        return self._first("spurious")

    def _first(self, folder: str) -> Metrics:
        """The first result in a folder that is of this section's SAEs."""
        results = map(self._by_seed, sorted((self.run / folder).glob("*.json")))
        return next(filter(None, results), {})

    def _by_seed(self, path: Path) -> Metrics:
        """Numbers of this section's SAEs in a file that has them by folder."""
        of_saes = json.loads(path.read_text())["saes"] if path.exists() else {}
        names = {seed: f"{self.name}-s{seed}" for seed in self.metrics}
        return {seed: of_saes[name] for seed, name in names.items() if name in of_saes}


def sections_of(run: Path) -> tuple[list[SaeSection], list[str]]:
    """The sections of a finished run, without those that are controls, which stand in ``controls``.

    Returns:
        The sections, and the names of the chains, which are not among them.

    Raises:
        SparsightError: no such folder, or no evaluated SAE in it.
    """
    metrics: defaultdict[str, Metrics] = defaultdict(dict)
    abouts: dict[str, dict[str, Any]] = {}
    for path in sorted(run.glob("saes/*/metrics.json")):
        name, _, seed = path.parent.name.rpartition("-s")
        metrics[name][int(seed)] = json.loads(path.read_text())
        about = path.parent / "config.json"
        if name not in abouts and about.exists():  # a chain has one in the folder of each site
            abouts[name] = json.loads(about.read_text())
    if not metrics:
        raise SparsightError(f"{run}: no evaluated SAE here; give the folder of a finished run, results/<run>")
    found = {name: SaeSection(run, name, metrics[name], about) for name, about in abouts.items()}
    for name, section in found.items():
        if section.control_of in found:
            what = name.removeprefix(f"{section.control_of}-").replace("-", " ")
            found[section.control_of].controls[what] = section
    own = [section for section in found.values() if section.control_of not in found]
    return own, sorted(set(metrics) - set(abouts))
