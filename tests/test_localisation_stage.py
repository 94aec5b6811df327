"""Localisation on coloured shapes: a planted latent, chance, the files of the stage, and its refusals."""

import copy
import json
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, make_backbone
from extracted import Stores, extracted
from made_up import NOWHERE
from snakemake.utils import update_config

from sparsight import config, sae
from sparsight.backbones.backbone import Backbone
from sparsight.bench.localisation import candidates
from sparsight.bench.localisation.best import Part, Scored, score
from sparsight.bench.localisation.evaluate import evaluate
from sparsight.bench.localisation.regions import UNKNOWN, patch_grid, patch_regions
from sparsight.common import tables
from sparsight.common.errors import SparsightError
from sparsight.common.work import Work
from sparsight.images.manifest import Manifest, write_manifest
from sparsight.images.preprocess import Preprocess
from sparsight.images.sources.shapes import SHAPES, ColouredShapes
from sparsight.pipeline.run import load_run
from sparsight.report import page
from sparsight.report.chapters import localisation
from sparsight.report.summary import write_metrics
from sparsight.sae import SAE

D, F, GRID, SITE = 24, 48, (8, 8), "blocks.1.output"
DIRECTIONS = torch.nn.functional.normalize(torch.randn(5, D, generator=torch.Generator().manual_seed(3)), dim=1)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    path = tmp_path_factory.mktemp("images") / "manifest.parquet"
    write_manifest(config.Images(source="coloured-shapes", limit=300, test_fraction=0.4), 0, {}, 1, path)
    return Manifest(path)


def part(manifest: Manifest, split: str) -> Part:
    """Patches that show their region as a direction, with noise."""
    rgb = Preprocess((64, 64), 3, (0.5,) * 3, (0.5,) * 3)
    regions = patch_regions(manifest, split, len(manifest.split(split)), rgb, GRID, 1)
    assert regions.shape[1] == 64 and set(np.unique(regions)) == {0, 1, 2, 3, 4}
    generator = torch.Generator().manual_seed(len(regions))
    noise = torch.randn(regions.size, D, generator=generator)
    x = 2 * DIRECTIONS[torch.from_numpy(regions.ravel()).long()] + 0.2 * noise
    return Part(x, regions.ravel(), GRID)


def planted() -> SAE:
    """A latent for every region; the others are too short to win."""
    one = sae.create("topk", D, F, 1, seed=0).requires_grad_(False)
    rows = 1e-3 * one.W_dec
    rows[7:12] = DIRECTIONS
    one.W_dec.copy_(rows)
    one.W_enc.copy_(rows.T)
    return one


@pytest.fixture(scope="module")
def parts(manifest: Manifest) -> tuple[Part, Part]:
    return part(manifest, "train"), part(manifest, "test")


@pytest.fixture(scope="module")
def scored(parts: tuple[Part, Part]) -> Scored:
    return score(candidates.of_sae(planted()), *parts, [1, 2, 3, 4], CPU, 5, shuffle=0)


