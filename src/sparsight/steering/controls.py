"""Class latents as a steering method, and its controls: edits of equal size.

Shapes: B batch, D width (d_in), C classes, M latents per class.
"""

from typing import Literal

import torch
from torch import Tensor

from sparsight.sae.base import SAE
from sparsight.steering.class_latents import ClassLatents, clamp_edit, class_edit
from sparsight.steering.edits import Batch, Edit, of_size


def random_edit(sae: SAE, classes_B: Tensor, found: ClassLatents, size_B: Tensor) -> Tensor:
    """Each class's random latents at their mean activation on all images, scaled to the norm ``size_B``; (B, D).

    A random latent is seldom active on a given image, so amplifying its code would change almost nothing. Its mean
    activation, scaled to the size of the real edit, is the harder control.
    """
    mean_CM = found.mean_code[found.random_latents]
    push_CD = torch.einsum("cm,cmd->cd", mean_CM, sae.W_dec[found.random_latents])
    return of_size(push_CD[classes_B], size_B)


def mean_difference_edit(classes_B: Tensor, found: ClassLatents, size_B: Tensor) -> Tensor:
    """Without an SAE: the class's mean activation minus the mean of all images, scaled to ``size_B``; (B, D)."""
    return of_size((found.class_mean - found.mean)[classes_B], size_B)


def edits(sae: SAE, found: ClassLatents, edit: Literal["amplify", "clamp"]) -> dict[str, Edit]:
    """Class latents and their controls, by name.

    The strength is the factor on the latents (``amplify``) or on their mean in the class (``clamp``).
    """

    def named(method: str) -> Edit:
        def apply(batch: Batch, factor: float) -> Tensor:
            assert batch.classes is not None
            codes_BF = sae.encode(batch.x).dense()
            if edit == "amplify":
                unit_BD = class_edit(sae, codes_BF, batch.classes, found)
                return batch.x + (factor - 1) * _beside(method, unit_BD, sae, batch.classes, found)
            clamped_BD = clamp_edit(sae, codes_BF, batch.classes, found, factor)
            return batch.x + _beside(method, clamped_BD, sae, batch.classes, found)

        return Edit(apply, ("predicted", "oracle"))

    return {method: named(method) for method in ("class-latents", "random-latents", "mean-difference")}


def _beside(method: str, edit_BD: Tensor, sae: SAE, classes_B: Tensor, found: ClassLatents) -> Tensor:
    """The edit itself, or a control of the same size."""
    if method == "class-latents":
        return edit_BD
    if method == "random-latents":
        return random_edit(sae, classes_B, found, edit_BD.norm(dim=1))
    assert method == "mean-difference", method
    return mean_difference_edit(classes_B, found, edit_BD.norm(dim=1))
