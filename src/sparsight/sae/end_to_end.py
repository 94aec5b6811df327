"""End-to-end training: the loss is what a reconstruction changes in the rest of the model, not its own error.

Braun et al. 2024 (arXiv 2405.12241): ``e2e`` minimises KL(p || q), where p is the model's output and q its output with
the reconstruction in place of the activation. ``e2e-downstream`` (the paper's e2e+ds) adds the squared error of the
activations in later blocks. The backbone is frozen; the stored activations are its input, so that no block before the
site is run.

Shapes: B images, T tokens of an image, P tokens of an image that the SAE replaces, N = B P rows, D width (d_in),
C classes, L streams after the blocks from the site on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsight.activations.store import Rows
from sparsight.common import sites
from sparsight.sae.base import SAE, Loss
from sparsight.sae.trainer import Trainer

if TYPE_CHECKING:
    from sparsight.backbones.backbone import Backbone


@dataclass(frozen=True)
class EndToEndLoss(Loss):
    """total = kl + downstream + aux_coefficient * aux + penalty; ``reconstruction`` is only reported."""

    kl: Tensor
    """Mean KL(p || q) over the images, in nats."""
    downstream: Tensor | None
    """Mean over the later streams of their squared error, relative to the stream's variance in the batch; None for a
    loss without this term."""


class RestOfModel:
    """The frozen part of a backbone behind a site.

    Args:
        backbone: the model; its weights stop taking gradients.
        site: ``blocks.<i>.input`` or ``.output``.
        positions: positions of the P tokens that the SAE replaces, along the model's token axis.
        scale: factor from the SAE's units to the model's.
        downstream: whether later streams are compared.
    """

    def __init__(
        self, backbone: "Backbone", site: str, positions: Sequence[int], scale: float = 1.0, downstream: bool = False
    ) -> None:
        block, part = sites.parse(site)
        assert block is not None and part in ("input", "output"), "the configuration refuses other sites"
        self.backbone, self.downstream = backbone.requires_grad_(False), downstream
        self.start = block + (part == "output")
        self.positions, self.scale = torch.tensor(positions, device=backbone.device), scale

    def run(self, x_BTD: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Log-probabilities (B, C) of the classes, and the L streams (B, T, D); none if they are not compared."""
        streams = []
        for block in range(self.start, self.backbone.n_blocks):
            x_BTD, _ = self.backbone.run_blocks(x_BTD, block, block + 1)
            streams.append(x_BTD)
        return self.backbone.classify(x_BTD).log_softmax(dim=1), streams if self.downstream else []

    def rows(self, x_BTD: Tensor) -> Tensor:
        """The SAE's inputs, (N, D): the tokens that it replaces, in its units."""
        return x_BTD.index_select(1, self.positions).flatten(0, 1) / self.scale

    def spliced(self, x_BTD: Tensor, x_hat_ND: Tensor) -> Tensor:
        """The activations with reconstructions in their places, (B, T, D); other tokens stay."""
        x_hat_BPD = x_hat_ND.unflatten(0, (len(x_BTD), -1)) * self.scale
        return x_BTD.index_copy(1, self.positions, x_hat_BPD.to(x_BTD.dtype))


class EndToEndTrainer(Trainer):
    """Optimises SAEs of one site by the output of the model.

    Args:
        rest: the model behind the site.
        saes: the SAEs, on the model's device.
        options: see :class:`Trainer`.
    """

    def __init__(self, rest: RestOfModel, saes: Sequence[SAE], *options: Any) -> None:
        super().__init__(saes, *options)
        self.rest = rest
        self._images: Tensor
        self._clean: tuple[Tensor, list[Tensor]]

    def step(
        self, x: Tensor | np.ndarray | Mapping[str, Tensor | np.ndarray], labels: Tensor | np.ndarray | None = None
    ) -> list[Loss]:
        """:meth:`Trainer.step` on whole images.

        Args:
            x: all tokens at the site in the model's units, (B, T, D) or (B, T D), or the same by site.
            labels: (B,) class numbers; if given, the PASS term is added.
        """
        device = self.rest.positions.device
        images = torch.as_tensor(self._rows(0, x), device=device)
        self._images = images.view(len(images), -1, self.saes[0].d_in)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            self._clean = self.rest.run(self._images)  # once for all SAEs
        if labels is not None:
            labels = torch.as_tensor(labels).repeat_interleave(len(self.rest.positions))
        return super().step(self.rest.rows(self._images), labels)

    def _loss(self, sae: SAE, x: Tensor | np.ndarray) -> EndToEndLoss:
        local = sae.loss(x)
        log_p, clean = self._clean
        log_q, changed = self.rest.run(self.rest.spliced(self._images, local.x_hat))
        kl = nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        total = kl + sae.aux_coefficient * local.aux + local.penalty
        downstream = _relative_error(clean, changed) if clean else None
        if downstream is not None:
            total = total + downstream
        values = {**vars(local), "total": total}
        return EndToEndLoss(**values, kl=kl, downstream=downstream)


def _relative_error(clean: Sequence[Tensor], changed: Sequence[Tensor]) -> Tensor:
    """Mean over streams of sum ||h - h~||^2 / sum ||h - E h||^2; sums are over the batch's tokens, E is their mean."""
    errors = []
    for h_BTD, changed_BTD in zip(clean, changed, strict=True):
        variance = (h_BTD - h_BTD.mean(dim=(0, 1))).square().sum()
        errors.append((h_BTD - changed_BTD).square().sum() / variance)
    return torch.stack(errors).mean()


class WholeImages:
    """A :class:`sparsight.training.batches.Source` whose rows are all tokens of an image at a site, (images, T D)."""

    def __init__(self, rows: Rows) -> None:
        self._rows, self.dtype, self.chunk_images, self.tokens_per_image = rows, rows.dtype, rows.chunk_images, 1
        n_tokens, d_in = rows.tokens_per_image, rows.shape[1]
        self.shape = len(rows) // n_tokens, n_tokens * d_in

    def images(self, first: int, last: int, out: np.ndarray | None = None) -> np.ndarray:
        """The rows of images ``first`` to ``last`` - 1, written to ``out`` if given."""
        tokens = None if out is None else out.reshape(-1, self._rows.shape[1])  # a view: buffers are contiguous
        return self._rows.images(first, last, tokens).reshape(-1, self.shape[1])
