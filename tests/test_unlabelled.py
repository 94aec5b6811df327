"""Images without labels, in all splits or in some: what is measured is the same, what cannot be is left out."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
import zarr
from conftest import ROOT, write_store
from studies import two_classes
from torch import Tensor
from unlabelled import unlabelled

from sparsight import config, sae
from sparsight.activations.store import ActivationStore
from sparsight.backbones.backbone import Backbone
from sparsight.backbones.fit import fit
from sparsight.common import tables
from sparsight.common.errors import SparsightError
from sparsight.common.work import Work
from sparsight.images.manifest import Manifest
from sparsight.pipeline.labels import check_labels
from sparsight.pipeline.run import load_run
from sparsight.pruning import evaluate as pruning
from sparsight.pruning import train as policies
from sparsight.sae import SAE
from sparsight.sae.evaluate import evaluate
from sparsight.steering import vs2
from sparsight.steering.edits import Batch
from sparsight.steering.evaluate import steer

SPLITS = ("train", "val", "test")
D, F, K, SITE = 48, 96, 6, "blocks.2.output"
Stores = Mapping[str, ActivationStore]


def at_site(backbone: Backbone, manifest: Manifest, split: str) -> Tensor:
    images = backbone.normalize(manifest.split(split).batch(slice(None), backbone.preprocess))
    return backbone.run_blocks(backbone.tokens(images), 0, 3)[0]


@pytest.fixture(scope="module")
def stores(labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Stores:
    """What the model of :func:`two_classes` has at the site and as embeddings."""
    made, backbone = {}, two_classes()
    for split in SPLITS:
        x = at_site(backbone, Manifest(labelled), split)
        path = write_store(tmp_path_factory.mktemp(split), len(x), {SITE: (D,), "embedding": (D,)}, dtype="float32")
        group = zarr.open_group(path, mode="r+")
        group[SITE][:], group["embedding"][:] = x[:, 0].numpy(), backbone.tower.pool(x).numpy()
        manifest = json.loads(path.with_suffix(".json").read_text())
        del manifest["checksum"]
        path.with_suffix(".json").write_text(json.dumps(manifest))
        made[split] = ActivationStore.open(path)
    return made


def make_sae() -> SAE:
    """Random, but centred where activations are, so that its error differs from image to image."""
    one = sae.create("topk", D, F, K, seed=0).requires_grad_(False)
    one.b_dec.copy_(torch.randn(D, generator=torch.Generator().manual_seed(0)))
    one.about = {"site": SITE, "tokens": "cls", "training": {"prototype_weight": 0.0}}
    return one


def evaluated(manifest: Manifest, stores: Stores, folder: Path) -> Path:
    images = {split: manifest.split(split) for split in SPLITS}
    with Work(folder / "w", "key") as work:
        evaluate({"s0": make_sae()}, two_classes(), stores, images, 0, work, {})
        work.finish(folder / "out")
    return folder / "out" / "s0"


def test_metrics_without_labels_are_those_that_need_none(
    labelled: Path, bare: Manifest, stores: Stores, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, out = evaluated(Manifest(labelled), stores, tmp_path / "whole"), evaluated(bare, stores, tmp_path / "bare")
    assert capsys.readouterr().err.count("16 of 16 images of test have no label: probes, classes of latents and") == 1
    expected, found = (json.loads((folder / "metrics.json").read_text()) for folder in (whole, out))
    needs_labels = {key for key in expected if key.startswith(("probing", "accuracy")) or "_delta" in key}
    assert len(needs_labels) > 20 and found.pop("n_labelled") == 0
    changes = {key: found.pop(key) for key in set(found) - set(expected)}
    assert changes.keys() == {
        f"changed_{mode}{end}" for mode in ("spliced", "mean_instead") for end in ("", "_lo", "_hi")
    }
    assert found == {key: value for key, value in expected.items() if key not in needs_labels}
    backbone, x = two_classes(), at_site(two_classes(), bare, "test")
    moved = torch.cat([make_sae()(x[:, 0])[:, None], x[:, 1:]], dim=1)
    different = backbone.classify(x).argmax(dim=1) != backbone.classify(moved).argmax(dim=1)
    assert changes["changed_spliced"] == float(different.double().mean()) > 0
    assert (out / "baselines.parquet").read_bytes() == (whole / "baselines.parquet").read_bytes()
    for name in ("probing", "latents"):
        assert pq.read_schema(out / f"{name}.parquet") == pq.read_schema(whole / f"{name}.parquet"), name
    assert tables.read(out / "probing.parquet") == []
    of_class = dict.fromkeys(("best_class", "class_precision", "selectivity"))
    latents = tables.read(whole / "latents.parquet")
    assert repr(tables.read(out / "latents.parquet")) == repr([{**row, **of_class} for row in latents])


def test_metrics_of_a_partly_labelled_split_are_of_its_labelled_images(
    labelled: Path, stores: Stores, tmp_path: Path
) -> None:
    manifest = unlabelled(labelled, tmp_path / "half.parquet", "train", "test", share=0.5)
    out = evaluated(manifest, stores, tmp_path / "half")
    metrics = json.loads((out / "metrics.json").read_text())
    train, test = (manifest.split(split).labels for split in ("train", "test"))
    codes = {split: make_sae().encode(np.asarray(stores[split].rows(SITE)[:])).dense().numpy() for split in SPLITS}
    assert metrics["n"] == len(test) == 16 and metrics["n_labelled"] == (test >= 0).sum() == 8
    assert {row["n"] for row in tables.read(out / "probing.parquet")} == {8}
    assert metrics["dead_train"] == int((codes["train"] == 0).all(axis=0).sum()), "of all images"
    means = np.stack([codes["train"][train == c].mean(axis=0) for c in range(2)])
    checked = 0
    for row in tables.read(out / "latents.parquet"):
        z = codes["test"][:, row["latent"]]
        if means[:, row["latent"]].any() and (z[test >= 0] > 0).any():
            assert row["best_class"] == means[:, row["latent"]].argmax()
            share = (test[(z > 0) & (test >= 0)] == row["best_class"]).mean()
            assert row["class_precision"] == pytest.approx(share)
            checked += 1
        else:
            assert np.isnan(row["class_precision"])
    assert checked > 10
    x = at_site(two_classes(), manifest, "test")
    right = two_classes().classify(x).argmax(dim=1).numpy() == test
    assert metrics["accuracy_untouched"] == right[test >= 0].mean()


@pytest.mark.parametrize("split", ["train", "test"])
def test_without_labels_of_train_or_of_test_there_are_no_probes(
    split: str, labelled: Path, stores: Stores, tmp_path: Path
) -> None:
    manifest = unlabelled(labelled, tmp_path / "m.parquet", split)
    out = evaluated(manifest, stores, tmp_path)
    assert tables.read(out / "probing.parquet") == []
    assert ("accuracy_spliced" in json.loads((out / "metrics.json").read_text())) == (split == "train")


def steered(manifest: Manifest, stores: Stores, backbone: Backbone, folder: Path, **options: Any) -> Path:
    section = config.Steering(**{"sae": "sae", "kind": "vs2", "strengths": (0.5, 4.0), **options})
    with Work(folder / "w", "key") as work:
        steer(section, {"s-s0": [make_sae()]}, backbone, stores, stores, manifest, 0, work, {})
        work.finish(folder / "out")
    return folder / "out"


@pytest.mark.parametrize("classes", [2, 0])
def test_vs2_without_labels_says_what_each_method_changes(
    classes: int, labelled: Path, bare: Manifest, stores: Stores, tmp_path: Path
) -> None:
    """Every row against the edit of the class token; without a classifier by the embedding."""
    backbone = two_classes()
    if not classes:
        backbone.model.reset_classifier(0)
    out = steered(bare, stores, backbone, tmp_path / "bare", quantiles=(0.5, 1.0))
    rows, summary = tables.read(out / "s-s0.parquet"), json.loads((out / "s-s0.json").read_text())
    names = ("vs2", "mean-extrapolation", "pca-extrapolation", "random-latents")
    keys = [("none", 0.0), ("reconstruct", 1.0), *((name, strength) for name in names for strength in (0.5, 4.0))]
    assert [(row["method"], row["strength"]) for row in rows] == keys, "every strength, on test alone"
    assert {row["split"] for row in rows} == {"test"} and {(row["n"], row["images"]) for row in rows} == {(0, 16)}
    assert summary["chosen_on_val"] == summary["against_controls"] == []
    assert (summary["classifies"], summary["unlabelled"]) == (
        bool(classes), "8 of 8 images of val, 16 of 16 images of test",
    )  # fmt: skip
    x, edits = (
        at_site(backbone, bare, "test"),
        vs2.edits(make_sae(), vs2.Calibration.of(make_sae(), stores["train"].rows(SITE), 0)),
    )
    for row in rows:
        cls = x[:, 0] if row["method"] == "none" else make_sae()(x[:, 0])
        if row["method"] == "random-latents":
            continue  # of another permutation
        if row["method"] in edits:
            cls = edits[row["method"]].apply(Batch(x[:, 0]), row["strength"])
        moved = torch.cat([cls[:, None], x[:, 1:]], dim=1)
        if classes:
            plain, changed = backbone.classify(x), backbone.classify(moved)
            share = float((plain.argmax(dim=1) != changed.argmax(dim=1)).double().mean())
            log_p, log_q = (logits.double().log_softmax(dim=1) for logits in (plain, changed))
            kl = float((log_p.exp() * (log_p - log_q)).sum(dim=1).mean())
            assert row["changed"] == share and row["kl"] == pytest.approx(kl, rel=1e-4, abs=1e-12)
            assert row["changed_lo"] <= share <= row["changed_hi"] and row["cosine"] is None
        else:
            cosine = torch.cosine_similarity(backbone.tower.pool(x), backbone.tower.pool(moved), dim=1)
            assert row["cosine"] == pytest.approx(float(cosine.mean()), abs=1e-5)
            assert row["changed"] is None and row["kl"] is None
        assert all(row[key] is None for key in ("accuracy", "lo", "hi", "delta", "delta_lo", "delta_hi", "top5"))
    key = "kl" if classes else "cosine"
    assert len({row[key] for row in rows}) > 5
    gate = summary["gate"]
    assert [(line["strength"], line["quantile"]) for line in gate] == [(0.5, 0.5), (0.5, 1), (4, 0.5), (4, 1)]
    assert not any(line["chosen"] for line in gate)
    if classes:
        whole = steered(Manifest(labelled), stores, backbone, tmp_path / "whole", quantiles=(0.5, 1.0))
        for suffix in (".parquet", "-classes.parquet"):
            schemas = [pq.read_schema(folder / f"s-s0{suffix}") for folder in (out, whole)]
            assert schemas[0] == schemas[1], suffix
        assert (out / "s-s0.safetensors").read_bytes() == (whole / "s-s0.safetensors").read_bytes()
        assert tables.read(out / "s-s0-classes.parquet") == []


def test_vs2_is_chosen_on_the_labelled_images_of_val_though_test_has_none(
    labelled: Path, stores: Stores, tmp_path: Path
) -> None:
    half = unlabelled(labelled, tmp_path / "half.parquet", "val", share=0.5)
    manifest = unlabelled(tmp_path / "half.parquet", tmp_path / "m.parquet", "test")
    assert (half.split("val").labels >= 0).sum() == 4
    out = steered(manifest, stores, two_classes(), tmp_path, strengths=(0.5, 1.0, 4.0))
    rows, summary = tables.read(out / "s-s0.parquet"), json.loads((out / "s-s0.json").read_text())
    on_val = [row for row in rows if row["split"] == "val"]
    assert {row["n"] for row in on_val} == {4} and {row["images"] for row in on_val} == {8}
    x, known = at_site(two_classes(), manifest, "val"), manifest.split("val").labels
    right = two_classes().classify(x).argmax(dim=1).numpy() == known
    assert on_val[0]["accuracy"] == right[known >= 0].mean()
    assert len(summary["chosen_on_val"]) == 4 and summary["against_controls"] == []
    on_test = [row for row in rows if row["split"] == "test"]
    assert len(on_test) == 7 and all(row["accuracy"] is None and row["kl"] is not None for row in on_test)


def test_neighbours_without_labels_have_no_oracle(bare: Manifest, stores: Stores, tmp_path: Path) -> None:
    out = steered(bare, stores, two_classes(), tmp_path, kind="vs2++", neighbours=5)
    rows = tables.read(out / "s-s0.parquet")
    assert {row["labels"] for row in rows} == {"none", "predicted"}
    assert {row["method"] for row in rows} >= {"vs2++-majority", "retrieval", "nearest-neighbours"}
    assert all((row["kl"] is None) == (row["method"] == "nearest-neighbours") for row in rows), "votes are no logits"


@pytest.mark.parametrize("kind", ["vs2++", "class-latents"])
def test_kinds_that_read_predictions_need_a_classifier(
    kind: str, labelled: Path, stores: Stores, tmp_path: Path
) -> None:
    backbone = two_classes()
    backbone.model.reset_classifier(0)
    with pytest.raises(
        SparsightError, match=r"steering.s: kind .* reads the model's predictions, .* set steering.s to"
    ):
        steered(Manifest(labelled), stores, backbone, tmp_path, kind=kind)


def test_what_needs_labels_is_refused_in_one_line(bare: Manifest, stores: Stores, tmp_path: Path) -> None:
    model, every = two_classes(), "64 of 64|56 of 56"
    missing = rf"^images: ({every}) images of train, .* images of val(, .* images of test)? have no label, which "
    cpu = torch.device("cpu")
    with Work(tmp_path / "w", "key") as work:
        trained = config.Backbone("timm/vit_tiny_patch16_224", epochs=1)
        with pytest.raises(SparsightError, match=missing + r"backbones.vit.training needs; set backbones.vit.epochs"):
            fit(trained, bare, "vit", 0, work, cpu, 1, {})
        with pytest.raises(SparsightError, match=missing + r"policies.heads needs; set policies.heads to null; or"):
            policies.fit(config.Policy("vit"), model, bare, "heads", 0, work, 1, {})
        section = config.Pruning(steering="s")
        with pytest.raises(SparsightError, match=missing + r"pruning needs; set pruning to null; or label"):
            pruning.evaluate(section, model, None, {}, bare, 0, work, 1, {})  # type: ignore[arg-type]
    with pytest.raises(SparsightError, match=missing + r"steering.s needs; set steering.s to null; or label"):
        steered(bare, stores, model, tmp_path, kind="class-latents")


def test_a_run_names_every_section_that_needs_labels_at_once(labelled: Path, bare: Manifest, tmp_path: Path) -> None:
    settings = yaml.safe_load((ROOT / "params.yaml").read_text())
    settings["saes"]["topk"]["prototype_weight"] = 0.8
    run = load_run(settings)
    check_labels(run, Manifest(labelled))
    with pytest.raises(SparsightError) as caught:
        check_labels(run, bare)
    sections = "backbones.vit.training, backbones.clip.training, saes.topk.prototype_weight, steering.class-latents, "
    sections += "policies.heads, pruning need; "
    assert sections in str(caught.value) and "\n" not in str(caught.value)
    assert "set saes.topk.prototype_weight to 0; set steering.class-latents to null" in str(caught.value)
    with pytest.raises(SparsightError, match=r"images of test have no label, which steering.class-latents, policies"):
        check_labels(run, unlabelled(labelled, tmp_path / "t.parquet", "test"))
    free = {**settings, "policies": {}, "pruning": None, "backbones": {"clip": {
        "model": "open_clip/ViT-B-32", "weights": str(labelled)}}, "saes": {"final": settings["saes"]["final"]},
        "steering": {"vs2": settings["steering"]["vs2"]}, "attribution": {}}  # fmt: skip
    check_labels(load_run(free), bare)
    free["other_images"] = {"away": {"source": "mnist-5000"}}
    with pytest.raises(SparsightError, match="images of val have no label, which other_images needs for the strength"):
        check_labels(load_run(free), bare)


def test_a_table_without_values_keeps_its_types(tmp_path: Path) -> None:
    types = {"a": pa.int64(), "b": pa.float64()}
    tables.write(tmp_path / "none", [], types)
    assert pq.read_schema(tmp_path / "none") == pa.schema(types)
    tables.write(tmp_path / "null", [{"c": "x", "b": None}], types)
    assert pq.read_schema(tmp_path / "null") == pa.schema({"c": pa.string(), "b": pa.float64()})
