"""Strategies and controls, against plain forward passes and plain sums."""

import itertools
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from studies import Study, last_inputs, random_policy, random_sae, two_class_images, two_classes
from torch import Tensor

from sparsight import config, sae
from sparsight.images.manifest import Manifest
from sparsight.pruning import controls, evaluate, head_outputs, last_block, linear_probe
from sparsight.pruning.head_outputs import HeadOutputs
from sparsight.pruning.last_block import last_block_inputs
from sparsight.pruning.latent_effects import Edit, LatentEffects, scramble
from sparsight.pruning.masks import pack, unpack
from sparsight.pruning.policy import FixedMask, HeadPolicy
from sparsight.pruning.strategies import KINDS, LABELS, NONE, Row
from sparsight.sae import SAE
from sparsight.steering import class_latents
from sparsight.steering.class_latents import ClassLatents
from sparsight.steering.controls import mean_difference_edit, random_edit


@pytest.fixture
def manifest(tmp_path: Path) -> Manifest:
    return two_class_images(tmp_path)


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
    got = torch.cat(list(HeadOutputs.of(backbone, x).every()), dim=1)
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
    table = last_block_inputs(backbone, policy, test, 7)
    monkeypatch.setattr(head_outputs, "_AFFORDABLE", 0)
    direct = last_block_inputs(backbone, policy, test, 7)
    assert table.tabulated and not direct.tabulated
    codes = np.repeat(np.arange(64, dtype=np.int32)[:, None], len(test), axis=1)
    codes = np.concatenate([codes, np.random.default_rng(0).integers(64, size=(9, len(test)), dtype=np.int32)])
    predicted = table.predict(codes)
    assert len(np.unique(predicted)) == 2 and np.array_equal(predicted, direct.predict(codes))


def edit_of(edit_ND: torch.Tensor) -> Edit:
    """An edit that adds these rows."""
    numbers_N1 = torch.arange(len(edit_ND))[:, None]
    return Edit(edit_ND.any(dim=1, keepdim=True).float(), numbers_N1, edit_ND)


