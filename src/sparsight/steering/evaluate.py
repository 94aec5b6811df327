"""Steering inside the model: edit the class token at the SAE's site and see what the classifier says.

No head is pruned here. Validation picks a strength per method; test sees that strength alone. The blocks before the
site are computed once for all methods and strengths.

Shapes: B batch, T tokens, D width (d_in), C classes, n images.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparsight import config, sites, tables
from sparsight.backbones import Backbone
from sparsight.errors import SparsightError
from sparsight.images import Manifest, Split
from sparsight.progress import Progress, say
from sparsight.sae.base import SAE
from sparsight.seeds import derive_seed
from sparsight.statistics import paired, wilson
from sparsight.steering import controls, latents, vs2
from sparsight.steering.edits import Batch, Edit
from sparsight.store import ActivationStore
from sparsight.windows import in_order
from sparsight.work import Work, write_json

_IMAGES = 125


class Row(NamedTuple):
    """What one row of the table is about."""

    method: str
    strength: float
    labels: str


NONE, RECONSTRUCT = Row("none", 0.0, "none"), Row("reconstruct", 1.0, "none")


@dataclass(frozen=True)
class Outcome:
    """What the classifier said under one row."""

    hits: np.ndarray
    """bool (n,), the true class comes first."""
    top5: np.ndarray
    """bool (n,), the true class is among the first five."""


def steer(
    section: config.Steering, sae: SAE, backbone: Backbone, store: ActivationStore, manifest: Manifest,
    name: str, seed: int, work: Work, record: dict[str, Any],
) -> None:  # fmt: skip
    """Write ``<name>.safetensors`` (the vectors), ``.parquet``, ``-classes.parquet`` and ``.json``.

    Args:
        store: of the train split.

    Raises:
        SparsightError: an SAE of another model, or not of the class token in the residual stream.
    """
    check_site(sae, backbone)
    seed = derive_seed(seed, "steering", name)
    if section.kind == "class-latents":
        labels = manifest.split("train").labels
        found = latents.find(
            sae, store.rows(sae.about["site"]), labels, len(manifest.classes), section.latents,
            derive_seed(seed, "random"),
        )  # fmt: skip
        found.save(work.out / f"{name}.safetensors")
        every, gate = controls.edits(sae, found), None
    else:
        gate = vs2.Calibration.of(sae, store, seed)
        gate.save(work.out / f"{name}.safetensors")
        every = vs2.edits(sae, gate)
    runner = _Runner(sae, backbone, every)
    rows = [Row(name, s, labels) for name, edit in every.items() for labels in edit.labels for s in section.strengths]
    val, test = manifest.split("val"), manifest.split("test")
    on_val = runner.run([NONE, RECONSTRUCT, *rows], val)
    chosen = _choose(rows, on_val)
    on_test = runner.run([NONE, RECONSTRUCT, *chosen], test)
    curve: list[dict[str, Any]] = []
    if gate is not None:
        curve = _gate(section.quantiles, gate, chosen[0], [(val, on_val), (test, on_test)], runner)
    lines, class_lines = [], []
    for split, outcomes in (("val", on_val), ("test", on_test)):
        for row, outcome in outcomes.items():
            lines.append({**row._asdict(), "split": split, **_measures(outcome, outcomes[NONE])})
    for row, outcome in on_test.items():
        for c, class_name in enumerate(manifest.classes):
            about = {**row._asdict(), "split": "test", "class": c, "class_name": class_name}
            own = test.labels == c
            if own.any():  # an official split need not have every class
                hits = outcome.hits[own]
                class_lines.append({**about, **wilson(hits), **paired(hits, on_test[NONE].hits[own])})
    tables.write(work.out / f"{name}.parquet", lines)
    tables.write(work.out / f"{name}-classes.parquet", class_lines)
    summary = {
        "format_version": 1,
        "sae": section.sae,
        "kind": section.kind,
        "chosen_on_val": [row._asdict() for row in chosen],
        "gate": curve,
        "against_controls": _against_controls(chosen, on_test),
        "cost": cost(sae, backbone),
        "record": record,
    }
    write_json(work.out / f"{name}.json", summary)
    for line in lines:
        if line["split"] == "test":
            say(f"{line['method']} x{line['strength']:g} ({line['labels']} labels): accuracy {line['accuracy']:.4f}")


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


def cost(sae: SAE, backbone: Backbone) -> dict[str, float]:
    """Multiply-accumulates of steering one image (encode, and decode its active latents) and of the whole encoder."""
    edit = sae.d_in * sae.d_sae + sae.k * sae.d_in
    whole = backbone.n_blocks * float(backbone.macs(backbone.n_heads)) + backbone.macs_outside_attention
    return {"edit_macs": edit, "encoder_macs": whole, "share": edit / whole}


def _choose(rows: Sequence[Row], on_val: Mapping[Row, Outcome]) -> list[Row]:
    """Per method and labels the strength of the highest accuracy on val, the least among equals."""
    keys = dict.fromkeys((row.method, row.labels) for row in rows)
    return [
        max(
            (row for row in rows if (row.method, row.labels) == key),
            key=lambda row: (on_val[row].hits.mean(), -row.strength),
        )
        for key in keys
    ]


def _against_controls(chosen: Sequence[Row], outcomes: Mapping[Row, Outcome]) -> list[dict[str, Any]]:
    """The paired difference in accuracy between the first method and every other one, by labels."""
    return [
        {"method": one.method, "labels": one.labels, "control": other.method,
         **paired(outcomes[one].hits, outcomes[other].hits)}
        for one in chosen if one.method == chosen[0].method
        for other in chosen if other.labels == one.labels and other.method != one.method
    ]  # fmt: skip


def _gate(
    quantiles: Sequence[float], found: vs2.Calibration, steered: Row,
    splits: Sequence[tuple[Split, dict[Row, Outcome]]], runner: "_Runner",
) -> list[dict[str, Any]]:  # fmt: skip
    """Add the row ``vs2-gated`` to the outcomes of both splits; returns the curve over all quantiles.

    An image whose FVU is above the threshold keeps the unsteered answer, so the gate needs no forward pass of its own.
    Its strength is the one chosen for VS2; the quantile is chosen on val.
    """
    curve: list[dict[str, Any]] = []
    best = quantiles[0]
    for number, (split, outcomes) in enumerate(splits):
        fvu = runner.sample_fvu(split, found)
        gated = {}
        for quantile in quantiles:
            steers = fvu <= found.threshold(quantile)
            one, none = outcomes[steered], outcomes[NONE]
            gated[quantile] = Outcome(np.where(steers, one.hits, none.hits), np.where(steers, one.top5, none.top5))
            about = {"quantile": quantile, "threshold": found.threshold(quantile), "steered": float(steers.mean())}
            measures = _measures(gated[quantile], none)
            curve.append({"split": ("val", "test")[number], "strength": steered.strength, **about, **measures})
        if number == 0:
            best = max(quantiles, key=lambda q: (gated[q].hits.mean(), -q))
        outcomes[steered._replace(method=f"{steered.method}-gated")] = gated[best]
    return [{**line, "chosen": line["quantile"] == best} for line in curve]


def _measures(outcome: Outcome, reference: Outcome) -> dict[str, float]:
    top5 = float(outcome.top5.mean())
    return {**wilson(outcome.hits), **paired(outcome.hits, reference.hits), "top5": top5}


class _Runner:
    """Forward passes of steered images."""

    def __init__(self, sae: SAE, backbone: Backbone, edits: Mapping[str, Edit]) -> None:
        self.sae, self.backbone, self.edits = sae, backbone, edits
        block, part = sites.parse(sae.about["site"])
        assert block is not None
        self.start = block + (part == "output")

    @torch.no_grad()
    def run(self, rows: Sequence[Row], split: Split) -> dict[Row, Outcome]:
        """What the classifier says of each image under each row."""
        found = {row: Outcome(np.zeros(len(split), bool), np.zeros(len(split), bool)) for row in rows}
        with Progress(len(split), "images") as progress:
            for images, x_BTD in self._at_site(split):
                truth = torch.from_numpy(split.labels[images]).long().to(x_BTD.device)
                predicted = self._logits(x_BTD, x_BTD[:, 0]).argmax(dim=1)
                classes = {"none": None, "predicted": predicted, "oracle": truth}
                for row, outcome in found.items():
                    logits = self._logits(x_BTD, self._steered(row, Batch(x_BTD[:, 0], classes[row.labels])))
                    first = logits.topk(min(5, logits.shape[1]), dim=1).indices == truth.unsqueeze(1)
                    outcome.hits[images] = (logits.argmax(dim=1) == truth).cpu().numpy()
                    outcome.top5[images] = first.any(dim=1).cpu().numpy()
                progress(len(x_BTD))
        return found

    @torch.no_grad()
    def sample_fvu(self, split: Split, found: vs2.Calibration) -> np.ndarray:
        """FVU of every image, (n,)."""
        blocks = [vs2.sample_fvu(self.sae, x_BTD[:, 0], found.mean) for _, x_BTD in self._at_site(split)]
        return torch.cat(blocks).cpu().numpy()

    def _at_site(self, split: Split) -> Iterator[tuple[slice, Tensor]]:
        """The residual stream (B, T, D) that arrives at the site, and whose it is."""
        windows = list(in_order(len(split), _IMAGES))
        pixels = split.stream(windows, self.backbone.preprocess, torch.get_num_threads())
        for images, block in zip(windows, pixels, strict=True):
            x_BTD = self.backbone.tokens(self.backbone.normalize(block))
            yield images, self.backbone.run_blocks(x_BTD, 0, self.start)[0]

    def _steered(self, row: Row, batch: Batch) -> Tensor:
        if row == NONE:
            return batch.x
        return self.sae(batch.x) if row == RECONSTRUCT else self.edits[row.method].apply(batch, row.strength)

    def _logits(self, x_BTD: Tensor, cls_BD: Tensor) -> Tensor:
        edited_BTD = torch.cat([cls_BD.unsqueeze(1), x_BTD[:, 1:]], dim=1)
        return self.backbone.classify(self.backbone.run_blocks(edited_BTD, self.start, self.backbone.n_blocks)[0])
