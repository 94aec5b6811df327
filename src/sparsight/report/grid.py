"""A strength or number that val chose, against what it could choose from."""

from collections.abc import Iterable


def end_of_grid(chosen: float, tried: Iterable[float]) -> str:
    """``largest`` or ``smallest`` if the choice is at that end of the grid; empty within it, or if there was no choice.

    At an end a wider grid could have given a better value.
    """
    grid = set(tried)
    if len(grid) < 2:
        return ""
    return "largest" if chosen >= max(grid) else "smallest" if chosen <= min(grid) else ""
