"""Interventions at an SAE's site: the blocks before it run once, the blocks after it once per edit.

Shapes: B batch, T tokens, D width (d_in), C classes, F latents (d_sae).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from sparsight.backbones.backbone import Backbone
from sparsight.common import sites
from sparsight.common.errors import SparsightError
from sparsight.common.progress import Progress
from sparsight.common.slices import row_slices
from sparsight.images.split import Split
from sparsight.sae.base import SAE

_IMAGES = 125


class Intervention:
    """Edits of the class token in the residual stream at an SAE's site.

    Raises:
        SparsightError: an SAE of another model, or not of the class token in the residual stream.
    """

    def __init__(self, sae: SAE, backbone: Backbone) -> None:
        check_site(sae, backbone)
        self.backbone = backbone
        block, part = sites.parse(sae.about["site"])
        assert block is not None
        self._start = block + (part == "output")

    @torch.no_grad()
    def streams(self, split: Split) -> Iterator[tuple[slice, Tensor]]:
        """In batches, the positions of the images in the split and the residual stream (B, T, D) at the site."""
        windows = list(row_slices(len(split), _IMAGES))
        pixels = split.stream(windows, self.backbone.preprocess, torch.get_num_threads())
        with Progress(len(split), "images") as progress:
            for images, block in zip(windows, pixels, strict=True):
                x_BTD = self.backbone.tokens(self.backbone.normalize(block))
                yield images, self.backbone.run_blocks(x_BTD, 0, self._start)[0]
                progress(len(x_BTD))

    def rest(self, x_BTD: Tensor, cls_BD: Tensor) -> Tensor:
        """The stream after the last block, with ``cls_BD`` as the class token at the site."""
        edited_BTD = torch.cat([cls_BD.unsqueeze(1), x_BTD[:, 1:]], dim=1)
        return self.backbone.run_blocks(edited_BTD, self._start, self.backbone.n_blocks)[0]

    def logits(self, x_BTD: Tensor, cls_BD: Tensor) -> Tensor:
        """Class logits (B, C), with ``cls_BD`` as the class token at the site."""
        return self.backbone.classify(self.rest(x_BTD, cls_BD))


def check_site(sae: SAE, backbone: Backbone) -> None:
    """Raise SparsightError unless the SAE reads the class token in this model's residual stream."""
    site, tokens = sae.about["site"], sae.about["tokens"]
    if tokens != "cls" or sites.parse(site)[1] not in ("input", "output"):
        raise SparsightError(
            f"steering: the SAE reads {site}, tokens {tokens}; it must read blocks.<i>.input or .output, tokens cls"
        )
    sites.check(site, backbone.n_blocks, "steering: the SAE's site")
    if sae.d_in != backbone.d_in:
        raise SparsightError(
            f"steering: the SAE reads activations of width {sae.d_in}, {backbone.name} has {backbone.d_in}; "
            "take the SAE that was trained on this model"
        )


def attribution(place: Intervention, sae: SAE, split: Split, n_classes: int) -> Tensor:
    """Attribution of each class's logit to each latent, to first order: (C, F).

    It is the mean over the images of a class of z_i <d logit_c / d x, W_dec_i>, with the gradient at the class token of
    the site. This linearises what the class's logit would lose without the latent (activation times gradient; for SAEs
    arXiv 2403.19647, equation 2).

    Args:
        place: the SAE's site in the model.
        sae: the SAE.
        split: labelled images, usually train.
        n_classes: C.
    """
    total_CF = torch.zeros(n_classes, sae.d_sae, dtype=torch.float64, device=sae.W_dec.device)
    for images, x_BTD in place.streams(split):
        labels_B = torch.from_numpy(split.labels[images]).long().to(x_BTD.device)
        cls_BD = x_BTD[:, 0].clone().requires_grad_(True)
        logit_sum = place.logits(x_BTD, cls_BD).gather(1, labels_B[:, None]).sum()
        (gradient_BD,) = torch.autograd.grad(logit_sum, cls_BD)
        with torch.no_grad():
            effect_BF = sae.encode(x_BTD[:, 0]).dense() * (gradient_BD @ sae.W_dec.T)
            total_CF += torch.nn.functional.one_hot(labels_B, n_classes).double().T @ effect_BF.double()
    count_C = torch.bincount(torch.from_numpy(split.labels).long(), minlength=n_classes).clamp(min=1)
    return (total_CF / count_C.to(total_CF.device)[:, None]).float()
