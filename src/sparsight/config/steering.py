"""Steering along the latents of SAEs."""

from dataclasses import dataclass
from typing import Literal

from sparsight.config.bounds import Count, NotNegative, PositiveShare
from sparsight.config.checks import Section, only_if, rising

_ONLY = {
    "class-latents": ("latents", "ranking", "edit"),
    "vs2": ("quantiles",),
    "vs2++": ("neighbours", "neighbour_backbone"),
}
"""By kind, the fields that only this kind reads."""


def steerable(tokens: str) -> tuple[str, ...]:
    """Tokens that an SAE which reads ``tokens`` can steer."""
    return ("cls", "registers", "patches", "all") if tokens == "all" else (tokens,)


@dataclass(frozen=True)
class Steering(Section):
    """Edits of activations along an SAE's latents, and their controls."""

    sae: str
    """Name of the SAE section whose latents steer; every seed is used. The SAEs must read the residual stream."""
    layers: tuple[str, ...] = ()
    """Further SAE sections that steer in the same pass with the same strength: of the same backbone, with the same
    seeds, at later sites in the order of the model."""
    tokens: Literal["cls", "registers", "patches", "all"] | None = None
    """Tokens that are steered. null: those that each SAE reads; one of the mean over patches moves every patch. An SAE
    of all tokens can steer any of them, another SAE only its own."""
    kind: Literal["class-latents", "vs2", "vs2++"] = "class-latents"
    """``class-latents`` amplifies latents of the predicted (or known) class. ``vs2`` amplifies every image's own active
    latents, without labels (arXiv 2506.01247). ``vs2++`` steers along the difference between the image's neighbours of
    one label and its other neighbours. Each kind has its own controls; see docs/steering.md."""
    strengths: tuple[NotNegative, ...] = (1.5, 2.0, 3.0, 5.0, 10.0)
    """Factors on the class's latents. For ``vs2`` and ``vs2++``, values of alpha = lambda (gamma - 1): try 0.25 to 2
    for ``vs2``, 0.5 to 16 for ``vs2++``. Validation picks one per method."""
    latents: Count = 10
    """Only for kind ``class-latents``: number of latents to amplify, the first by ``ranking`` on the train split."""
    ranking: Literal["mean-difference", "mean", "attribution"] = "mean-difference"
    """Only for kind ``class-latents``: how latents are ranked. ``mean-difference``: mean activation in the class minus
    that outside it. ``mean``: mean activation in the class. ``attribution``: the latent's contribution to the class's
    logit (activation times gradient)."""
    edit: Literal["amplify", "clamp"] = "amplify"
    """Only for kind ``class-latents``: ``amplify`` multiplies the image's own codes by the strength. ``clamp`` sets
    them to the strength times the latents' mean activation in the class. Strength 0 ablates the latents."""
    neighbours: Count = 50
    """Only for kind ``vs2++``: number of nearest train images per image."""
    neighbour_backbone: str | None = None
    """Only for kind ``vs2++``: name of the backbone section whose embeddings find neighbours; null uses the steered
    model. ``activations.sites`` must include embedding."""
    quantiles: tuple[PositiveShare, ...] = (0.9, 0.95, 0.99, 0.995)
    """Only for kind ``vs2``: quantiles of the FVU of single train images. The gate does not steer images with an FVU
    above the quantile. Validation picks one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        rising(self, "strengths", "quantiles")
        for kind, names in _ONLY.items():
            only_if(self.kind == kind, f"kind {kind}", self, *names)
