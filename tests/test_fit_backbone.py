"""The backbone stage: every recipe learns, writes the same bytes again, and continues where it was killed."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_folder
from safetensors.torch import load_file, save_file
from torch.optim.optimizer import register_optimizer_step_pre_hook

from sparsight import backbones, config
from sparsight.backbones import open_clip
from sparsight.backbones.contrastive import Contrastive
from sparsight.backbones.fit import fit
from sparsight.backbones.recipes import Recipe, correct
from sparsight.common.errors import SparsightError
from sparsight.common.work import Work
from sparsight.images.manifest import Manifest, write_manifest
from sparsight.training.microbatches import MicroBatches

VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
CLIP = {
    "embed_dim": 16, "vision.width": 24, "vision.layers": 2, "vision.head_width": 8, "vision.patch_size": 8,
    "vision.image_size": 16, "text.width": 16, "text.layers": 1, "text.heads": 2, "text.context_length": 12,
}  # fmt: skip
COMMON: dict[str, Any] = {"epochs": 4, "batch_size": 8, "lr": 3e-3}
MOVED: dict[str, Any] = {"flip": True, "shift": 0.1}
RECIPES = {
    "supervised": config.Backbone("timm/vit_tiny_patch16_224", architecture=VIT, **COMMON, **MOVED),
    "averaged": config.Backbone("timm/vit_tiny_patch16_224", architecture=VIT, ema=0.8, **COMMON, **MOVED),
    "probe": config.Backbone("timm/vit_tiny_patch16_224", architecture=VIT, training="probe", ema=0.5, **COMMON),
    "contrastive": config.Backbone(
        "open_clip/ViT-B-32", architecture=CLIP, training="contrastive", held_out_templates=("a drawing of a {}.",),
        templates=("a photo of a {}.", "one {}."), **{**COMMON, **MOVED, "epochs": 8},
    ),
}  # fmt: skip
EVERY = pytest.mark.parametrize("name", RECIPES)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("images")
    section = config.Images(source="folder", path=str(make_folder(folder / "f", per_class=30)))
    write_manifest(section, 0, {}, 1, folder / "m.parquet")
    return Manifest(folder / "m.parquet")


def run(section: config.Backbone, manifest: Manifest, folder: Path, n_parallel: int = 2) -> Path:
    with Work(folder, "key") as work:
        fit(section, manifest, "net", 0, work, torch.device("cpu"), n_parallel, {})
        return work.out


@EVERY
def test_recipe_learns_and_its_folder_opens_as_it_was_measured(name: str, manifest: Manifest, tmp_path: Path) -> None:
    out = run(RECIPES[name], manifest, tmp_path / "w")
    backbone, about = backbones.open_folder(out)
    assert about["accuracy"]["test"]["accuracy"] > 0.9
    for part, measured in about["accuracy"].items():
        split = manifest.split(part.removesuffix("_held_out"))
        if part.endswith("_held_out"):
            backbone.use_prompts(about["prompt_names"], about["held_out_templates"])
        assert correct(backbone, split, 8, MicroBatches(1)).mean() == measured["accuracy"]
    assert ("test_held_out" in about["accuracy"]) == (name == "contrastive")


@EVERY
def test_killed_and_continued_gives_the_bytes_of_a_run_that_was_not(
    name: str, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsight.training.checkpoints._SECONDS", -1.0)
    section = replace(RECIPES[name], epochs=3)
    whole = run(section, manifest, tmp_path / "whole")
    plain, steps = Recipe.epoch_end, [0]

    def stop(self: Recipe) -> dict[str, float]:
        steps[0] += 1
        if steps[0] == 2:
            raise KeyboardInterrupt
        return plain(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Recipe, "epoch_end", stop)
        run(section, manifest, tmp_path / "killed")
    assert (tmp_path / "killed" / "state" / "checkpoint.safetensors").exists()
    again = run(section, manifest, tmp_path / "killed")
    for file in ("model.safetensors", "config.json", "training.jsonl"):
        assert (whole / file).read_bytes() == (again / file).read_bytes(), file


@EVERY
def test_parts_at_the_same_time_give_the_bytes_of_one_after_the_other(
    name: str, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsight.config.compute._ROWS", 2)
    one, many = (run(RECIPES[name], manifest, tmp_path / str(n), n) for n in (1, 4))
    for file in ("model.safetensors", "config.json", "training.jsonl"):
        assert (one / file).read_bytes() == (many / file).read_bytes(), file


@EVERY
def test_every_step_learns_and_one_has_the_rate_of_the_section(name: str, manifest: Manifest, tmp_path: Path) -> None:
    rates: list[float] = []
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"]))
    try:
        run(RECIPES[name], manifest, tmp_path / "w")
    finally:
        hook.remove()
    peak = rates.index(RECIPES[name].lr)
    assert peak + 1 == math.ceil(len(rates) / 10)
    assert rates[:peak] == sorted(rates[:peak]) and rates[peak:] == sorted(rates[peak:], reverse=True)
    assert 0 < rates[-1] < 0.01 * rates[peak] and rates[0] == pytest.approx(rates[peak] / (peak + 1))


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.4])
def test_contrastive_loss_is_the_same_with_images_and_texts_swapped(
    smoothing: float, manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where every text has one image; also against CLIP's loss written out, its targets smoothed in both directions."""
    section = replace(RECIPES["contrastive"], label_smoothing=smoothing)
    backbone, _ = backbones.open_folder(run(replace(section, epochs=1), manifest, tmp_path / "w"))
    train = manifest.split("train")
    recipe = Contrastive(section, backbone, train, train, manifest.classes, section.templates, 1)
    rows = np.array([np.flatnonzero(train.labels == label)[0] for label in range(2)])
    x, y = torch.randn(2, 2, 16, generator=torch.Generator().manual_seed(0))
    x, y = (torch.nn.functional.normalize(z, dim=-1) for z in (x, y))

    def loss(images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        monkeypatch.setattr(backbone.model, "encode_text", lambda *_, **__: texts)
        return recipe.loss(images, rows, torch.Generator())["loss"]

    scores = backbone.model.logit_scale.exp() * x @ y.T
    target = (1 - smoothing) * torch.eye(2) + smoothing / 2
    expected = -sum((target * scores.log_softmax(dim)).sum() for dim in (0, 1)) / 4
    torch.testing.assert_close(loss(x, y), loss(y, x))
    torch.testing.assert_close(loss(x, y), expected)


def test_dropout_is_refused(manifest: Manifest, tmp_path: Path) -> None:
    for key, what in {"drop_path_rate": "drop_path1", "proj_drop_rate": "proj_drop"}.items():
        architecture: dict[str, Any] = {**VIT, key: 0.25}
        section = replace(RECIPES["supervised"], architecture=architecture)
        with pytest.raises(SparsightError, match=f"{what} drops 0.25 of what it reads at random"):
            run(section, manifest, tmp_path / key)


def test_probe_leaves_the_tower_as_it_was(manifest: Manifest, tmp_path: Path) -> None:
    torch.manual_seed(0)
    start = backbones.load("timm/vit_tiny_patch16_224", None, 7, **VIT).model.state_dict()
    from safetensors.torch import save_file

    save_file(start, tmp_path / "start.safetensors")
    section = replace(RECIPES["probe"], weights=str(tmp_path / "start.safetensors"))
    after = load_file(run(section, manifest, tmp_path / "w") / "model.safetensors")
    changed = {key for key in after if key not in start or not torch.equal(after[key], start[key])}
    assert changed == {"head.weight", "head.bias"}


def test_moving_average_is_what_is_kept(manifest: Manifest, tmp_path: Path) -> None:
    """Against the same recursion by hand over the weights after each step."""
    section = replace(RECIPES["averaged"], epochs=1)
    seen: list[np.ndarray] = []
    plain = Recipe.step

    def follow(self: Recipe, *arguments: Any) -> Any:
        if not seen:
            seen.append(self.backbone.model.head.weight.detach().numpy().copy())
        out = plain(self, *arguments)
        seen.append(self.backbone.model.head.weight.detach().numpy().copy())
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recipe, "step", follow)
        kept = load_file(run(section, manifest, tmp_path / "w") / "model.safetensors")["head.weight"].numpy()
    average = seen[0]
    for value in seen[1:]:
        average = 0.8 * average + 0.2 * value
    np.testing.assert_allclose(kept, average, atol=1e-6)
    assert not np.allclose(kept, seen[-1], atol=1e-4)


