"""Evaluation ranks SAEs of a planted dictionary as they deserve: planted, trained, soft-frozen, frozen decoder, random.

The margins are below what five draws give (docs/evaluation.md#what-the-metrics-see).
"""

from collections.abc import Mapping
from itertools import pairwise

import planted
import pytest


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Mapping[str, float]]:
    return planted.ranked(tmp_path_factory.mktemp("planted"), seed=0)


MARGINS = {
    "fvu": (0.04, 0.1, 0.2, 0.005),
    "match": (0.04, 0.15, 0.25, None),
    "probing_1": (None, 0.03, 0.2, None),
    "probing_5": (None, 0.02, 0.1, None),
    "monosemanticity": (0.01, 0.01, 0.02, None),
    "monosemanticity_judge": (0.005, 0.005, 0.008, None),
    "bits per bit of PCA": (0.05, 0.2, 0.5, None),
}
"""By metric, the least gain of each method over the next of ``planted.ORDER``; None where no difference is sure."""


@pytest.mark.slow
@pytest.mark.parametrize("metric", MARGINS)
def test_a_method_is_better_than_the_next(metric: str, found: Mapping[str, Mapping[str, float]]) -> None:
    for (better, worse), margin in zip(pairwise(planted.ORDER), MARGINS[metric], strict=True):
        if margin is not None:
            gain = planted.METRICS[metric] * (found[better][metric] - found[worse][metric])
            assert gain > margin, f"{better} and {worse}"


@pytest.mark.slow
def test_what_does_not_see_the_order(found: Mapping[str, Mapping[str, float]]) -> None:
    """Bits alone are fewer for a worse SAE, because its error is larger. Random rows match by chance, frozen or not."""
    bits = [found[name]["bits"] for name in planted.ORDER]
    assert bits == sorted(bits, reverse=True)
    assert abs(found["frozen decoder"]["match"] - found["random"]["match"]) < 0.03
    assert max(abs(one["l0"] - planted.K) for one in found.values()) < 0.3
