"""Forward passes of steered images, and the predictions under each row of a table.

Shapes: B batch, T tokens, R edited rows, D width (d_in), C classes, n images.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparsight.backbones.backbone import Backbone
from sparsight.common.devices import sent
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


ACCURACIES = ("n", "accuracy", "lo", "hi", "delta", "delta_lo", "delta_hi", "top5")
EFFECTS = ("images", "changed", "changed_lo", "changed_hi", "kl", "cosine")
NONE, RECONSTRUCT = Row("none", 0.0, "none"), Row("reconstruct", 1.0, "none")


@dataclass(frozen=True)
class Outcome:
    """What the model makes of each image under one row."""

    judged: np.ndarray
    """bool (n,), whether the image has a label and the model a classifier; the same in all rows."""
    hits: np.ndarray
    """bool (n,), whether the true class has the largest logit."""
    top5: np.ndarray
    """bool (n,), whether the true class is among the five largest logits."""
    predicted: np.ndarray
    """int64 (n,), the class of the largest logit; -1 without a classifier."""
    kl: np.ndarray
    """float64 (n,), KL(none || row) of the predictions in nats; NaN without a classifier, and for a method that only
    votes for classes."""
    cosine: np.ndarray
    """float64 (n,), cosine of the embedding with that of ``none``; NaN with a classifier."""

    @classmethod
    def empty(cls, judged: np.ndarray) -> "Outcome":
        """An outcome to be filled."""
        n, number = len(judged), np.full(len(judged), np.nan)
        return cls(judged, np.zeros(n, bool), np.zeros(n, bool), np.full(n, -1), number, number.copy())

    def where(self, steers: np.ndarray, otherwise: "Outcome") -> "Outcome":
        """The same for the images of ``steers``, bool (n,), and another outcome for the rest."""
        pairs = zip(_arrays(self), _arrays(otherwise), strict=True)
        return Outcome(*(np.where(steers, ours, other) for ours, other in pairs))

    def measures(self, reference: "Outcome") -> dict[str, Any]:
        """What a row of the table says; None is what labels or a classifier would tell.

        Of the ``n`` judged images: accuracy, lo, hi; delta, delta_lo and delta_hi against the reference; top5. Of all
        ``images``: changed, changed_lo and changed_hi, the share with another prediction than the reference; mean kl;
        mean cosine.
        """
        hits, judged = self.hits[self.judged], bool(self.judged.any())
        measures = dict.fromkeys(ACCURACIES) | {"n": 0}
        if judged:
            measures |= {**wilson(hits), **paired(hits, reference.hits[self.judged])}
            measures["top5"] = float(self.top5[self.judged].mean())
        changed = wilson(self.predicted != reference.predicted) if (reference.predicted >= 0).all() else {}
        effects = {"changed": changed.get("accuracy"), "changed_lo": changed.get("lo"), "changed_hi": changed.get("hi")}
        means = {name: float(values.mean()) for name, values in (("kl", self.kl), ("cosine", self.cosine))}
        numbers = {name: None if np.isnan(mean) else mean for name, mean in means.items()}
        return {**measures, "images": len(self.judged), **effects, **numbers}


def _arrays(outcome: Outcome) -> tuple[np.ndarray, ...]:
    return (outcome.judged, outcome.hits, outcome.top5, outcome.predicted, outcome.kl, outcome.cosine)


class Runner:
    """Forward passes of steered images. The blocks before the first site run once for all rows.

    Args and errors are those of :class:`Intervention`.
    """

    def __init__(self, saes: Sequence[SAE], backbone: Backbone, tokens: str | None = None) -> None:
        self.backbone, self.where = backbone, Intervention(saes, backbone, tokens)
        self.classifies = bool(backbone.n_classes)

    def fill(
        self, outcomes: Mapping[Row, Outcome], edits: Edits, images: slice, x_BTD: Tensor, plain: Mapping[str, Tensor],
        truth_B: Tensor,
    ) -> None:  # fmt: skip
        """Run each row on a batch and write down what the model makes of it.

        Args:
            images: positions of the batch in the split.
            x_BTD: the stream at the first site.
            plain: what the unsteered model gives: ``logits`` and, if an edit needs it, ``embedding``.
            truth_B: true classes, -1 without a label.
        """
        classes = {"none": None, "predicted": plain["logits"].argmax(dim=1), "oracle": truth_B}
        for row, outcome in outcomes.items():
            if row == NONE:
                out = plain["logits"]
            elif row == RECONSTRUCT:
                out = self.read(self.where.rest(x_BTD, lambda m, rows_RD: self.where.places[m].sae(rows_RD)))
            elif (edit := edits[0][row.method]).at == "site":
                out = self._steered(x_BTD, row, edits, classes[row.labels], images)
            else:
                edited = edit.apply(Batch(plain[edit.at], classes[row.labels], row.labels, images), row.strength)
                out = edited if edit.at == "logits" else self.backbone.classify_embedding(edited)
            votes = row.method in edits[0] and edits[0][row.method].at == "logits"
            self._write(outcome, images, out, plain["logits"], truth_B, votes)

    def read(self, last_BTD: Tensor) -> Tensor:
        """Class logits (B, C) from the stream after the last block; without a classifier the embedding (B, E)."""
        return self.backbone.classify(last_BTD) if self.classifies else self.backbone.tower.pool(last_BTD)

    def _steered(self, x_BTD: Tensor, row: Row, edits: Edits, classes_B: Tensor | None, images: slice) -> Tensor:
        """What :meth:`read` gives under a method that edits the stream at every site."""

        def apply(m: int, rows_RD: Tensor) -> Tensor:
            n_tokens = self.where.places[m].n_tokens
            classes_R = None if classes_B is None else classes_B.repeat_interleave(n_tokens)
            return edits[m][row.method].apply(Batch(rows_RD, classes_R, row.labels, images, n_tokens), row.strength)

        return self.read(self.where.rest(x_BTD, apply))

    def _write(self, outcome: Outcome, images: slice, out: Tensor, plain: Tensor, truth_B: Tensor, votes: bool) -> None:
        """Fill in a batch: ``out`` is what :meth:`read` gives with the edit (or votes), ``plain`` without it."""
        if not self.classifies:
            outcome.cosine[images] = torch.cosine_similarity(out.double(), plain.double(), dim=1).cpu().numpy()
            return
        predicted_B, first_B5 = out.argmax(dim=1), out.topk(min(5, out.shape[1]), dim=1).indices
        found = [predicted_B, predicted_B == truth_B, (first_B5 == truth_B.unsqueeze(1)).any(dim=1)]
        if not votes:
            log_p, log_q = plain.double().log_softmax(dim=1), out.double().log_softmax(dim=1)
            found.append((log_p.exp() * (log_p - log_q)).sum(dim=1))
        numbers = torch.stack([values.double() for values in found]).cpu().numpy()  # one wait for a GPU
        arrays = (outcome.predicted, outcome.hits, outcome.top5, outcome.kl)
        for array, values in zip(arrays, numbers, strict=False):
            array[images] = values


class Ran(NamedTuple):
    """What came of a plan."""

    outcomes: dict[Row, Outcome]
    """By row."""
    fvu: list[np.ndarray]
    """For each site's gate, the FVU of every image in the unsteered stream, (n,)."""


