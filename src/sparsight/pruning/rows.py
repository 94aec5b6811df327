"""Outcomes as table rows: over all images, by class and by head.

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
    """One head of one block, with the part of the MLP that is coupled to it."""
    outside: float
    """Everything but heads."""
    last_mlp: float
    """The last block's MLP, without the parts coupled to heads."""
    encoder: dict[str, float]
    """Encoding one activation, by SAE."""
    probe: float

    @classmethod
    def of(cls, backbone: Backbone, strategies: Strategies, n_classes: int) -> "Costs":
        """Count on a forward pass, or compute from the sizes."""
        encoder = {name: float(effects.sae.macs_encode) for name, effects in strategies.effects_by_sae.items()}
        mlp, probe = macs.of_mlp(backbone, backbone.n_blocks - 1), backbone.d_in * n_classes
        return cls(macs.of_head(backbone), macs.outside_heads(backbone), mlp, encoder, probe)

    def mean(self, row: Row, kept: float, kept_unsteered: float) -> float:
        """All multiply-accumulates needed for a prediction under a row, mean over images.

        Args:
            row: the row.
            kept: heads kept in all blocks, mean over images.
            kept_unsteered: heads that the unsteered policy keeps in the last block, mean over images. Routing by its
                prediction runs that block once more.
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
    outcome, none = outcomes[row], outcomes[NONE]
    hits, reference, usage = outcome.hits[images], none.hits[images], outcome.usage[images]
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
        "distinct_masks_last": len(np.unique(outcome.codes[images])),
    }


def by_class(
    outcomes: dict[Row, Outcome], inputs: LastBlockInputs, classes: list[str], costs: Costs, margin: float
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of ``per_class`` and of ``per_head``; usages in ``per_head`` are those of the one head."""
    per_class, per_head = [], []
    for row, outcome in outcomes.items():
        keep_NH = unpack(outcome.codes, inputs.n_heads)
        for c, class_name in enumerate(classes):
            images = np.flatnonzero(inputs.labels == c)
            if len(images) == 0:
                continue  # an official split need not have every class
            key = {"class": c, "class_name": class_name}
            line = {**key, **describe(row, outcomes, inputs, costs, margin, images)}
            per_class.append(line)
            last_H = keep_NH[images].mean(axis=0)
            all_H = (inputs.before[images].mean(axis=0).sum(axis=0) + last_H) / (inputs.before.shape[1] + 1)
            for head, (usage_last, usage_all) in enumerate(zip(last_H, all_H, strict=True)):
                per_head.append({"head": head, **line, "usage_last": float(usage_last), "usage_all": float(usage_all)})
    return per_class, per_head
