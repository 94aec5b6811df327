"""Contestants that take turns, so that a while in which the machine is slow is slow for all of them."""

import time
from collections.abc import Callable, Mapping


def take_turns(
    contestants: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """Let each run once a round, in the order given.

    Args:
        contestants: what runs, by name.
        rounds: how many count.
        warm_up: rounds before them that do not.

    Returns:
        The seconds of every round that counts, by name.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(warm_up + rounds):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            if turn >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return seconds
