"""The head policy and its training."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, make_backbone, make_folder
from safetensors.torch import load_file, save_file
from timm.layers import Attention
from torch import Tensor, nn

from sparsight import config
from sparsight.backbones.backbone import Backbone
from sparsight.common.errors import SparsightError
from sparsight.common.files import write_json
from sparsight.common.work import Work
from sparsight.images.manifest import Manifest, write_manifest
from sparsight.pruning import train
from sparsight.pruning.policy import FixedMask, HeadPolicy
from sparsight.pruning.policy_inputs import AtLastBlock, Whole
from sparsight.pruning.train import _straight_through, _Training

SCRIPT = str(ROOT / "workflow" / "scripts" / "policy.py")

# The stage's own script; it writes a checkpoint after every third step and is killed in the step that it is told.
KILLED = """
import itertools, os, runpy, signal, sys
from sparsight.pipeline.stage import set_threads
set_threads(1)
from sparsight.training import loop
from sparsight.pruning import train

step, at, steps, asked = train._Training.step, int(sys.argv[1]), itertools.count(1), itertools.count(1)

def mortal(self, *rest):
    if next(steps) == at:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *rest)

train._Training.step = mortal
loop.Checkpoint.due = property(lambda self: next(asked) % 3 == 0)
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    make_folder(tmp_path / "images", per_class=30)
    write_manifest(config.Images(source="folder", path=str(tmp_path / "images")), 0, {}, 2, tmp_path / "m.parquet")
    return Manifest(tmp_path / "m.parquet")


def random_policy() -> HeadPolicy:
    policy = HeadPolicy(48, 6, [1, 2])
    with torch.no_grad():
        policy.weight.copy_(torch.randn(policy.weight.shape, generator=torch.Generator().manual_seed(0)))
        policy.bias.zero_()
    return policy.requires_grad_(False)


def fit(
    section: config.Policy, backbone: Backbone, manifest: Manifest, folder: Path, n_parallel: int = 2
) -> tuple[HeadPolicy, list[Any]]:
    """The policy and its log."""
    with Work(folder / "work", "key") as work:
        train.fit(section, backbone, manifest, "heads", 0, work, n_parallel, {})
        work.finish(folder)
    return HeadPolicy.load(folder), [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]


def save_backbone(backbone: Backbone, folder: Path) -> Path:
    """As the backbone stage writes it."""
    folder.mkdir()
    save_file(backbone.model.state_dict(), folder / "model.safetensors")
    preprocess = vars(backbone.preprocess)
    sizes = {"img_size": 16, "patch_size": 4, "in_chans": 1, "embed_dim": 48, "depth": 3, "num_heads": 6}
    about = {"model": "timm/vit_tiny_patch16_224", "architecture": sizes, "classes": ["bright", "dark"]}
    write_json(folder / "config.json", {**about, "templates": [], "training": None, "preprocess": preprocess})
    return folder / "model.safetensors"


@pytest.mark.slow
def test_killed_twice_the_stage_ends_with_the_same_bytes(manifest: Manifest, tmp_path: Path) -> None:
    weights = save_backbone(make_backbone(classes=2), tmp_path / "backbone")

    def run(name: str, at: int) -> int:
        out = tmp_path / name
        words = [f"--out={out}", f"--work={out}.work", "--name=heads", "--threads=1", "--backbone=vit"]
        inputs = [f"--from-images={tmp_path / 'm.parquet'}", f"--from-backbone={weights}"]
        command = [sys.executable, "-c", KILLED, str(at), SCRIPT, *inputs, *words, "--batch-size=6", "--epochs=2"]
        command += ["--backbone-lr=0.001"]  # more to restore
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode in (0, -signal.SIGKILL), done.stderr
        return done.returncode

    assert run("undisturbed", 0) == 0
    assert run("killed", 5) == -signal.SIGKILL and not (tmp_path / "killed").exists()
    state = load_file(tmp_path / "killed.work" / "state" / "checkpoint.safetensors")
    assert int(state["loop.position"][0]) == 3, "of 14 steps"
    assert run("killed", 8) == -signal.SIGKILL, "ten steps in all"
    assert run("killed", 0) == 0
    for file in ("policy.safetensors", "config.json", "training.jsonl"):
        assert (tmp_path / "killed" / file).read_bytes() == (tmp_path / "undisturbed" / file).read_bytes(), file


