"""Which activations are stored, and how."""

from dataclasses import dataclass, field
from typing import Literal

from sparsight.common import sites
from sparsight.common.digests import FREE
from sparsight.common.errors import SparsightError
from sparsight.config.checks import positive


@dataclass(frozen=True)
class Activations:
    """What of every backbone is stored."""

    sites: tuple[str, ...]
    """What is stored: blocks.<i>.input, .output, .attn, .mlp, or embedding."""
    tokens: Literal["cls", "patches", "all", "mean"] = "cls"
    """Which tokens: the class token, the patches, every token, or the mean over patches."""
    dtype: Literal["float16", "float32"] = "float16"
    """Number format on disk; a value that float16 cannot hold is an error."""
    shard_images: int = 4096
    """Most images in a shard; a small split is cut further so that it has 8 shards or more."""
    batch_size: int = 128
    """Images a forward pass."""
    parts: int = field(default=1, metadata=FREE)
    """Jobs that share each split, over cores, GPUs or cluster nodes. Never changes a result."""

    def __post_init__(self) -> None:
        for site in self.sites:
            sites.parse(site)
        if len(set(self.sites)) != len(self.sites) or not self.sites:
            raise SparsightError("sites: name at least one site, each once")
        positive(self, "shard_images", "batch_size", "parts")
