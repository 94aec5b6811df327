"""Intervals against scipy."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from pytest import approx
from scipy import stats

from sparsight.common.intervals import bootstrap, loss_bound, paired, wilson


@given(n=st.integers(1, 300), data=st.data())
def test_wilson_equals_scipy(n: int, data: st.DataObject) -> None:
    right = data.draw(st.integers(0, n))
    ours = wilson(np.arange(n) < right)
    theirs = stats.binomtest(right, n).proportion_ci(method="wilson")
    assert (ours["accuracy"], ours["n"]) == (right / n, n)
    assert (ours["lo"], ours["hi"]) == approx((theirs.low, theirs.high), abs=1e-9)


def test_paired_interval_is_the_normal_one_with_half_an_image_added_to_each_outcome() -> None:
    generator = np.random.default_rng(0)
    reference = generator.random(1000) < 0.8
    hits = np.where(generator.random(1000) < 0.05, ~reference, reference)
    ours = paired(hits, reference)
    assert ours["delta"] == approx(hits.mean() - reference.mean())
    d = np.append(hits.astype(float) - reference, [0, 0, 1, -1])
    weights = np.append(np.ones(1000), [0.5] * 4)
    mean = np.average(d, weights=weights)
    error = np.sqrt(np.average((d - mean) ** 2, weights=weights) / weights.sum())
    assert (ours["delta_lo"], ours["delta_hi"]) == approx(stats.norm.interval(0.95, mean, error))
    assert ours["delta_hi"] - ours["delta_lo"] < wilson(hits)["hi"] - wilson(hits)["lo"]


def test_methods_that_agree_on_every_image_still_get_an_interval() -> None:
    hits = np.arange(1000) < 970
    ours = paired(hits, hits)
    assert ours["delta"] == 0 and ours["delta_lo"] == approx(-0.002, rel=0.05) and ours["delta_hi"] == -ours["delta_lo"]


def test_paired_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    generator, covered = np.random.default_rng(0), 0
    for _ in range(2000):
        kind = generator.random(200)  # truth: 4 % gained, 1 % lost
        hits, reference = (kind < 0.04) | (kind > 0.5), ((kind >= 0.04) & (kind < 0.05)) | (kind > 0.5)
        interval = paired(hits, reference)
        covered += interval["delta_lo"] <= 0.03 <= interval["delta_hi"]
    assert 0.93 < covered / 2000 < 0.98


def test_the_loss_bound_is_the_one_sided_paired_interval() -> None:
    generator = np.random.default_rng(0)
    reference = generator.random(1000) < 0.8
    hits = np.where(generator.random(1000) < 0.05, ~reference, reference)
    two_sided = paired(hits, reference)
    centre = (two_sided["delta_lo"] + two_sided["delta_hi"]) / 2
    error = (two_sided["delta_hi"] - centre) / stats.norm.ppf(0.975)
    assert loss_bound(hits, reference) == approx(-stats.norm.ppf(0.05, centre, error))
    assert loss_bound(reference, reference) > 0, "no image that differs is no proof that none would"


def test_bootstrap_intervals_are_those_of_the_mean() -> None:
    generator = np.random.default_rng(0)
    wide, narrow = generator.normal(3, 2, 4000), generator.normal(0, 0.1, 4000)
    for values, found in zip((wide, narrow), bootstrap([wide, narrow], seed=1), strict=True):
        mean, error = values.mean(), values.std() / np.sqrt(4000)
        assert found["mean"] == approx(mean)
        assert (found["lo"], found["hi"]) == approx(stats.norm.interval(0.95, mean, error), abs=0.15 * error)
        assert found["low"] == approx(stats.norm.ppf(0.05, mean, error), abs=0.15 * error)
    assert bootstrap([wide], seed=1) == bootstrap([wide], seed=1) != bootstrap([wide], seed=2)
    together = bootstrap([wide, wide - 1], seed=1)
    assert together[1]["lo"] == approx(together[0]["lo"] - 1), "columns are resampled together"
