"""The choices that validation makes among rows: targets, strengths, frontiers.

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
    """Of rows that differ in their target alone, the one that :func:`better` puts first.

    Returns:
        The rows that are left, and every row that has a target with its accuracy and usage.
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
    """The rule of every choice on val: the least usage among what is at least as accurate as ``floor``.

    If nothing is, the most accurate. Smaller ranks first.
    """
    refused = accuracy < floor - 1e-9
    return (refused, -accuracy, usage) if refused else (refused, usage, -accuracy)


class Point(NamedTuple):
    """A strategy at one strength and number of latents: the mean over SAEs."""

    strategy: config.Strategy
    labels: str
    strength: float
    latents: int
    rows: tuple[Row, ...]
    """One for each SAE; they may differ in their targets."""

    def hits(self, outcomes: dict[Row, Outcome]) -> np.ndarray:
        """(N,) shares of the SAEs with which an image is classified correctly."""
        return np.mean([outcomes[row].hits for row in self.rows], axis=0)

    def usage(self, outcomes: dict[Row, Outcome]) -> np.ndarray:
        """(N,) mean share of the last block's heads."""
        return np.mean([outcomes[row].usage for row in self.rows], axis=0)


def points(outcomes: Iterable[Row]) -> dict[tuple[str, str], list[Point]]:
    """Every point by (strategy, labels)."""
    groups: dict[tuple[str, str, float, int], list[Row]] = {}
    for row in outcomes:
        groups.setdefault((row.strategy, row.labels, row.strength, row.latents), []).append(row)
    found: dict[tuple[str, str], list[Point]] = {}
    for rows in groups.values():
        first = rows[0]
        point = Point(first.strategy, first.labels, first.strength, first.latents, tuple(sorted(rows)))
        found.setdefault((first.strategy, first.labels), []).append(point)
    return found


def choose(candidates: list[Point], outcomes: dict[Row, Outcome], tolerance: float) -> Point:
    """The point that :func:`rank` puts first; ties go to the weaker strength, then to fewer latents."""
    floor = float(outcomes[NONE].hits.mean()) - tolerance

    def order(point: Point) -> tuple[tuple[bool, float, float], float, int]:
        accuracy, usage = float(point.hits(outcomes).mean()), float(point.usage(outcomes).mean())
        return rank(accuracy, usage, floor), point.strength, point.latents

    return min(candidates, key=order)


def frontier(candidates: list[Point], outcomes: dict[Row, Outcome]) -> list[Point]:
    """The points that no other beats in usage and accuracy at once, by rising usage.

    Not steering is a choice that every strategy leaves open, so ``none`` is among the candidates.
    """
    none = Point("none", "none", 1.0, 0, (NONE,))
    every = [p for p in candidates if p.rows != (NONE,)] + [none]
    measured = sorted(
        (float(p.usage(outcomes).mean()), -float(p.hits(outcomes).mean()), p.strength, p.latents, p) for p in every
    )
    best = -1.0
    left: list[Point] = []
    for _, minus_accuracy, _, _, point in measured:
        if -minus_accuracy > best + 1e-12:
            best, left = -minus_accuracy, [*left, point]
    return left


@dataclass(frozen=True)
class AtUsage:
    """A frontier at a usage between two of its points: every image gets one of two masks by the toss of a coin."""

    hits: np.ndarray
    """(N,) expected."""
    usage: float
    lower: Point
    upper: Point
    weight: float
    """Probability of the upper point."""


def at_usage(line: list[Point], outcomes: dict[Row, Outcome], usage: float) -> AtUsage:
    """A frontier of val on another split, at a given usage; at its end where it does not reach so far.

    The weights match the usage of this split, which needs no labels; which points are on the frontier is
    decided on val.
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
