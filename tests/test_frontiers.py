"""How strengths are chosen, and how strategies are compared at equal usage."""

import numpy as np
import pytest

from sparsight.pruning import comparisons
from sparsight.pruning.outcomes import Outcome
from sparsight.pruning.selection import at_usage, choose, frontier, pick_targets, points
from sparsight.pruning.strategies import NONE, Row


def outcome(hits: float, kept: float) -> Outcome:
    codes = np.where(np.arange(100) < 100 * kept, 63, 0).astype(np.int32)
    right = np.arange(100) < 100 * hits
    return Outcome(right.astype(int), right, codes, np.bitwise_count(codes) / 6)


def test_strength_is_the_one_with_least_usage_among_those_that_keep_accuracy() -> None:
    found = {NONE: outcome(0.9, 0.7)}
    for strength, hits, kept in ((1.5, 0.9, 0.6), (3, 0.89, 0.4), (5, 0.91, 0.4), (10, 0.80, 0.1)):
        for name, change in (("a", 0.01), ("b", -0.01)):  # two SAEs count as their mean
            found[Row("class-latents", strength, "oracle", name, 5)] = outcome(hits + change, kept)
    found[Row("logit-bias", 1, "oracle")] = outcome(0.5, 0.1)
    found[Row("logit-bias", 2, "oracle")] = outcome(0.6, 0.5)
    groups = points(found)

    def strength_of(strategy: str, tolerance: float) -> float:
        return choose(groups[strategy, "oracle"], found, tolerance).strength

    assert strength_of("class-latents", 0.02) == 5, "equal usage: the more accurate"
    assert strength_of("logit-bias", 0.02) == 2, "none is allowed: the most accurate"
    assert strength_of("class-latents", 0.11) == 10
    line = frontier(groups["class-latents", "oracle"], found)
    assert [point.strength for point in line] == [10, 5], "none (0.7 for 0.9) and the others are dominated"


def test_of_several_targets_the_best_is_kept() -> None:
    found = [(Row("targeted", 2.0, "none", "a", 5, h), outcome(hits, kept)) for h, hits, kept in
             ((0, 0.9, 0.5), (1, 0.89, 0.3), (2, 0.7, 0.1))]  # fmt: skip
    kept, tried = pick_targets(iter(found), outcome(0.9, 0.7), 0.02)
    assert list(kept) == [found[1][0]]
    assert tried == [(row, one.hits.mean(), one.usage.mean()) for row, one in found]


def test_a_frontier_between_two_points_is_their_mixture() -> None:
    low, high = Row("class-static", 0.2, "oracle"), Row("class-static", 0.6, "oracle")
    found = {NONE: outcome(0.95, 0.9), low: outcome(0.5, 0.2), high: outcome(0.8, 0.6)}
    line = frontier(points(found)["class-static", "oracle"], found)
    assert [point.strategy for point in line] == ["class-static", "class-static", "none"]
    at = at_usage(line, found, 0.3)
    assert at.usage == pytest.approx(0.3) and at.weight == pytest.approx(0.25)
    assert at.hits.mean() == pytest.approx(0.75 * 0.5 + 0.25 * 0.8)
    for usage, end, accuracy in ((0.05, 0.2, 0.5), (0.2, 0.2, 0.5), (0.9, 0.9, 0.95), (1.0, 0.9, 0.95)):
        at = at_usage(line, found, usage)
        assert at.usage == pytest.approx(end) and at.hits.mean() == pytest.approx(accuracy)


def test_class_latents_meet_each_control_at_their_own_usage() -> None:
    main, control = Row("class-latents", 3.0, "probe", "a", 5), Row("class-threshold", 0.5, "probe")
    other = Row("class-threshold", 0.1, "oracle")
    found = {NONE: outcome(0.9, 0.8), main: outcome(0.85, 0.4), control: outcome(0.7, 0.3), other: outcome(1.0, 0.0)}
    groups = points(found)
    chosen = {key: group[0] for key, group in groups.items()}
    lines = {key: frontier(group, found) for key, group in groups.items()}
    (line,) = comparisons.matched(chosen, lines, found, seed=0)
    assert (line["labels"], line["control"]) == ("probe", "class-threshold"), "of the same kind of label only"
    assert line["usage"] == line["usage_control"] == pytest.approx(0.4)
    expected = 0.85 - (0.8 * 0.7 + 0.2 * 0.9)  # a fifth of the way from usage 0.3 to 0.8
    assert line["delta"] == pytest.approx(expected)
    assert line["delta_lo"] < expected < line["delta_hi"]
    lost = {row["strategy"]: row for row in comparisons.against_none(chosen, found, 0.1, seed=0)}["class-latents"]
    assert lost["delta"] == pytest.approx(-0.05) and lost["loss_bound"] > 0.05
    assert lost["non_inferior"] == (lost["loss_bound"] < 0.1)
