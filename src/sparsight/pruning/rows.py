"""Rows of outcomes as tables: over all images, by class and by head.

Shapes: N images, L blocks, H heads.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from sparsight.backbones import macs
from sparsight.backbones.backbone import Backbone
from sparsight.common.intervals import loss_bound, paired, wilson
from sparsight.pruning.last_block import LastBlockInputs
from sparsight.pruning.masks import unpack
from sparsight.pruning.outcomes import Outcome
from sparsight.pruning.strategies import KINDS, NONE, Row, Strategies


@dataclass(frozen=True)
class Costs:
    """Multiply-accumulates of one image."""

    head: float
    """One head of one block, with what is coupled to it."""
    outside: float
    """Everything else."""
    last_mlp: float
    """The last block's MLP, but for what is coupled to heads."""
    encoder: dict[str, float]
    """Encoding one activation, by SAE."""
    probe: float

    @classmethod
    def of(cls, backbone: Backbone, strategies: Strategies, n_classes: int) -> "Costs":
        """Counted on a forward pass, or by their sizes."""
        encoder = {name: float(one.sae.d_in * one.sae.d_sae) for name, one in strategies.effects_by_sae.items()}
        mlp, probe = macs.of_mlp(backbone, backbone.n_blocks - 1), backbone.d_in * n_classes
        return cls(macs.of_head(backbone), macs.outside_heads(backbone), mlp, encoder, probe)

    def mean(self, row: Row, kept: float, kept_unsteered: float) -> float:
        """Everything that is computed to answer under a row.

        Args:
            row: the row.
            kept: heads kept in all blocks, mean over images.
            kept_unsteered: heads that the unsteered policy keeps in the last block: routing by its answer has
                already run that block once.
        """
        total = self.outside + kept * self.head
        if row.strategy == "skip-block":
            total -= self.last_mlp
        if row.labels == "predicted":
            total += kept_unsteered * self.head + self.last_mlp
        if row.labels == "probe":
            total += self.probe
        if KINDS[row.strategy].sae and row.strategy != "logit-bias-matched":
            total += self.encoder[row.sae]
        return total


def describe(
    row: Row, outcomes: dict[Row, Outcome], inputs: LastBlockInputs, costs: Costs, margin: float,
    images: np.ndarray | None = None,
) -> dict[str, Any]:  # fmt: skip
    """One row of a table, over all images or over ``images``."""
    images = np.arange(len(inputs)) if images is None else images
    own, none = outcomes[row], outcomes[NONE]
    hits, reference, usage = own.hits[images], none.hits[images], own.usage[images]
    before = inputs.before[images].sum(axis=(1, 2))
    H, n_blocks = inputs.n_heads, inputs.before.shape[1] + 1
    kept = float((before + H * usage).mean())
    bound = loss_bound(hits, reference)
    return {
        **row._asdict(),
        **wilson(hits),
        **paired(hits, reference),
        "loss_bound": bound,
        "non_inferior": bound < margin,
        "usage_last": float(usage.mean()),
        "usage_all": kept / (H * n_blocks),
        "macs": costs.mean(row, kept, float(H * none.usage[images].mean())),
        "distinct_masks_last": len(np.unique(own.codes[images])),
    }


def by_class(
    outcomes: dict[Row, Outcome], inputs: LastBlockInputs, classes: list[str], costs: Costs, margin: float
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """``per_class``, and ``per_head``, whose usages are those of the one head."""
    per_class, per_head = [], []
    for row, outcome in outcomes.items():
        keep_NH = unpack(outcome.codes, inputs.n_heads)
        for c, class_name in enumerate(classes):
            images = np.flatnonzero(inputs.labels == c)
            if len(images) == 0:
                continue  # an official split need not have every class
            about = {"class": c, "class_name": class_name}
            line = {**about, **describe(row, outcomes, inputs, costs, margin, images)}
            per_class.append(line)
            last_H = keep_NH[images].mean(axis=0)
            all_H = (inputs.before[images].mean(axis=0).sum(axis=0) + last_H) / (inputs.before.shape[1] + 1)
            for head, (last, all_) in enumerate(zip(last_H, all_H, strict=True)):
                per_head.append({"head": head, **line, "usage_last": float(last), "usage_all": float(all_)})
    return per_class, per_head