@pytest.mark.parametrize("options", VITS, ids=["plain", "pooled", "qk-norm, layer scale, registers", "3 heads"])
@pytest.mark.parametrize("kept", [0, 2**30], ids=["stream computed again", "stream kept"])
def test_edited_class_tokens_are_seen_by_the_last_block(
    manifest: Manifest, options: dict[str, Any], kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(last_block, "_KEPT", kept)
    backbone, test = two_classes(**options), manifest.split("test")
    H, generator = backbone.n_heads, torch.Generator().manual_seed(0)
    policy = HeadPolicy(48, H, [1, 2]).requires_grad_(False)
    policy.weight.normal_(generator=generator)
    codes_SN = np.random.default_rng(0).integers(2**H, size=(3, len(test)), dtype=np.int32)
    edits_SND = 3 * torch.randn(3, len(test), 48, generator=generator)
    edits_SND[0, ::3] = edits_SND[1] = 0  # images that an edit leaves as they are
    last = last_block_inputs(backbone, policy, test, 7, n_parallel=3)
    x_BTD = last_inputs(backbone, manifest, "test", policy)
    for _ in range(2):  # the second time from what was kept
        got_SN = last.predict_edited(codes_SN, [edit_of(edit_ND) for edit_ND in edits_SND])
        for got_N, codes_N, edit_ND in zip(got_SN, codes_SN, edits_SND, strict=True):
            whole = torch.cat([x_BTD[:, :1] + edit_ND[:, None], x_BTD[:, 1:]], dim=1)
            keep = FixedMask(torch.from_numpy(unpack(codes_N, H)))
            assert np.array_equal(got_N, backbone.classify(backbone.run_blocks(whole, 2, 3, keep)[0]).argmax(dim=1))
    assert len(np.unique(got_SN)) == 2


def test_class_latents_are_those_of_the_largest_mean_difference(manifest: Manifest) -> None:
    study = Study(manifest)
    train, x, one = manifest.split("train"), study.train.read_ND, random_sae(0)
    z = one.encode(x).dense().numpy()
    found = class_latents.find(one, x.numpy(), train.labels, 2, 5, 0)
    ranked = study.strategies.effects_by_sae["sae-s0"].found.latents
    for c in (0, 1):
        difference = z[train.labels == c].mean(axis=0) - z[train.labels != c].mean(axis=0)
        assert found.latents[c].tolist() == np.argsort(-difference, kind="stable")[:5].tolist()
        assert ranked[c].tolist() == found.latents[c, :4].tolist()
        np.testing.assert_allclose(found.class_mean[c], x.numpy()[train.labels == c].mean(axis=0), atol=1e-5)
        mean = z[train.labels == c].mean(axis=0)[found.latents[c]]
        np.testing.assert_allclose(found.vectors[c, 4], mean @ one.W_dec[found.latents[c]].numpy(), atol=1e-4)
        assert not set(found.latents[c].tolist()) & set(found.random_latents[c].tolist())
        assert len(set(found.random_latents[c].tolist())) == 5


def found_on_train(one: SAE, manifest: Manifest) -> ClassLatents:
    x = last_inputs(two_classes(), manifest, "train")[:, 0].numpy()
    return class_latents.find(one, x, manifest.split("train").labels, 2, 5, 0)


def test_class_edit_is_the_difference_of_two_decodings(manifest: Manifest) -> None:
    one = random_sae(0)
    found = found_on_train(one, manifest)
    x = last_inputs(two_classes(), manifest, "val")[:, 0]
    classes = torch.tensor(manifest.split("val").labels).long()
    z = one.encode(x).dense()
    gain = torch.ones_like(z)
    for row, c in enumerate(classes):
        gain[row, found.latents[c]] = 7.0
    expected = (gain * z) @ one.W_dec - z @ one.W_dec
    got = (7.0 - 1) * class_latents.class_edit(one, z, classes, found)
    assert expected.norm() > 0
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_controls_have_the_size_they_are_given(manifest: Manifest) -> None:
    one = random_sae(0)
    found = found_on_train(one, manifest)
    size, classes = torch.tensor([0.0, 2.5, 40.0]), torch.tensor([0, 1, 1])
    for edit in (
        random_edit(one, classes, found, size),
        mean_difference_edit(classes, found, size),
    ):
        torch.testing.assert_close(edit.norm(dim=1), size)
    towards = mean_difference_edit(classes, found, size)[1]
    assert torch.cosine_similarity(towards, found.class_mean[1] - found.mean, dim=0) > 0.9999


def by_definition(study: Study, row: Row, cls: Tensor, c: int) -> tuple[Tensor, Tensor]:
    """Head logits (H,) of one image under a row that amplifies or replaces, and what was added to the token (D,)."""
    own = (study.strategies.scrambled if row.strategy == "random-sae" else study.strategies.effects_by_sae)[row.sae]
    z = own.sae.encode(cls).dense()[0]
    if row.strategy == "reconstruct":
        return study.policy.logits(2, own.sae(cls))[0], torch.zeros(48)
    m, A = row.latents, study.policy.weight[1] @ own.sae.W_dec.T
    train_z = own.sae.encode(study.train.read_ND).dense()
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
        latents_of_c = own.found.random_latents[c, :m]
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
                taken = FixedMask(torch.from_numpy(unpack(np.array([code]), 6)))
                predicted = int(backbone.classify(backbone.run_blocks(whole, 2, 3, taken)[0]).argmax())
            assert got[row].predicted[n] == predicted and got[row].hits[n] == (predicted == test.labels[n]), row
            assert got[row].usage[n] == pytest.approx(bin(code).count("1") / 6)
    assert compared > 0.8 * len(rows) * len(range(0, len(test), 3))


def test_a_random_sae_that_is_the_sae_itself_gets_the_same_rows(
    manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "scramble", lambda one, seed: one)
    study = Study(manifest)
    rows = [row for row in study.rows if row.strategy == "class-latents"]
    own, control = study.run(rows), study.run([row._replace(strategy="random-sae") for row in rows])
    assert len({outcome.codes.tobytes() for outcome in own.values()}) > 4
    for row, outcome in own.items():
        expected = control[row._replace(strategy="random-sae")]
        assert np.array_equal(outcome.codes, expected.codes) and np.array_equal(outcome.predicted, expected.predicted)


def test_the_control_of_random_latents_weighs_images_alike_with_and_without_pruning(manifest: Manifest) -> None:
    """Classes of unequal size: the random latents' mean activation is over images, not over class means."""
    study = Study(manifest, saes=1)
    one, keep = study.saes["sae-s0"], np.flatnonzero((study.train.labels == 0) | (np.arange(len(study.train)) % 3 == 0))
    labels, x = study.train.labels[keep], study.train.read_ND[torch.from_numpy(keep)]
    assert (labels == 0).sum() > 2 * (labels == 1).sum()
    found = class_latents.find(one, x.numpy(), labels, 2, 4, 0)
    z, classes = one.encode(study.test.read_ND).dense(), torch.from_numpy(study.routes["oracle"])
    size_N = class_latents.class_edit(one, z, classes, found).norm(dim=1)
    mean_F = one.encode(x).dense().mean(dim=0)
    direction = torch.stack([mean_F[latents] @ one.W_dec[latents] for latents in found.random_latents])
    direction = direction / direction.norm(dim=1, keepdim=True)
    expected = direction[classes] * size_N[:, None]
    torch.testing.assert_close(random_edit(one, classes, found, size_N), expected, rtol=1e-4, atol=1e-4)
    weight_HD = study.policy.weight[-1]
    change_NH = LatentEffects(one, weight_HD, found).random_change(z, classes, 4)
    torch.testing.assert_close(change_NH, expected @ weight_HD.T, rtol=1e-3, atol=1e-3)


def test_the_closed_form_is_the_measured_change_of_the_head_logits(manifest: Manifest) -> None:
    study = Study(manifest, saes=1)
    one, x = study.strategies.effects_by_sae["sae-s0"], study.test.read_ND
    z, classes = one.encode(x), torch.from_numpy(study.routes["oracle"])
    gain = torch.ones_like(z)
    for n, c in enumerate(classes):
        gain[n, one.found.latents[c, :4]] = 3.0
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
    monkeypatch.setattr(head_outputs, "_AFFORDABLE", 0)
    study = Study(manifest)
    for c in (0, 1):
        order = study.train.logits_NH[study.train.labels == c].mean(dim=0).argsort(descending=True).tolist()
        for k in range(7):
            assert study.strategies.controls.subsets["oracle", k / 6][c] == sum(2**h for h in order[:k])


def test_the_probe_is_the_minimum_of_its_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(200, 6, generator=generator) * 3 + 7, torch.randint(3, (200,), generator=generator)
    x[:, 0] += 5 * y
    found = linear_probe.fit(x, y.numpy(), 3)
    std = x.double().std(dim=0, correction=0)
    weight, bias = (found.weight_CD * std).requires_grad_(), found.bias_C.clone().requires_grad_()
    centred = x.double() / std
    loss = torch.nn.functional.cross_entropy(centred @ weight.T + bias, y) + 1e-3 * weight.square().sum()
    for gradient in torch.autograd.grad(loss, (weight, bias)):
        assert gradient.abs().max() < 1e-4
    assert (found(x) == y.numpy()).mean() > 0.7


@pytest.mark.parametrize("kind", sae.names())
def test_every_variant_can_be_scrambled_for_the_control_random_sae(kind: str) -> None:
    plain = sae.create(kind, 12, 32, 4).requires_grad_(False)
    plain.b_dec.copy_(torch.arange(12.0))
    random = scramble(plain, seed=3)
    torch.testing.assert_close(random.W_dec.norm(dim=1), torch.ones(32))
    assert torch.equal(random.W_enc, random.W_dec.T) and torch.equal(random.b_dec, plain.b_dec)
    assert not torch.allclose(random.W_dec, plain.W_dec, atol=0.1)
    assert random.encode(torch.randn(5, 12)).dense().shape == (5, 32)
