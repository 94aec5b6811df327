"""The values that a number of the configuration may have, stated in its type: ``k: Count``."""

import math
import sys
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin

from sparsight.common.errors import SparsightError

MAX = sys.float_info.max  # YAML and Python read a larger number, such as 1.0e+400, as infinity


@dataclass(frozen=True)
class Bounds:
    """An interval of finite numbers; integers must fit in 64 bits. Its text completes the sentence "must be ..."."""

    low: float
    high: float = math.inf
    includes_low: bool = True
    includes_high: bool = True

    def __contains__(self, value: float) -> bool:
        above = value >= self.low if self.includes_low else value > self.low
        return above and (value <= self.high if self.includes_high else value < self.high)

    def __str__(self) -> str:
        low = f"{self.low:g} or more" if self.includes_low else f"more than {self.low:g}"
        if self.high == math.inf:
            return low
        return f"{low} and {'at most' if self.includes_high else 'less than'} {self.high:g}"


Count = Annotated[int, Bounds(1)]
CountOrZero = Annotated[int, Bounds(0)]
Positive = Annotated[float, Bounds(0, includes_low=False)]
NotNegative = Annotated[float, Bounds(0)]
Share = Annotated[float, Bounds(0, 1)]
PositiveShare = Annotated[float, Bounds(0, 1, includes_low=False)]
ShareBelowOne = Annotated[float, Bounds(0, 1, includes_high=False)]


def bounds_of(hint: Any) -> Bounds | None:
    """The bounds in a type, also inside a tuple, a dict or ``X | None``; None for types without numbers."""
    if get_origin(hint) is Annotated:
        return next((about for about in hint.__metadata__ if isinstance(about, Bounds)), None)
    return next(filter(None, map(bounds_of, get_args(hint))), None)


def check(bounds: Bounds, value: Any, where: str) -> None:
    """Raise SparsightError, with its place, for the first number of a field that is not within its bounds."""
    if isinstance(value, tuple):
        for i, item in enumerate(value):
            check(bounds, item, f"{where}[{i}]")
    elif isinstance(value, dict):
        for key, item in value.items():
            check(bounds, item, f"{where}.{key}")
    elif value is not None:
        largest, limit = (2**63 - 1, " and less than 2^63") if isinstance(value, int) else (MAX, " and finite")
        fits = abs(value) <= largest  # false for nan
        if not (fits and value in bounds):
            raise SparsightError(f"{where}: must be {bounds}{'' if fits else limit}, got {value}")
