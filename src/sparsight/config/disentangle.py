"""Whether two attributes of an image can be changed one without the other."""

from collections.abc import Collection
from dataclasses import dataclass

from sparsight.common import sites
from sparsight.common.errors import SparsightError
from sparsight.config.bounds import Count, Positive
from sparsight.config.checks import Section, rising
from sparsight.config.sae import Sae


@dataclass(frozen=True)
class Disentangle(Section):
    """Interchanges of one of two attributes between images, by an SAE's latents and by other features."""

    sae: str
    """Name of the SAE section whose latents are interchanged; every seed is used. The SAEs must read the residual
    stream, and ``activations.sites`` must include embedding."""
    attributes: tuple[str, ...]
    """Two label columns of the images: ``label_name`` (the class) and further ones, see docs/images.md."""
    features: tuple[Count, ...] = (1, 4, 16, 64)
    """Numbers of interchanged features; a method that has fewer features is left out."""
    pairs: Count = 1000
    """Number of pairs of images on val and on test. Each image is the base of one pair at most."""
    das_steps: Count = 400
    """Training steps of the subspaces of the skyline, distributed alignment search."""
    das_batch_size: Count = 64
    """Pairs of train images per step."""
    das_lr: Positive = 1e-3
    """Learning rate of Adam, until it decays over the last fifth of the steps."""

    def __post_init__(self) -> None:
        super().__post_init__()
        rising(self, "features")
        if len(set(self.attributes)) != 2 or len(self.attributes) != 2:
            raise SparsightError(
                f"attributes: name two label columns, e.g. [label_name, colour], not {self.attributes}"
            )

    def check(self, where: str, sae: Sae, stored: Collection[str]) -> None:
        """Check that the SAEs' latents can be interchanged, and that the attributes can be read.

        Args:
            where: the section's dotted place.
            sae: the section of the SAEs.
            stored: the sites in the store.
        """
        if sae.site is None:
            raise SparsightError(f"{where}.sae: {self.sae!r} is a chain; name SAEs of one site")
        if sites.parse(sae.site)[1] not in ("input", "output"):
            raise SparsightError(
                f"{where}.sae: {self.sae!r} reads {sae.site!r}; interchanges are made in the residual stream, "
                "blocks.<i>.input or .output"
            )
        if "embedding" not in stored:
            raise SparsightError(
                f"{where}: attributes are read from the embedding; add embedding to activations.sites, or set {where} "
                "to null"
            )
