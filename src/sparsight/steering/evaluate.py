"""Steering inside the model: edit the class token at the SAE's site and see what the classifier says.

No head is pruned here. Validation picks a strength per method; test sees that strength alone.

Shapes: B batch, D width (d_in), n images.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sparsight import config, tables
from sparsight.backbones import Backbone
from sparsight.errors import SparsightError
from sparsight.images import Manifest, Split
from sparsight.progress import say
from sparsight.sae.base import SAE
from sparsight.seeds import derive_seed
from sparsight.statistics import paired, wilson
from sparsight.steering import controls, latents
from sparsight.store import ActivationStore
from sparsight.work import Work, write_json

_IMAGES = 125
METHODS = ("class-latents", "random-latents", "mean-difference")


class Row(NamedTuple):
    """What one row of the table is about."""

    method: str
    strength: float
    labels: str


NONE, RECONSTRUCT = Row("none", 1.0, "none"), Row("reconstruct", 1.0, "none")


def steer(
    section: config.Steering, sae: SAE, backbone: Backbone, store: ActivationStore, manifest: Manifest,
    name: str, seed: int, work: Work, record: dict[str, Any],
) -> None:  # fmt: skip
    """Write ``<name>.safetensors`` (the vectors), ``.parquet``, ``-classes.parquet`` and ``.json``.

    Raises:
        SparsightError: an SAE of another place than the class token at the last block's input.
    """
    check_site(sae, backbone)
    train = manifest.split("train")
    found = latents.find(
        sae, store.rows(sae.about["site"]), train.labels, len(manifest.classes), section.latents,
        derive_seed(seed, "steering", name, "random"),
    )  # fmt: skip
    found.save(work.out / f"{name}.safetensors")
    every = [Row(m, s, labels) for m in METHODS for s in section.strengths for labels in ("predicted", "oracle")]
    on_val = _hits([NONE, RECONSTRUCT, *every], sae, found, backbone, manifest.split("val"))
    chosen = [
        max(
            (row for row in every if (row.method, row.labels) == key),
            key=lambda row: (on_val[row].mean(), -row.strength),
        )
        for key in dict.fromkeys((row.method, row.labels) for row in every)
    ]
    test = manifest.split("test")
    on_test = _hits([NONE, RECONSTRUCT, *chosen], sae, found, backbone, test)
    rows, class_rows = [], []
    for split, hits in (("val", on_val), ("test", on_test)):
        for row, hit in hits.items():
            rows.append({**row._asdict(), "split": split, **wilson(hit), **paired(hit, hits[NONE])})
    for row, hit in on_test.items():
        for c, class_name in enumerate(manifest.classes):
            about = {**row._asdict(), "split": "test", "class": c, "class_name": class_name}
            if (test.labels == c).any():  # an official split need not have every class
                class_rows.append({**about, **wilson(hit[test.labels == c])})
    tables.write(work.out / f"{name}.parquet", rows)
    tables.write(work.out / f"{name}-classes.parquet", class_rows)
    summary = {
        "format_version": 1,
        "sae": section.sae,
        "latents": section.latents,
        "chosen_on_val": [row._asdict() for row in chosen],
        "record": record,
    }
    write_json(work.out / f"{name}.json", summary)
    for line in rows:
        if line["split"] == "test":
            say(f"{line['method']} x{line['strength']:g} ({line['labels']} labels): accuracy {line['accuracy']:.4f}")


def check_site(sae: SAE, backbone: Backbone) -> None:
    """Raise SparsightError unless the SAE reads the class token at the last block's input."""
    site, tokens = sae.about["site"], sae.about["tokens"]
    wanted = f"blocks.{backbone.n_blocks - 1}.input"
    if (site, tokens) != (wanted, "cls"):
        raise SparsightError(f"steering: the SAE reads {site}, tokens {tokens}; steering acts on {wanted}, tokens cls")


@torch.no_grad()
def _hits(
    rows: list[Row], sae: SAE, found: latents.ClassLatents, backbone: Backbone, split: Split
) -> dict[Row, np.ndarray]:
    """Whether each image is classified correctly under each row, bool (n,)."""
    last = backbone.n_blocks - 1
    out = {row: np.zeros(len(split), bool) for row in rows}
    start = 0
    for pixels in split.batches(backbone.preprocess, _IMAGES, torch.get_num_threads()):
        x_BTD, _ = backbone.run_blocks(backbone.tokens(backbone.normalize(pixels)), 0, last)
        cls_BD = x_BTD[:, 0]
        truth = torch.from_numpy(split.labels[start : start + len(pixels)]).long().to(backbone.device)

        def predict(cls: Tensor, x: Tensor = x_BTD) -> Tensor:
            edited = torch.cat([cls[:, None], x[:, 1:]], dim=1)
            return backbone.classify(backbone.run_blocks(edited, last, last + 1)[0]).argmax(dim=1)

        unsteered = predict(cls_BD)
        for row in rows:
            predicted = unsteered
            if row == RECONSTRUCT:
                predicted = predict(sae(cls_BD))
            elif row != NONE:
                classes = truth if row.labels == "oracle" else unsteered
                predicted = predict(cls_BD + (row.strength - 1) * unit_edit(row.method, sae, cls_BD, classes, found))
            out[row][start : start + len(pixels)] = (predicted == truth).cpu().numpy()
        start += len(pixels)
    return out


def unit_edit(method: str, sae: SAE, cls_BD: Tensor, classes_B: Tensor, found: latents.ClassLatents) -> Tensor:
    """The edit of factor 2 by a method's name, (B, D); every method has the size of class-latents."""
    edit = latents.class_edit(sae, sae.encode(cls_BD).dense(), classes_B, found)
    if method == "class-latents":
        return edit
    if method == "random-latents":
        return controls.random_edit(sae, classes_B, found, edit.norm(dim=1))
    assert method == "mean-difference", method
    return controls.mean_difference_edit(classes_B, found, edit.norm(dim=1))
