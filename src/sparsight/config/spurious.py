"""Whether a model's dependence on a spurious feature can be removed by ablating latents."""

from collections.abc import Collection
from dataclasses import dataclass

from sparsight.common import sites
from sparsight.common.errors import SparsightError
from sparsight.config.backbone import Backbone
from sparsight.config.bounds import Count, Positive
from sparsight.config.checks import Section, rising
from sparsight.config.sae import Sae


@dataclass(frozen=True)
class Spurious(Section):
    """Accuracy in the worst group after ablating latents that stand for a spurious feature, beside other methods."""

    sae: str
    """Name of the SAE section; every seed is used. The SAEs must read the residual stream, and ``activations.sites``
    must include embedding."""
    group: str
    """Label column of the images with the spurious feature, e.g. ``place``; see docs/images.md."""
    latents: tuple[Count, ...] = (1, 2, 4, 8, 16, 32)
    """Numbers of ablated latents that are tried on val; those above the SAE's width are left out."""
    strengths: tuple[Positive, ...] = (0.5, 1.0, 1.5, 2.0)
    """Strengths of ablation that are tried on val; 1 sets a latent to zero, or a direction to its mean."""
    draws: Count = 5
    """Random sets of latents, the control, whose results are averaged."""

    def __post_init__(self) -> None:
        super().__post_init__()
        rising(self, "latents")
        rising(self, "strengths")
        if self.group == "label_name":
            raise SparsightError("group: label_name is the class itself; name a further label column")

    def check(self, where: str, sae: Sae, backbone: Backbone, stored: Collection[str]) -> None:
        """Check that latents can be ablated in the model, and that the model predicts the images' classes.

        Args:
            where: the section's dotted place.
            sae: the section of the SAEs.
            backbone: the section of their model.
            stored: the sites in the store.
        """
        if sae.site is None:
            raise SparsightError(f"{where}.sae: {self.sae!r} is a chain; name SAEs of one site")
        if sites.parse(sae.site)[1] not in ("input", "output"):
            raise SparsightError(
                f"{where}.sae: {self.sae!r} reads {sae.site!r}; latents are ablated in the residual stream, "
                "blocks.<i>.input or .output"
            )
        if "embedding" not in stored:
            raise SparsightError(
                f"{where}: the last layer is trained again on the embedding; add embedding to activations.sites, or "
                f"set {where} to null"
            )
        if backbone.training == "none":
            raise SparsightError(
                f"{where}.sae: {sae.backbone!r}, the model of {self.sae!r}, has no classifier; train or probe one, or "
                f"set {where} to null"
            )
