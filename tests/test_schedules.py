"""Learning-rate schedules: every step learns, the peak is reached exactly, and the decay ends just above 0."""

import math
from collections.abc import Callable

import pytest

from sparsight.training.schedules import linear_decay, warmup_cosine

TOTALS = (1, 2, 3, 7, 10, 11, 37, 100, 660, 5000)


def factors(schedule: Callable[[int, int], float], total: int) -> list[float]:
    return [schedule(step, total) for step in range(1, total + 1)]


@pytest.mark.parametrize("total", TOTALS)
@pytest.mark.parametrize("schedule", [warmup_cosine, linear_decay])
def test_every_step_learns_the_peak_is_exact_and_one_step_more_would_end_at_zero(
    schedule: Callable[[int, int], float], total: int
) -> None:
    found = factors(schedule, total)
    peak = found.index(max(found))
    assert min(found) > 0 and max(found) == 1
    assert found[: peak + 1] == sorted(found[: peak + 1]) and found[peak:] == sorted(found[peak:], reverse=True)
    assert schedule(total + 1, total) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("total", TOTALS)
def test_the_warm_up_is_the_first_tenth_of_the_steps_and_ends_at_the_peak(total: int) -> None:
    found, warmup = factors(warmup_cosine, total), math.ceil(total / 10)
    assert found.index(1) + 1 == warmup
    assert found[:warmup] == pytest.approx([step / warmup for step in range(1, warmup + 1)])


@pytest.mark.parametrize("total", TOTALS)
def test_saes_decay_over_the_last_fifth_of_the_steps(total: int) -> None:
    found = factors(linear_decay, total)
    assert [factor < 1 for factor in found] == [5 * (total - step + 1) < total for step in range(1, total + 1)]
