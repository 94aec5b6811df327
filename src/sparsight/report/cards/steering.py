"""Does steering help? Accuracy of the steered model beside the unsteered one and steering without the SAE."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from sparsight.common import tables
from sparsight.common.verdicts import Comparison, Interval, Measure, pooled
from sparsight.report.cards.questions import Question, counted, sections
from sparsight.report.grid import end_of_grid

ACCURACY = Measure("accuracy when steered", "points", 1, 100)
_OWN = ("vs2", "class-latents")  # beginnings of the names of methods that use the SAE's latents


def ask(results: Iterable[Path], main: str | None) -> Question:
    """Each steering section, pooled over its seeds, the ``main`` one first."""
    by_section = sections(results)
    names = sorted(by_section, key=lambda name: name != main)
    groups = [_section(name, by_section[name]) for name in names]
    unanswered = ""
    if not names:
        unanswered = "This run has no steering."
    elif not any(groups):
        unanswered = (
            "No strength was chosen on val for want of labels or a classifier, so nothing says whether a change is "
            "right."
        )
    return Question("Does steering help?", "steering" if names else "", groups, unanswered=unanswered)


def _section(name: str, files: list[Path]) -> list[Comparison]:
    """The first method of a section, with labels that it can have, beside its controls; empty without accuracies."""
    seeds = [_Seed(path) for path in files]
    if not all(seed.summary["against_controls"] for seed in seeds):
        return []
    first = seeds[0]
    method = first.summary["chosen_on_val"][0]["method"]
    labels = next(row["labels"] for row in first.summary["chosen_on_val"] if row["labels"] != "oracle")
    key = method, labels
    lines = [line for line in first.summary["against_controls"] if (line["method"], line["labels"]) == key]
    controls = ["none", *(line["control"] for line in lines if not line["control"].startswith(_OWN))]
    return [_against(name, seeds, key, control) for control in controls]


class _Seed:
    """The files of a section's result for one seed."""

    def __init__(self, path: Path) -> None:
        rows = tables.read(path)
        self.summary: dict[str, Any] = json.loads(path.with_suffix(".json").read_text())
        self.on_val = [row for row in rows if row["split"] == "val"]
        self.on_test = {(row["method"], row["labels"]): row for row in rows if row["split"] == "test"}

    def row(self, method: str, labels: str) -> dict[str, Any]:
        """The row on test with these labels, or of a method without labels."""
        return self.on_test.get((method, labels)) or self.on_test[method, "none"]

    def difference(self, method: str, labels: str, control: str) -> Interval:
        """Paired on the images of test."""
        line = self.row(method, labels)
        if control != "none":
            keys = {"method": method, "labels": labels, "control": control}
            line = next(row for row in self.summary["against_controls"] if keys.items() <= row.items())
        return line["delta"], line["delta_lo"], line["delta_hi"]

    def strength(self, method: str, labels: str) -> tuple[float, str]:
        """The strength on test and, if val chose it at an end of several, which end."""
        row = self.row(method, labels)
        key = row["method"], row["labels"]
        tried = (r["strength"] for r in self.on_val if (r["method"], r["labels"]) == key)
        return row["strength"], end_of_grid(row["strength"], tried)


def _against(name: str, seeds: list[_Seed], key: tuple[str, str], control: str) -> Comparison:
    method, labels = key
    images = [seed.difference(method, labels, control) for seed in seeds]
    value, other = (float(np.mean([seed.row(of, labels)["accuracy"] for seed in seeds])) for of in (method, control))
    shown = f"{name if name == method else f'{name} ({method})'} of {seeds[0].summary['sae']}"
    read = " with predicted labels" if labels == "predicted" else ""
    beside = "the unsteered model" if control == "none" else control
    says = (
        f"Steered by {shown}{read} the model is right on {ACCURACY.level(value)} of the test images, "
        f"{'unsteered' if control == 'none' else f'by {control}'} on {ACCURACY.level(other)}"
    )
    ends = [_chosen(method, [seed.strength(method, labels) for seed in seeds])]
    if control != "none":
        ends.append(_chosen(control, [seed.strength(control, labels) for seed in seeds]))
    found = pooled([delta for delta, _, _ in images], images)
    n = f"{counted(seeds[0].row(method, labels)['n'], 'image')}, {counted(len(seeds), 'seed')}"
    subject = f"{name} (SAE {seeds[0].summary['sae']})"
    return Comparison(subject, beside, ACCURACY, value, other, found, n, says, ends=tuple(filter(None, ends)))


def _chosen(method: str, strengths: list[tuple[float, str]]) -> str:
    """The method with the strengths that val chose at the end of the grid; empty if it chose none there."""
    at_end = [strength for strength, end in strengths if end]
    if not at_end:
        return ""
    values = " and ".join(f"{strength:g}" for strength in sorted(set(at_end)))
    seeds = f", {len(at_end)} of {len(strengths)} seeds" if len(at_end) < len(strengths) else ""
    return f"{method} (strength {values}{seeds})"