def test_training_moves_the_evaluated_usage_to_the_target(manifest: Manifest, tmp_path: Path) -> None:
    for target in (0.3, 0.9):
        section = config.Policy("vit", target=target, usage_weight=20.0, epochs=12, batch_size=6)
        _, log = fit(section, make_backbone(classes=2), manifest, tmp_path / str(target))
        assert log[-1]["val_usage_policy_blocks"] == pytest.approx(target, abs=0.12)
        steps = [line for line in log if "usage_evaluated" in line]
        assert any(line["usage_evaluated"] != line["usage_sampled"] for line in steps)


@pytest.mark.parametrize(
    "change", [{}, {"blocks": "last"}, {"backbone_lr": 1e-3}, {"couple_mlp": True}], ids=lambda change: str(*change)
)
def test_parts_at_the_same_time_give_the_bytes_of_one_after_the_other(
    change: dict[str, Any], manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsight.config.compute._ROWS", 2)
    section = config.Policy("vit", target=0.5, epochs=2, batch_size=7, **change)
    for n_parallel in (1, 4):
        fit(section, make_backbone(classes=2), manifest, tmp_path / str(n_parallel), n_parallel)
    for file in ("policy.safetensors", "config.json", "training.jsonl"):
        assert (tmp_path / "1" / file).read_bytes() == (tmp_path / "4" / file).read_bytes(), file


def test_a_step_in_parts_is_the_step_of_the_whole_batch(
    manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section, logs = config.Policy("vit", target=0.5, epochs=2, batch_size=7), []
    for rows in (1, 100):
        monkeypatch.setattr("sparsight.config.compute._ROWS", rows)
        logs.append(fit(section, make_backbone(classes=2), manifest, tmp_path / str(rows))[1])
    assert logs[0] != logs[1], "sums in another order"
    for part, whole in zip(*logs, strict=True):
        assert part == pytest.approx(whole, rel=1e-3, abs=1e-4)


def test_without_noise_training_decides_as_evaluation_does(manifest: Manifest, tmp_path: Path) -> None:
    section = config.Policy("vit", target=0.5, noise="none", epochs=2, batch_size=6)
    _, log = fit(section, make_backbone(classes=2), manifest, tmp_path / "policy")
    steps = [line for line in log if "usage_evaluated" in line]
    assert steps and all(line["usage_evaluated"] == line["usage_sampled"] for line in steps)


def test_a_policy_of_the_last_block_leaves_the_others_whole(manifest: Manifest, tmp_path: Path) -> None:
    backbone = make_backbone(classes=2)
    section = config.Policy("vit", blocks="last", target=0.5, usage_weight=20.0, epochs=2, batch_size=6)
    policy, _ = fit(section, backbone, manifest, tmp_path / "policy")
    policy.check(backbone)
    assert policy.blocks == [2] and policy.weight.shape == (1, 6, 48)
    _, masks = backbone.run_blocks(backbone.tokens(torch.randn(4, 1, 16, 16)), 0, 3, policy)
    assert list(masks) == [2]


class AtBlock2(FixedMask):
    """Masks for block 2 alone."""

    def decide(self, block: int, read_BD: Tensor) -> Tensor | None:  # type: ignore[override]
        return self.keep_BH if block == 2 else None


def test_images_stored_at_the_last_block_give_what_the_whole_model_gives(manifest: Manifest) -> None:
    backbone = make_backbone(classes=2).requires_grad_(False)
    train, val = manifest.split("train"), manifest.split("val")
    whole, stored = Whole(backbone, train, val, [2], 7), AtLastBlock(backbone, train, val, 7)
    for one, other in zip(whole.statistics(), stored.statistics(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    rows, gradients, logits = np.arange(1, len(train), 3), [], []
    for passes in (whole, stored):
        keep = torch.rand(len(rows), 6, generator=torch.Generator().manual_seed(1)).requires_grad_()
        logits.append(passes.logits(rows, AtBlock2(keep)))
        gradients.append(torch.autograd.grad(logits[-1][:, 0].sum(), keep)[0])
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)
    policy = random_policy()
    policy.blocks = [2]
    for got, wanted in zip(whole.on_val(policy), stored.on_val(policy), strict=True):
        np.testing.assert_allclose(got, wanted)


def test_a_fine_tuned_backbone_is_kept_with_its_policy(manifest: Manifest, tmp_path: Path) -> None:
    original, tuned = make_backbone(classes=2), make_backbone(classes=2)
    section = config.Policy("vit", target=0.5, epochs=2, batch_size=6, backbone_lr=1e-3)
    policy, _ = fit(section, tuned, manifest, tmp_path / "policy")
    own, images = policy.own(original), torch.randn(4, 1, 16, 16)
    assert torch.equal(own(images, policy=policy), tuned(images, policy=policy))
    assert not torch.equal(own(images), original(images))
    frozen, _ = fit(config.Policy("vit", epochs=1, batch_size=6), original, manifest, tmp_path / "frozen")
    assert torch.equal(frozen.own(original)(images), original(images))
    assert torch.equal(original(images), make_backbone(classes=2)(images))


@pytest.mark.parametrize("blocks", ["all", "last"])
def test_a_policy_remembers_that_mlps_were_coupled(manifest: Manifest, tmp_path: Path, blocks: Any) -> None:
    backbone, images = make_backbone(classes=2), torch.randn(4, 1, 16, 16)
    section = config.Policy("vit", blocks=blocks, target=0.3, couple_mlp=True, epochs=1, batch_size=6)
    policy, _ = fit(section, backbone, manifest, tmp_path / "policy")
    policy.bias[:, :3] = -100  # whatever training did: half of the heads
    uncoupled, coupled = backbone(images, policy=policy), policy.own(backbone)(images, policy=policy)
    assert not backbone.couples_mlp and not torch.allclose(uncoupled, coupled, atol=1e-3)


class Foreign(Attention):  # type: ignore[misc]
    """An attention layer that computes something else."""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda old: Foreign(48, 6), r"policies\.heads: block 2: heads of Foreign cannot be switched; known layers: "),
        (
            lambda old: Attention(48, 6, scale_norm=True, norm_layer=nn.LayerNorm),
            r"policies\.heads: block 2: .*Attention normalises or gates all heads together",
        ),
    ],
    ids=["another class", "a norm over all heads"],
)
def test_a_model_whose_heads_cannot_be_left_out_is_named(
    manifest: Manifest, tmp_path: Path, change: Any, message: str
) -> None:
    backbone = make_backbone(classes=2)
    backbone.model.blocks[2].attn = change(backbone.model.blocks[2].attn)
    with pytest.raises(SparsightError, match=message):
        fit(config.Policy("vit"), backbone, manifest, tmp_path / "policy")


