"""Strategies and their evaluation, against plain forward passes and plain sums."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from conftest import make_backbone, make_folder
from safetensors.torch import load_file
from torch import Tensor

from sparsight import config, sae, tables
from sparsight.backbones import Backbone
from sparsight.errors import SparsightError
from sparsight.images import Manifest, write_manifest
from sparsight.pruning import classes, controls, evaluate, frontiers, headwise, outcomes, probe, strategies
from sparsight.pruning.evaluate import Steered
from sparsight.pruning.headwise import Headwise, pack, unpack
from sparsight.pruning.last_block import arrive
from sparsight.pruning.outcomes import Outcome
from sparsight.pruning.policy import Given, HeadPolicy
from sparsight.pruning.strategies import KINDS, LABELS, NONE, Row
from sparsight.sae import SAE
from sparsight.steering import latents
from sparsight.steering.controls import mean_difference_edit, random_edit
from sparsight.steering.evaluate import steer
from sparsight.work import Work

SECTION = config.Pruning(
    steering="s", strengths=(1.0, 2.0, 30.0), latents=(1, 4), bias_strengths=(1.0, 5.0), batch_size=7
)


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    make_folder(tmp_path / "images", per_class=30)
    write_manifest(config.Images(source="folder", path=str(tmp_path / "images")), 0, {}, 2, tmp_path / "m.parquet")
    return Manifest(tmp_path / "m.parquet")


def two_classes(**options: Any) -> Backbone:
    """A random ViT that predicts both classes, now one and now the other by the heads that are kept."""
    backbone = make_backbone(classes=2, **options)
    levels = torch.linspace(-2, 2, 64).view(64, 1, 1, 1)
    images = levels + torch.randn(64, 1, 16, 16, generator=torch.Generator().manual_seed(0)) / 10
    mask = torch.rand(64, 3, backbone.n_heads, generator=torch.Generator().manual_seed(1)) > 0.4
    with torch.no_grad():
        backbone.model.head.bias -= backbone(images, head_mask=mask).mean(dim=0)
    return backbone


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


class Study:
    """Everything that an evaluation fits, and the test split as it reaches the last block."""

    def __init__(self, manifest: Manifest, saes: int = 2, **options: Any) -> None:
        self.backbone, self.policy, self.manifest = two_classes(**options), random_policy(), manifest
        both = [steered(self.backbone, manifest, s) for s in range(saes)]
        train = arrive(self.backbone, self.policy, manifest.split("train"), 7)
        self.train, self.probe = train, probe.fit(train.cls_ND, train.labels, 2)
        self.unpruned_train = last_inputs(self.backbone, manifest, "train")[:, 0]
        self.routes_train = evaluate._routes(self.probe, train)
        self.strategies = evaluate._strategies(SECTION, self.policy, both, train, self.routes_train, 2, 0)
        self.test = arrive(self.backbone, self.policy, manifest.split("test"), 7)
        self.routes = evaluate._routes(self.probe, self.test)
        self.rows = strategies.every_row(SECTION, 6, self.strategies.dictionaries)

    def run(self, rows: list[Row]) -> dict[Row, Outcome]:
        return dict(outcomes.run(self.strategies, rows, self.test, self.routes))


def test_codes_and_masks_are_each_other() -> None:
    mask = torch.rand(3, 20, 6) > 0.5
    codes = pack(mask)
    assert codes[1, 4] == sum(2**h for h in range(6) if mask[1, 4, h])
    assert np.array_equal(unpack(codes, 6), mask.numpy())


VITS: list[dict[str, Any]] = [
    {}, {"global_pool": "avg"}, {"qk_norm": True, "init_values": 0.5, "reg_tokens": 2}, {"num_heads": 3},
]  # fmt: skip


@pytest.mark.parametrize("options", VITS, ids=["plain", "pooled", "qk-norm, layer scale, registers", "3 heads"])
def test_every_mask_of_the_table_has_the_logits_of_masking(manifest: Manifest, options: dict[str, Any]) -> None:
    backbone = two_classes(**options)
    H = backbone.n_heads
    images = backbone.normalize(manifest.split("test").batch(slice(0, 5), backbone.preprocess))
    x, _ = backbone.run_blocks(backbone.tokens(images), 0, 2)
    got = torch.cat(list(Headwise.of(backbone, x).every()), dim=1)
    assert got.shape == (5, 2**H, 2)
    for code in range(2**H):
        mask = torch.ones(5, 3, H, dtype=torch.bool)
        mask[:, 2] = torch.from_numpy(unpack(np.array(code), H))
        torch.testing.assert_close(got[:, code], backbone(images, head_mask=mask), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", VITS[:2], ids=["plain", "pooled"])
def test_the_table_and_the_direct_way_predict_the_same(
    manifest: Manifest, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, policy, test = two_classes(**options), random_policy(), manifest.split("test")
    table = arrive(backbone, policy, test, 7)
    monkeypatch.setattr(headwise, "_AFFORDABLE", 0)
    direct = arrive(backbone, policy, test, 7)
    assert table.tabulated and not direct.tabulated
    codes = np.repeat(np.arange(64, dtype=np.int32)[:, None], len(test), axis=1)
    codes = np.concatenate([codes, np.random.default_rng(0).integers(64, size=(9, len(test)), dtype=np.int32)])
    predicted = table.predict(codes)
    assert len(np.unique(predicted)) == 2 and np.array_equal(predicted, direct.predict(codes))


def test_class_latents_are_those_of_the_largest_mean_difference(manifest: Manifest) -> None:
    backbone = two_classes()
    train = manifest.split("train")
    x = last_inputs(backbone, manifest, "train")[:, 0]
    one = random_sae(0)
    z = one.encode(x).dense().numpy()
    found = latents.find(one, x.numpy(), train.labels, 2, 5, 0)
    ranked = Study(manifest).strategies.dictionaries["sae-s0"].ranked_CM
    for c in (0, 1):
        difference = z[train.labels == c].mean(axis=0) - z[train.labels != c].mean(axis=0)
        assert found.latents[c].tolist() == np.argsort(-difference, kind="stable")[:5].tolist()
        assert ranked[c].tolist() == found.latents[c, :4].tolist()
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
        random_edit(one.sae, classes, one.found, size),
        mean_difference_edit(classes, one.found, size),
    ):
        torch.testing.assert_close(edit.norm(dim=1), size)
    towards = mean_difference_edit(classes, one.found, size)[1]
    assert torch.cosine_similarity(towards, one.found.class_mean[1] - one.found.mean, dim=0) > 0.9999


def by_definition(study: Study, row: Row, cls: Tensor, c: int) -> tuple[Tensor, Tensor]:
    """Head logits (H,) of one image under a row that amplifies or replaces, and what was added to the token (D,)."""
    own = (study.strategies.scrambled if row.strategy == "random-sae" else study.strategies.dictionaries)[row.sae]
    z = own.sae.encode(cls).dense()[0]
    if row.strategy == "reconstruct":
        return study.policy.logits(2, own.sae(cls))[0], torch.zeros(48)
    m, A = row.latents, study.policy.weight[1] @ own.sae.W_dec.T
    # class means of the SAE itself are those of the unpruned model
    train_z = own.sae.encode(study.train.cls_ND if row.strategy == "random-sae" else study.unpruned_train).dense()
    inside = torch.from_numpy(study.train.labels == c)
    ranked = (train_z[inside].mean(dim=0) - train_z[~inside].mean(dim=0)).argsort(descending=True)
    chosen = ranked[:m].tolist()
    if row.strategy == "uniform":
        chosen = list(range(64))
    elif row.strategy == "sample-top":
        chosen = z.argsort(descending=True)[:m].tolist()
    elif row.strategy == "targeted":
        chosen = (A[row.target] * train_z.mean(dim=0)).argsort()[:m].tolist()
    elif row.strategy == "latent-atlas":
        chosen = [row.target]
    gain = torch.ones(64)
    gain[chosen] = row.strength
    edit = (gain * z) @ own.sae.W_dec - z @ own.sae.W_dec
    if row.strategy == "random-latents":
        latents_of_c = own.random_CM[c, :m]
        assert not set(latents_of_c.tolist()) & set(ranked[:m].tolist())
        direction = train_z.mean(dim=0)[latents_of_c] @ own.sae.W_dec[latents_of_c]
        edit = direction / direction.norm() * edit.norm() if direction.norm() > 0 else torch.zeros(48)
    if row.strategy == "logit-bias-matched":
        mean_z = train_z[inside].mean(dim=0)
        edit = (gain * mean_z) @ own.sae.W_dec - mean_z @ own.sae.W_dec
    return study.policy.logits(2, cls + edit)[0], edit


def test_every_row_equals_its_definition_run_image_by_image(manifest: Manifest) -> None:
    """Edit the class token, ask the policy, run the whole model under that mask; no table, no closed form."""
    study = Study(manifest, saes=1)
    backbone, policy, test, fitted = study.backbone, study.policy, manifest.split("test"), study.strategies.controls
    rows = [row for row in study.rows if row.strategy != "latent-atlas" or row.target % 9 == 0]
    assert {row.strategy for row in rows} == set(get_args(config.Strategy)) == set(KINDS)
    got = study.run(rows)
    images = backbone.normalize(test.batch(slice(None), backbone.preprocess))
    train_logits = policy.logits(2, last_inputs(backbone, manifest, "train", policy)[:, 0])
    by_class = torch.stack([train_logits[manifest.split("train").labels == c].mean(dim=0) for c in (0, 1)])
    compared = 0
    for n in range(0, len(test), 3):
        x, before = backbone.run_blocks(backbone.tokens(images[n : n + 1]), 0, 2, policy)
        cls, masks = x[:, 0], torch.ones(1, 3, 6, dtype=torch.bool)
        unsteered, by_mask = policy.logits(2, cls)[0], dict[int, int]()
        masks[:, 1], masks[:, 2] = before[1], unsteered > 0
        routed = {
            "oracle": int(test.labels[n]),
            "predicted": int(backbone(images[n : n + 1], head_mask=masks).argmax()),
            "probe": int(study.probe(cls)[0]),
            "none": 0,
        }
        assert np.array_equal(study.test.before[n], masks[0, :2].numpy())
        for row in rows:
            c = routed[row.labels]
            if row.strategy in ("zero-heads", "all-heads", "skip-block"):
                logits = torch.full((6,), 1.0 if row.strategy == "all-heads" else -1.0)
            elif row.strategy == "class-static":
                logits = torch.from_numpy(unpack(fitted.subsets[row.labels, row.strength][c], 6)).float() - 0.5
            elif row.strategy == "class-threshold":
                logits = unsteered + fitted.offsets[row.labels, row.strength][c]
            elif row.strategy == "logit-bias":
                logits = unsteered + row.strength * (by_class[c] - by_class.mean(dim=0))
            else:
                logits, edit = by_definition(study, row, cls, c) if row.sae else (unsteered, cls[0])
            if logits.abs().min() < 1e-3 * (1 + row.strength):
                continue  # a logit on the threshold may fall either way
            compared += 1
            code = int(pack(logits > 0))
            assert got[row].codes[n] == code, row
            if code not in by_mask:
                masks[:, 2] = logits > 0
                by_mask[code] = int(backbone(images[n : n + 1], head_mask=masks).argmax())
            predicted = by_mask[code]
            if row.strategy == "skip-block":
                predicted = int(backbone.classify(x).argmax())
            elif row.strategy == "class-latents-in-stream":
                whole = torch.cat([cls[:, None] + edit, x[:, 1:]], dim=1)
                taken = Given(torch.from_numpy(unpack(np.array([code]), 6)))
                predicted = int(backbone.classify(backbone.run_blocks(whole, 2, 3, taken)[0]).argmax())
            assert got[row].predicted[n] == predicted and got[row].hits[n] == (predicted == test.labels[n]), row
            assert got[row].usage[n] == pytest.approx(bin(code).count("1") / 6)
    assert compared > 0.8 * len(rows) * len(range(0, len(test), 3))


def test_the_closed_form_is_the_measured_change_of_the_head_logits(manifest: Manifest) -> None:
    study = Study(manifest, saes=1)
    one, x = study.strategies.dictionaries["sae-s0"], study.test.cls_ND
    z, classes = one.encode(x), torch.from_numpy(study.routes["oracle"])
    gain = torch.ones_like(z)
    for n, c in enumerate(classes):
        gain[n, one.ranked_CM[c, :4]] = 3.0
    edited = x + (gain * z) @ one.sae.W_dec - z @ one.sae.W_dec
    measured = study.policy.logits(2, edited) - study.policy.logits(2, x)
    closed = (3.0 - 1) * one.class_change(z, classes, 4)
    assert measured.abs().max() > 0.1
    scale = float(study.policy.logits(2, x).abs().max())
    torch.testing.assert_close(closed / scale, measured / scale, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(one.edit_size(z, classes, 4), (edited - x).norm(dim=1) / 2, atol=1e-4, rtol=1e-4)


def test_a_strength_of_one_changes_nothing(manifest: Manifest) -> None:
    study = Study(manifest)
    rows = [row for row in study.rows if row.strength == 1.0 and KINDS[row.strategy].grid == "strengths"]
    assert len({row.strategy for row in rows}) == 9
    got = study.run([NONE, *rows])
    strong = study.run([row._replace(strength=30.0) for row in rows])
    for row in rows:
        assert np.array_equal(got[row].codes, got[NONE].codes) and np.array_equal(got[row].hits, got[NONE].hits)
    assert sum(not np.array_equal(strong[row].codes, got[NONE].codes) for row in strong) > len(strong) / 2


def test_controls_are_fitted_on_train_as_they_say(manifest: Manifest) -> None:
    study = Study(manifest)
    train, fitted = study.train, study.strategies.controls
    predictions = train.predict(np.repeat(np.arange(64, dtype=np.int32)[:, None], len(train), axis=1))
    for labels, c in itertools.product(LABELS, (0, 1)):
        images = np.flatnonzero(study.routes_train[labels] == c)
        for share in controls.THRESHOLD_SHARES:
            kept = train.logits_NH[images] + fitted.offsets[labels, share][c] > 0
            assert kept.float().mean() == pytest.approx(share, abs=0.5 / kept.numel() + 1e-6)
        hits = (predictions == train.labels)[:, images].mean(axis=1)
        for k in range(7):
            best = max(hits[code] for code in range(64) if bin(code).count("1") == k)
            code = int(fitted.subsets[labels, k / 6][c])
            assert bin(code).count("1") == k and hits[code] == best


def test_static_subsets_without_a_table_keep_the_heads_with_the_largest_mean_logits(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(headwise, "_AFFORDABLE", 0)
    study = Study(manifest)
    for c in (0, 1):
        order = study.train.logits_NH[study.train.labels == c].mean(dim=0).argsort(descending=True).tolist()
        for k in range(7):
            assert study.strategies.controls.subsets["oracle", k / 6][c] == sum(2**h for h in order[:k])


def test_the_probe_is_the_minimum_of_its_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(200, 6, generator=generator) * 3 + 7, torch.randint(3, (200,), generator=generator)
    x[:, 0] += 5 * y
    found = probe.fit(x, y.numpy(), 3)
    std = x.double().std(dim=0, correction=0)
    weight, bias = (found.weight_CD * std).requires_grad_(), found.bias_C.clone().requires_grad_()
    centred = x.double() / std
    loss = torch.nn.functional.cross_entropy(centred @ weight.T + bias, y) + 1e-3 * weight.square().sum()
    for gradient in torch.autograd.grad(loss, (weight, bias)):
        assert gradient.abs().max() < 1e-4
    assert (found(x) == y.numpy()).mean() > 0.7


def outcome(hits: float, kept: float) -> Outcome:
    codes = np.where(np.arange(100) < 100 * kept, 63, 0).astype(np.int32)
    right = np.arange(100) < 100 * hits
    return Outcome(right.astype(int), right, codes, np.bitwise_count(codes) / 6)


def test_strength_is_the_one_with_least_usage_among_those_that_keep_accuracy() -> None:
    found = {NONE: outcome(0.9, 0.7)}
    for strength, hits, kept in ((1.5, 0.9, 0.6), (3, 0.89, 0.4), (5, 0.91, 0.4), (10, 0.80, 0.1)):
        for name, change in (("a", 0.01), ("b", -0.01)):  # two SAEs count as their mean
            found[Row("class-latents", strength, "oracle", name, 5)] = outcome(hits + change, kept)
    found[Row("logit-bias", 1, "oracle")] = outcome(0.5, 0.1)
    found[Row("logit-bias", 2, "oracle")] = outcome(0.6, 0.5)
    groups = outcomes.points(found)

    def strength_of(strategy: str, tolerance: float) -> float:
        return outcomes.choose(groups[strategy, "oracle"], found, tolerance).strength

    assert strength_of("class-latents", 0.02) == 5, "equal usage: the more accurate"
    assert strength_of("logit-bias", 0.02) == 2, "none is allowed: the most accurate"
    assert strength_of("class-latents", 0.11) == 10
    line = outcomes.frontier(groups["class-latents", "oracle"], found)
    assert [point.strength for point in line] == [10, 5], "none (0.7 for 0.9) and the others are dominated"


def test_of_several_targets_the_best_is_kept() -> None:
    found = [(Row("targeted", 2.0, "none", "a", 5, h), outcome(hits, kept)) for h, hits, kept in
             ((0, 0.9, 0.5), (1, 0.89, 0.3), (2, 0.7, 0.1))]  # fmt: skip
    kept, tried = outcomes.pick_targets(iter(found), outcome(0.9, 0.7), 0.02)
    assert list(kept) == [found[1][0]]
    assert tried == [(row, one.hits.mean(), one.usage.mean()) for row, one in found]


def test_a_frontier_between_two_points_is_their_mixture() -> None:
    low, high = Row("class-static", 0.2, "oracle"), Row("class-static", 0.6, "oracle")
    found = {NONE: outcome(0.95, 0.9), low: outcome(0.5, 0.2), high: outcome(0.8, 0.6)}
    line = outcomes.frontier(outcomes.points(found)["class-static", "oracle"], found)
    assert [point.strategy for point in line] == ["class-static", "class-static", "none"]
    at = outcomes.at_usage(line, found, 0.3)
    assert at.usage == pytest.approx(0.3) and at.weight == pytest.approx(0.25)
    assert at.hits.mean() == pytest.approx(0.75 * 0.5 + 0.25 * 0.8)
    for usage, end, accuracy in ((0.05, 0.2, 0.5), (0.2, 0.2, 0.5), (0.9, 0.9, 0.95), (1.0, 0.9, 0.95)):
        at = outcomes.at_usage(line, found, usage)
        assert at.usage == pytest.approx(end) and at.hits.mean() == pytest.approx(accuracy)


def test_class_latents_meet_each_control_at_their_own_usage() -> None:
    main, control = Row("class-latents", 3.0, "probe", "a", 5), Row("class-threshold", 0.5, "probe")
    other = Row("class-threshold", 0.1, "oracle")
    found = {NONE: outcome(0.9, 0.8), main: outcome(0.85, 0.4), control: outcome(0.7, 0.3), other: outcome(1.0, 0.0)}
    groups = outcomes.points(found)
    chosen = {key: group[0] for key, group in groups.items()}
    lines = {key: outcomes.frontier(group, found) for key, group in groups.items()}
    (line,) = frontiers.matched(chosen, lines, found, seed=0)
    assert (line["labels"], line["control"]) == ("probe", "class-threshold"), "of the same kind of label only"
    assert line["usage"] == line["usage_control"] == pytest.approx(0.4)
    expected = 0.85 - (0.8 * 0.7 + 0.2 * 0.9)  # a fifth of the way from usage 0.3 to 0.8
    assert line["delta"] == pytest.approx(expected)
    assert line["delta_lo"] < expected < line["delta_hi"]
    lost = {row["strategy"]: row for row in frontiers.against_none(chosen, found, 0.1, seed=0)}["class-latents"]
    assert lost["delta"] == pytest.approx(-0.05) and lost["loss_bound"] > 0.05
    assert lost["non_inferior"] == (lost["loss_bound"] < 0.1)


def test_class_configurations_follow_val_and_are_counted_on_all_test_images(manifest: Manifest) -> None:
    study = Study(manifest)
    val = arrive(study.backbone, study.policy, manifest.split("val"), 7)
    routes = evaluate._routes(study.probe, val)
    rows = [row for row in study.rows if row.target < 0]
    on_val = dict(outcomes.run(study.strategies, rows, val, routes))
    chosen = classes.configurations(on_val, val, 2, 0.2)
    assert set(chosen) == {name for name, kind in KINDS.items() if kind.by_class}
    for strategy, own in chosen.items():
        for c, one in own.items():
            mine, none = val.labels == c, on_val[NONE]
            candidates = [
                (group, np.mean([on_val[row].hits[mine].mean() for row in group]),
                 np.mean([on_val[row].usage[mine].mean() for row in group]))
                for (name, labels), found in outcomes.points(on_val).items()
                if (name, labels) == (strategy, "oracle") for group in (point.rows for point in found)
            ]  # fmt: skip
            floor = none.hits[mine].mean() - 0.2 - 1e-9
            allowed = [usage for _, accuracy, usage in candidates if accuracy >= floor]
            (accuracy, usage), = [(a, u) for group, a, u in candidates if group == one.point.rows]  # fmt: skip
            if allowed:
                assert accuracy >= floor and usage == pytest.approx(min(allowed))
            assert one.selected == (accuracy >= floor and usage <= 0.5 * none.usage[mine].mean())
    none = study.run([NONE])[NONE]
    made = classes.evaluate(study.strategies, chosen, study.test, none, study.routes, ["a", "b"], SECTION, 0)
    labels = study.test.labels
    for subset, counted in zip(made.subsets, made.false_positives, strict=True):
        c = subset["class"]
        row = Row(**{key: subset[key] for key in Row._fields})
        everywhere = {"oracle": np.full(len(labels), c)}
        ((_, expected),) = outcomes.run(study.strategies, [row], study.test, everywhere)
        own = labels == c
        assert subset["accuracy"] == counted["recall"] == expected.hits[own].mean()
        assert subset["usage_last"] == pytest.approx(expected.usage[own].mean())
        assert counted["false_positives"] == ((expected.predicted == c) & ~own).sum()
        assert counted["false_positives_none"] == ((none.predicted == c) & ~own).sum()
        assert counted["accuracy"] == expected.hits.mean()
        kept = unpack(expected.codes[own], 6).mean(axis=0) >= 0.5
        assert subset["heads"] == ", ".join(f"h{h}" for h in range(6) if kept[h])
    assert any(one.selected for own in chosen.values() for one in own.values())
    for line in made.deployed:
        route, own = study.routes[line["labels"]], chosen[line["strategy"]]
        saes = own[0].point.rows
        hits = np.stack([none.hits] * len(saes)).astype(float)
        for c in (c for c, one in own.items() if one.selected):
            everywhere = {"oracle": np.full(len(labels), c)}
            found = dict(outcomes.run(study.strategies, list(own[c].point.rows), study.test, everywhere))
            for i, row in enumerate(own[c].point.rows):
                hits[i, route == c] = found[row].hits[route == c]
        assert line["accuracy"] == pytest.approx(hits.mean())


def test_tables_of_the_evaluation_follow_the_contract(manifest: Manifest, tmp_path: Path) -> None:
    backbone = two_classes()
    both = [steered(backbone, manifest, s) for s in (0, 1)]
    with Work(tmp_path / "w", "key") as work:
        evaluate.evaluate(SECTION, backbone, random_policy(), both, manifest, 0, work, {})
        work.finish(tmp_path / "out")
    read = {path.stem: tables.read(path) for path in (tmp_path / "out").glob("*.parquet")}
    overall, per_class, per_head = read["overall"], read["per_class"], read["per_head"]
    numbers = {"n", "accuracy", "lo", "hi", "usage_last", "usage_all", "macs"}
    key = list(Row._fields)
    for table, more in (
        (overall, ()),
        (per_class, ("class",)),
        (per_head, ("class", "head")),
        (read["validation"], ()),
    ):
        names = [*key, *more]
        assert numbers | set(names) <= table[0].keys()
        assert len({tuple(row[k] for k in names) for row in table}) == len(table), "keys are unique"
    for strategy, kind in KINDS.items():
        own = [row for row in overall if row["strategy"] == strategy]
        assert len(own) == (3 if kind.by_class else 1) * (2 if kind.sae else 1), "one strength each"
        assert {row["labels"] for row in own} == (set(LABELS) if kind.by_class else {"none"})
    assert len(per_head) == 6 * len(per_class) == 6 * 2 * len(overall)
    for row in overall:
        parts = [r for r in per_class if all(r[k] == row[k] for k in key)]
        assert sum(r["n"] for r in parts) == row["n"] == len(manifest.split("test"))
        for name in ("accuracy", "usage_last", "usage_all", "macs"):
            assert np.average([r[name] for r in parts], weights=[r["n"] for r in parts]) == pytest.approx(row[name])
    for row in per_class:
        heads = [r for r in per_head if all(r[k] == row[k] for k in (*key, "class"))]
        assert np.mean([r["usage_last"] for r in heads]) == pytest.approx(row["usage_last"])
        assert np.mean([r["usage_all"] for r in heads]) == pytest.approx(row["usage_all"])
    macs = {row["strategy"]: row["macs"] for row in overall if row["labels"] == "none"}
    tokens, mlp = 17, 2 * 4 * 48 * 48 * 17
    assert macs["all-heads"] - macs["zero-heads"] == pytest.approx(6 * 8 * tokens * (4 * 48 + 2 * tokens))
    assert macs["zero-heads"] - macs["skip-block"] == mlp
    test_points = [row for row in read["frontier"] if row["split"] == "test"]
    assert len({(r["strategy"], r["labels"]) for r in test_points if r["chosen"]}) == len(
        {(r["strategy"], r["labels"]) for r in overall}
    )
    assert all(row["on_frontier"] or row["chosen"] for row in test_points)
    for row in test_points:
        mean = [r for r in overall if all(r[k] == row[k] for k in ("strategy", "labels", "strength", "latents"))]
        if mean:
            assert row["accuracy"] == pytest.approx(np.mean([r["accuracy"] for r in mean]))
            assert row["usage"] == pytest.approx(np.mean([r["usage_last"] for r in mean]))
    pushes = load_file(tmp_path / "out" / "head_latents.safetensors")
    torch.testing.assert_close(pushes["sae-s1"], random_policy().weight[1] @ both[1].sae.W_dec.T)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["gathered_against_masked"]["max_abs_logit_difference"] < 1e-5
    assert metrics["static_policy"] is False and metrics["tabulated_masks"] == 64
    assert {line["control"] for line in metrics["matched_usage"]} == set(KINDS) - {
        "none", "reconstruct", "class-latents", "class-latents-in-stream", "skip-block", "zero-heads", "all-heads"
    }  # fmt: skip


def test_none_comes_first_wherever_the_configuration_names_it(manifest: Manifest) -> None:
    study = Study(manifest, saes=1)
    section = dataclasses.replace(SECTION, strategies=("class-latents-in-stream", "zero-heads", "none"))
    choices = evaluate._choices(section, study.strategies, study.test, study.routes)
    order = [row.strategy for row in choices.outcomes]
    assert order[0] == "none" and order == sorted(order, key=["none", *section.strategies].index)
    assert next(iter(choices.chosen)) == ("none", "none")


def test_a_policy_or_an_sae_of_another_model_is_refused(manifest: Manifest, tmp_path: Path) -> None:
    backbone = two_classes()
    one = steered(backbone, manifest, 0)
    narrow = make_backbone(classes=2, embed_dim=36, num_heads=6)
    with Work(tmp_path / "w", "key") as work:
        with pytest.raises(SparsightError, match=r"another model \(width 48, 6 heads, 3 blocks\) than this .*width 36"):
            evaluate.evaluate(SECTION, narrow, random_policy(), [one], manifest, 0, work, {})
        one.sae.about["site"] = "blocks.1.input"
        with pytest.raises(SparsightError, match=r"the SAE reads blocks\.1\.input.* steered at blocks\.2\.input"):
            evaluate.evaluate(SECTION, backbone, random_policy(), [one], manifest, 0, work, {})
    with pytest.raises(SparsightError, match="the head policy is for a model of width 48, not 36"):
        narrow(torch.zeros(1, 1, 16, 16), policy=random_policy())


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


def test_the_unpruned_model_is_the_one_before_fine_tuning(manifest: Manifest) -> None:
    whole, policy, test = two_classes(), random_policy(), manifest.split("test")
    policy.finetuned = {name: -value for name, value in whole.model.state_dict().items()}
    hits, difference = evaluate._other_ways(whole, policy.own(whole), policy, test, 7)
    images = whole.normalize(test.batch(slice(None), whole.preprocess))
    assert np.array_equal(hits, whole(images).argmax(dim=1).numpy() == test.labels)
    assert difference["max_abs_logit_difference"] < 1e-5 * max(1.0, difference["max_abs_logit"])
    logits = policy.own(whole)(images, policy=policy)
    assert difference["max_abs_logit"] == pytest.approx(float(logits.detach().abs().max()), rel=1e-4)
