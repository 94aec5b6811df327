"""Stable? Whether another seed finds the same features."""

import json
from pathlib import Path

import numpy as np
from scipy import special

from sparsight.common.verdicts import Comparison, Measure, symmetric
from sparsight.report.cards.questions import MainSae, Question, counted

MATCHED = Measure("decoder rows with a partner in another seed", "points", 1, 100)


def ask(sae: MainSae, stabilities: list[Path]) -> Question:
    """Share of matched decoder rows whose cosine is above 0.7, beside that of random dictionaries."""
    files = [path for path in stabilities if path.stem == f"{sae.name}-stability"]
    if not files:
        why = f"{sae.name} has one seed in this run, so nothing says whether another finds the same latents."
        return Question("Stable?", "saes", [], unanswered=why)
    of_site = json.loads(files[0].read_text())["sites"][sae.about["site"]]
    value, control = of_site["over_0.7"], of_site["over_0.7_random"]
    least, most = of_site["over_0.7_min"], of_site["over_0.7_max"]
    half = _half(least, value, most, of_site["saes"])
    found = None if half is None else symmetric(value - control, half, of_site["saes"] - 1, "pairs of seeds")
    says = (
        f"{MATCHED.level(value)} of the decoder rows of {sae.name} have a partner in another seed (cosine above 0.7), "
        f"{MATCHED.level(control)} of those of random dictionaries"
    )
    n = f"{counted(of_site['saes'], 'seed')}, {counted(of_site['pairs'], 'pair')}"
    why = "" if found else "two seeds are a single pair; give the section a third"
    comparison = Comparison(sae.name, "random dictionaries", MATCHED, value, control, found, n, says, why)
    fact = f"Mean cosine of the matched rows: {of_site['cosine']:.2f}, of random ones {of_site['cosine_random']:.2f}."
    return Question("Stable?", "saes", [[comparison]], [fact])


def _half(least: float, mean: float, most: float, seeds: int) -> float | None:
    """Half the width of the 95 % interval of a mean over all pairs of seeds; None for a single pair.

    Three pairs have one value between the ends; more spread at most as if half of them lay at each end. Pairs share
    seeds: the mean is least certain where pairs with a common seed correlate by 1/2, the most that is possible
    (Hoeffding 1948). Student's t with one degree of freedom less than there are seeds.
    """
    pairs = seeds * (seeds - 1) // 2
    if pairs < 2:
        return None
    between = 3 * mean - least - most
    known = float(np.var([least, between, most], ddof=1))
    spread = known if pairs == 3 else (most - least) ** 2 / 4 * pairs / (pairs - 1)
    variance = spread / (1 - (seeds - 2) / (pairs - 1))
    return float(special.stdtrit(seeds - 1, 0.975) * (2 * variance / seeds) ** 0.5)
