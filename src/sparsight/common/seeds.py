"""Seeds for all random numbers, derived from the run's seed and the name of their purpose."""

from sparsight.common.digests import digest


def derive_seed(seed: int, *names: object) -> int:
    """A seed below 2**60 for one purpose, e.g. ``derive_seed(seed, "sae", "topk-s0", step)``.

    Each purpose has a stream of its own, so adding a purpose changes no other.
    """
    return int(digest([seed, *map(str, names)])[:15], 16)
