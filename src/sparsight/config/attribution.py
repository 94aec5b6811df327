"""Which latents cause the logit of an image's class."""

from dataclasses import dataclass

from sparsight.common import sites
from sparsight.common.errors import SparsightError
from sparsight.config.backbone import Backbone
from sparsight.config.bounds import Count
from sparsight.config.checks import Section
from sparsight.config.sae import Sae


@dataclass(frozen=True)
class Attribution(Section):
    """Attribution of class logits to latents, judged by removing and adding them, beside other features."""

    sae: str
    """Name of the SAE section; every seed is used. The SAEs must read the residual stream."""
    images: Count = 500
    """Number of test images, or all if there are fewer."""
    steps: Count = 8
    """Steps in which the active latents of an image are removed or added, each the same share of them."""
    ablated: Count = 8
    """Latents of an image that are also set to zero one by one: those of the largest attribution of either sign."""
    draws: Count = 3
    """Random orders of each image's latents, whose curves are averaged."""

    def check(self, where: str, sae: Sae, backbone: Backbone) -> None:
        """Check that the SAEs' latents can be removed in the model, and that it has classes.

        Args:
            where: the section's dotted place.
            sae: the section of the SAEs.
            backbone: the section of their model.
        """
        if sae.site is None:
            raise SparsightError(f"{where}.sae: {self.sae!r} is a chain; name SAEs of one site")
        if sites.parse(sae.site)[1] not in ("input", "output"):
            raise SparsightError(
                f"{where}.sae: {self.sae!r} reads {sae.site!r}; latents are removed in the residual stream, "
                "blocks.<i>.input or .output"
            )
        if backbone.training == "none":
            raise SparsightError(
                f"{where}.sae: {sae.backbone!r}, the model of {self.sae!r}, has no classifier; train or probe one, or "
                f"set {where} to null"
            )
