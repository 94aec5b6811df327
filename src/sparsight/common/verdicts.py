"""Differences from a control, and what may be said of them: better, not distinguishable or worse.

p-values are two-sided. Over seeds they are of Student's t test of the seeds' differences (n - 1 degrees of freedom).
Over images they are normal, from an estimate and its 95 % interval: z is the estimate over the interval's half width in
units of 1.96. Where both exist, the one with the wider interval counts, because a result should hold for other seeds
and for other images. All p-values of the first screen are one family, corrected by Holm (1979).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from scipy import special

from sparsight.common.intervals import Z, mean_of_seeds

Verdict = Literal["better", "not distinguishable", "worse", "no verdict"]
Interval = tuple[float, float, float]
"""An estimate with the ends of its 95 % interval."""
LEVEL = 0.05  # chance of one wrong verdict or more in the family


class Difference(NamedTuple):
    """A measure of the SAE minus that of a control, with its 95 % interval and p-value, uncorrected."""

    estimate: float
    low: float
    high: float
    p: float
    over: str
    """What the interval is over: ``seeds``, ``images``, ``pairs of seeds``."""


def over_seeds(differences: Sequence[float]) -> Difference | None:
    """Student's t over the differences of the seeds; None for a single seed."""
    found = mean_of_seeds(differences)
    if "half" not in found:
        return None
    return symmetric(found["mean"], found["half"], len(differences) - 1, "seeds")


def symmetric(estimate: float, half: float, freedom: int, over: str) -> Difference:
    """A difference from half the width of its interval by Student's t with ``freedom`` degrees of freedom."""
    if half and estimate:
        p = float(2 * special.stdtr(freedom, -abs(estimate) / half * special.stdtrit(freedom, 0.975)))
    else:
        p = float(estimate == 0)
    return Difference(estimate, estimate - half, estimate + half, p, over)


def over_images(seeds: Sequence[Interval]) -> Difference:
    """The mean of the seeds' paired differences, with the mean of their intervals.

    That is at least as wide as the interval of the mean, however alike the seeds are.
    """
    estimate, low, high = (sum(ends) / len(seeds) for ends in zip(*seeds, strict=True))
    error = (high - low) / (2 * Z)
    p = float(2 * special.ndtr(-abs(estimate) / error)) if error and estimate else float(estimate == 0)
    return Difference(estimate, low, high, p, "images")


def over_pairs(pairs: Interval, seeds: int, control: float) -> Difference | None:
    """The mean of a number of every pair of seeds minus that of a control; None for a single pair.

    Three pairs have one value between the ends; more spread at most as if half of them lay at each end. Pairs share
    seeds: the mean is least certain where pairs with a common seed correlate by 1/2, the most that is possible
    (Hoeffding 1948). Student's t with one degree of freedom less than there are seeds.

    Args:
        pairs: the least, mean and largest number of a pair.
        seeds: number of seeds.
        control: the control's number, taken as exact.
    """
    least, mean, most = pairs
    n = seeds * (seeds - 1) // 2
    if n < 2:
        return None
    between = 3 * mean - least - most
    known = float(np.var([least, between, most], ddof=1))
    spread = known if n == 3 else (most - least) ** 2 / 4 * n / (n - 1)
    variance = spread / (1 - (seeds - 2) / (n - 1))
    half = float(special.stdtrit(seeds - 1, 0.975) * (2 * variance / seeds) ** 0.5)
    return symmetric(mean - control, half, seeds - 1, "pairs of seeds")


def unpaired(one: Interval, other: Interval) -> Interval:
    """Difference of two estimates as if they were independent; too wide for two methods on the same images."""
    half = sum(((high - low) / 2) ** 2 for _, low, high in (one, other)) ** 0.5
    return one[0] - other[0], one[0] - other[0] - half, one[0] - other[0] + half


def pooled(differences: Sequence[float], images: Sequence[Interval] = ()) -> Difference | None:
    """Seeds pooled: over seeds or, if ``images`` has an interval for each seed, over whichever is wider."""
    found = [one for one in (over_seeds(differences), over_images(images) if images else None) if one]
    return max(found, key=lambda one: one.high - one.low) if found else None


