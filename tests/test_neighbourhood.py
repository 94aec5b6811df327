"""VS2++ in the model: its edits against arithmetic by hand, its tables, and what it refuses.

Shapes: Q queries, N neighbours of a query, D width (d_in), C classes.
"""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from conftest import make_backbone, make_manifest, write_store
from torch import Tensor

from sparsight import config, sae
from sparsight.activations.store import ActivationStore
from sparsight.backbones.backbone import Backbone
from sparsight.common import tables
from sparsight.common.errors import SparsightError
from sparsight.common.seeds import derive_seed
from sparsight.common.work import Work
from sparsight.images.manifest import Manifest
from sparsight.sae import SAE
from sparsight.steering.edits import Batch
from sparsight.steering.evaluate import steer
from sparsight.steering.intervention import place
from sparsight.steering.vs2pp import NeighbourSteering

D, F, K = 48, 96, 6
SITE = "blocks.2.output"
SPLITS = ("train", "val", "test")
Stores = dict[str, ActivationStore]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_manifest(tmp_path_factory.mktemp("images"), per_class=40)


@pytest.fixture(scope="module")
def backbone(manifest: Manifest) -> Backbone:
    """Random, with a threshold that gives half of the images each class: pseudo-labels and true ones differ."""
    backbone = make_backbone(classes=2)
    logits = backbone(images(backbone, manifest, "train"))
    backbone.model.head.bias[0] -= (logits[:, 0] - logits[:, 1]).quantile(0.3)
    return backbone


def images(backbone: Backbone, manifest: Manifest, split: str) -> Tensor:
    return backbone.normalize(manifest.split(split).batch(slice(None), backbone.preprocess))


