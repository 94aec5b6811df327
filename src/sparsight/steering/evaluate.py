"""Steering inside the model: edit tokens at the sites of SAEs and classify the images.

No head is pruned here. A strength per method is chosen on val; only this strength is run on test. If accuracy on val is
unknown, because it has no labels or the model no classifier, nothing can be chosen and every strength is run on test.

Shapes: D width (d_in), n images.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from torch import Tensor

from sparsight import config
from sparsight.activations.store import ActivationStore
from sparsight.backbones import macs
from sparsight.backbones.backbone import Backbone
from sparsight.common import tables
from sparsight.common.errors import SparsightError
from sparsight.common.files import write_json
from sparsight.common.intervals import paired, wilson
from sparsight.common.progress import log
from sparsight.common.seeds import derive_seed
from sparsight.common.work import Work
from sparsight.images.labels import need_labels, needs, unlabelled
from sparsight.images.manifest import Manifest
from sparsight.images.split import Split
from sparsight.sae.base import SAE
from sparsight.steering import class_latents, controls, intervention, vectors, vs2
from sparsight.steering.edits import Edits
from sparsight.steering.intervention import Place
from sparsight.steering.runner import (
    ACCURACIES,
    EFFECTS,
    NONE,
    RECONSTRUCT,
    Outcome,
    Planned,
    Ran,
    Row,
    Runner,
    check_images,
    run_together,
)
from sparsight.steering.vs2pp import NeighbourSteering

Stores = Mapping[str, ActivationStore]
# Types of columns, which nothing but these would tell without labels or a classifier.
MEASURES = {name: pa.int64() if name in ("n", "images") else pa.float64() for name in (*ACCURACIES, *EFFECTS)}
_OF_CLASSES = {
    "method": pa.string(), "strength": pa.float64(), "labels": pa.string(), "split": pa.string(), "class": pa.int64(),
    "class_name": pa.string(), **{name: MEASURES[name] for name in ACCURACIES if name != "top5"},
}  # fmt: skip


def steer(
    section: config.Steering, saes: Mapping[str, Sequence[SAE]], backbone: Backbone, stores: Stores, finder: Stores,
    manifest: Manifest, seed: int, work: Work, record: dict[str, Any],
) -> None:  # fmt: skip
    """Write ``<name>.safetensors`` (the vectors), ``.parquet``, ``-classes.parquet`` and ``.json`` of every result.

    Each result is the same as if it were made alone.

    Args:
        saes: by name of the result, <section>-s<seed>, the SAE, and SAEs of later sites that steer in the same pass.
        stores: stores of the backbone by split: train, for kind ``vs2++`` also val and test.
        finder: for kind ``vs2++``, stores by split of the model whose embeddings find the neighbours.
        seed: the run's seed.

    Raises:
        SparsightError: an SAE that cannot steer these tokens (:func:`sparsight.steering.intervention.place`); images
            with other classes than the model's; images without labels or a model without a classifier, if the kind
            needs it.
    """
    splits = {split: manifest.split(split) for split in ("train", "val", "test")}
    own_section = f"steering.{next(iter(saes)).rpartition('-s')[0]}"
    need_labels(manifest, needs(own_section, section))
    for split, images in splits.items():
        check_images(backbone, images, split)
    runners = {name: Runner(one, backbone, section.tokens) for name, one in saes.items()}
    classifies = bool(backbone.n_classes)
    if section.kind != "vs2" and not classifies:
        raise SparsightError(
            f"{own_section}: kind {section.kind} reads the model's predictions, and {backbone.name} has no classifier "
            f"here; set {own_section} to null, or take kind vs2 or a model with a classifier"
        )
    if missing := unlabelled({split: splits[split] for split in ("val", "test")}):
        log(f"{missing} have no label: accuracy is of labelled images alone, or left out without any")
    n_classes, seeds = len(manifest.classes), {name: derive_seed(seed, "steering", name) for name in saes}
    found = [
        _prepare(section, name, runner, stores, finder, splits, n_classes, seeds[name])
        for name, runner in runners.items()
    ]
    choosable = classifies and bool((splits["val"].labels >= 0).any())
    first = "val" if choosable else "test"
    plans = [one.planned(first, None, section.strengths) for one in found]
    rows = [list(plan.rows[2:]) for plan in plans]
    ran = {first: run_together(plans, splits[first])}
    del plans  # with vectors for every image
    chosen = [_choose(*of_one) if choosable else [] for of_one in zip(rows, ran[first], strict=True)]
    if choosable:
        again = [one.planned("test", best, section.strengths) for one, best in zip(found, chosen, strict=True)]
        ran["test"] = run_together(again, splits["test"])
    about = {
        "format_version": 1,
        "sae": section.sae,
        "layers": list(section.layers),
        "tokens": section.tokens,
        "kind": section.kind,
        "classifies": classifies,
        "unlabelled": missing,
    }
    for i, one in enumerate(found):
        own = {split: of_split[i] for split, of_split in ran.items()}
        _write(section, one, rows[i], chosen[i], own, manifest, work, about, record)


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """What steers with one SAE, and its layers."""

    name: str
    runner: Runner
    edits: Callable[[str], Edits]
    """By split."""
    tensors: Callable[[], Sequence[Mapping[str, Tensor]]]
    """Of every site; to be called once all splits have run."""
    gates: Sequence[vs2.Calibration] = ()

    def planned(self, split: str, rows: Sequence[Row] | None, strengths: Sequence[float]) -> Planned:
        """The plan for a split: these rows, or every method at every strength."""
        edits = self.edits(split)
        if rows is None:
            rows = [
                Row(method, strength, labels)
                for method, edit in edits[0].items()
                for labels in edit.labels
                for strength in (strengths if edit.strength is None else (edit.strength,))
            ]
        return Planned(self.runner, [NONE, RECONSTRUCT, *rows], edits, self.gates)


def _prepare(
    section: config.Steering, name: str, runner: Runner, stores: Stores, finder: Stores, splits: Mapping[str, Split],
    n_classes: int, seed: int,
) -> _Prepared:  # fmt: skip
    """What is fitted on train for one SAE."""
    places = runner.where.places
    seeds = [derive_seed(seed, place.site) if m else seed for m, place in enumerate(places)]
    if section.kind == "class-latents":
        found = _rank(section, runner, stores["train"], splits["train"], n_classes, seeds)
        by_site = [controls.edits(at.sae, own, section.edit) for at, own in zip(places, found, strict=True)]
        return _Prepared(name, runner, lambda split: by_site, lambda: [vars(own) for own in found])
    if section.kind == "vs2":
        gates = [
            vs2.Calibration.of(at.sae, stores["train"].rows(at.site, at.tokens), own)
            for at, own in zip(places, seeds, strict=True)
        ]
        vs2_by_site = vs2.edits_by_site(places, gates)
        return _Prepared(name, runner, lambda split: vs2_by_site, lambda: [vars(own) for own in gates], gates)
    labels = {split: images.labels for split, images in splits.items()}
    neighbours = NeighbourSteering(section.neighbours, places, runner.backbone, stores, finder, labels, seeds)
    return _Prepared(name, runner, neighbours.edits, neighbours.tensors)


def _write(
    section: config.Steering, one: _Prepared, rows: list[Row], chosen: list[Row], ran: Mapping[str, Ran],
    manifest: Manifest, work: Work, about: dict[str, Any], record: dict[str, Any],
) -> None:  # fmt: skip
    """The files of one result."""
    name, places = one.name, one.runner.where.places
    outcomes = {split: of_split.outcomes for split, of_split in ran.items()}
    vectors.save(
        {at.site: own for at, own in zip(places, one.tensors(), strict=True)}, work.out / f"{name}.safetensors"
    )
    curve = []
    if one.gates:
        steered = [row for row in chosen or rows if row.method == rows[0].method]
        curves = {
            split: [gate_curve(section.quantiles, one.gates, row, outcomes[split], ran[split].fvu) for row in steered]
            for split in outcomes
        }
        best = None
        if chosen:
            ((_, on_val),) = curves["val"]
            best = max(section.quantiles, key=lambda q: (_accuracy(on_val[q]), -q))
            for split, ((_, gated),) in curves.items():
                outcomes[split][chosen[0]._replace(method=f"{chosen[0].method}-gated")] = gated[best]
        curve = [
            {"split": split, **line, "chosen": line["quantile"] == best}
            for split, of_split in curves.items()
            for lines, _ in of_split
            for line in lines
        ]
    on_test, labels = outcomes["test"], manifest.split("test").labels
    outcome_rows, class_rows = [], []
    for split, by_row in outcomes.items():
        for row, outcome in by_row.items():
            outcome_rows.append({**row._asdict(), "split": split, **outcome.measures(by_row[NONE])})
    for row, outcome in on_test.items():
        for c, class_name in enumerate(manifest.classes):
            key = {**row._asdict(), "split": "test", "class": c, "class_name": class_name}
            in_class = outcome.judged & (labels == c)
            if in_class.any():  # an official split need not have every class
                hits = outcome.hits[in_class]
                class_rows.append({**key, **wilson(hits), **paired(hits, on_test[NONE].hits[in_class])})
    tables.write(work.out / f"{name}.parquet", outcome_rows, MEASURES)
    tables.write(work.out / f"{name}-classes.parquet", class_rows, _OF_CLASSES)
    summary = {
        **about,
        "chosen_on_val": [row._asdict() for row in chosen],
        "gate": curve,
        "against_controls": against_controls(chosen, on_test) if on_test[NONE].judged.any() else [],
        "cost": cost(places, one.runner.backbone),
        "record": record,
    }
    write_json(work.out / f"{name}.json", summary)
    for line in outcome_rows:
        if line["split"] == "test":
            shown = {key: line[key] for key in ("accuracy", "changed", "kl", "cosine") if line[key] is not None}
            numbers = ", ".join(f"{key} {value:.4f}" for key, value in shown.items())
            log(f"{name}: {line['method']} x{line['strength']:g} ({line['labels']} labels): {numbers}")


def _rank(
    section: config.Steering, runner: Runner, train: ActivationStore, images: Split, n_classes: int,
    seeds: Sequence[int],
) -> list[class_latents.ClassLatents]:  # fmt: skip
    """The class latents at every site."""
    places, ranking = runner.where.places, section.ranking
    scores: Sequence[Any] = (
        intervention.attribution(runner.where, images, n_classes)
        if ranking == "attribution"
        else [ranking] * len(places)
    )
    return [
        class_latents.find(
            at.sae, train.rows(at.site, at.tokens), images.labels, n_classes, section.latents,
            derive_seed(seed, "random"), score,
        )
        for at, seed, score in zip(places, seeds, scores, strict=True)
    ]  # fmt: skip


def cost(places: Sequence[Place], backbone: Backbone) -> dict[str, float]:
    """Multiply-accumulates of steering one image (encode, and decode its active latents), and of the whole model."""
    edit = sum(at.n_tokens * (at.sae.macs_encode + at.sae.k * at.sae.d_in) for at in places)
    whole = backbone.n_blocks * backbone.n_heads * macs.of_head(backbone) + macs.outside_heads(backbone)
    return {"edit_macs": edit, "encoder_macs": whole, "share": edit / whole}


def _choose(rows: Sequence[Row], on_val: Ran) -> list[Row]:
    """Per method and kind of label, the row with the highest accuracy on val. Ties go to the lowest strength."""
    keys = dict.fromkeys((row.method, row.labels) for row in rows)
    return [
        max(
            (row for row in rows if (row.method, row.labels) == key),
            key=lambda row: (_accuracy(on_val.outcomes[row]), -row.strength),
        )
        for key in keys
    ]


def _accuracy(outcome: Outcome) -> float:
    return float(outcome.hits[outcome.judged].mean())


def against_controls(chosen: Sequence[Row], outcomes: Mapping[Row, Outcome]) -> list[dict[str, Any]]:
    """Paired differences in accuracy between the first method and every other one with the same labels or none."""
    return [
        {"method": row.method, "labels": row.labels, "control": control.method,
         **paired(*(outcomes[of].hits[outcomes[of].judged] for of in (row, control)))}
        for row in chosen if row.method == chosen[0].method
        for control in chosen if control.labels in (row.labels, "none") and control.method != row.method
    ]  # fmt: skip


def gate_curve(
    quantiles: Sequence[float], found: Sequence[vs2.Calibration], steered: Row, outcomes: Mapping[Row, Outcome],
    fvu: Sequence[np.ndarray],
) -> tuple[list[dict[str, Any]], dict[float, Outcome]]:  # fmt: skip
    """The gate at each quantile on the images of a split: measures, and outcomes by quantile.

    The gate steers images whose FVU is at most the threshold at every site, at the strength of ``steered``, a row of
    VS2. All others keep the unsteered prediction, so the gate needs no forward pass of its own.

    Args:
        found: the calibration of each site.
        fvu: for each site, the FVU of every image of the split, (n,).
    """
    steered_outcome, unsteered = outcomes[steered], outcomes[NONE]
    curve, gated = [], {}
    for quantile in quantiles:
        thresholds = [at_site.threshold(quantile) for at_site in found]
        steers = np.all([own <= most for own, most in zip(fvu, thresholds, strict=True)], axis=0)
        gated[quantile] = steered_outcome.where(steers, unsteered)
        setting: dict[str, Any] = {"quantile": quantile, "threshold": thresholds[0], "steered": float(steers.mean())}
        if len(found) > 1:
            setting["thresholds"] = thresholds
        curve.append({"strength": steered.strength, **setting, **gated[quantile].measures(unsteered)})
    return curve, gated