@dataclass(frozen=True)
class Measure:
    """How a quantity is named and written."""

    name: str
    unit: str = ""
    """Of differences, e.g. ``points``."""
    digits: int = 3
    factor: float = 1.0
    lower_is_better: bool = False

    def number(self, value: float) -> str:
        """A value or difference as text, without unit."""
        text = f"{self.factor * value:,.{self.digits}f}"
        return text.removeprefix("-") if not text.strip("-0.,") else text

    def level(self, value: float) -> str:
        """A value as text, with the percent sign if differences are in points."""
        return self.number(value) + " %" * (self.unit == "points")


@dataclass(frozen=True)
class Comparison:
    """The SAE beside one control in one measure; values are means over seeds."""

    subject: str
    control: str
    measure: Measure
    value: float
    control_value: float
    difference: Difference | None
    """None if nothing says how far it would vary."""
    n: str
    """Images and seeds."""
    says: str
    """Both values in a clause that a verdict can follow."""
    open: str = ""
    """Why there is no verdict, if there is none."""
    ends: tuple[str, ...] = ()
    """Choices that val made at an end of their grid."""

    @property
    def estimate(self) -> float:
        """The difference, also without an interval."""
        return self.difference.estimate if self.difference else self.value - self.control_value


@dataclass(frozen=True)
class Judged:
    """A comparison with its verdict."""

    comparison: Comparison
    verdict: Verdict
    p: float | None
    """Corrected; None without a verdict."""

    @property
    def rank(self) -> tuple[int, float]:
        """Sort key, the least favourable first: by verdict, then by the difference in relation to the larger value."""
        c = self.comparison
        sign = -1 if c.measure.lower_is_better else 1
        relative = sign * c.estimate / (max(abs(c.value), abs(c.control_value)) or 1.0)
        return {"worse": 0, "better": 2}.get(self.verdict, 1), relative

    @property
    def text(self) -> str:
        """The verdict in words, with the control."""
        joined = {"better": "better than", "worse": "worse than", "not distinguishable": "not distinguishable from"}
        c = self.comparison
        return f"{joined[self.verdict]} {c.control}" if self.verdict in joined else f"no verdict against {c.control}"

    @property
    def interval(self) -> str:
        """The difference with its interval."""
        number, c = self.comparison.measure.number, self.comparison
        sign = "+" if c.estimate > 0 and number(c.estimate).strip("0.") else ""
        ends = f" ({number(c.difference.low)} to {number(c.difference.high)})" if c.difference else ""
        return f"{sign}{number(c.estimate)}{ends}{c.measure.unit and ' '}{c.measure.unit}"

    @property
    def sentence(self) -> str:
        """What the numbers say, to be quoted."""
        c, number = self.comparison, self.comparison.measure.number
        if self.verdict in ("better", "worse") and c.difference:
            low, high = sorted(map(abs, c.difference[1:3]))
            by = f"{number(abs(c.estimate))}{c.measure.unit and ' '}{c.measure.unit}"
            return f"{c.says}: {self.verdict} by {by} ({number(low)} to {number(high)})."
        if self.verdict == "not distinguishable":
            return f"{c.says}: {self._alike} (difference {self.interval})."
        return f"{c.says}; there is no verdict, because {c.open}."

    @property
    def line(self) -> str:
        """The same in short, without the subject."""
        c = self.comparison
        said = self._alike if self.verdict == "not distinguishable" else self.verdict
        why = f", because {c.open}" if c.open else f", {self.interval}"
        values = c.measure.level(c.value), c.measure.level(c.control_value)
        return f"{c.measure.name} {values[0]}, {c.control} {values[1]}: {said}{why}."

    @property
    def _alike(self) -> str:
        """Not distinguishable, with the reason if the interval does not say so."""
        found = self.comparison.difference
        corrected = found is not None and (found.low > 0 or found.high < 0)
        return "not distinguishable" + " after correction" * corrected


def judge(comparisons: Sequence[Comparison]) -> list[Judged]:
    """The verdict on each of the comparisons, which are one family (Holm 1979, by statsmodels)."""
    from statsmodels.stats.multitest import multipletests  # slow to import, and only needed here

    family = [c.difference.p for c in comparisons if c.difference and not c.open]
    corrected = iter(multipletests(family, LEVEL, "holm")[1].tolist() if family else [])
    judged: list[Judged] = []
    for c in comparisons:
        if c.difference is None or c.open:
            judged.append(Judged(c, "no verdict", None))
            continue
        p, higher_wins = next(corrected), not c.measure.lower_is_better
        better: Verdict = "better" if (c.difference.estimate > 0) == higher_wins else "worse"
        judged.append(Judged(c, better if p <= LEVEL else "not distinguishable", p))
    return judged
