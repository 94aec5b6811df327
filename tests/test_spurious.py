"""Spurious features: a planted latent, choices on val alone, what is fitted, the source, files and refusals."""

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
from torch import Tensor

from sparsight import config, sae
from sparsight.backbones.backbone import Backbone
from sparsight.bench.attribute import Attribute
from sparsight.bench.spurious import evaluate
from sparsight.bench.spurious.cells import Cells, balanced
from sparsight.bench.spurious.edits import Key, WithoutDirection, predictions
from sparsight.bench.spurious.evaluate import Part
from sparsight.bench.spurious.fit import Fitted, fit
from sparsight.bench.spurious.statistics import accuracies, hits, tabulate, worst
from sparsight.common import tables
from sparsight.common.errors import SparsightError
from sparsight.common.work import Work
from sparsight.images.manifest import Manifest, write_manifest
from sparsight.images.sources.biased import BiasedDigits
from sparsight.images.sources.coloured import COLOURS
from sparsight.images.sources.packaged import Mnist5000
from sparsight.pipeline.labels import check_labels
from sparsight.pipeline.run import load_run
from sparsight.report.chapters import spurious
from sparsight.report.summary import _spurious
from sparsight.sae.metrics.baselines import Method, of_sae

D, F = 16, 16
SHAPE = (2, 2)
"""Classes and values."""


class MadeUpRows:
    """As :class:`sparsight.bench.site_rows.SiteRows`, of made-up activations; the embedding is the same."""

    tokens = 1

    def __init__(self, x_nD: np.ndarray) -> None:
        self.x_nD, self.n_images = x_nD, len(x_nD)

    def head(self, rows: int) -> Tensor:
        return torch.from_numpy(self.x_nD[:rows]).float()

    def windows(self) -> Any:
        for start in range(0, self.n_images, 100):
            window = slice(start, min(start + 100, self.n_images))
            yield window, torch.from_numpy(self.x_nD[window]).float(), self.x_nD[window]

    def embeddings(self, window: slice) -> np.ndarray:
        return self.x_nD[window]


class MadeUp:
    """A model that reads the class (latents 0 and 1) weakly and the group (latents 2 and 3) strongly."""

    rows_per_image = 1

    def __init__(self, x_nD: np.ndarray) -> None:
        self.x = torch.from_numpy(x_nD).float()

    def stream(self, images: np.ndarray) -> Tensor:
        return self.x[torch.from_numpy(images)]

    def rows(self, stream: Tensor) -> Tensor:
        return stream

    def logits(self, stream: Tensor, rows_RD: Tensor) -> Tensor:
        score = rows_RD[:, 1] - rows_RD[:, 0] + 3 * (rows_RD[:, 3] - rows_RD[:, 2])
        return torch.stack([-score, score], dim=1)