@pytest.fixture(scope="module")
def stores(backbone: Backbone, manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Stores:
    found = {}
    for split in SPLITS:
        taps = backbone.taps(images(backbone, manifest, split), [SITE, "embedding"])
        values = {SITE: taps[SITE][:, 0].numpy(), "embedding": taps["embedding"].numpy()}
        n, folder = len(values[SITE]), tmp_path_factory.mktemp(split)
        path = write_store(folder, n, {SITE: (D,), "embedding": (D,)}, dtype="float32")
        for site, x in values.items():
            zarr.open_group(path, mode="r+")[site][:] = x
        found[split] = ActivationStore.open(path)
    return found


def make_sae() -> SAE:
    one = sae.create("topk", D, F, K, seed=0).requires_grad_(False)
    one.about = {"site": SITE, "tokens": "cls", "training": {"prototype_weight": 0.0}}
    return one


def around(n: int, backbone: Backbone, stores: Stores, manifest: Manifest) -> NeighbourSteering:
    labels = {split: manifest.split(split).labels for split in SPLITS}
    seeds = [derive_seed(0, "steering", "n-s0")]
    return NeighbourSteering(n, [place(make_sae(), backbone)], backbone, stores, stores, labels, seeds)


def nearest(stores: Stores, n: int) -> np.ndarray:
    """Rows of train nearest to every test image, (Q, N), by sorting cosine similarities."""
    q, b = (torch.from_numpy(stores[split].rows("embedding")[:]).double() for split in ("test", "train"))
    s = torch.nn.functional.normalize(q, dim=1) @ torch.nn.functional.normalize(b, dim=1).T
    return s.argsort(dim=1, descending=True)[:, :n].numpy()


def moved(x: Tensor, v: Tensor) -> Tensor:
    return (x + v) * (x.norm(dim=1) / (x + v).norm(dim=1))[:, None]


def test_one_neighbour_with_its_true_label_is_the_vector_by_hand(
    backbone: Backbone, stores: Stores, manifest: Manifest
) -> None:
    """With one neighbour the positives are that neighbour and there are no negatives: v = W_dec^T c of it."""
    edits, one = around(1, backbone, stores, manifest).edits("test")[0], make_sae()
    nearest_one = nearest(stores, 1)[:, 0]
    code = one.encode(torch.from_numpy(stores["train"].rows(SITE)[nearest_one])).dense()
    x = torch.from_numpy(stores["test"].rows(SITE)[:])
    got = edits["vs2++-majority"].apply(Batch(x, labels="oracle"), 1.5)
    torch.testing.assert_close(got, moved(x, 1.5 * code @ one.W_dec), rtol=1e-4, atol=1e-4)
    same = torch.from_numpy(manifest.split("train").labels[nearest_one] == manifest.split("test").labels)
    signed = torch.where(same, 1.5, -1.5)[:, None] * code @ one.W_dec  # a neighbour of another class is a negative
    got = edits["vs2++-query"].apply(Batch(x, labels="oracle"), 1.5)
    torch.testing.assert_close(got, moved(x, signed), rtol=1e-4, atol=1e-4)


def test_edits_are_their_definitions(backbone: Backbone, stores: Stores, manifest: Manifest) -> None:
    n, alpha, rows = 5, 2.0, slice(3, 12)
    found, one = around(n, backbone, stores, manifest), make_sae()
    (edits,) = found.edits("test")
    index = nearest(stores, n)[rows]
    x, embedding = (torch.from_numpy(stores["test"].rows(site)[:])[rows] for site in (SITE, "embedding"))
    z = one.encode(torch.from_numpy(stores["train"].rows(SITE)[:])).dense()
    train_x, train_e = (torch.from_numpy(stores["train"].rows(site)[:]) for site in (SITE, "embedding"))
    pseudo = {split: backbone(images(backbone, manifest, split)).argmax(dim=1).numpy() for split in SPLITS}
    truth = {split: manifest.split(split).labels for split in SPLITS}
    assert (pseudo["train"] != truth["train"]).mean() > 0.1

    def difference(values: Tensor, positive: np.ndarray, q: int) -> Tensor:
        sides = [values[index[q][side]] for side in (positive, ~positive)]
        means = [side.mean(dim=0) if len(side) else torch.zeros(values.shape[1]) for side in sides]
        return means[0] - means[1]

    for labels, of in (("predicted", pseudo), ("oracle", truth)):
        near = of["train"][index]
        top = []
        for line in near:
            counts = Counter(line.tolist())
            top.append(next(label for label in line if counts[label] == max(counts.values())))
        own = of["test"][rows]
        for method, wanted in (("vs2++-majority", np.array(top)), ("vs2++-query", own)):
            v = torch.stack([difference(z, near[q] == wanted[q], q) @ one.W_dec for q in range(len(x))])
            got = edits[method].apply(Batch(x, labels=labels, images=rows), alpha)
            torch.testing.assert_close(got, moved(x, alpha * v), rtol=1e-3, atol=1e-3)
            if method == "vs2++-majority":
                size = v.norm(dim=1, keepdim=True)
        positive = near == np.array(top)[:, None]
        plain = torch.stack([difference(train_x, positive[q], q) for q in range(len(x))])
        plain = plain / plain.norm(dim=1, keepdim=True) * size
        shuffled = (
            torch.stack([difference(z, positive[q], q) for q in range(len(x))]) @ one.W_dec[found.permutations[0]]
        )
        shuffled = shuffled / shuffled.norm(dim=1, keepdim=True) * size
        for method, v in (("mean-difference", plain), ("random-latents", shuffled)):
            got = edits[method].apply(Batch(x, labels=labels, images=rows), alpha)
            torch.testing.assert_close(got, moved(x, alpha * v), rtol=1e-3, atol=1e-3)
        shift = torch.stack([difference(train_e, positive[q], q) for q in range(len(x))])
        got = edits["embedding-steering"].apply(Batch(embedding, labels=labels, images=rows), alpha)
        torch.testing.assert_close(got, embedding + alpha * shift, rtol=1e-4, atol=1e-4)
        votes = edits["nearest-neighbours"].apply(Batch(torch.zeros(len(x), 2), labels=labels, images=rows), 1.0)
        assert votes.argmax(dim=1).tolist() == top
    unit = torch.nn.functional.normalize(train_e.double(), dim=1)
    w = (unit[index] * torch.nn.functional.normalize(embedding.double(), dim=1)[:, None]).sum(dim=2).clamp(min=0)
    r = ((w / w.sum(dim=1, keepdim=True))[:, :, None] * train_e[index]).sum(dim=1).float()
    got = edits["retrieval"].apply(Batch(embedding, images=rows), alpha)
    torch.testing.assert_close(got, embedding / 3 + r * 2 / 3, rtol=1e-4, atol=1e-4)


def test_strength_zero_changes_no_bit(backbone: Backbone, stores: Stores, manifest: Manifest) -> None:
    (edits,) = around(5, backbone, stores, manifest).edits("test")
    for method, edit in edits.items():
        x = torch.from_numpy(stores["test"].rows("embedding" if edit.at == "embedding" else SITE)[:])
        for labels in edit.labels:
            if edit.at != "logits":
                assert torch.equal(edit.apply(Batch(x, labels=labels), 0.0), x), method
                assert not torch.equal(edit.apply(Batch(x, labels=labels), 0.1), x), method


def run(folder: Path, backbone: Backbone, stores: Stores, manifest: Manifest, **options: Any) -> Path:
    section = config.Steering(**{"sae": "sae", "kind": "vs2++", "neighbours": 5, "strengths": (0.5, 2.0), **options})
    with Work(folder / "work", "key") as work:
        steer(section, {"n-s0": [make_sae()]}, backbone, stores, stores, manifest, 0, work, {})
        work.finish(folder / "out")
    return folder / "out"


def test_tables_say_what_the_model_says_of_edited_images(
    backbone: Backbone, stores: Stores, manifest: Manifest, tmp_path: Path
) -> None:
    out = run(tmp_path, backbone, stores, manifest)
    rows = [row for row in tables.read(out / "n-s0.parquet") if row["split"] == "test"]
    two = ("vs2++-majority", "vs2++-query", "mean-difference", "random-latents", "embedding-steering")
    expected = {(m, labels) for m in (*two, "nearest-neighbours") for labels in ("predicted", "oracle")}
    expected |= {(m, "none") for m in ("none", "reconstruct", "retrieval")}
    assert {(row["method"], row["labels"]) for row in rows} == expected and len(rows) == len(expected)
    (edits,) = around(5, backbone, stores, manifest).edits("test")
    x = images(backbone, manifest, "test")
    stream, truth = backbone.run_blocks(backbone.tokens(x), 0, 3)[0], torch.from_numpy(manifest.split("test").labels)
    for row in rows:
        if row["method"] in ("none", "reconstruct"):
            continue
        edit = edits[row["method"]]
        if edit.at == "site":
            cls = edit.apply(Batch(stream[:, 0], labels=row["labels"]), row["strength"])
            logits = backbone.classify(torch.cat([cls[:, None], stream[:, 1:]], dim=1))
        elif edit.at == "embedding":
            embedding = backbone.taps(x, ["embedding"])["embedding"]
            logits = backbone.classify_embedding(edit.apply(Batch(embedding, labels=row["labels"]), row["strength"]))
        else:
            logits = edit.apply(Batch(torch.zeros(len(x), 2), labels=row["labels"]), 1.0)
        assert row["accuracy"] == pytest.approx(float((logits.argmax(dim=1) == truth).double().mean())), row
    summary = json.loads((out / "n-s0.json").read_text())
    against = {(line["labels"], line["control"]) for line in summary["against_controls"]}
    controls = (*two[1:], "nearest-neighbours", "retrieval")
    assert against == {(labels, name) for labels in ("predicted", "oracle") for name in controls}
    again = run(tmp_path / "again", backbone, stores, manifest)
    for name in ("n-s0.safetensors", "n-s0.parquet", "n-s0.json"):
        assert (out / name).read_bytes() == (again / name).read_bytes()


def test_what_does_not_fit_is_refused(backbone: Backbone, stores: Stores, manifest: Manifest, tmp_path: Path) -> None:
    with pytest.raises(SparsightError, match=r"retrieval: 500 neighbours out of a bank of 56 rows; ask for 1 to 56"):
        run(tmp_path / "a", backbone, stores, manifest, neighbours=500)
    other = {**stores, "val": stores["train"]}
    with pytest.raises(SparsightError, match="a store of the val split has 56 images, the manifest 8; run the activ"):
        run(tmp_path / "b", backbone, other, manifest)
