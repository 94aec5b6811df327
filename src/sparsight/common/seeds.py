"""Every random number comes from the run's seed and the name of what it is for."""

from sparsight.common.digests import digest


def derive_seed(seed: int, *names: object) -> int:
    """A seed below 2**60 for one purpose, e.g. ``derive_seed(seed, "sae", "topk-s0", step)``.

    Two purposes never share a stream, and adding one changes no other.
    """
    return int(digest([seed, *map(str, names)])[:15], 16)
