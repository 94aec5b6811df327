"""Which activations are stored, and how."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

from sparsight.common import sites
from sparsight.common.digests import FREE
from sparsight.common.errors import SparsightError
from sparsight.common.tokens import EMBEDDING, Tokens
from sparsight.config.bounds import Count
from sparsight.config.checks import Section, only_if
from sparsight.config.schema import check_keys


class StoredSite(str):
    """``<site>``, or ``<site>=<tokens>``; YAML may also have ``{site: <site>, tokens: <tokens>}``."""

    form: ClassVar[str] = "site or {site, tokens}"

    @classmethod
    def read(cls, value: Any, where: str) -> "StoredSite":
        """The text of a value from YAML or a flag; its site and tokens are checked by :class:`Activations`."""
        if isinstance(value, Mapping):
            check_keys(value, {"site": None, "tokens": None}, where)
            if "site" not in value:
                raise SparsightError(f"{where}: the key 'site' is missing")
            value = "=".join(map(str, (value["site"], *filter(None, [value.get("tokens")]))))
        if not isinstance(value, str):
            raise SparsightError(f"{where}: expected a site or {{site: ..., tokens: ...}}, got {value!r}")
        return cls(value)


@dataclass(frozen=True)
class Activations(Section):
    """Which activations of every backbone are stored, and how."""

    sites: tuple[StoredSite, ...]
    """Places to read: blocks.<i>.input, .output, .attn, .mlp, or embedding. A place may store other tokens than
    ``tokens`` says: {site: blocks.9.input, tokens: all}, or blocks.9.input=all."""
    tokens: Tokens = "cls"
    """Which tokens are stored where ``sites`` names none: the class token, the register tokens, the patches, every
    token, or the mean over patches."""
    dtype: Literal["float16", "float32"] = "float16"
    """Number format on disk. A value too large for float16 is an error."""
    shard_images: Count = 4096
    """Maximum images per shard, rounded down to a power of two. Small splits are cut into at least 8 shards."""
    batch_size: Count = 128
    """Images per forward pass. On a CPU about 2,000 tokens are best (8 images of 256 patches): what layers hand to each
    other then stays in its cache."""
    parts: Count = field(default=1, metadata=FREE)
    """Number of jobs per split, to use several cores, GPUs or cluster nodes. Never changes a result."""

    @property
    def tokens_by_site(self) -> dict[str, str]:
        """What every site stores; the site ``embedding`` has no tokens and stores ``embedding``."""
        pairs = (text.partition("=") for text in self.sites)
        return {site: EMBEDDING if site == EMBEDDING else tokens or self.tokens for site, _, tokens in pairs}

    def __post_init__(self) -> None:
        super().__post_init__()
        for text in self.sites:
            site, _, tokens = text.partition("=")
            sites.parse(site)
            if tokens and site == EMBEDDING:
                raise SparsightError("sites: embedding is one vector per image; leave out its tokens")
            if "=" in text and tokens not in get_args(Tokens):
                raise SparsightError(f"sites: {site} cannot store {tokens!r}; use {', '.join(get_args(Tokens))}")
        if len(self.tokens_by_site) != len(self.sites) or not self.sites:
            raise SparsightError("sites: name at least one site, each once")
        named = all("=" in text for text in self.sites if text != EMBEDDING)
        only_if(not named, "a site without tokens of its own", self, "tokens")
