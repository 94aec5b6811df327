"""Backbones on images without labels: their classifiers, prompts and accuracies."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from studies import two_classes
from unlabelled import unlabelled

from sparsight import backbones, config
from sparsight.backbones.backbone import Backbone
from sparsight.backbones.fit import fit
from sparsight.common.errors import SparsightError
from sparsight.common.work import Work
from sparsight.images.manifest import Manifest


def saved(backbone: Backbone, folder: Path) -> str:
    path = folder / "weights.safetensors"
    save_file({key: value.contiguous() for key, value in backbone.model.state_dict().items()}, path)
    return str(path)


def fitted(section: config.Backbone, manifest: Manifest, folder: Path) -> tuple[Backbone, dict[str, Any]]:
    with Work(folder / "w", "key") as work:
        fit(section, manifest, "net", 0, work, torch.device("cpu"), 1, {})
        work.finish(folder / "out")
    return backbones.open_folder(folder / "out")


@pytest.mark.parametrize("named", [True, False])
def test_weights_as_they_are_keep_their_classifier(named: bool, labelled: Path, bare: Manifest, tmp_path: Path) -> None:
    """Of unlabelled images for whatever classes; of images with classes for these."""
    model, manifest = two_classes(), Manifest(labelled) if named else bare
    weights = saved(model, tmp_path)
    sizes = {"img_size": 16, "patch_size": 4, "in_chans": 1, "embed_dim": 48, "depth": 3, "num_heads": 6}
    options: dict[str, Any] = {
        "weights": weights,
        "architecture": {**sizes, "num_classes": 2},
    }
    opened, about = fitted(config.Backbone("timm/vit_tiny_patch16_224", **options), manifest, tmp_path / "own")
    pixels = opened.normalize(manifest.split("test").batch(slice(None), opened.preprocess))
    assert torch.equal(opened(pixels), model(pixels)) and opened.n_classes == 2
    assert set(about["accuracy"]) == ({"val", "test"} if named else set())
    assert opened.class_names == (["bright", "dark"] if named else None)
    without = config.Backbone("timm/vit_tiny_patch16_224", weights, sizes, training="none")
    assert fitted(without, manifest, tmp_path / "none")[0].n_classes == 0
    for ignored in ({"training": "none"}, {"epochs": 1}):
        with pytest.raises(SparsightError, match="architecture: num_classes is of the classifier in weights that are"):
            config.Backbone("timm/vit_tiny_patch16_224", **options, **ignored)
    options["architecture"]["num_classes"] = 3
    with pytest.raises(SparsightError, match=r"backbones.net: .*" + ("3 outputs" if named else "no classifier of 3")):
        fitted(config.Backbone("timm/vit_tiny_patch16_224", **options), manifest, tmp_path / "three")


def test_a_contrastive_model_without_class_names_has_no_prompts(bare: Manifest, tmp_path: Path) -> None:
    sizes = {
        "embed_dim": 16, "vision.width": 24, "vision.layers": 2, "vision.head_width": 8, "vision.patch_size": 8,
        "vision.image_size": 16, "text.width": 16, "text.layers": 1, "text.heads": 2, "text.context_length": 12,
    }  # fmt: skip
    model = backbones.load("open_clip/ViT-B-32", None, **sizes)
    section = config.Backbone("open_clip/ViT-B-32", saved(model, tmp_path), sizes, held_out_templates=("one {}.",))
    opened, about = fitted(section, bare, tmp_path)
    assert opened.n_classes is None and about["accuracy"] == {} and about["templates"] == []


def test_accuracy_of_a_backbone_is_of_labelled_images(labelled: Path, tmp_path: Path) -> None:
    manifest = unlabelled(labelled, tmp_path / "m.parquet", "test", share=0.5)
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 3}
    section = config.Backbone("timm/vit_tiny_patch16_224", architecture=sizes, epochs=1, batch_size=8)
    _, about = fitted(section, manifest, tmp_path / "half")
    assert (about["accuracy"]["val"]["n"], about["accuracy"]["test"]["n"]) == (8, 8)
    _, about = fitted(section, unlabelled(labelled, tmp_path / "n.parquet", "test"), tmp_path / "none")
    assert set(about["accuracy"]) == {"val"}
