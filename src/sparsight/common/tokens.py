"""Which tokens of an image a site stores, and which of them can be read from it."""

from collections.abc import Mapping
from typing import Literal

from sparsight.common.errors import SparsightError

Tokens = Literal["cls", "registers", "patches", "all", "mean"]
"""The class token, the register tokens, the patches, every token, or the mean over the patches."""
EMBEDDING = "embedding"
"""What the site ``embedding`` stores: one vector per image, which is no token."""
READABLE: Mapping[str, tuple[str, ...]] = {
    "cls": ("cls",),
    "registers": ("registers",),
    "patches": ("patches", "mean"),
    "all": ("all", "cls", "registers", "patches", "mean"),
    "mean": ("mean",),
    EMBEDDING: (EMBEDDING,),
}
"""By what a site stores, what can be read from it."""


def chosen(tokens: str | None, stored: Mapping[str, str]) -> str:
    """The tokens on which an SAE is trained.

    Args:
        tokens: its setting; None takes what is stored.
        stored: what each of its sites stores. A chain may end at ``embedding``, which goes with one token per image.

    Raises:
        SparsightError: a site that does not hold the tokens, or a chain whose sites store different ones.
    """
    kinds = {site: kind for site, kind in stored.items() if kind != EMBEDDING}
    if tokens is None and len(set(kinds.values())) > 1:
        what = ", ".join(f"{kind} at {site}" for site, kind in kinds.items())
        raise SparsightError(f"tokens: a chain needs the same tokens at all its sites, stored are {what}; name them")
    read = tokens or next(iter(kinds.values()), EMBEDDING)
    for site, kind in stored.items():
        if kind == EMBEDDING and (tokens if not kinds else read not in ("cls", "mean")):
            raise SparsightError(f"tokens: {site} is one vector per image and has no tokens {read!r}; leave it out")
        if kind != EMBEDDING and read not in READABLE[kind]:
            raise SparsightError(
                f"tokens: {site} stores {kind}, not {read}; store them there (activations.sites) or choose among "
                f"{', '.join(READABLE[kind])}"
            )
    return read
