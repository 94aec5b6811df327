"""VS2 and its gate on another data set, and what stops steering before it starts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from conftest import make_backbone, write_store
from PIL import Image

from sparsight import backbones, config, sae
from sparsight.activations.store import ActivationStore
from sparsight.backbones.backbone import Backbone
from sparsight.common import tables
from sparsight.common.errors import SparsightError
from sparsight.common.work import Work
from sparsight.images.manifest import Manifest, write_manifest
from sparsight.images.preprocess import Preprocess
from sparsight.sae import SAE
from sparsight.steering import vs2
from sparsight.steering.edits import Batch
from sparsight.steering.evaluate import gate_curve, steer
from sparsight.steering.runner import NONE, Outcome, Row, check_images
from sparsight.steering.transfer import steer_elsewhere

CLIP = {
    "embed_dim": 16, "vision.width": 24, "vision.layers": 2, "vision.head_width": 8, "vision.patch_size": 8,
    "vision.image_size": 16, "text.width": 16, "text.layers": 1, "text.heads": 2, "text.context_length": 12,
}  # fmt: skip
SITE, D, F, K = "blocks.1.output", 24, 48, 4
NAMES = ["bright", "dark"]
SECTION = config.Steering(sae="sae", kind="vs2", strengths=(0.5, 2.0), quantiles=(0.5, 0.9))


def make_clip() -> Backbone:
    torch.manual_seed(0)
    backbone = backbones.load("open_clip/ViT-B-32", None, **CLIP).requires_grad_(False)
    backbone.preprocess = Preprocess((16, 16), 3, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    backbone.use_prompts(NAMES, ["a photo of a {}."])
    backbone.class_names = NAMES
    return backbone


def write_images(folder: Path, levels: dict[str, int], per_class: int, noise: int) -> Manifest:
    generator = np.random.default_rng(0)
    for name, level in levels.items():
        (folder / "images" / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = generator.integers(level, level + noise, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / name / f"{i:03}.png")
    write_manifest(config.Images(source="folder", path=str(folder / "images")), 0, {}, 1, folder / "m.parquet")
    return Manifest(folder / "m.parquet")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return write_images(tmp_path_factory.mktemp("home"), {"bright": 170, "dark": 30}, 40, 60)


@pytest.fixture(scope="module")
def away(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Three classes of another look: noise of every level."""
    return write_images(tmp_path_factory.mktemp("away"), {"white": 10, "grey": 5, "black": 0}, 20, 240)


def at_site(backbone: Backbone, manifest: Manifest, split: str) -> torch.Tensor:
    images = backbone.normalize(manifest.split(split).batch(slice(None), backbone.preprocess))
    return backbone.run_blocks(backbone.tokens(images), 0, 2)[0]


def make_sae(backbone: Backbone, home: Manifest) -> SAE:
    """The principal directions of the home images, either way: it fits these images and no others."""
    x = at_site(backbone, home, "train")[:, 0]
    one = sae.create("topk", D, F, K, seed=0).requires_grad_(False)
    one.b_dec.copy_(x.mean(dim=0))
    directions = torch.linalg.svd(x - x.mean(dim=0))[2]
    one.W_dec.copy_(torch.cat([directions, -directions]))
    one.W_enc.copy_(one.W_dec.T)
    one.about = {"site": SITE, "tokens": "cls", "training": {"prototype_weight": 0.0}}
    return one


