"""Head policy, steering edits and the evaluation, against plain forward passes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_backbone, make_folder
from torch import Tensor

from sparsight import config, sae, tables
from sparsight.backbones import Backbone
from sparsight.images import Manifest, write_manifest
from sparsight.pruning import evaluate as pruning
from sparsight.pruning.evaluate import NONE, Row, Steered
from sparsight.pruning.policy import HeadPolicy
from sparsight.pruning.train import _cls_statistics, _straight_through, _Training
from sparsight.sae import SAE
from sparsight.steering import controls, latents
from sparsight.steering.evaluate import steer
from sparsight.work import Work

SECTION = config.Pruning(steering="s", strengths=(2.0, 30.0), bias_strengths=(1.0, 5.0), batch_size=7)


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    make_folder(tmp_path / "images", per_class=30)
    write_manifest(config.Images(source="folder", path=str(tmp_path / "images")), 0, {}, 2, tmp_path / "m.parquet")
    return Manifest(tmp_path / "m.parquet")


def two_classes() -> Backbone:
    return make_backbone(classes=2)


def random_policy(seed: int = 0) -> HeadPolicy:
    policy = HeadPolicy(48, 6, [1, 2])
    with torch.no_grad():
        generator = torch.Generator().manual_seed(seed)
        policy.weight.copy_(torch.randn(policy.weight.shape, generator=generator))
        policy.bias.zero_()
    return policy.requires_grad_(False)


def random_sae(seed: int) -> SAE:
    one = sae.create("topk", 48, 64, 8, seed=seed)
    one.about = {"site": "blocks.2.input", "tokens": "cls"}
    return one.requires_grad_(False)


def last_inputs(backbone: Backbone, manifest: Manifest, split: str, policy: HeadPolicy | None = None) -> Tensor:
    images = manifest.split(split).batch(slice(None), backbone.preprocess)
    return backbone.run_blocks(backbone.tokens(backbone.normalize(images)), 0, 2, policy)[0]


def steered(backbone: Backbone, manifest: Manifest, seed: int) -> Steered:
    one, train = random_sae(seed), manifest.split("train")
    x = last_inputs(backbone, manifest, "train")[:, 0].numpy()
    return Steered(f"sae-s{seed}", one, latents.find(one, x, train.labels, 2, 5, seed))


def test_class_latents_are_those_of_the_largest_mean_difference(manifest: Manifest) -> None:
    backbone = two_classes()
    train = manifest.split("train")
    x = last_inputs(backbone, manifest, "train")[:, 0]
    one = random_sae(0)
    z = one.encode(x).dense().numpy()
    found = latents.find(one, x.numpy(), train.labels, 2, 5, 0)
    for c in (0, 1):
        difference = z[train.labels == c].mean(axis=0) - z[train.labels != c].mean(axis=0)
        assert found.latents[c].tolist() == np.argsort(-difference, kind="stable")[:5].tolist()
        np.testing.assert_allclose(found.class_mean[c], x.numpy()[train.labels == c].mean(axis=0), atol=1e-5)
        mean = z[train.labels == c].mean(axis=0)[found.latents[c]]
        np.testing.assert_allclose(found.vectors[c, 4], mean @ one.W_dec[found.latents[c]].numpy(), atol=1e-4)
        assert not set(found.latents[c].tolist()) & set(found.random_latents[c].tolist())
        assert len(set(found.random_latents[c].tolist())) == 5


def test_class_edit_is_the_difference_of_two_decodings(manifest: Manifest) -> None:
    backbone = two_classes()
    one = steered(backbone, manifest, 0)
    x = last_inputs(backbone, manifest, "val")[:, 0]
    classes = torch.tensor(manifest.split("val").labels).long()
    z = one.sae.encode(x).dense()
    gain = torch.ones_like(z)
    for row, c in enumerate(classes):
        gain[row, one.found.latents[c]] = 7.0
    expected = (gain * z) @ one.sae.W_dec - z @ one.sae.W_dec
    got = (7.0 - 1) * latents.class_edit(one.sae, z, classes, one.found)
    assert expected.norm() > 0
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_controls_have_the_size_they_are_given(manifest: Manifest) -> None:
    one = steered(two_classes(), manifest, 0)
    size, classes = torch.tensor([0.0, 2.5, 40.0]), torch.tensor([0, 1, 1])
    for edit in (
        controls.random_edit(one.sae, classes, one.found, size),
        controls.mean_difference_edit(classes, one.found, size),
    ):
        torch.testing.assert_close(edit.norm(dim=1), size)
    towards = controls.mean_difference_edit(classes, one.found, size)[1]
    assert torch.cosine_similarity(towards, one.found.class_mean[1] - one.found.mean, dim=0) > 0.9999


def rows() -> list[Row]:
    return pruning._rows(SECTION, ["sae-s0", "sae-s1"])


def test_every_row_equals_its_definition_run_image_by_image(manifest: Manifest) -> None:
    """Steer the class token, ask the policy, run the whole model under a mask; no shared prefix, no grouping."""
    backbone, policy, test = two_classes(), random_policy(), manifest.split("test")
    by_name = {f"sae-s{s}": steered(backbone, manifest, s) for s in (0, 1)}
    shift = pruning.class_shift(backbone, policy, manifest.split("train"), 2, 7)
    train_logits = policy.logits(2, last_inputs(backbone, manifest, "train", policy)[:, 0])
    by_class = torch.stack([train_logits[manifest.split("train").labels == c].mean(dim=0) for c in (0, 1)])
    torch.testing.assert_close(shift, by_class - by_class.mean(dim=0), atol=1e-4, rtol=1e-4)
    got = pruning._Runner(backbone, policy, by_name, shift, 7).run(rows(), test)
    images = backbone.normalize(test.batch(slice(None), backbone.preprocess))
    for n in range(len(test)):
        x, before = backbone.run_blocks(backbone.tokens(images[n : n + 1]), 0, 2, policy)
        cls, truth = x[:, 0], int(test.labels[n])
        masks = torch.ones(1, 3, 6, dtype=torch.bool)
        masks[:, 1], masks[:, 2] = before[1], policy.logits(2, cls) > 0
        unsteered = int(backbone(images[n : n + 1], head_mask=masks).argmax())
        for row in rows():
            c = torch.tensor([truth if row.labels == "oracle" else unsteered])
            one = by_name.get(row.sae)
            steered_cls, bias = cls, torch.zeros(6)
            if row.strategy == "logit-bias":
                bias = row.strength * shift[c[0]]
            elif one is not None:
                z = one.sae.encode(cls).dense()
                edit = latents.class_edit(one.sae, z, c, one.found)
                if row.strategy == "random-latents":
                    edit = controls.random_edit(one.sae, c, one.found, edit.norm(dim=1))
                steered_cls = one.sae(cls) if row.strategy == "reconstruct" else cls + (row.strength - 1) * edit
            logits = policy.logits(2, steered_cls) + bias
            if logits.abs().min() < 1e-3:
                continue  # a logit on the threshold may fall either way
            masks[:, 2] = logits > 0
            assert np.array_equal(got[row].all[n], masks[0].numpy()), row
            assert np.array_equal(got[row].last[n], masks[0, 2].numpy())
            assert got[row].hits[n] == (int(backbone(images[n : n + 1], head_mask=masks).argmax()) == truth), row


def outcome(hits: float, kept: float) -> pruning.Outcome:
    last = np.arange(600).reshape(100, 6) < 600 * kept
    return pruning.Outcome(np.arange(100) < 100 * hits, last, np.repeat(last[:, None], 3, axis=1))


def test_strength_is_the_one_with_least_usage_among_those_that_keep_accuracy() -> None:
    outcomes = {NONE: outcome(0.9, 0.7)}
    for strength, hits, kept in ((1.5, 0.9, 0.6), (3, 0.89, 0.4), (5, 0.91, 0.4), (10, 0.80, 0.1)):
        for name, change in (("a", 0.01), ("b", -0.01)):  # two SAEs count as their mean
            outcomes[Row("class-latents", strength, "oracle", name)] = outcome(hits + change, kept)
    outcomes[Row("logit-bias", 1, "oracle", "")] = outcome(0.5, 0.1)
    outcomes[Row("logit-bias", 2, "oracle", "")] = outcome(0.6, 0.5)
    chosen = pruning._choose(outcomes, 0.01)
    assert chosen["class-latents", "oracle"] == 3, "ties in usage go to the smaller strength"
    assert chosen["logit-bias", "oracle"] == 2, "none is allowed: the most accurate"
    assert pruning._choose(outcomes, 0.0)["class-latents", "oracle"] == 5


def test_tables_of_the_evaluation_follow_the_contract(manifest: Manifest, tmp_path: Path) -> None:
    backbone = two_classes()
    both = [steered(backbone, manifest, s) for s in (0, 1)]
    with Work(tmp_path / "w", "key") as work:
        pruning.evaluate(SECTION, backbone, random_policy(), both, manifest, work, {})
        work.finish(tmp_path / "out")
    numbers = {"n", "accuracy", "lo", "hi", "usage_last", "usage_all", "macs"}
    overall, per_class, per_head = (
        tables.read(tmp_path / "out" / f"{t}.parquet") for t in ("overall", "per_class", "per_head")
    )
    for table, keys in ((overall, ()), (per_class, ("class",)), (per_head, ("class", "head"))):
        names = ["strategy", "strength", "labels", "sae", *keys]
        assert numbers | set(names) <= table[0].keys()
        assert len({tuple(row[k] for k in names) for row in table}) == len(table), "keys are unique"
    assert len(overall) == 1 + 2 + 2 * 2 + 2 * 2 + 2, "one strength each; a row per SAE where there is one"
    assert len(per_head) == 6 * len(per_class) == 6 * 2 * len(overall)
    for row in overall:
        parts = [r for r in per_class if all(r[k] == row[k] for k in ("strategy", "strength", "labels", "sae"))]
        assert sum(r["n"] for r in parts) == row["n"] == len(manifest.split("test"))
        for name in ("accuracy", "usage_last", "usage_all", "macs"):
            assert np.average([r[name] for r in parts], weights=[r["n"] for r in parts]) == pytest.approx(row[name])
    for row in per_class:
        heads = [r for r in per_head if all(r[k] == row[k] for k in ("strategy", "strength", "labels", "sae", "class"))]
        assert np.mean([r["usage_last"] for r in heads]) == pytest.approx(row["usage_last"])
        assert np.mean([r["usage_all"] for r in heads]) == pytest.approx(row["usage_all"])
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["gathered_against_masked"]["max_abs_logit_difference"] < 1e-5
    assert metrics["static_policy"] is False


def test_in_stream_steering_equals_editing_the_input_of_the_last_block(manifest: Manifest, tmp_path: Path) -> None:
    backbone, one = two_classes(), random_sae(0)
    section = config.Steering(sae="topk", latents=5, strengths=(2.0, 30.0))
    x_train = last_inputs(backbone, manifest, "train")[:, 0].numpy()

    class Store:
        tokens = "cls"
        path = tmp_path

        def rows(self, site: str) -> np.ndarray:
            assert site == "blocks.2.input"
            return x_train

    stores: Any = {"train": Store()}

    with Work(tmp_path / "w", "key") as work:
        steer(section, one, backbone, stores, {}, manifest, "s", 0, work, {})
        work.finish(tmp_path / "out")
    table = tables.read(tmp_path / "out" / "s.parquet")
    found = latents.ClassLatents.load(tmp_path / "out" / "s.safetensors", torch.device("cpu"))
    val = manifest.split("val")
    x, truth = last_inputs(backbone, manifest, "val"), torch.tensor(val.labels).long()

    def accuracy(cls: Tensor) -> float:
        edited = torch.cat([cls[:, None], x[:, 1:]], dim=1)
        logits = backbone.classify(backbone.run_blocks(edited, 2, 3)[0])
        return float((logits.argmax(dim=1) == truth).float().mean())

    def row(**wanted: Any) -> dict[str, Any]:
        (found_row,) = [r for r in table if all(r[k] == v for k, v in wanted.items())]
        return found_row

    edit = latents.class_edit(one, one.encode(x[:, 0]).dense(), truth, found)
    for strength in section.strengths:
        got = row(method="class-latents", labels="oracle", split="val", strength=strength)["accuracy"]
        assert got == pytest.approx(accuracy(x[:, 0] + (strength - 1) * edit))
    assert row(method="none", split="val")["accuracy"] == pytest.approx(accuracy(x[:, 0]))
    assert row(method="reconstruct", split="val")["accuracy"] == pytest.approx(accuracy(one(x[:, 0])))
    for method in ("class-latents", "random-latents", "mean-difference"):
        for labels in ("predicted", "oracle"):
            best = max(
                (r for r in table if (r["method"], r["labels"], r["split"]) == (method, labels, "val")),
                key=lambda r: (r["accuracy"], -r["strength"]),
            )
            assert row(method=method, labels=labels, split="test")["strength"] == best["strength"]


def test_folded_policy_decides_as_the_standardised_one(manifest: Manifest) -> None:
    backbone = two_classes()
    mean, std = _cls_statistics(backbone, manifest.split("train"), [1, 2], 7)
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
