"""Steering along an SAE's latents."""

from dataclasses import dataclass
from typing import Literal

from sparsight.common.errors import SparsightError
from sparsight.config.checks import positive, rising


@dataclass(frozen=True)
class Steering:
    """Edits along an SAE's latents at its site, beside their controls."""

    sae: str
    """Name of the SAE section whose latents steer, every seed of it: of the class token, in the residual stream."""
    kind: Literal["class-latents", "vs2", "vs2++"] = "class-latents"
    """``class-latents``: latents of the class that is predicted (or known) are amplified. ``vs2``: every image's own
    active latents are, without labels (arXiv 2506.01247). ``vs2++``: along the difference between its neighbours of one
    label and the others. Each brings its controls; docs/steering.md."""
    strengths: tuple[float, ...] = (1.5, 2.0, 3.0, 5.0, 10.0)
    """Factors on the class's latents, or alpha = lambda (gamma - 1) of VS2, 0.25 to 2 for a start, and of VS2++, 0.5 to
    16. Validation picks one per method."""
    latents: int = 10
    """Only for kind ``class-latents``: how many are amplified, the first ones by ``ranking`` on the train split."""
    ranking: Literal["mean-difference", "mean", "attribution"] = "mean-difference"
    """Only for kind ``class-latents``: mean activation in the class minus elsewhere, mean activation in the class, or
    what the class's logit owes to the latent (activation times gradient)."""
    edit: Literal["amplify", "clamp"] = "amplify"
    """Only for kind ``class-latents``: the image's own codes times the strength, or the strength times the latents'
    mean activation in the class. Strength 0 ablates them."""
    neighbours: int = 50
    """Only for kind ``vs2++``: train images around an image."""
    neighbour_backbone: str | None = None
    """Only for kind ``vs2++``: name of the backbone section whose embeddings find neighbours; null: the steered model.
    ``activations.sites`` must have embedding."""
    quantiles: tuple[float, ...] = (0.9, 0.95, 0.99, 0.995)
    """Only for kind ``vs2``: of the FVU of single train images. The gate leaves alone what is reconstructed worse.
    Validation picks one."""

    def __post_init__(self) -> None:
        positive(self, "latents", "neighbours")
        rising(self, "strengths", "quantiles")
        if not 0 < self.quantiles[0] <= self.quantiles[-1] <= 1:
            raise SparsightError(f"quantiles: must lie above 0 and at most at 1; got {list(self.quantiles)}")