@pytest.mark.parametrize("target", [0.0, -0.1, 1.01])
def test_a_usage_target_outside_0_to_1_is_refused(target: float) -> None:
    with pytest.raises(SparsightError, match=f"target: must be more than 0 and at most 1, got {target}"):
        config.Policy("vit", target=target)


def last_inputs(backbone: Backbone, manifest: Manifest, split: str) -> Tensor:
    images = manifest.split(split).batch(slice(None), backbone.preprocess)
    return backbone.run_blocks(backbone.tokens(backbone.normalize(images)), 0, 2)[0]


def test_folded_policy_decides_as_the_standardised_one(manifest: Manifest) -> None:
    backbone = make_backbone(classes=2)
    mean, std = Whole(backbone, manifest.split("train"), manifest.split("val"), [1, 2], 7).statistics()
    x = last_inputs(backbone, manifest, "train")[:, 0]
    torch.testing.assert_close(mean[1], x.mean(dim=0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(std[1], x.std(dim=0, correction=0), atol=1e-4, rtol=1e-3)
    loop = _Training.__new__(_Training)
    loop.policy, loop.backbone, loop.mean_PD, loop.std_PD = random_policy(), backbone, mean, std
    expected = loop.policy.logits(2, (x - mean[1]) / std[1])
    torch.testing.assert_close(loop.folded().logits(2, x), expected, atol=1e-4, rtol=1e-4)


def test_policy_saves_and_loads_and_leaves_the_first_block_alone(tmp_path: Path) -> None:
    policy = random_policy()
    policy.save(tmp_path)
    loaded, cls = HeadPolicy.load(tmp_path), torch.randn(9, 48)
    assert loaded.decide(0, cls) is None
    for block in (1, 2):
        got = loaded.decide(block, cls)
        assert got is not None and torch.equal(got, policy.logits(block, cls) > 0)


def test_straight_through_is_binary_forward_and_soft_backward() -> None:
    logits = torch.tensor([-2.0, 0.1, 3.0], requires_grad=True)
    mask = _straight_through(torch.sigmoid(logits / 5))
    assert mask.tolist() == [0, 1, 1]
    (gradient,) = torch.autograd.grad(mask.sum(), logits)
    soft = torch.sigmoid(logits.detach() / 5)
    torch.testing.assert_close(gradient, soft * (1 - soft) / 5)
