"""Intervals against scipy."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from pytest import approx
from scipy import stats

from sparsight.statistics import paired, wilson


@given(n=st.integers(1, 300), data=st.data())
def test_wilson_equals_scipy(n: int, data: st.DataObject) -> None:
    right = data.draw(st.integers(0, n))
    ours = wilson(np.arange(n) < right)
    theirs = stats.binomtest(right, n).proportion_ci(method="wilson")
    assert (ours["accuracy"], ours["n"]) == (right / n, n)
    assert (ours["lo"], ours["hi"]) == approx((theirs.low, theirs.high), abs=1e-9)


def test_paired_interval_equals_scipy_and_is_narrower_than_the_unpaired_one() -> None:
    generator = np.random.default_rng(0)
    reference = generator.random(1000) < 0.8
    hits = np.where(generator.random(1000) < 0.05, ~reference, reference)
    ours = paired(hits, reference)
    d = hits.astype(float) - reference
    low, high = stats.norm.interval(0.95, d.mean(), stats.sem(d))
    assert (ours["delta"], ours["delta_lo"], ours["delta_hi"]) == approx((d.mean(), low, high))
    assert ours["delta_hi"] - ours["delta_lo"] < wilson(hits)["hi"] - wilson(hits)["lo"]
