"""Checks of field values, shared by several sections; each raises SparsightError."""

import math
from typing import Any

from sparsight.common.errors import SparsightError


def positive(section: Any, *names: str) -> None:
    """Check that each named field is more than 0."""
    for name in names:
        if getattr(section, name) <= 0:
            raise SparsightError(f"{name}: must be more than 0, got {getattr(section, name)}")


def not_negative(section: Any, *names: str) -> None:
    """Check that each named field is 0 or more."""
    for name in names:
        if getattr(section, name) < 0:
            raise SparsightError(f"{name}: must be 0 or more, got {getattr(section, name)}")


def fraction(section: Any, *names: str) -> None:
    """Check that each named field lies between 0 and 1."""
    for name in names:
        if not 0 <= getattr(section, name) <= 1:
            raise SparsightError(f"{name}: must lie between 0 and 1, got {getattr(section, name)}")


def rising(section: Any, *names: str) -> None:
    """Check that each named field holds one or more rising numbers, none negative or infinite."""
    for name in names:
        values = list(getattr(section, name))
        if not values or values != sorted(set(values)) or not all(0 <= value < math.inf for value in values):
            raise SparsightError(f"{name}: give at least one, rising, none negative or infinite; got {values}")
