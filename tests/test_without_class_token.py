"""Models without a class token go through SAE, steering and pruning, by the functions of the stages.

Their head policies read the mean over patches, and their SAEs steer patches, or all of them by the edit of the mean.

Shapes: B batch, T tokens, D width (d_in), H heads.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_folder
from extracted import Stores, extracted
from test_families import SIGLIP, SMALL, TEXT
from torch import Tensor

from sparsight import backbones, config, sae
from sparsight.backbones.backbone import Backbone
from sparsight.common import tables
from sparsight.common.errors import SparsightError
from sparsight.common.work import Work
from sparsight.images.manifest import Manifest, write_manifest
from sparsight.pruning import evaluate as pruning
from sparsight.pruning import train
from sparsight.pruning.last_block import last_block_inputs
from sparsight.pruning.latent_effects import Edit
from sparsight.pruning.masks import unpack
from sparsight.pruning.policy import FixedMask, HeadPolicy
from sparsight.pruning.policy_inputs import AtLastBlock, Whole
from sparsight.sae import SAE
from sparsight.sae.fit import fit
from sparsight.steering.evaluate import steer

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "SigLIP of open_clip": ("open_clip/ViT-B-16-SigLIP", {**SIGLIP, **TEXT, "vision.image_size": 32}),
    "SigLIP of timm, map pooling": ("timm/vit_base_patch16_siglip_224", {**SMALL, "num_classes": 2}),
    "mean-pooled, with registers": ("timm/vit_medium_patch16_reg4_gap_256", {**SMALL, "num_classes": 2}),
    "mean-pooled": (
        "timm/vit_tiny_patch16_224", {**SMALL, "num_classes": 2, "global_pool": "avg", "class_token": False},
    ),
}  # fmt: skip
CPU = torch.device("cpu")


def make(name: str) -> Backbone:
    torch.manual_seed(0)
    model, options = MODELS[name]
    backbone = backbones.load(model, None, **options)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    if backbone.has_text:
        backbone.prompts_CE = torch.nn.functional.normalize(torch.randn(2, len(backbone.features(backbone.blank)[0])))
    return backbone.requires_grad_(False)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    folder = tmp_path_factory.mktemp("images")
    images = config.Images(source="folder", path=str(make_folder(folder / "images", per_class=20, size=32)))
    write_manifest(images, 0, {}, 3, folder / "m.parquet")
    return Manifest(folder / "m.parquet")


@pytest.fixture(scope="module", params=list(MODELS))
def backbone(request: pytest.FixtureRequest) -> Backbone:
    return make(request.param)


def trained(folder: Path, stores: Stores, site: str) -> SAE:
    section = config.Sae("model", site=site, d_sae=64, k=4, seeds=(0,), epochs=2, batch_size=16, lr=1e-3)
    with Work(folder / "work", "key") as work:
        fit(section, stores["train"], None, "sae", 0, work, CPU, {})
        work.finish(folder)
    return sae.load(folder / "sae-s0").requires_grad_(False)


def run(
    folder: Path, backbone: Backbone, stores: Stores, manifest: Manifest, one: SAE, **options: Any
) -> list[dict[str, Any]]:
    section = config.Steering(**{"sae": "sae", "strengths": (0.5, 20.0), **options})
    with Work(folder / "work", "key") as work:
        steer(section, {"s": [one]}, backbone, stores, stores, manifest, 0, work, {})
        work.finish(folder)
    return tables.read(folder / "s.parquet")


def fitted(folder: Path, backbone: Backbone, manifest: Manifest, blocks: Any = "all") -> HeadPolicy:
    section = config.Policy("model", blocks=blocks, target=0.5, epochs=1, batch_size=8)
    with Work(folder / "work", "key") as work:
        train.fit(section, backbone, manifest, "heads", 0, work, 1, {})
        work.finish(folder)
    return HeadPolicy.load(folder)


def at_last(backbone: Backbone, manifest: Manifest, split: str, policy: HeadPolicy | None = None) -> Tensor:
    images = backbone.normalize(manifest.split(split).batch(slice(None), backbone.preprocess))
    return backbone.run_blocks(backbone.tokens(images), 0, backbone.n_blocks - 1, policy)[0]


def test_sae_steering_and_pruning(backbone: Backbone, manifest: Manifest, tmp_path: Path) -> None:
    last = backbone.n_blocks - 1
    site = f"blocks.{last}.input"
    found = {
        tokens: extracted(backbone, manifest, tmp_path / tokens, sites=(site, "embedding"), tokens=tokens)
        for tokens in ("patches", "mean")
    }
    saes = {tokens: trained(tmp_path / f"sae-{tokens}", stores, site) for tokens, stores in found.items()}
    kinds: dict[str, dict[str, Any]] = {"class-latents": {"latents": 3}, "vs2": {}, "vs2++": {"neighbours": 3}}
    for tokens, one in saes.items():
        for kind, options in kinds.items():
            folder = tmp_path / f"{tokens}-{kind}"
            rows = run(folder, backbone, found[tokens], manifest, one, kind=kind, **options)
            assert {row["n"] for row in rows if row["split"] == "test"} == {len(manifest.split("test"))}
            cost = json.loads((folder / "s.json").read_text())["cost"]["edit_macs"]
            per_row = one.macs_encode + 4 * backbone.d_in
            assert cost == per_row * (backbone.n_patches if tokens == "patches" else 1)
        with pytest.raises(SparsightError, match=r"reads tokens .*, which cannot steer cls"):
            run(tmp_path / "refused", backbone, found[tokens], manifest, one, tokens="cls", latents=3)
    policy = fitted(tmp_path / "policy", backbone, manifest)
    section = config.Pruning("s", strengths=(2.0, 30.0), latents=(1, 3), bias_strengths=(1.0,), batch_size=7)
    with Work(tmp_path / "work", "key") as work:
        pruning.evaluate(section, backbone, policy, {"sae-s0": saes["mean"]}, manifest, 0, work, 1, {})
        work.finish(tmp_path / "pruning")
    metrics = json.loads((tmp_path / "pruning" / "metrics.json").read_text())
    difference = metrics["gathered_against_masked"]
    assert difference["max_abs_logit_difference"] < 1e-4 * max(1, difference["max_abs_logit"])
    own = saes["mean"]
    x = at_last(backbone, manifest, "test", policy)[:, backbone.n_prefix :].mean(dim=1)
    fvu = (own(x) - x).square().sum() / (x - x.mean(dim=0)).square().sum()
    assert metrics["fvu_on_pruned_stream"]["sae-s0"] == pytest.approx(float(fvu), rel=1e-4)
    message = f"reads {site}, tokens patches; heads are steered at {site}, tokens mean"
    with pytest.raises(SparsightError, match=message), Work(tmp_path / "w", "key") as work:
        pruning.evaluate(section, backbone, policy, {"sae-s0": saes["patches"]}, manifest, 0, work, 1, {})


def test_the_policy_reads_the_mean_over_patches_and_edits_move_it(
    backbone: Backbone, manifest: Manifest, tmp_path: Path
) -> None:
    policy, last, H = fitted(tmp_path / "last", backbone, manifest, "last"), backbone.n_blocks - 1, backbone.n_heads
    test, patches = manifest.split("test"), slice(backbone.n_prefix, backbone.n_prefix + backbone.n_patches)
    x = at_last(backbone, manifest, "test")
    mean = x[:, patches].mean(dim=1)
    policy.bias[0] -= policy.logits(last, mean).median(dim=0).values  # so that half of the images keep a head
    _, masks = backbone.run_blocks(x, last, last + 1, policy)
    assert torch.equal(masks[last], mean @ policy.weight[0].T + policy.bias[0] > 0)
    assert masks[last].any() and not masks[last].all()
    inputs = last_block_inputs(backbone, policy, test, 7)
    torch.testing.assert_close(inputs.read_ND, mean, atol=1e-5, rtol=1e-5)
    generator = torch.Generator().manual_seed(0)
    codes = np.random.default_rng(0).integers(2**H, size=(1, len(test)), dtype=np.int32)
    edit = 2 * torch.randn(len(test), backbone.d_in, generator=generator)
    moved = x.clone()
    moved[:, patches] += edit[:, None]
    torch.testing.assert_close(moved[:, patches].mean(dim=1), mean + edit, atol=1e-4, rtol=1e-4)
    keep = FixedMask(torch.from_numpy(unpack(codes[0], H)))
    expected = backbone.classify(backbone.run_blocks(moved, last, last + 1, keep)[0]).argmax(dim=1)
    as_weights = Edit(torch.ones(len(edit), 1), torch.arange(len(edit))[:, None], edit)
    assert np.array_equal(inputs.predict_edited(codes, [as_weights])[0], expected)
    splits = manifest.split("train"), manifest.split("val")
    whole, stored = Whole(backbone, *splits, [last], 7), AtLastBlock(backbone, *splits, 7)
    train_mean = at_last(backbone, manifest, "train")[:, patches].mean(dim=1)
    for statistics in (whole.statistics(), stored.statistics()):
        torch.testing.assert_close(statistics[0][0], train_mean.mean(dim=0), atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(statistics[1][0], train_mean.std(dim=0, correction=0), atol=1e-4, rtol=1e-3)