class Planned(NamedTuple):
    """What is to be run with the SAEs of a runner."""

    runner: Runner
    rows: Sequence[Row]
    edits: Edits
    gates: Sequence[vs2.Calibration] = ()


@torch.no_grad()
def run_together(plans: Sequence[Planned], split: Split) -> list[Ran]:
    """Predictions for each image of a split under each row; without a classifier, changes of the embedding.

    The blocks before the first site, and the unsteered model, run once for all plans. Each plan has the results that it
    has alone.

    Args:
        plans: of runners of one backbone, sites and tokens.
        split: the images.
    """
    first = plans[0].runner
    judged = (split.labels >= 0) & first.classifies
    outcomes = [{row: Outcome.empty(judged) for row in plan.rows} for plan in plans]
    fvu: list[list[list[Tensor]]] = [[[] for _ in plan.gates] for plan in plans]

    def measured(m: int, rows_RD: Tensor) -> Tensor:
        for plan, blocks in zip(plans, fvu, strict=True):
            if plan.gates:
                at = plan.runner.where.places[m]
                x_BSD = rows_RD.unflatten(0, (-1, at.n_tokens))
                blocks[m].append(vs2.sample_fvu(at.sae, x_BSD, plan.gates[m].mean))
        return rows_RD

    for images, x_BTD in first.where.streams(split):
        truth_B = sent(torch.from_numpy(split.labels[images]).long(), x_BTD.device)
        last_BTD = first.where.rest(x_BTD, measured)
        plain = {"logits": first.read(last_BTD)}
        if any(edit.at == "embedding" for plan in plans for edit in plan.edits[0].values()):
            plain["embedding"] = first.backbone.tower.pool(last_BTD)
        for plan, own in zip(plans, outcomes, strict=True):
            plan.runner.fill(own, plan.edits, images, x_BTD, plain, truth_B)
    return [
        Ran(own, [torch.cat(of_site).cpu().numpy() for of_site in blocks])
        for own, blocks in zip(outcomes, fvu, strict=True)
    ]


def check_images(backbone: Backbone, split: Split, name: str) -> None:
    """Raise SparsightError unless a split has images, and labels, if any, of the model's classes."""
    if len(split) == 0:
        raise SparsightError(f"steering: the {name} split is empty; add images or change the fractions of images")
    if backbone.class_names is not None and backbone.class_names != split.classes:
        pairs = zip(backbone.class_names, split.classes, strict=False)
        mismatch = next((f": {a!r} against {b!r}" for a, b in pairs if a != b), "")
        raise SparsightError(
            f"steering: the model knows {len(backbone.class_names)} classes and the images have {len(split.classes)}, "
            f"which are not the same{mismatch}; run the backbone stage on these images"
        )
