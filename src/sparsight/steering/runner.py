"""Forward passes of steered images, and the predictions under each row of a table.

Shapes: B batch, T tokens, D width (d_in), C classes, n images.
"""

from collections.abc import Mapping, Sequence
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
from sparsight.steering.edits import Batch, Edit
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
    """Forward passes of steered images. The blocks before the site run once for all rows.

    Raises:
        SparsightError: an SAE of another model, or not of the class token in the residual stream.
    """

    def __init__(self, sae: SAE, backbone: Backbone) -> None:
        self.sae, self.backbone, self.place = sae, backbone, Intervention(sae, backbone)

    @torch.no_grad()
    def run(self, rows: Sequence[Row], edits: Mapping[str, Edit], split: Split) -> dict[Row, Outcome]:
        """Predictions for each image of a split under each row."""
        outcomes = {row: Outcome(np.zeros(len(split), bool), np.zeros(len(split), bool)) for row in rows}
        for images, x_BTD in self.place.streams(split):
            truth_B = torch.from_numpy(split.labels[images]).long().to(x_BTD.device)
            last_BTD = self.place.rest(x_BTD, x_BTD[:, 0])
            plain = {"site": x_BTD[:, 0], "logits": self.backbone.classify(last_BTD)}
            if any(edit.at == "embedding" for edit in edits.values()):
                plain["embedding"] = self.backbone.tower.pool(last_BTD)
            classes = {"none": None, "predicted": plain["logits"].argmax(dim=1), "oracle": truth_B}
            for row, outcome in outcomes.items():
                if row == NONE:
                    logits_BC = plain["logits"]
                elif row == RECONSTRUCT:
                    logits_BC = self.place.logits(x_BTD, self.sae(x_BTD[:, 0]))
                else:
                    edit = edits[row.method]
                    batch = Batch(plain[edit.at], classes[row.labels], row.labels, images)
                    logits_BC = self._logits(edit, x_BTD, edit.apply(batch, row.strength))
                first_B5 = logits_BC.topk(min(5, logits_BC.shape[1]), dim=1).indices
                outcome.hits[images] = (logits_BC.argmax(dim=1) == truth_B).cpu().numpy()
                outcome.top5[images] = (first_B5 == truth_B.unsqueeze(1)).any(dim=1).cpu().numpy()
        return outcomes

    def _logits(self, edit: Edit, x_BTD: Tensor, edited: Tensor) -> Tensor:
        if edit.at == "site":
            return self.place.logits(x_BTD, edited)
        return self.backbone.classify_embedding(edited) if edit.at == "embedding" else edited

    @torch.no_grad()
    def sample_fvu(self, split: Split, found: vs2.Calibration) -> np.ndarray:
        """FVU of every image, (n,)."""
        blocks = [vs2.sample_fvu(self.sae, x_BTD[:, 0], found.mean) for _, x_BTD in self.place.streams(split)]
        return torch.cat(blocks).cpu().numpy()


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
