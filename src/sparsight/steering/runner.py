"""Forward passes of steered images, and the predictions under each row of a table.

Shapes: B batch, T tokens, R edited rows, D width (d_in), C classes, n images.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparsight.backbones.backbone import Backbone
from sparsight.common.errors import SparsightError
from sparsight.common.intervals import paired, wilson
from sparsight.images.split import Split
from sparsight.sae.base import SAE
from sparsight.steering import vs2
from sparsight.steering.edits import Batch, Edits
from sparsight.steering.intervention import Intervention


class Row(NamedTuple):
    """Key of a row of the table."""

    method: str
    strength: float
    labels: str


NONE, RECONSTRUCT = Row("none", 0.0, "none"), Row("reconstruct", 1.0, "none")


@dataclass(frozen=True)
class Outcome:
    """Predictions under one row."""

    hits: np.ndarray
    """bool (n,), whether the true class has the largest logit."""
    top5: np.ndarray
    """bool (n,), whether the true class is among the five largest logits."""

    def measures(self, reference: "Outcome") -> dict[str, float]:
        """n, accuracy, lo, hi; delta, delta_lo and delta_hi against a reference on the same images; top5."""
        return {**wilson(self.hits), **paired(self.hits, reference.hits), "top5": float(self.top5.mean())}


class Runner:
    """Forward passes of steered images. The blocks before the first site run once for all rows.

    Args and errors are those of :class:`Intervention`.
    """

    def __init__(self, saes: Sequence[SAE], backbone: Backbone, tokens: str | None = None) -> None:
        self.backbone, self.where = backbone, Intervention(saes, backbone, tokens)

    @torch.no_grad()
    def run(self, rows: Sequence[Row], edits: Edits, split: Split) -> dict[Row, Outcome]:
        """Predictions for each image of a split under each row."""
        outcomes = {row: Outcome(np.zeros(len(split), bool), np.zeros(len(split), bool)) for row in rows}
        for images, x_BTD in self.where.streams(split):
            truth_B = torch.from_numpy(split.labels[images]).long().to(x_BTD.device)
            last_BTD = self.where.rest(x_BTD)
            plain = {"logits": self.backbone.classify(last_BTD)}
            if any(edit.at == "embedding" for edit in edits[0].values()):
                plain["embedding"] = self.backbone.tower.pool(last_BTD)
            classes = {"none": None, "predicted": plain["logits"].argmax(dim=1), "oracle": truth_B}
            for row, outcome in outcomes.items():
                if row == NONE:
                    logits_BC = plain["logits"]
                elif row == RECONSTRUCT:
                    logits_BC = self.where.logits(x_BTD, lambda m, rows_RD: self.where.places[m].sae(rows_RD))
                elif (edit := edits[0][row.method]).at == "site":
                    logits_BC = self._steered(x_BTD, row, edits, classes[row.labels], images)
                else:
                    edited = edit.apply(Batch(plain[edit.at], classes[row.labels], row.labels, images), row.strength)
                    logits_BC = edited if edit.at == "logits" else self.backbone.classify_embedding(edited)
                first_B5 = logits_BC.topk(min(5, logits_BC.shape[1]), dim=1).indices
                outcome.hits[images] = (logits_BC.argmax(dim=1) == truth_B).cpu().numpy()
                outcome.top5[images] = (first_B5 == truth_B.unsqueeze(1)).any(dim=1).cpu().numpy()
        return outcomes

    def _steered(self, x_BTD: Tensor, row: Row, edits: Edits, classes_B: Tensor | None, images: slice) -> Tensor:
        """Class logits (B, C) under a method that edits the stream at every site."""

        def apply(m: int, rows_RD: Tensor) -> Tensor:
            n_tokens = self.where.places[m].n_tokens
            classes_R = None if classes_B is None else classes_B.repeat_interleave(n_tokens)
            return edits[m][row.method].apply(Batch(rows_RD, classes_R, row.labels, images, n_tokens), row.strength)

        return self.where.logits(x_BTD, apply)

    @torch.no_grad()
    def sample_fvu(self, split: Split, found: Sequence[vs2.Calibration]) -> list[np.ndarray]:
        """For each site, the FVU of every image in the unsteered stream, (n,)."""
        blocks: list[list[Tensor]] = [[] for _ in found]

        def measure(m: int, rows_RD: Tensor) -> Tensor:
            at = self.where.places[m]
            blocks[m].append(vs2.sample_fvu(at.sae, rows_RD.unflatten(0, (-1, at.n_tokens)), found[m].mean))
            return rows_RD

        for _, x_BTD in self.where.streams(split):
            self.where.rest(x_BTD, measure)
        return [torch.cat(own).cpu().numpy() for own in blocks]


def check_images(backbone: Backbone, split: Split, name: str) -> None:
    """Raise SparsightError unless a split has images, all of them labelled with the classes of the model."""
    if len(split) == 0:
        raise SparsightError(f"steering: the {name} split is empty; add images or change the fractions of images")
    missing = int((split.labels < 0).sum())
    if missing:
        raise SparsightError(
            f"steering: {missing} of {len(split)} images of the {name} split have no label; accuracy needs all of them"
        )
    if backbone.class_names is not None and backbone.class_names != split.classes:
        pairs = zip(backbone.class_names, split.classes, strict=False)
        mismatch = next((f": {a!r} against {b!r}" for a, b in pairs if a != b), "")
        raise SparsightError(
            f"steering: the model knows {len(backbone.class_names)} classes and the images have {len(split.classes)}, "
            f"which are not the same{mismatch}; run the backbone stage on these images"
        )
