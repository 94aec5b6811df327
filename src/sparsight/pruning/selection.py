"""Choices on val among rows: targets, strengths and frontiers.

Shapes: N images.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sparsight import config
from sparsight.pruning.outcomes import Outcome
from sparsight.pruning.strategies import NONE, Row


def pick_targets(
    found: Iterable[tuple[Row, Outcome]], none: Outcome, tolerance: float
) -> tuple[dict[Row, Outcome], list[tuple[Row, float, float]]]:
    """Among rows that differ only in their target, keep the one that :func:`rank` puts first.

    Returns:
        The kept rows with their outcomes, and every row with a target, with its accuracy and usage.
    """
    kept: dict[Row, tuple[Row, Outcome]] = {}
    tried = []
    for row, outcome in found:
        if row.target >= 0:
            tried.append((row, float(outcome.hits.mean()), float(outcome.usage.mean())))
        unit = row._replace(target=-1)
        floor = none.hits.mean() - tolerance
        if unit not in kept or _rank(outcome, floor) < _rank(kept[unit][1], floor):
            kept[unit] = row, outcome
    return dict(kept.values()), tried


def _rank(outcome: Outcome, floor: float) -> tuple[bool, float, float]:
    return rank(float(outcome.hits.mean()), float(outcome.usage.mean()), floor)


def rank(accuracy: float, usage: float, floor: float) -> tuple[bool, float, float]:
    """Sort key of every choice on val; the smallest is chosen.

    That is the candidate with the least usage among those at least as accurate as ``floor``. If there is none, it is
    the most accurate one.
    """
    refused = accuracy < floor - 1e-9
    return (refused, -accuracy, usage) if refused else (refused, usage, -accuracy)


class Point(NamedTuple):
    """A strategy at one strength and number of latents, as the mean over SAEs."""

    strategy: config.Strategy
    labels: str
    strength: float
    latents: int
    rows: tuple[Row, ...]
    """One row for each SAE; targets may differ."""

    def hits(self, outcomes: dict[Row, Outcome]) -> np.ndarray:
        """(N,) shares of the SAEs with which an image is classified correctly."""
        return np.mean([outcomes[row].hits for row in self.rows], axis=0)

    def usage(self, outcomes: dict[Row, Outcome]) -> np.ndarray:
        """(N,) shares of the last block's heads that are kept, mean over SAEs."""
        return np.mean([outcomes[row].usage for row in self.rows], axis=0)


def points(outcomes: Iterable[Row]) -> dict[tuple[str, str], list[Point]]:
    """Every point by (strategy, labels)."""
    groups: dict[tuple[str, str, float, int], list[Row]] = {}
    for row in outcomes:
        groups.setdefault((row.strategy, row.labels, row.strength, row.latents), []).append(row)
    by_key: dict[tuple[str, str], list[Point]] = {}
    for rows in groups.values():
        first = rows[0]
        point = Point(first.strategy, first.labels, first.strength, first.latents, tuple(sorted(rows)))
        by_key.setdefault((first.strategy, first.labels), []).append(point)
    return by_key


def choose(candidates: list[Point], outcomes: dict[Row, Outcome], tolerance: float) -> Point:
    """The point that :func:`rank` puts first. Ties go to the weaker strength, then to fewer latents."""
    floor = float(outcomes[NONE].hits.mean()) - tolerance

    def order(point: Point) -> tuple[tuple[bool, float, float], float, int]:
        accuracy, usage = float(point.hits(outcomes).mean()), float(point.usage(outcomes).mean())
        return rank(accuracy, usage, floor), point.strength, point.latents

    return min(candidates, key=order)


def frontier(candidates: list[Point], outcomes: dict[Row, Outcome]) -> list[Point]:
    """The points that no other point beats in both usage and accuracy, by rising usage.

    ``none`` is always among the candidates, because every strategy leaves the choice not to steer.
    """
    none = Point("none", "none", 1.0, 0, (NONE,))
    all_points = [p for p in candidates if p.rows != (NONE,)] + [none]
    measured = sorted(
        (float(p.usage(outcomes).mean()), -float(p.hits(outcomes).mean()), p.strength, p.latents, p) for p in all_points
    )
    best = -1.0
    kept: list[Point] = []
    for _, minus_accuracy, _, _, point in measured:
        if -minus_accuracy > best + 1e-12:
            best, kept = -minus_accuracy, [*kept, point]
    return kept


@dataclass(frozen=True)
class AtUsage:
    """A frontier at a usage between two of its points: every image gets the mask of one of them at random."""

    hits: np.ndarray
    """(N,) expected hits."""
    usage: float
    lower: Point
    upper: Point
    weight: float
    """Probability of the upper point."""


def at_usage(line: list[Point], outcomes: dict[Row, Outcome], usage: float) -> AtUsage:
    """A frontier chosen on val, evaluated on another split at a given usage.

    If the frontier does not reach the usage, its nearest end is used. The weights match the usage on this split, which
    needs no labels.
    """
    by_usage = sorted((float(point.usage(outcomes).mean()), i) for i, point in enumerate(line))
    usages = [value for value, _ in by_usage]
    upper = min(int(np.searchsorted(usages, usage)), len(line) - 1)
    lower = max(upper - 1, 0) if usages[upper] > usage else upper
    gap = usages[upper] - usages[lower]
    weight = float(np.clip((usage - usages[lower]) / gap, 0, 1)) if gap > 0 else 1.0
    a, b = line[by_usage[lower][1]], line[by_usage[upper][1]]
    hits = (1 - weight) * a.hits(outcomes) + weight * b.hits(outcomes)
    return AtUsage(hits, usages[lower] + weight * gap, a, b, weight)