def images(n: int, agree: float, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Activations of latents 0 and 1 by class, 2 and 3 by group and others at random; labels; cells."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(2, size=n)
    groups = np.where(generator.random(n) < agree, labels, 1 - labels)
    x_nD = np.zeros((n, D))
    x_nD[np.arange(n), labels] = 1
    x_nD[np.arange(n), 2 + groups] = 1
    x_nD[np.arange(n), generator.integers(4, D, size=n)] = 1
    return x_nD + 0.01 * generator.random((n, D)), labels, labels * 2 + groups


def planted() -> Method:
    one = sae.create("topk", D, F, 3, seed=0).requires_grad_(False)
    one.W_dec.copy_(torch.eye(D))
    one.W_enc.copy_(torch.eye(D))
    return of_sae(one)


COLOUR = Attribute("colour", ["green", "red"])
SECTION = config.Spurious("x", "colour", latents=(1, 2, 3), strengths=(0.5, 1.0), draws=8)


@pytest.fixture(scope="module")
def fitted() -> Fitted:
    x_nD, _, cells = images(800, 0.95, 0)
    return fit(MadeUpRows(x_nD), cells, SHAPE, balanced(cells, 0), {"x-s0": planted()})  # type: ignore[arg-type]


def part(n: int, seed: int) -> Part:
    x_nD, labels, cells = images(n, 0.5, seed)
    return Part(MadeUp(x_nD), x_nD, labels, cells)


def test_ablating_the_planted_latents_restores_the_worst_group(fitted: Fitted) -> None:
    order = evaluate.ranked(fitted.scores["x-s0"])
    assert set(order[:2]) == {2, 3}, "the latents of the group, not those of the class"
    methods, val, test = {"x-s0": planted()}, part(200, 1), part(600, 2)
    edits = evaluate.tried(SECTION, methods, fitted)
    scores = {key: worst(one, val.labels, val.cells) for key, one in evaluate.predicted(val, edits, fitted).items()}
    chosen = evaluate.choose(scores)
    own = next(key for key in chosen if key.method == "sae")
    assert (own.latents, own.strength) == (2, 1.0)
    edits |= evaluate.controls(chosen, methods, fitted, SECTION.draws, 0)
    some = {key: edit for key, edit in edits.items() if key in chosen or key.draw}
    on_test = evaluate.predicted(test, some, fitted)
    found = accuracies(
        hits({key: one == test.labels for key, one in on_test.items()}, chosen), test.cells, 0
    )  # fmt: skip
    assert found["none"].worst == 0 and found["sae/x-s0"].worst == 1
    assert found["random_latents/x-s0"].worst < 0.5, "random latents do not"
    assert all(found[method].worst > 0.95 for method in ("mean_difference", "leace", "last_layer"))
    cells = Cells(["a", "b"], COLOUR)
    _, groups, flat = tabulate(
        hits({key: one == test.labels for key, one in on_test.items()}, chosen), chosen, scores, test.cells, cells, 0
    )
    assert flat["x-s0"]["worst_sae_minus_random_latents_lo"] > 0.5 and flat["x-s0"]["latents"] == 2
    assert {row["n"] for row in groups if row["method"] == "none"} == set(Counter(test.cells.tolist()).values())


def test_the_mean_difference_is_that_within_classes(fitted: Fitted) -> None:
    expected = np.zeros(D)
    expected[2], expected[3] = 1, -1
    direction = fitted.direction_D.numpy()
    assert abs(direction @ expected) / np.sqrt(2) == pytest.approx(1, abs=0.02), "not along the class"
    rows = torch.randn(5, D)
    edited = WithoutDirection(fitted.direction_D, fitted.centre_D, 1.0)(rows, lambda method: None)
    along = (edited - fitted.centre_D) @ fitted.direction_D
    torch.testing.assert_close(along, torch.zeros(5), atol=1e-5, rtol=0)
    half = WithoutDirection(fitted.direction_D, fitted.centre_D, 0.5)(rows, lambda method: None)
    torch.testing.assert_close(half, (rows + edited) / 2)


def test_leace_leaves_no_linear_trace_of_the_group_on_balanced_train(fitted: Fitted) -> None:
    x_nD, _, cells = images(800, 0.95, 0)
    even = balanced(cells, 0)
    assert len(set(Counter(cells[even].tolist()).values())) == 1
    erased = fitted.eraser(torch.from_numpy(x_nD[even].astype(np.float32)).double()).numpy()
    difference = erased[cells[even] % 2 == 0].mean(axis=0) - erased[cells[even] % 2 == 1].mean(axis=0)
    np.testing.assert_allclose(difference, 0, atol=1e-6)


def test_standardised_differences_are_those_of_a_plain_computation() -> None:
    x_nD, _, cells = images(400, 0.8, 5)
    x_nD[cells == 3] = 0  # a cell that train lacks
    cells = np.where(cells == 3, -1, cells)
    method = planted()
    found = fit(MadeUpRows(x_nD), cells, SHAPE, balanced(cells, 0), {"x": method})  # type: ignore[arg-type]
    z = method.encode(torch.from_numpy(x_nD).float()).toarray().astype(float)[cells >= 0]
    own = cells[cells >= 0]
    within = sum((own == cell).mean() * z[own == cell].var(axis=0) for cell in range(3))
    difference = np.abs(z[own == 0].mean(axis=0) - z[own == 1].mean(axis=0)) / 2  # class 1 has one value alone
    np.testing.assert_allclose(found.scores["x"], difference / np.sqrt(within), rtol=1e-4, atol=1e-6)


def test_of_equal_scores_the_fewest_latents_are_chosen() -> None:
    scores = {
        Key("sae", "x", 4, 1.0): (0.8, 0.9), Key("sae", "x", 2, 1.0): (0.8, 0.9), Key("sae", "x", 1, 2.0): (0.8, 0.8),
        Key("sae", "x", 2, 0.5): (0.8, 0.9), Key("none"): (0.1, 0.9), Key("sae", "y", 1, 1.0): (0.2, 0.2),
    }  # fmt: skip
    assert set(evaluate.choose(scores)) == {Key("sae", "x", 2, 0.5), Key("none"), Key("sae", "y", 1, 1.0)}


def test_intervals_are_those_of_images_drawn_within_cells() -> None:
    generator = np.random.default_rng(0)
    cells = np.repeat([0, 1], [400, 100])
    right = generator.random(500) < np.where(cells == 0, 0.9, 0.6)
    one = accuracies({"a": right[None], "b": ~right[None]}, cells, 0)["a"]
    rate = right[cells == 1].mean()
    assert one.worst == rate and one.mean == pytest.approx(right.mean())
    assert one.drawn_worst.std() == pytest.approx(np.sqrt(rate * (1 - rate) / 100), rel=0.1)


def test_every_draw_of_random_latents_has_a_worst_group_of_its_own() -> None:
    """A draw that turns every answer round is as bad in the other group; the mean over draws has no worst group."""
    cells = np.repeat([0, 1], [60, 40])
    one = accuracies({"random_latents": np.stack([cells == 0, cells == 1])}, cells, 0)["random_latents"]
    assert one.worst == 0 and (one.drawn_worst == 0).all()
    assert one.by_cell.tolist() == [0.5, 0.5] and one.mean == pytest.approx(0.5)


def test_edits_do_not_depend_on_batches(monkeypatch: pytest.MonkeyPatch, fitted: Fitted) -> None:
    edits = evaluate.tried(SECTION, {"x-s0": planted()}, fitted)
    whole = predictions(MadeUp(images(50, 0.5, 3)[0]), 50, edits)
    monkeypatch.setattr("sparsight.bench.spurious.edits._IMAGES", 7)
    again = predictions(MadeUp(images(50, 0.5, 3)[0]), 50, edits)
    assert all((whole[key] == again[key]).all() for key in edits)


SITES = {"all": "blocks.1.input", "cls": "blocks.2.output"}
SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    path = tmp_path_factory.mktemp("images") / "manifest.parquet"
    write_manifest(config.Images(source="biased-digits", images_per_class=100), 0, {}, 2, path)
    return Manifest(path)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return make_backbone(classes=2, img_size=28, patch_size=7, in_chans=3)


@pytest.fixture(scope="module")
def stores(backbone: Backbone, manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Stores:
    sites = [{"site": SITES["all"], "tokens": "all"}, SITES["cls"], "embedding"]
    section = config.schema.parse(config.Activations, {"sites": sites, "tokens": "cls"}, "activations")
    return extracted(backbone, manifest, tmp_path_factory.mktemp("stores"), sites=section.sites)


def run(tokens: str, backbone: Backbone, stores: Stores, splits: dict[str, Any], folder: Path) -> Path:
    saes = {}
    for seed in (0, 1):
        saes[f"x-s{seed}"] = one = sae.create("topk", backbone.d_in, 40, 4, seed=seed).requires_grad_(False)
        one.about = {"site": SITES[tokens], "tokens": tokens}
    section = config.Spurious("x", "colour", latents=(1, 4, 80), strengths=(1.0, 4.0), draws=2)
    with Work(folder / "work", "key") as work:
        evaluate.evaluate(section, saes, backbone, stores, splits, "x", 0, work, {"seed": 0})
        work.finish(folder / "out")
    return folder / "out" / "x.parquet"


@pytest.mark.parametrize("tokens", SITES)
def test_choices_read_val_alone_and_files_are_the_same_twice(
    tokens: str, backbone: Backbone, stores: Stores, manifest: Manifest, tmp_path: Path
) -> None:
    splits = {split: manifest.split(split) for split in SPLITS}
    path = run(tokens, backbone, stores, splits, tmp_path / "first")
    again = run(tokens, backbone, stores, splits, tmp_path / "again")
    for file in sorted(path.parent.iterdir()):
        assert file.read_bytes() == (again.parent / file.name).read_bytes()
    other = {split: copy.copy(one) for split, one in splits.items()}
    other["test"].__dict__["labels"] = 1 - splits["test"].labels
    swapped = run(tokens, backbone, stores, other, tmp_path / "other")
    keys = ("method", "sae", "latents", "strength", "worst_val", "mean_val")
    first, changed = ([[row[key] for key in keys] for row in tables.read(file)] for file in (path, swapped))
    assert first == changed, "the labels of test decide nothing"
    summary, of_swapped = (json.loads(file.with_suffix(".json").read_text()) for file in (path, swapped))
    assert summary["chosen"] == of_swapped["chosen"] and summary["saes"] != of_swapped["saes"]

    rows = tables.read(path)
    found = Counter((row["method"], row["sae"]) for row in rows)
    both = [(method, f"x-s{seed}") for method in ("sae", "random_latents") for seed in (0, 1)]
    shared = [(method, None) for method in ("none", "mean_difference", "leace", "last_layer")]
    assert found == dict.fromkeys([*both, *shared], 1)
    assert {row["latents"] for row in rows if row["method"] == "sae"} <= {1, 4}, "80 are more than there are"
    for row in rows:
        assert row["worst_lo"] <= row["worst"] <= row["worst_hi"] and row["worst"] <= row["mean"]
        assert row["n"] == len(splits["test"])
    groups = tables.read(path.with_name("x-groups.parquet"))
    for row in rows:
        own = [one for one in groups if (one["method"], one["sae"]) == (row["method"], row["sae"])]
        assert len(own) == 4 and min(one["accuracy"] for one in own) == row["worst"]
        assert sum(one["n"] * one["accuracy"] for one in own) == pytest.approx(row["n"] * row["mean"])
    untouched = next(row for row in rows if row["method"] == "none")
    pixels = splits["test"].batch(slice(None), backbone.preprocess)
    right = backbone(backbone.normalize(pixels)).argmax(dim=1).numpy() == splits["test"].labels
    assert untouched["mean"] == pytest.approx(right.mean(), abs=0.01)
    chapter = spurious.chapter(path)
    assert chapter["figures"]["spurious-x"].startswith("<svg") and chapter["worst"]["none"] == untouched["worst"]
    assert {"spurious.x.leace.worst", "spurious.x-s1.sae.mean"} <= _spurious(path).keys()


def test_a_model_of_other_classes_is_refused(stores: Stores, manifest: Manifest, tmp_path: Path) -> None:
    splits = {split: manifest.split(split) for split in SPLITS}
    with pytest.raises(SparsightError, match=r"spurious\.x: the images have 2 classes, the model .* has 5; train or"):
        run("cls", make_backbone(img_size=28, patch_size=7, in_chans=3), stores, splits, tmp_path)


def test_a_feature_that_is_the_class_is_refused(manifest: Manifest) -> None:
    train = copy.copy(manifest.split("train"))
    train.__dict__["labels"] = COLOUR.numbers(train).astype(np.int32)
    with pytest.raises(SparsightError, match="no class has two values of 'colour' on train"):
        Cells.of("colour", train)


def test_biased_digits_are_those_digits_in_the_colours_of_their_splits() -> None:
    source, grey = BiasedDigits(), Mnist5000()
    counts = Counter((item.split, item.label_name, item.columns["colour"]) for item in source.items())
    agree = {split: counts[split, "0 to 4", "red"] + counts[split, "5 to 9", "green"] for split in SPLITS}
    total = {split: sum(n for (own, *_), n in counts.items() if own == split) for split in SPLITS}
    assert total == {"train": 3500, "val": 500, "test": 1000}
    assert agree["train"] / 3500 == pytest.approx(0.95, abs=0.003)
    assert (agree["val"], agree["test"]) == (250, 500)
    for item in source.items()[::997]:
        pixels = source.decode(item.uri, source.read(item.uri)).astype(int)
        shape = grey.decode("", grey.read(item.uri.replace("biased-digits", "mnist-5000"))).astype(int)
        assert np.array_equal(pixels, shape * np.array(COLOURS[item.columns["colour"]]) // 255)


def overlay(**changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = copy.deepcopy(yaml.safe_load((ROOT / "params.yaml").read_text()))
    update_config(settings, yaml.safe_load((ROOT / "experiments" / "biased-digits.yaml").read_text()))
    update_config(settings, copy.deepcopy(changes))
    return settings


def test_the_default_run_has_none_and_null_removes_it() -> None:
    assert load_run(yaml.safe_load((ROOT / "params.yaml").read_text())).spurious == {}
    assert list(load_run(overlay()).spurious) == ["middle", "last"]
    assert list(load_run(overlay(saes={"middle": None})).spurious) == ["last"]
    assert list(load_run(overlay(spurious={"last": None})).spurious) == ["middle"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"spurious": {"last": {"sae": "lst"}}}, "spurious.last.sae: there is no 'lst'; known: middle, last"),
        ({"spurious": {"last": {"group": "label_name"}}}, "group: label_name is the class itself"),
        ({"spurious": {"last": {"latents": [4, 1]}}}, "spurious.last.latents: give at least one, rising"),
        ({"spurious": {"last": {"strengths": []}}}, "spurious.last.strengths: give at least one, rising"),
        ({"saes": {"last": {"site": "embedding"}}}, "'last' reads 'embedding'; latents are ablated in the residual"),
        (
            {"activations": {"sites": [{"site": "blocks.2.input", "tokens": "all"}, "blocks.3.output"]}},
            "spurious.middle: the last layer is trained again on the embedding; add embedding",
        ),
    ],
)
def test_what_cannot_work_is_refused_at_planning(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SparsightError) as caught:
        load_run(overlay(**changes))
    assert message in str(caught.value)


def test_missing_columns_are_refused_as_soon_as_the_images_are_listed(manifest: Manifest) -> None:
    check_labels(load_run(overlay()), manifest)
    with pytest.raises(SparsightError, match=r"spurious.last.group: the images have no label column 'hue'; use colour"):
        check_labels(load_run(overlay(spurious={"last": {"group": "hue"}})), manifest)
