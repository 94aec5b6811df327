"""Interchanges in a small Vision Transformer on coloured digits: the model from a site on, files, refusals."""

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, make_backbone
from extracted import Stores, extracted
from snakemake.utils import update_config

from sparsight import config, sae
from sparsight.backbones.backbone import Backbone
from sparsight.bench.at_site import AtSite
from sparsight.bench.attribute import Attribute
from sparsight.bench.disentangling import evaluate as stage
from sparsight.common import tables
from sparsight.common.errors import SparsightError
from sparsight.common.work import Work
from sparsight.images.manifest import Manifest, write_manifest
from sparsight.images.sources.coloured import COLOURS, ColouredDigits
from sparsight.images.sources.packaged import Mnist5000
from sparsight.pipeline.labels import check_labels
from sparsight.pipeline.run import load_run
from sparsight.report.chapters import disentangling
from sparsight.report.summary import _disentangled
from sparsight.sae import SAE
from sparsight.steering.intervention import place

D, SITES = 48, {"all": "blocks.1.input", "cls": "blocks.2.input"}
SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    path = tmp_path_factory.mktemp("images") / "manifest.parquet"
    write_manifest(config.Images(source="coloured-digits", images_per_class=50), 0, {}, 2, path)
    return Manifest(path)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return make_backbone(classes=10, img_size=28, patch_size=7, in_chans=3)


