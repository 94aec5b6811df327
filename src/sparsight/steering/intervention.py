"""Interventions at the sites of SAEs: the blocks before the first site run once, those after it once per edit.

Shapes: B batch, T tokens, R edited rows of a batch (image by image), D width (d_in), C classes, F latents (d_sae).
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsight.backbones.backbone import Backbone
from sparsight.common import sites
from sparsight.common.errors import SparsightError
from sparsight.common.progress import Progress
from sparsight.common.slices import row_slices
from sparsight.config.steering import steerable
from sparsight.images.split import Split
from sparsight.sae.base import SAE

_IMAGES, _ROWS = 125, 4096  # at most so many images, and of several tokens so many edited rows, at a time


@dataclass(frozen=True)
class Place:
    """The tokens of the residual stream that an SAE steers."""

    sae: SAE
    start: int
    """The block that reads the stream at the site; the number of blocks at the last block's output."""
    tokens: str
    """``cls``, ``registers``, ``patches``, ``all`` or ``mean``."""
    positions: slice
    """Of these tokens in the stream; for ``mean`` of the patches."""
    n_tokens: int
    """Rows that :meth:`read` gives for an image."""

    @property
    def site(self) -> str:
        """The SAE's site."""
        return str(self.sae.about["site"])

    def read(self, x_BTD: Tensor) -> Tensor:
        """The rows that are edited, (R, D)."""
        picked_BSD = x_BTD[:, self.positions]
        return picked_BSD.mean(dim=1) if self.tokens == "mean" else picked_BSD.flatten(0, 1)

    def write(self, x_BTD: Tensor, rows_RD: Tensor) -> Tensor:
        """The stream with edited rows. An edit of the mean over patches is added to every patch."""
        edited_BTD = x_BTD.clone(memory_format=torch.contiguous_format)
        if self.tokens == "mean":
            edited_BTD[:, self.positions] += (rows_RD - self.read(x_BTD)).unsqueeze(1)
        else:
            edited_BTD[:, self.positions] = rows_RD.unflatten(0, (len(x_BTD), -1))
        return edited_BTD


def place(sae: SAE, backbone: Backbone, tokens: str | None = None) -> Place:
    """Where an SAE steers a model.

    Args:
        tokens: ``cls``, ``registers``, ``patches`` or ``all``; None takes the tokens that the SAE reads.

    Raises:
        SparsightError: an SAE of another model, not of the residual stream or of other tokens; tokens that the
            model does not have.
    """
    site, own = sae.about["site"], sae.about["tokens"]
    block, part = sites.parse(site)
    if block is None or part not in ("input", "output"):
        raise SparsightError(f"steering: the SAE reads {site}; it must read blocks.<i>.input or .output")
    sites.check(site, backbone.n_blocks, "steering: the SAE's site")
    tokens = tokens or own
    if tokens not in steerable(own):
        raise SparsightError(
            f"steering: the SAE at {site} reads tokens {own}, which cannot steer {tokens}; train one on {tokens} or all"
        )
    registers = backbone.register_positions
    lacks = {
        "class token": tokens == "cls" and not backbone.class_positions,
        "register tokens": tokens == "registers" and not registers,
    }
    for kind in (kind for kind, missing in lacks.items() if missing):
        raise SparsightError(f"steering: {backbone.name} has no {kind}; steer its patches")
    if sae.d_in != backbone.d_in:
        raise SparsightError(
            f"steering: the SAE reads activations of width {sae.d_in}, {backbone.name} has {backbone.d_in}; "
            "take the SAE that was trained on this model"
        )
    every, patches = slice(0, backbone.n_prefix + backbone.n_patches), slice(*backbone.patch_positions)
    of_registers = slice(registers[0], registers[-1] + 1) if registers else slice(0)
    positions = {"cls": slice(0, 1), "registers": of_registers, "patches": patches, "mean": patches, "all": every}[
        tokens
    ]
    n_tokens = 1 if tokens == "mean" else positions.stop - positions.start
    return Place(sae, block + (part == "output"), tokens, positions, n_tokens)


def unchanged(m: int, rows_RD: Tensor) -> Tensor:
    """The edit that changes nothing."""
    return rows_RD