def test_prompts_are_computed_once_and_again_when_texts_or_weights_change(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = run(RECIPES["contrastive"], manifest, tmp_path / "w")
    about = json.loads((out / "config.json").read_text())
    read: list[list[str]] = []
    plain = open_clip.encode_text

    def encode(model: Any, name: str, texts: list[str]) -> torch.Tensor:
        read.append(texts)
        return plain(model, name, texts)

    monkeypatch.setattr(open_clip, "encode_text", encode)
    kept = backbones.open_folder(out)[0].prompts_CE
    assert kept is not None and not read
    assert torch.equal(kept, load_file(out / "prompts.safetensors")["prompts"])
    (out / "config.json").write_text(json.dumps({**about, "templates": ["a blurry {}."]}))
    other = backbones.open_folder(out)[0].prompts_CE
    assert read == [["a blurry bright.", "a blurry dark."]] and other is not None and not torch.allclose(kept, other)
    (out / "config.json").write_text(json.dumps(about))
    state = {name: value + 0.1 for name, value in load_file(out / "model.safetensors").items()}
    save_file(state, out / "model.safetensors")
    other = backbones.open_folder(out)[0].prompts_CE
    assert len(read) == 2 and other is not None and not torch.allclose(kept, other)
    timm_out = run(RECIPES["supervised"], manifest, tmp_path / "t")
    assert load_file(timm_out / "prompts.safetensors") == {} and backbones.open_folder(timm_out)[0].prompts_CE is None


def test_open_clip_weights_as_they_are_classify_by_prompts(manifest: Manifest, tmp_path: Path) -> None:
    first = run(RECIPES["contrastive"], manifest, tmp_path / "a")
    names = ("model", "architecture", "templates", "held_out_templates", "batch_size")
    kept: Any = {name: getattr(RECIPES["contrastive"], name) for name in names}
    section = config.Backbone(weights=str(first / "model.safetensors"), **kept)
    second = run(section, manifest, tmp_path / "b")
    a, b = (json.loads((out / "config.json").read_text())["accuracy"] for out in (first, second))
    assert a == b


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("resnet", {}, "starts with neither 'timm/' nor 'open_clip/'"),
        ("open_clip/ViT-B-32", {"epochs": 1}, "'supervised' does not suit open_clip/ViT-B-32"),
        ("timm/x", {"epochs": 1, "training": "contrastive"}, "'contrastive' does not suit timm/x"),
        ("timm/x", {"epochs": 1, "templates": ("a {}",)}, "only an open_clip model reads texts"),
        ("open_clip/x", {"weights": "pretrained", "templates": ("a photo",)}, "'a photo' needs one {} for"),
        ("timm/x", {"epochs": 1, "ema": 1.0}, "ema: must be 0 or more and less than 1, got 1.0"),
        ("timm/x", {}, "random weights need training"),
        ("timm/x", {"weights": "no/such.pt"}, "there is no file 'no/such.pt'"),
    ],
)
def test_mistakes_in_the_section_are_explained(model: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(SparsightError, match=message):
        config.Backbone(model, **options)


def test_a_classifier_for_other_classes_is_refused(manifest: Manifest, tmp_path: Path) -> None:
    out = run(RECIPES["supervised"], manifest, tmp_path / "a")
    section = config.Backbone(
        "timm/vit_tiny_patch16_224", weights=str(out / "model.safetensors"), architecture=VIT, batch_size=16
    )
    with pytest.raises(SparsightError, match="its classifier has 1000 outputs, the images 2 classes; set epochs"):
        run(section, manifest, tmp_path / "b")


def test_weights_without_a_classifier_serve_for_their_embeddings(manifest: Manifest, tmp_path: Path) -> None:
    trained = run(RECIPES["supervised"], manifest, tmp_path / "t")
    options: Any = {"architecture": VIT, "weights": str(trained / "model.safetensors"), "training": "none"}
    out = run(config.Backbone("timm/vit_tiny_patch16_224", **options), manifest, tmp_path / "n")
    backbone, about = backbones.open_folder(out)
    assert about["accuracy"] == {} and backbone.n_classes == 0 and backbone.class_names is None
    assert not any(name.startswith("head.") for name in load_file(out / "model.safetensors"))
    images = backbone.normalize(manifest.split("val").batch(slice(None), backbone.preprocess))
    expected = backbones.open_folder(trained)[0].taps(images, ["embedding"])["embedding"]
    assert torch.equal(backbone.taps(images, ["embedding"])["embedding"], expected)
    with pytest.raises(SparsightError, match="'none' is for timm weights as they are; set weights, and leave epochs"):
        config.Backbone("timm/vit_tiny_patch16_224", training="none", epochs=1)