def test_patches_have_the_region_that_covers_most_of_them(manifest: Manifest, parts: tuple[Part, Part]) -> None:
    uri = manifest.split("test").uris(slice(3, 4))[0]
    mask = ColouredShapes().mask(uri)
    for number, region in enumerate(parts[1].regions.reshape(-1, 64)[3]):
        row, column = divmod(number, 8)
        patch = mask[8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
        assert region == (np.bincount(patch.ravel()).argmax() if (patch == patch.max()).mean() > 0.5 else 0)


def test_a_planted_latent_is_found_where_its_shape_is(scored: Scored) -> None:
    assert [(one.region, one.feature, one.sign) for one in scored.best] == [(r, 7 + r, 1) for r in (1, 2, 3, 4)]
    for one in scored.best:
        assert one.ap > 0.95 and one.ap_train > 0.95 and one.maps > 0
        assert one.purity > 0.9 and one.moran > 0.2


def test_shuffled_patches_give_chance(scored: Scored, parts: tuple[Part, Part]) -> None:
    """The average precision of a random order lies within what 200 random orders give."""
    _, test = parts
    generator = np.random.default_rng(1)
    for one in scored.shuffled:
        hit = test.regions == one.region
        own = test.x.numpy() @ DIRECTIONS[one.region].numpy()
        firing = np.where(own > 1, own, 0)
        chance = []
        for _ in range(200):
            order = np.argsort(-generator.permutation(firing), kind="stable")
            active = (firing > 0).sum()
            hits = hit[order]
            precision = np.cumsum(hits)[:active] / np.arange(1, active + 1)
            chance.append((precision[hits[:active]].sum() + hits[active:].sum() * hit.mean()) / hit.sum())
        low, high = np.quantile(chance, (0.0005, 0.9995))
        assert low * 0.98 <= one.ap <= high * 1.02 and one.ap < 0.2
        assert one.purity < 0.2


def test_controls_are_scored_alike_and_both_signs_count(parts: tuple[Part, Part], scored: Scored) -> None:
    train, test = parts
    turned = [Part(torch.cat([-p.x[:, :1], p.x[:, 1:]], dim=1), p.regions, GRID) for p in (train, test)]
    found: dict[str, Scored] = {}
    for name, some in candidates.shared(train.x, F, CPU, 0).items():
        found[name] = score(some, train, test, [1, 2, 3, 4], CPU, 5)
        assert 0 < np.mean([one.ap for one in found[name].best]) < 1 and not found[name].shuffled
    sae_ap = np.mean([one.ap for one in scored.best])
    assert np.mean([one.ap for one in found["neurons"].best]) < sae_ap, "random directions are along no neuron"
    random = score(candidates.random(planted(), train.x, 0), train, test, [1, 2, 3, 4], CPU, 5)
    assert np.mean([one.ap for one in random.best]) < sae_ap
    neurons = candidates.shared(turned[0].x, F, CPU, 0)["neurons"]
    other = score(neurons, turned[0], turned[1], [1, 2, 3, 4], CPU, 5)
    for one, two in zip(found["neurons"].best, other.best, strict=True):
        assert one.ap == pytest.approx(two.ap, abs=1e-6) and one.feature == two.feature
        assert (one.sign == -two.sign) == (one.feature == 0)
    assert -1 in {one.sign for one in found["neurons"].best}


def test_a_basis_in_blocks_is_the_whole_basis(parts: tuple[Part, Part], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = score(candidates.shared(parts[0].x, F, CPU, 0)["pca"], *parts, [1, 3], CPU, 5)
    monkeypatch.setattr(candidates, "_COLUMNS", 7)
    monkeypatch.setattr(candidates, "_ROWS", 1000)
    blocks = score(candidates.shared(parts[0].x, F, CPU, 0)["pca"], *parts, [1, 3], CPU, 5)
    assert [(b.feature, b.sign) for b in blocks.best] == [(w.feature, w.sign) for w in whole.best]
    assert [b.ap for b in blocks.best] == pytest.approx([w.ap for w in whole.best], abs=1e-5)
    assert blocks.moran == pytest.approx(whole.moran, abs=1e-5)


def test_unknown_patches_do_not_count(parts: tuple[Part, Part]) -> None:
    train, test = parts
    noisy = test.regions.copy()
    noisy[: 10 * 64] = UNKNOWN
    moved = Part(torch.cat([100 * DIRECTIONS[3].repeat(640, 1), test.x[640:]]), noisy, GRID)
    scores = score(candidates.of_sae(planted()), train, moved, [2, 3], CPU, 5)
    assert all(one.ap > 0.95 for one in scores.best)


def test_grids_of_patches() -> None:
    assert patch_grid(196, (224, 224)) == (14, 14) and patch_grid(8, (16, 32)) == (2, 4)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return make_backbone(classes=4, img_size=64, patch_size=8, in_chans=3, embed_dim=D, num_heads=3)


@pytest.fixture(scope="module")
def stores(backbone: Backbone, manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Stores:
    section = config.schema.parse(
        config.Activations, {"sites": [{"site": SITE, "tokens": "patches"}], "dtype": "float16"}, "activations"
    )
    return extracted(backbone, manifest, tmp_path_factory.mktemp("s"), sites=section.sites, dtype="float16")


def run(backbone: Backbone, stores: Stores, manifest: Manifest, folder: Path) -> dict[str, bytes]:
    saes = {}
    for seed in (0, 1):
        saes[f"x-s{seed}"] = one = sae.create("topk", D, F, 4, seed=seed).requires_grad_(False)
        one.about = {"site": SITE, "tokens": "patches"}
    with Work(folder / "work", "key") as work:
        evaluate(saes, backbone, stores, manifest, "x", 0, 1, work, {"seed": 0})
        work.finish(folder / "out")
    return {path.name: path.read_bytes() for path in sorted((folder / "out").iterdir())}


def test_the_stage_writes_a_row_per_class_and_method_and_the_same_bytes(
    backbone: Backbone, stores: Stores, manifest: Manifest, tmp_path: Path
) -> None:
    found = run(backbone, stores, manifest, tmp_path / "a")
    assert found == run(backbone, stores, manifest, tmp_path / "b") and list(found) == ["x.json", "x.parquet"]
    rows = tables.read(tmp_path / "a" / "out" / "x.parquet")
    saes = [(m, s) for m in ("sae", "random", "shuffled") for s in ("x-s0", "x-s1")]
    methods: list[tuple[str, Any]] = [*saes, ("pca", None), ("kmeans", None), ("neurons", None)]
    assert sorted((r["class"], r["method"], str(r["sae"])) for r in rows) == sorted(
        (shape, method, str(name)) for shape in SHAPES for method, name in methods
    )
    summary = json.loads(found["x.json"])
    assert summary["regions"] == list(SHAPES) and summary["grid"] == [8, 8] and summary["least_maps"] == 12
    for name, flat in summary["saes"].items():
        assert flat["n_classes"] == 4 and flat["n_images"] == 120 and flat["n_patches"] == 120 * 64
        for method in ("sae", "random", "shuffled", "pca", "kmeans", "neurons"):
            own = [r for r in rows if r["method"] == method and r["sae"] in (name, None)]
            assert len(own) == 4
            for key in ("ap", "purity"):
                assert flat[f"{key}_{method}"] == pytest.approx(np.mean([r[key] for r in own]))
            morans = [r["moran"] for r in own if r["moran"] is not None]
            assert flat.get(f"moran_{method}") == (pytest.approx(np.mean(morans)) if morans else None)
    assert summary["saes"]["x-s0"]["ap_pca"] == summary["saes"]["x-s1"]["ap_pca"], "shared"
    assert summary["saes"]["x-s0"]["ap_random"] != summary["saes"]["x-s1"]["ap_random"], "one for each SAE"


def test_a_changed_mask_stops_the_stage(
    manifest: Manifest, backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ColouredShapes, "mask", lambda *_: np.zeros((64, 64), np.uint8))
    with pytest.raises(SparsightError, match=r"mask of coloured-shapes:.*: changed since the manifest was made"):
        patch_regions(manifest, "test", 3, backbone.preprocess, GRID, 1)


def test_the_report_and_the_headline_numbers_have_every_class(
    backbone: Backbone, stores: Stores, manifest: Manifest, tmp_path: Path
) -> None:
    run(backbone, stores, manifest, tmp_path)
    path = tmp_path / "out" / "x.parquet"
    chapter = localisation.chapter(path)
    rows, of_saes = tables.read(path), json.loads(path.with_suffix(".json").read_text())["saes"]
    assert [one["name"] for one in chapter["classes"]] == list(SHAPES)
    assert chapter["means"]["ap_sae"]["mean"] == pytest.approx(np.mean([flat["ap_sae"] for flat in of_saes.values()]))
    controls = {m: chapter["means"][f"ap_{m}"]["mean"] for m in ("pca", "kmeans", "neurons", "random")}
    assert controls[chapter["strongest"]] == max(controls.values())
    square = chapter["classes"][1]
    own = [row["ap"] for row in rows if (row["class"], row["method"]) == ("square", "sae")]
    assert square["ap"]["sae"]["mean"] == pytest.approx(np.mean(own)) and square["ap"]["sae"]["n"] == 2
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(page.__file__).parent / "templates"), undefined=jinja2.StrictUndefined
    )
    text = environment.get_template("localisation.html.j2").render(localisations=[chapter], figures={}, captions={})
    assert all(f'<th class="text" scope="row">{shape}</th>' in text for shape in SHAPES)
    assert "nan" not in text and f"{chapter['means']['ap_shuffled']['mean']:.3f}" in text
    assert not environment.get_template("localisation.html.j2").render(localisations=[]).strip()

    inputs: dict[str, Any] = {kind: [] for kind in NOWHERE} | {"backbones": [], "localisations": [path]}
    write_manifest(config.Images(source="coloured-shapes", limit=40), 0, {}, 1, tmp_path / "m.parquet")
    write_metrics({**inputs, "images": tmp_path / "m.parquet"}, tmp_path / "metrics.json")
    flat = json.loads((tmp_path / "metrics.json").read_text())
    assert {key: flat[f"localisation.x-s1.{key}"] for key in of_saes["x-s1"]} == of_saes["x-s1"]


def overlay(**changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text())
    update_config(settings, yaml.safe_load((ROOT / "experiments" / "coloured-shapes.yaml").read_text()))
    update_config(settings, copy.deepcopy(changes))
    return settings


def test_sections_of_patches_are_scored_where_images_have_masks(tmp_path: Path) -> None:
    assert load_run(yaml.safe_load((ROOT / "params.yaml").read_text())).localised == []
    assert load_run(overlay()).localised == ["middle", "last"]
    assert load_run(overlay(saes={"last": {"tokens": "mean"}})).localised == ["middle"]
    chain = {"site": None, "sites": ["blocks.1.output", "blocks.3.output"]}
    assert load_run(overlay(saes={"last": chain})).localised == ["middle"], "chains are not"
    folder = {"source": "folder", "path": str(tmp_path)}
    assert load_run(overlay(images=folder)).localised == []
    assert load_run(overlay(images={**folder, "masks": str(tmp_path)})).localised == ["middle", "last"]


def test_masks_of_other_images_are_refused(tmp_path: Path) -> None:
    other = {"source": "folder", "path": str(tmp_path), "masks": str(tmp_path)}
    with pytest.raises(SparsightError, match=r"other_images.x.masks: would be ignored, only images has masks"):
        load_run(overlay(other_images={"x": other}))