class Intervention:
    """Edits of the residual stream at one or several sites in the same pass.

    Args:
        saes: SAEs of different sites, in the order of the model.
        backbone: the model.
        tokens: see :func:`place`.

    Raises:
        SparsightError: see :func:`place`; sites in another order.
    """

    def __init__(self, saes: Sequence[SAE], backbone: Backbone, tokens: str | None = None) -> None:
        self.backbone, self.places = backbone, [place(sae, backbone, tokens) for sae in saes]
        if any(first.start >= second.start for first, second in itertools.pairwise(self.places)):
            names = ", ".join(where.site for where in self.places)
            raise SparsightError(f"steering: the sites are {names}; give each once, in the order of the model")

    @torch.no_grad()
    def streams(self, split: Split) -> Iterator[tuple[slice, Tensor]]:
        """In batches, the positions of the images in the split and the stream (B, T, D) at the first site."""
        at_once = max(1, min(_IMAGES, _ROWS // max(where.n_tokens for where in self.places)))
        windows = list(row_slices(len(split), at_once))
        pixels = split.stream(windows, self.backbone.preprocess, self.backbone.decoding_threads)
        with Progress(len(split), "images") as progress:
            for images, block in zip(windows, pixels, strict=True):
                x_BTD = self.backbone.tokens(self.backbone.normalize(block))
                yield images, self.backbone.run_blocks(x_BTD, 0, self.places[0].start)[0]
                progress(len(x_BTD))

    def rest(self, x_BTD: Tensor, edit: Callable[[int, Tensor], Tensor] = unchanged) -> Tensor:
        """The stream after the last block.

        Args:
            x_BTD: the stream at the first site.
            edit: from the number of a site and the rows (R, D) that arrive there, changed by the edits at earlier
                sites, to the edited rows.
        """
        x_BTD = self.to_last_site(x_BTD, edit)
        return self.backbone.run_blocks(x_BTD, self.places[-1].start, self.backbone.n_blocks)[0]

    def to_last_site(self, x_BTD: Tensor, edit: Callable[[int, Tensor], Tensor]) -> Tensor:
        """The edited stream at the last site; arguments as for :meth:`rest`."""
        block = self.places[0].start
        for m, where in enumerate(self.places):
            x_BTD, _ = self.backbone.run_blocks(x_BTD, block, where.start)
            x_BTD, block = where.write(x_BTD, edit(m, where.read(x_BTD))), where.start
        return x_BTD

    def logits(self, x_BTD: Tensor, edit: Callable[[int, Tensor], Tensor] = unchanged) -> Tensor:
        """Class logits (B, C); arguments as for :meth:`rest`."""
        return self.backbone.classify(self.rest(x_BTD, edit))


def attribution(where: Intervention, split: Split, n_classes: int) -> list[Tensor]:
    """Attribution of each class's logit to each latent, to first order: (C, F) for every site.

    It is the mean over the images of a class of z_i <d logit_c / d x, W_dec_i>, summed over the edited tokens x of the
    site. This linearises what the class's logit would lose without the latent (activation times gradient; for SAEs
    arXiv 2403.19647, equation 2).

    Args:
        where: the sites in the model.
        split: labelled images, usually train.
        n_classes: C.
    """
    totals = [
        torch.zeros(n_classes, at.sae.d_sae, dtype=torch.float64, device=at.sae.W_dec.device) for at in where.places
    ]
    for images, x_BTD in where.streams(split):
        labels_B = torch.from_numpy(split.labels[images]).long().to(x_BTD.device)
        arrived, gradients = _gradients(where, x_BTD, labels_B)
        with torch.no_grad():
            for at, rows_RD, gradient_RD, total_CF in zip(where.places, arrived, gradients, totals, strict=True):
                effect_RF = at.sae.encode(rows_RD).dense() * (gradient_RD @ at.sae.W_dec.T)
                effect_BF = effect_RF.unflatten(0, (-1, at.n_tokens)).sum(dim=1)
                total_CF += torch.nn.functional.one_hot(labels_B, n_classes).double().T @ effect_BF.double()
    count_C = torch.bincount(torch.from_numpy(split.labels).long(), minlength=n_classes).clamp(min=1)
    return [(total_CF / count_C.to(total_CF.device)[:, None]).float() for total_CF in totals]


def _gradients(where: Intervention, x_BTD: Tensor, labels_B: Tensor) -> tuple[list[Tensor], Sequence[Tensor]]:
    """For each site, the rows that arrive there and the gradient of their image's logit of its class, (R, D) each."""
    arrived: list[Tensor] = []
    followed: list[Tensor] = []

    def follow(m: int, rows_RD: Tensor) -> Tensor:
        arrived.append(rows_RD.detach())
        followed.append(rows_RD if rows_RD.requires_grad else rows_RD.clone().requires_grad_(True))
        return followed[m]

    logit_sum = where.logits(x_BTD, follow).gather(1, labels_B[:, None]).sum()
    return arrived, torch.autograd.grad(logit_sum, followed)
