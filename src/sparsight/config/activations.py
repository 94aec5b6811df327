"""Which activations are stored, and how."""

from dataclasses import dataclass, field
from typing import Literal

from sparsight.common import sites
from sparsight.common.digests import FREE
from sparsight.common.errors import SparsightError
from sparsight.config.bounds import Count
from sparsight.config.checks import Section


@dataclass(frozen=True)
class Activations(Section):
    """Which activations of every backbone are stored, and how."""

    sites: tuple[str, ...]
    """Places to read: blocks.<i>.input, .output, .attn, .mlp, or embedding."""
    tokens: Literal["cls", "patches", "all", "mean"] = "cls"
    """Which tokens are stored: the class token, the patches, every token, or the mean over patches."""
    dtype: Literal["float16", "float32"] = "float16"
    """Number format on disk. A value too large for float16 is an error."""
    shard_images: Count = 4096
    """Maximum images per shard, rounded down to a power of two. Small splits are cut into at least 8 shards."""
    batch_size: Count = 128
    """Images per forward pass."""
    parts: Count = field(default=1, metadata=FREE)
    """Number of jobs per split, to use several cores, GPUs or cluster nodes. Never changes a result."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for site in self.sites:
            sites.parse(site)
        if len(set(self.sites)) != len(self.sites) or not self.sites:
            raise SparsightError("sites: name at least one site, each once")
