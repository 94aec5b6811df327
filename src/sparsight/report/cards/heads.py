"""Does steering save heads? Heads kept and accuracy under class latents beside controls without the SAE."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from sparsight import config
from sparsight.common import tables
from sparsight.common.verdicts import Comparison, Measure, over_images, pooled
from sparsight.pruning.strategies import KINDS
from sparsight.report.cards.questions import ONE_SEED, Question, counted
from sparsight.report.grid import end_of_grid
from sparsight.report.summary import by_strategy

KEPT = Measure("share of the last block's heads kept", "points", 1, 100, lower_is_better=True)
AT_USAGE = Measure("accuracy at equal usage", "points", 1, 100)
EQUAL = 0.01  # largest difference of usages that is called equal
MAIN: config.Strategy = "class-latents"
CONTROLS: tuple[config.Strategy, ...] = (
    "random-latents", "random-sae", "logit-bias", "logit-bias-matched", "class-threshold", "class-static",
)  # fmt: skip
_NONE: config.Strategy = "none"
_ROUTES = {"probe": "a linear probe's labels", "predicted": "predicted labels"}


def ask(policies: Iterable[Path]) -> Question:
    """Each policy: heads kept at the chosen points, and accuracy at equal usage."""
    folders = [path.parent for path in policies]
    groups = [_policy(folder) for folder in folders]
    unanswered = ""
    if not folders:
        unanswered = "This run has no head policy."
    elif not any(groups):
        unanswered = f"{MAIN} is not among the strategies of this run's policies."
    return Question("Does steering save heads?", "pruning" if folders else "", groups, unanswered=unanswered)


def _policy(folder: Path) -> list[Comparison]:
    """Class latents with labels that they can have, those of the probe if there are any."""
    rows = by_strategy(tables.read(folder / "overall.parquet"))
    labels = next((name for name in _ROUTES if (MAIN, name) in rows), None)
    if labels is None:
        return []
    policy = _Policy(folder, rows, labels)
    kept = [policy.kept(control) for control in (_NONE, *CONTROLS) if policy.has(control)]
    matched = json.loads((folder / "metrics.json").read_text())["matched_usage"]
    at_usage = [row for row in matched if row["labels"] == labels and row["control"] in CONTROLS]
    return kept + [policy.at_usage(row) for row in at_usage]


class _Policy:
    """The rows of ``overall.parquet`` and of ``validation.parquet`` of a policy, for one kind of label."""

    def __init__(self, folder: Path, rows: dict[tuple[str, str], list[dict[str, Any]]], labels: str) -> None:
        self.name, self.labels, self._rows = folder.name, labels, rows
        self._on_val = by_strategy(tables.read(folder / "validation.parquet"))

    def has(self, strategy: config.Strategy) -> bool:
        return self._key(strategy) in self._rows

    def _key(self, strategy: config.Strategy) -> tuple[str, str]:
        return strategy, "none" if strategy == "none" else self.labels

    def _mean(self, strategy: config.Strategy, column: str) -> float:
        return float(np.mean([row[column] for row in self._rows[self._key(strategy)]]))

    def _says(self, usage: float, accuracy: float, end: str) -> str:
        """What class latents keep and how often they are right, followed by what a control does."""
        sae = self._rows[self._key(MAIN)][0]["sae"].rpartition("-s")[0]
        return (
            f"With {_ROUTES[self.labels]}, {MAIN} of {sae} keep {KEPT.level(usage)} of the last block's heads and are "
            f"right on {AT_USAGE.level(accuracy)} of the images, {end}"
        )

    @property
    def n(self) -> str:
        """Images and seeds."""
        rows = self._rows[self._key(MAIN)]
        return f"{counted(rows[0]['n'], 'image')}, {counted(len(rows), 'seed')}"

    def kept(self, control: config.Strategy) -> Comparison:
        """Heads kept at the points that val chose by one rule: the fewest at most the tolerance less accurate."""
        own, others = self._rows[self._key(MAIN)], self._rows[self._key(control)]
        by_sae = {row["sae"]: row["usage_last"] for row in others}
        differences = [row["usage_last"] - by_sae.get(row["sae"], others[0]["usage_last"]) for row in own]
        found = pooled(differences)
        value, other = (self._mean(strategy, "usage_last") for strategy in (MAIN, control))
        beside = "the unsteered policy" if control == "none" else control
        right, its = (self._mean(strategy, "accuracy") for strategy in (MAIN, control))
        says = self._says(value, right, f"{beside} {KEPT.level(other)} and {AT_USAGE.level(its)}")
        why = "" if found else ONE_SEED
        return Comparison(self.name, beside, KEPT, value, other, found, self.n, says, why, self._ends(control))

    def at_usage(self, row: dict[str, Any]) -> Comparison:
        """Accuracy beside that of a control at the same usage of heads or, if it has none, at the nearest."""
        control, usage, other = row["control"], row["usage"], row["usage_control"]
        equal = abs(usage - other) <= EQUAL
        at = "that usage" if equal else f"the nearest usage of {KEPT.level(other)}"
        end = f"{control} at {at} on {AT_USAGE.level(row['accuracy_control'])}"
        says = self._says(usage, row["accuracy"], end)
        found = over_images([(row["delta"], row["delta_lo"], row["delta_hi"])])
        values = row["accuracy"], row["accuracy_control"]
        why = "" if equal else f"they keep {KEPT.level(usage)} and {KEPT.level(other)} of the heads"
        return Comparison(self.name, control, AT_USAGE, *values, found, self.n, says, why, self._ends(control))

    def _ends(self, control: config.Strategy) -> tuple[str, ...]:
        """Choices at an end of their grid; a share of heads and a single latent are natural ends."""
        ends = []
        for strategy in (MAIN, control):
            kind, chosen = KINDS[strategy], self._rows[self._key(strategy)][0]
            texts = {"strength": f"strength {chosen['strength']:g}", "latents": f"{chosen['latents']} latents"}
            offered = ["strength"] * kind.grid.endswith("strengths") + ["latents"] * kind.counts
            for column in offered:
                end = end_of_grid(chosen[column], (row[column] for row in self._on_val[self._key(strategy)]))
                if end and (column, chosen[column]) != ("latents", 1):
                    ends.append(f"{strategy} ({texts[column]})")
        return tuple(ends)
