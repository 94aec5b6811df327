"""Formats in which other tools keep SAEs."""

from dataclasses import dataclass
from typing import Literal

Name = Literal["saev", "prisma", "visaebench", "dictionary_learning", "saelens"]


@dataclass(frozen=True)
class Format:
    """A format, read by src/sparsight/sae/foreign/<name>.py."""

    kinds: tuple[str, ...]
    """The variants of which a file can be."""
    beside: tuple[str, ...] = ("config.json",)
    """Names of the settings in the folder of the weights; the first that is there is read."""
    rms: bool = False
    """What ``normalized`` divides by: the root mean square of x - mean, or its mean length over sqrt(d_in)."""


FORMATS: dict[str, Format] = {
    "saev": Format(("relu", "topk", "batchtopk"), ()),
    "prisma": Format(("relu", "topk", "gated")),
    "visaebench": Format(("topk", "batchtopk", "jumprelu"), ("config.json", "config.yaml", "config.yml"), rms=True),
    "dictionary_learning": Format(("relu", "gated", "topk", "batchtopk", "matryoshka", "jumprelu")),
    "saelens": Format(("relu", "gated", "jumprelu", "topk"), ("cfg.json",)),
}
