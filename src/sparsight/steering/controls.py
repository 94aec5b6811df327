"""Class latents as a steering method, and its controls: edits of equal size.

Shapes: R edited rows, D width (d_in), C classes, M latents per class.
"""

from typing import Literal

import torch
from torch import Tensor

from sparsight.sae.base import SAE
from sparsight.steering.class_latents import ClassLatents, clamp_edit, class_edit
from sparsight.steering.edits import Batch, Edit, of_size


def random_edit(sae: SAE, classes_R: Tensor, found: ClassLatents, size_R: Tensor) -> Tensor:
    """Each class's random latents at their mean activation on all images, scaled to the norm ``size_R``; (R, D).

    A random latent is seldom active on a given row, so amplifying its code would change almost nothing. Its mean
    activation, scaled to the size of the real edit, is the harder control.
    """
    mean_CM = found.mean_code[found.random_latents]
    push_CD = torch.einsum("cm,cmd->cd", mean_CM, sae.W_dec[found.random_latents])
    return of_size(push_CD[classes_R], size_R)


def mean_difference_edit(classes_R: Tensor, found: ClassLatents, size_R: Tensor) -> Tensor:
    """Without an SAE: the class's mean activation minus the mean of all images, scaled to ``size_R``; (R, D)."""
    return of_size((found.class_mean - found.mean)[classes_R], size_R)


def edits(sae: SAE, found: ClassLatents, edit: Literal["amplify", "clamp"]) -> dict[str, Edit]:
    """Class latents and their controls, by name.

    The strength is the factor on the latents (``amplify``) or on their mean in the class (``clamp``).
    """

    def named(method: str) -> Edit:
        def apply(batch: Batch, factor: float) -> Tensor:
            assert batch.classes is not None
            codes_RF = sae.encode(batch.x).dense()
            if edit == "amplify":
                unit_RD = class_edit(sae, codes_RF, batch.classes, found)
                return batch.x + (factor - 1) * _beside(method, unit_RD, sae, batch.classes, found)
            clamped_RD = clamp_edit(sae, codes_RF, batch.classes, found, factor)
            return batch.x + _beside(method, clamped_RD, sae, batch.classes, found)

        return Edit(apply, ("predicted", "oracle"))

    return {method: named(method) for method in ("class-latents", "random-latents", "mean-difference")}


def _beside(method: str, edit_RD: Tensor, sae: SAE, classes_R: Tensor, found: ClassLatents) -> Tensor:
    """The edit itself, or a control of the same size."""
    if method == "class-latents":
        return edit_RD
    if method == "random-latents":
        return random_edit(sae, classes_R, found, edit_RD.norm(dim=1))
    assert method == "mean-difference", method
    return mean_difference_edit(classes_R, found, edit_RD.norm(dim=1))