@pytest.fixture(scope="module")
def at_home(home: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    backbone, folder = make_clip(), tmp_path_factory.mktemp("steering")
    x = at_site(backbone, home, "train")[:, 0].numpy()
    path = write_store(folder / "store", len(x), {SITE: (D,)}, dtype="float32")
    zarr.open_group(path, mode="r+")[SITE][:] = x
    store = ActivationStore.open(path)
    with Work(folder / "w", "key") as work:
        steer(SECTION, {"vs2-s0": [make_sae(backbone, home)]}, backbone, {"train": store}, {}, home, 0, work, {})
        work.finish(folder / "out")
    return folder / "out"


def elsewhere(folder: Path, backbone: Backbone, at_home: Path, home: Manifest, away: Manifest) -> Path:
    about: dict[str, Any] = {"template_choice": []}
    saes, homes = {"vs2-s0": [make_sae(make_clip(), home)]}, {"vs2-s0": at_home / "vs2-s0.json"}
    with Work(folder / "w", "key") as work:
        steer_elsewhere(saes, backbone, about, homes, away, "away", work, {})
        work.finish(folder / "out")
    return folder / "out" / "vs2-s0"


def test_other_images_fall_back_to_the_plain_model(
    at_home: Path, home: Manifest, away: Manifest, tmp_path: Path
) -> None:
    backbone = make_clip()
    out = elsewhere(tmp_path, backbone, at_home, home, away)
    rows = {row["method"]: row for row in tables.read(out / "away.parquet")}
    summary = json.loads((out / "away.json").read_text())
    test = away.split("test")
    assert len(backbone.prompts_CE) == 3 and summary["classes"] == 3  # type: ignore[arg-type]
    names = ["none", "reconstruct", "vs2", "mean-extrapolation", "pca-extrapolation", "random-latents", "vs2-gated"]
    assert list(rows) == names and all(row["n"] == len(test) for row in rows.values())
    home_curve = json.loads((at_home / "vs2-s0.json").read_text())["gate"]
    chosen = {line["quantile"] for line in home_curve if line["chosen"]}
    for line in summary["gate"]:
        (same,) = [own for own in home_curve if own["split"] == "test" and own["quantile"] == line["quantile"]]
        assert line["threshold"] == same["threshold"] and summary["steered_at_home"][str(line["quantile"])] > 0.2
        assert line["steered"] == 0 and line["accuracy"] == rows["none"]["accuracy"], "none is like the home images"
        assert line["chosen"] == (line["quantile"] in chosen)
    one, x = make_sae(make_clip(), home), at_site(make_clip(), away, "test")
    found = vs2.Calibration.load(at_home / "vs2-s0.safetensors", torch.device("cpu"))
    truth = torch.from_numpy(test.labels).long()
    for method, edit in vs2.edits(one, found).items():
        cls = edit.apply(Batch(x[:, 0]), rows[method]["strength"])
        logits = backbone.classify(torch.cat([cls[:, None], x[:, 1:]], dim=1))
        assert rows[method]["accuracy"] == pytest.approx(float((logits.argmax(dim=1) == truth).double().mean()))


def make_vit() -> Backbone:
    """A timm model with a head for the home images."""
    backbone = make_backbone(classes=2, embed_dim=D, depth=2, num_heads=2, in_chans=3)
    backbone.preprocess = Preprocess((16, 16), 3, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    backbone.class_names = NAMES
    return backbone


def test_a_head_knows_the_classes_of_home_alone(
    home: Manifest, away: Manifest, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    x = at_site(make_vit(), home, "train")[:, 0].numpy()
    path = write_store(tmp_path / "store", len(x), {SITE: (D,)}, dtype="float32")
    zarr.open_group(path, mode="r+")[SITE][:] = x
    with Work(tmp_path / "w", "key") as work:
        stores = {"train": ActivationStore.open(path)}
        steer(SECTION, {"vs2-s0": [make_sae(make_vit(), home)]}, make_vit(), stores, {}, home, 0, work, {})
        work.finish(tmp_path / "home")
    at_home = tmp_path / "home/vs2-s0.json"
    summary = json.loads(at_home.read_text())
    half = write_images(tmp_path_factory.mktemp("half"), {"bright": 10, "grey": 5}, 20, 240)
    for manifest, known in ((away, 0), (half, 4)):
        with Work(tmp_path / "w", f"{known}") as work:
            saes = {f"vs2-s{seed}": [make_sae(make_vit(), home)] for seed in range(2)}
            steer_elsewhere(saes, make_vit(), {}, dict.fromkeys(saes, at_home), manifest, "away", work, {})
            work.finish(tmp_path / f"{known}")
        of_both = [tmp_path / f"{known}/vs2-s{seed}/away.parquet" for seed in range(2)]
        assert of_both[0].read_bytes() == of_both[1].read_bytes(), "the same SAE twice"
        rows = {row["method"]: row for row in tables.read(of_both[0])}
        about = json.loads(of_both[0].with_suffix(".json").read_text())
        test = manifest.split("test")
        assert about["n_labelled"] == known == rows["vs2"]["n"] and rows["vs2"]["images"] == len(test)
        logits = make_vit()(make_vit().normalize(test.batch(slice(None), make_vit().preprocess))).argmax(dim=1).numpy()
        bright = np.array(test.column("label_name")) == "bright"
        if known:
            assert bright.sum() == known and rows["none"]["accuracy"] == (logits[bright] == 0).mean()
        else:
            assert rows["none"]["accuracy"] is None and about["against_controls"] == []
        assert rows["reconstruct"]["changed"] is not None and rows["none"]["changed"] == 0
        assert all(line["steered"] <= summary["gate"][0]["steered"] for line in about["gate"])


def test_without_a_strength_chosen_at_home_nothing_is_tried(
    at_home: Path, home: Manifest, away: Manifest, tmp_path: Path
) -> None:
    summary = {**json.loads((at_home / "vs2-s0.json").read_text()), "chosen_on_val": []}
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "vs2-s0.json").write_text(json.dumps(summary))
    (tmp_path / "home" / "vs2-s0.safetensors").write_bytes((at_home / "vs2-s0.safetensors").read_bytes())
    with pytest.raises(SparsightError, match=r"^other_images.away: takes the strength that val .*; leave away out"):
        elsewhere(tmp_path, make_clip(), tmp_path / "home", home, away)


def test_thresholds_without_bounds_steer_nobody_and_everybody() -> None:
    generator = np.random.default_rng(0)
    answers = [(generator.random(50) < 0.5, generator.random(50) < 0.8) for _ in range(2)]
    judged, classes, unknown = np.ones(50, bool), np.zeros(50, np.int64), np.full(50, np.nan)
    none, one = (Outcome(judged, hits, top5, classes, np.zeros(50), unknown) for hits, top5 in answers)
    steered, fvu = Row("vs2", 1.0, "none"), generator.random(50)
    outcomes = {NONE: none, steered: one}
    for bound, expected, share in ((-np.inf, none, 0.0), (np.inf, one, 1.0)):
        found = vs2.Calibration(torch.zeros(1), torch.zeros(1, 1), torch.tensor([bound]), torch.zeros(1))
        (line,), gated = gate_curve([1.0], [found], steered, outcomes, [fvu])
        assert line["threshold"] == bound and line["steered"] == share
        assert (gated[1.0].hits == expected.hits).all() and (gated[1.0].top5 == expected.top5).all()


def test_images_that_cannot_be_counted_stop_the_stage(home: Manifest) -> None:
    backbone = make_clip()
    check_images(backbone, home.split("val"), "val")
    empty = home.split("no such split")
    with pytest.raises(SparsightError, match="the val split is empty; add images or change the fractions"):
        check_images(backbone, empty, "val")
    backbone.class_names = ["bright", "dim", "dark"]
    with pytest.raises(SparsightError, match=r"knows 3 classes and the images have 2, .*: 'dim' against 'dark'; run"):
        check_images(backbone, home.split("val"), "val")
