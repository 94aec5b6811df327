"""Sites: names of the places in a Vision Transformer where activations are read or edited."""

import math
import re

from sparsight.common.errors import SparsightError

_BLOCK = re.compile(r"blocks\.(\d+)\.(input|output|attn|mlp)")


def parse(site: str) -> tuple[int | None, str]:
    """Split a site into its block and part; ``embedding`` has no block.

    Raises:
        SparsightError: the name is not a site.
    """
    if site == "embedding":
        return None, site
    match = _BLOCK.fullmatch(site)
    if match is None:
        raise SparsightError(f"sites: {site!r} is no site; use blocks.<i>.input, .output, .attn, .mlp or embedding")
    return int(match[1]), match[2]


def depth(site: str) -> tuple[float, int]:
    """Sort key of a site by its place in the model; a block's output and the next block's input count as one.

    Raises:
        SparsightError: the name is not a site.
    """
    block, part = parse(site)
    if block is None:
        return math.inf, 0
    return (block + 1, 0) if part == "output" else (block, ("input", "attn", "mlp").index(part))


def check(site: str, n_blocks: int, where: str) -> None:
    """Raise SparsightError if ``site`` is malformed or its block does not exist."""
    block, _ = parse(site)
    if block is not None and block >= n_blocks:
        raise SparsightError(f"{where}: {site!r} does not exist; the blocks are numbered 0 to {n_blocks - 1}")