@pytest.fixture(scope="module")
def stores(backbone: Backbone, manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Stores:
    sites = [{"site": SITES["all"], "tokens": "all"}, SITES["cls"], "embedding"]
    section = config.schema.parse(config.Activations, {"sites": sites, "tokens": "cls"}, "activations")
    return extracted(backbone, manifest, tmp_path_factory.mktemp("stores"), sites=section.sites)


def random_saes(tokens: str) -> dict[str, SAE]:
    found = {}
    for seed in (0, 1):
        found[f"x-s{seed}"] = one = sae.create("topk", D, 40, 4, seed=seed).requires_grad_(False)
        one.about = {"site": SITES[tokens], "tokens": tokens}
    return found


@pytest.mark.parametrize("tokens", SITES)
def test_the_rest_of_the_model_gives_the_models_own_embedding(
    tokens: str, backbone: Backbone, stores: Stores, manifest: Manifest
) -> None:
    split, images = manifest.split("val"), np.array([7, 3, 20, 3])
    where = place(random_saes(tokens)["x-s0"], backbone)
    model = AtSite(backbone, where, split, stores["val"])
    whole = backbone.taps(backbone.normalize(split.batch(images, backbone.preprocess)), [SITES[tokens], "embedding"])
    stream = model.stream(images)
    torch.testing.assert_close(stream, whole[SITES[tokens]], atol=1e-5, rtol=1e-4)
    rows = model.rows(stream)
    assert rows.shape == ((17 * 4 if tokens == "all" else 4), D) and model.rows_per_image * 4 == len(rows)
    torch.testing.assert_close(model.embedding(stream, rows), whole["embedding"], atol=1e-4, rtol=1e-4)
    changed = model.embedding(
        stream, rows + 9 * torch.eye(len(rows), D) * (torch.arange(len(rows)) == 0)[:, None]
    )  # a row of the first image alone
    assert (changed - whole["embedding"]).abs().amax(dim=1).gt(1e-4).tolist() == [True, False, False, False]


def run(tokens: str, backbone: Backbone, stores: Stores, manifest: Manifest, folder: Path) -> dict[str, bytes]:
    section = config.Disentangle("x", ("label_name", "colour"), (1, 8, 60), 20, das_steps=3, das_batch_size=8)
    images = {part: manifest.split(part) for part in SPLITS}
    with Work(folder / "work", "key") as work:
        stage.evaluate(section, random_saes(tokens), backbone, stores, images, "x", 0, work, {"seed": 0})
        work.finish(folder / "out")
    return {path.name: path.read_bytes() for path in sorted((folder / "out").iterdir())}


@pytest.mark.parametrize("tokens", SITES)
def test_a_killed_stage_keeps_its_subspaces_and_ends_with_the_same_bytes(
    tokens: str, backbone: Backbone, stores: Stores, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(tokens, backbone, stores, manifest, tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):

        def killed(*_: Any) -> None:
            raise KeyboardInterrupt

        patch.setattr(stage, "outcomes", killed)
        run(tokens, backbone, stores, manifest, tmp_path / "killed")
    monkeypatch.setattr(stage, "train_subspaces", None)  # they are there
    assert run(tokens, backbone, stores, manifest, tmp_path / "killed") == whole
    assert list(whole) == ["x-absorption.parquet", "x.json", "x.parquet"]

    rows = tables.read(tmp_path / "whole" / "out" / "x.parquet")
    found = Counter((row["attribute"], row["method"], row["sae"], row["features"]) for row in rows)
    methods = [("sae", "x-s0"), ("sae", "x-s1"), ("random", "x-s0"), ("random", "x-s1")]
    methods += [("neurons", None), ("pca", None), ("das", None)]  # type: ignore[list-item]
    expected = {
        (a, m, s, n) for a in ("label_name", "colour") for m, s in methods for n in (1, 8)
    } | {(a, "everything", None, D) for a in ("label_name", "colour")}  # fmt: skip
    assert found == dict.fromkeys(expected, 1), "60 features are more than there are"
    summary = json.loads((tmp_path / "whole" / "out" / "x.json").read_text())
    assert {row["n"] for row in rows} == {summary["pairs"]["test"]} and summary["pairs"]["test"] > 5
    for row in rows:
        assert row["score"] == pytest.approx((row["cause"] + row["isolate"]) / 2)
        assert all(0 <= row[f"{key}_lo"] <= row[key] <= row[f"{key}_hi"] <= 1 for key in ("cause", "isolate", "score"))
        assert (row["rule"] is None) == (row["method"] in ("das", "everything"))
    absorbed = tables.read(tmp_path / "whole" / "out" / "x-absorption.parquet")
    for attribute, n_values in (("label_name", 10), ("colour", 6)):
        for method, name in methods[:4]:
            some = [r for r in absorbed if (r["attribute"], r["method"], r["sae"]) == (attribute, method, name)]
            assert some[0]["value"] is None and 1 < len(some) <= n_values + 1
            assert all(some[0][key] == sum(r[key] for r in some[1:]) for key in ("n", "silent", "absorbed"))

    chapter = disentangling.chapter(tmp_path / "whole" / "out" / "x.parquet")
    assert chapter["features"] == 8 and chapter["figures"]["disentangling-x"].startswith("<svg")
    flat = _disentangled(tmp_path / "whole" / "out" / "x.parquet")
    assert {"disentangling.x-s1.colour.sae.8.score", "disentangling.x.colour.das.1.cause",
            "disentangling.x-s0.label_name.random.absorption"} <= flat.keys()  # fmt: skip


def test_an_attribute_needs_a_column_and_two_values(manifest: Manifest, tmp_path: Path) -> None:
    train = manifest.split("train")
    assert Attribute.of("colour", train).values == sorted(COLOURS)
    with pytest.raises(SparsightError, match="no label column 'hue'; use label_name, colour"):
        Attribute.of("hue", train)
    section = config.Images(source="coloured-digits", classes=("3",), images_per_class=30)
    write_manifest(section, 0, {}, 2, tmp_path / "m.parquet")
    with pytest.raises(SparsightError, match="have 1 value of 'label_name'; an attribute needs two or more"):
        Attribute.of("label_name", Manifest(tmp_path / "m.parquet").split("train"))


def test_a_value_that_train_lacks_is_unknown(manifest: Manifest) -> None:
    split = manifest.split("test")
    known = Attribute("colour", ["blue", "red"]).numbers(split)
    assert [{"blue": 0, "red": 1}.get(str(name), -1) for name in split.column("colour")] == known.tolist()


def test_colours_are_independent_of_the_digit() -> None:
    source, grey = ColouredDigits(), Mnist5000()
    counts = Counter((item.label_name, item.columns["colour"]) for item in source.items())
    assert set(counts.values()) == {83, 84} and len(counts) == 60
    for item in source.items()[::997]:
        pixels = source.decode(item.uri, source.read(item.uri)).astype(int)
        shape = grey.decode("", grey.read(item.uri.replace("coloured-digits", "mnist-5000"))).astype(int)
        assert np.array_equal(pixels, shape * np.array(COLOURS[item.columns["colour"]]) // 255)


def overlay(**changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = copy.deepcopy(yaml.safe_load((ROOT / "params.yaml").read_text()))
    update_config(settings, yaml.safe_load((ROOT / "experiments" / "coloured-digits.yaml").read_text()))
    update_config(settings, copy.deepcopy(changes))
    return settings


def test_the_default_run_has_none_and_null_removes_it() -> None:
    assert load_run(yaml.safe_load((ROOT / "params.yaml").read_text())).disentangle == {}
    assert list(load_run(overlay()).disentangle) == ["middle", "last"]
    assert list(load_run(overlay(saes={"middle": None})).disentangle) == ["last"]
    assert list(load_run(overlay(disentangle={"last": None})).disentangle) == ["middle"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"disentangle": {"last": {"sae": "lst"}}}, "disentangle.last.sae: there is no 'lst'; known: middle, last"),
        ({"disentangle": {"last": {"attributes": ["colour"]}}}, "disentangle.last.attributes: name two label columns"),
        ({"disentangle": {"last": {"attributes": ["colour"] * 2}}}, "attributes: name two label columns"),
        ({"disentangle": {"last": {"features": [4, 1]}}}, "disentangle.last.features: give at least one, rising"),
        ({"disentangle": {"last": {"pairs": 0}}}, "disentangle.last.pairs: must be 1 or more, got 0"),
        ({"saes": {"last": {"site": "embedding"}}}, "'last' reads 'embedding'; interchanges are made in the residual"),
        (
            {"saes": {"last": {"site": None, "sites": ["blocks.3.input", "blocks.5.output"], "tokens": "cls"}}},
            "disentangle.last.sae: 'last' is a chain; name SAEs of one site",
        ),
        (
            {"activations": {"sites": [{"site": "blocks.3.input", "tokens": "all"}, "blocks.5.output"]}},
            "disentangle.middle: attributes are read from the embedding; add embedding to activations.sites",
        ),
    ],
)
def test_what_cannot_work_is_refused_at_planning(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SparsightError) as caught:
        load_run(overlay(**changes))
    assert message in str(caught.value)


def test_missing_columns_are_refused_as_soon_as_the_images_are_listed(manifest: Manifest) -> None:
    check_labels(load_run(overlay()), manifest)
    with pytest.raises(
        SparsightError, match=r"disentangle.last.attributes: the images have no label column 'hue'; use"
    ):
        check_labels(load_run(overlay(disentangle={"last": {"attributes": ["label_name", "hue"]}})), manifest)
