"""Attribution of class logits: planted latents, a brute-force reference, finite differences, files and refusals."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT, make_backbone, make_manifest
from extracted import Stores, extracted
from snakemake.utils import update_config
from torch import Tensor, nn

from sparsight import config, sae
from sparsight.backbones.backbone import Backbone
from sparsight.bench.at_site import AtSite
from sparsight.bench.attribution import curves, evaluate, statistics
from sparsight.bench.attribution.features import active, steps_of
from sparsight.common import tables
from sparsight.common.errors import SparsightError
from sparsight.common.work import Work
from sparsight.images.manifest import Manifest
from sparsight.pipeline.run import load_run
from sparsight.report.chapters import attribution
from sparsight.report.latents.attributed import CLASSES, Attributed
from sparsight.report.summary import _attributed
from sparsight.sae import SAE
from sparsight.sae.metrics.baselines import Method, neurons, of_sae, pca
from sparsight.sae.metrics.sparse_codes import from_codes
from sparsight.steering.intervention import place

D, CLASS_COUNT, TOKENS = 24, 4, 3


class MadeUp:
    """A model whose logits are a function of the mean over an image's rows."""

    rows_per_image = TOKENS

    def __init__(self, x_nTD: Tensor, rest: nn.Module) -> None:
        self.x_nTD, self.rest = x_nTD, rest.requires_grad_(False)

    def stream(self, images: np.ndarray) -> Tensor:
        return self.x_nTD[torch.from_numpy(images)]

    def rows(self, stream: Tensor) -> Tensor:
        return stream.flatten(0, 1)

    def logits(self, stream: Tensor, rows_RD: Tensor) -> Tensor:
        return self.rest(rows_RD.unflatten(0, (len(stream), -1)).mean(dim=1))


def dictionary(seed: int, f: int = 40, k: int = 5) -> SAE:
    return sae.create("topk", D, f, k, seed=seed).requires_grad_(False)


def methods(one: SAE, x_nTD: Tensor) -> dict[str, Method]:
    mean = x_nTD.flatten(0, 1).mean(dim=0)
    basis = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(3)))[0]
    every = {"pca": pca("pca", mean, basis), "neurons": neurons(mean, D)}
    return {"sae": of_sae(one), "random": of_sae(dictionary(99)), **every}


def linear(seed: int) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(D, CLASS_COUNT)


def bent(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(D, 30), nn.GELU(), nn.Linear(30, CLASS_COUNT))


def images(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, TOKENS, D, generator=torch.Generator().manual_seed(seed)) * 3


SECTION = config.Attribution("x", steps=4, ablated=50, draws=2)


def test_gradient_times_activation_is_the_ablation_of_a_linear_rest() -> None:
    x, one = images(30), dictionary(0)
    found, _, _ = curves.measure(MadeUp(x, linear(1)), 30, {"x": methods(one, x)}, SECTION, 0)
    gradient, ablation = np.concatenate(found["x"].gradient), np.concatenate(found["x"].ablation)
    assert len(gradient) == np.concatenate(found["x"].counts).sum() > 200, "every latent that is active is ablated"
    np.testing.assert_allclose(gradient, ablation, atol=1e-5)
    of_bent, _, _ = curves.measure(MadeUp(x, bent(1)), 30, {"x": methods(one, x)}, SECTION, 0)
    assert np.abs(np.concatenate(of_bent["x"].gradient) - np.concatenate(of_bent["x"].ablation)).max() > 1e-3


def test_the_gradient_is_that_of_finite_differences() -> None:
    x, one, rest = images(4).double(), dictionary(0).double(), bent(2).double().requires_grad_(False)
    z_RF = one.encode(x.flatten(0, 1)).dense()
    error_RD = x.flatten(0, 1) - z_RF @ one.W_dec - one.b_dec
    classes = rest(x.mean(dim=1)).argmax(dim=1)

    def centred(z_RF: Tensor) -> Tensor:
        """From the codes, with the error kept."""
        logits = rest((z_RF @ one.W_dec + one.b_dec + error_RD).unflatten(0, (4, TOKENS)).mean(dim=1))
        return logits.gather(1, classes[:, None])[:, 0] - logits.mean(dim=1)

    found, _, _ = curves.measure(
        MadeUp(x.float(), copy.deepcopy(rest).float()), 4, {"x": methods(dictionary(0), x.float())}, SECTION, 0
    )
    latents, labels, effects = (np.concatenate(parts) for parts in zip(*found["x"].effects, strict=True))
    numbers = np.repeat(np.arange(4), np.concatenate(found["x"].counts))
    assert (labels == classes.numpy()[numbers]).all()
    step = 1e-6
    for image, latent, effect in zip(numbers, latents, effects, strict=True):
        scaled = z_RF.clone()
        scaled[image * TOKENS : (image + 1) * TOKENS, latent] *= 1 + step  # d l / d log z = z d l / d z, over tokens
        slope = (centred(scaled)[image] - centred(z_RF)[image]) / step
        assert effect == pytest.approx(float(slope), abs=1e-4)


def brute_force(
    model: MadeUp, image: int, method: Method, scores: dict[int, float], n: int, steps: int
) -> tuple[list[float], list[float]]:
    """Both curves of one image: features in the order of their scores, one pass for each share."""
    x_TD = model.x_nTD[image]
    z_TF = method.encode(x_TD).toarray()
    probability = model.rest(x_TD.mean(dim=0, keepdim=True)).softmax(dim=1)[0]
    order = sorted(scores, key=lambda feature: (-scores[feature], feature))
    both: tuple[list[float], list[float]] = [], []
    for step in range(steps + 1):
        some = order[: int(step * n / steps + 0.5)]
        added = torch.from_numpy(z_TF[:, some] @ method.rows[some])
        for kept, rows_TD in zip(both, (x_TD - added, torch.from_numpy(method.offset) + added), strict=True):
            changed = model.rest(rows_TD.mean(dim=0, keepdim=True)).softmax(dim=1)[0]
            kept.append(float(changed[probability.argmax()] / probability.max()))
    return both


def test_curves_are_those_of_one_pass_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    x, one = images(7), dictionary(0)
    model, found_methods = MadeUp(x, bent(3)), methods(one, x)
    found, _, _ = curves.measure(model, 7, {"x": found_methods}, SECTION, 5)
    joined = curves.joined(found["x"])
    for image in range(7):
        own = model.x_nTD[image].clone().requires_grad_(True)
        logits = model.rest(own.mean(dim=0, keepdim=True))[0]
        (gradient_TD,) = torch.autograd.grad(logits.max() - logits.mean(), own)
        n = None
        for name, method in found_methods.items():
            z_TF = method.encode(own.detach()).toarray()
            sizes = {f: np.abs(z_TF[:, f]).sum() * np.linalg.norm(method.rows[f]) for f in np.flatnonzero(z_TF.any(0))}
            n = len(sizes) if n is None else n  # of the SAE, the first
            largest = sorted(sizes, key=lambda f: (-sizes[f], f))[:n]
            slopes_TF = gradient_TD.numpy() @ method.rows.T
            scores = {f: float((z_TF[:, f] * slopes_TF[:, f]).sum()) for f in largest}
            orders = {name: scores} | ({"activation_order": sizes} if name == "sae" else {})
            for key, order in orders.items():
                expected = brute_force(model, image, method, order, n, 4)
                for direction, values in zip(curves.DIRECTIONS, expected, strict=True):
                    np.testing.assert_allclose(joined[direction, key][image], values, atol=2e-5)
    monkeypatch.setattr(curves, "_PASSES", 110)  # two images at a time
    again = curves.joined(curves.measure(model, 7, {"x": found_methods}, SECTION, 5)[0]["x"])
    for key, values in joined.items():
        np.testing.assert_allclose(again[key], values, atol=1e-6)
    ends = joined["deletion", "random_order"][:, [0, -1]]
    np.testing.assert_allclose(ends, joined["deletion", "sae"][:, [0, -1]], atol=1e-6)
    assert np.ptp(joined["deletion", "random_order"] - joined["deletion", "sae"]) > 0.05


def planted(n: int) -> tuple[MadeUp, SAE]:
    """Images with five active latents, of which the one of the class alone is read by the logits."""
    one = sae.create("topk", D, D, 5, seed=0).requires_grad_(False)
    for weight, value in ((one.W_dec, torch.eye(D)), (one.W_enc, torch.eye(D))):
        weight.copy_(value)
    generator = np.random.default_rng(0)
    x_nTD = torch.zeros(n, 1, D)
    for image in range(n):
        x_nTD[image, 0, image % CLASS_COUNT] = 1.0
        x_nTD[image, 0, CLASS_COUNT + generator.permutation(D - CLASS_COUNT)[:4]] = 2.0  # larger, and of no effect
    rest = nn.Linear(D, CLASS_COUNT)
    rest.requires_grad_(False)
    rest.bias.zero_()
    rest.weight.copy_(40 * torch.eye(CLASS_COUNT, D))
    model = MadeUp(x_nTD, rest)
    model.rows_per_image = 1
    return model, one


def test_planted_latents_that_alone_carry_the_class_are_removed_first() -> None:
    model, one = planted(80)
    section = config.Attribution("x", steps=5, ablated=5, draws=40)
    found, predicted, probability = curves.measure(model, 80, {"x": methods(one, model.x_nTD)}, section, 0)
    assert predicted.tolist() == [image % CLASS_COUNT for image in range(80)] and probability.min() > 0.999
    flat = statistics.numbers(found["x"], probability, 0)
    chance = 1 / CLASS_COUNT
    least = (1 / 2 + 4.5 * chance) / 5  # untouched, then chance from the first of five on
    assert flat["deletion_sae"] == pytest.approx(least, abs=1e-4)
    assert flat["insertion_sae"] == pytest.approx(1 + chance - least, abs=1e-4)
    # In random order the class's latent is removed at any of the five places: the mean over them is half of the way.
    assert flat["deletion_random_order"] == pytest.approx((1 + chance) / 2, abs=0.02)
    assert flat["deletion_sae_minus_random_order_hi"] < -0.25
    most = (5 - 1 / 2 + chance / 2) / 5  # removed last
    assert flat["deletion_activation_order"] == pytest.approx(most, abs=1e-4)
    assert flat["gradient_ablation_correlation"] == pytest.approx(1, abs=1e-5)
    rows = statistics.effects_by_class("x", found["x"], predicted, ["a", "b", "c", "d"])
    assert [(row["latent"], row["class"], row["class_name"], row["n"]) for row in rows if row["attribution"] > 1] == [
        (0, 0, "a", 20), (1, 1, "b", 20), (2, 2, "c", 20), (3, 3, "d", 20),
    ]  # fmt: skip
    assert rows[0]["attribution"] == pytest.approx(40 - 10), "less the mean over classes"


def test_features_are_removed_in_equal_shares() -> None:
    ranks, counts = np.arange(5), np.full(5, 5)
    assert steps_of(ranks, counts, 5).tolist() == [0, 1, 2, 3, 4]
    assert steps_of(ranks, counts, 2).tolist() == [0, 0, 0, 1, 1], "2.5 is rounded up"
    assert steps_of(ranks[:2], counts[:2] * 0 + 2, 8).tolist() == [1, 5]


def test_an_image_without_active_latents_keeps_its_probability() -> None:
    x, one = images(3), dictionary(0)
    one.b_enc.fill_(-1e6)
    nothing = methods(one, x)
    nothing["random"] = nothing["sae"]
    found, predicted, probability = curves.measure(MadeUp(x, bent(0)), 3, {"x": nothing}, SECTION, 0)
    joined = curves.joined(found["x"])
    assert all(np.allclose(joined["deletion", name], 1, atol=1e-6) for name in curves.METHODS)
    assert statistics.numbers(found["x"], probability, 0)["gradient_ablation_pairs"] == 0
    assert statistics.effects_by_class("x", found["x"], predicted, []) == []


def test_agreement_is_the_correlation_with_an_interval_over_images() -> None:
    generator = np.random.default_rng(0)
    x, numbers = generator.standard_normal(400), np.repeat(np.arange(50), 8)
    y = x + generator.standard_normal(400)
    flat = statistics.agreement(x, y, numbers, 0)
    assert flat["gradient_ablation_correlation"] == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert 0.03 < flat["gradient_ablation_correlation_hi"] - flat["gradient_ablation_correlation_lo"] < 0.15
    ranks = np.stack([np.argsort(np.argsort(values)) for values in (x, y)])
    assert flat["gradient_ablation_spearman"] == pytest.approx(np.asarray(np.corrcoef(ranks))[0, 1])


def test_pairs_of_a_method_are_sums_over_tokens() -> None:
    x, one = images(2), dictionary(0)
    some = active(of_sae(one), x.flatten(0, 1), 2)
    z_BTF = torch.from_numpy(from_codes(one.encode(x.flatten(0, 1))).toarray()).unflatten(0, (2, TOKENS))
    places = z_BTF.sum(dim=1).nonzero()
    assert torch.from_numpy(np.stack([some.images, some.features], axis=1)).equal(places)
    np.testing.assert_allclose(some.sizes, z_BTF.sum(dim=1)[tuple(places.T)], rtol=1e-5)
    kept = some.largest(np.array([3, 0]))
    assert kept.counts.tolist() == [3, 0] and kept.sizes.min() >= np.sort(some.sizes[some.images == 0])[-3]


SITES = {"all": "blocks.1.input", "cls": "blocks.2.input"}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_manifest(tmp_path_factory.mktemp("images"), per_class=20)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return make_backbone(classes=3)


@pytest.fixture(scope="module")
def stores(backbone: Backbone, manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Stores:
    sites = [{"site": SITES["all"], "tokens": "all"}, SITES["cls"]]
    section = config.schema.parse(config.Activations, {"sites": sites, "tokens": "cls"}, "activations")
    return extracted(backbone, manifest, tmp_path_factory.mktemp("stores"), sites=section.sites)


@pytest.mark.parametrize("tokens", SITES)
def test_the_stage_writes_the_same_files_twice_and_the_report_reads_them(
    tokens: str, backbone: Backbone, stores: Stores, manifest: Manifest, tmp_path: Path
) -> None:
    saes = {}
    for seed in (0, 1):
        saes[f"x-s{seed}"] = one = sae.create("topk", backbone.d_in, 40, 4, seed=seed).requires_grad_(False)
        one.about = {"site": SITES[tokens], "tokens": tokens}
    section, test = config.Attribution("x", images=5, steps=3, ablated=2, draws=2), manifest.split("test")
    written = []
    for folder in (tmp_path / "first", tmp_path / "again"):
        with Work(folder / "work", "key") as work:
            evaluate.evaluate(section, saes, backbone, stores, test, "x", 0, work, {"seed": 0})
            work.finish(folder / "out")
        written.append({path.name: path.read_bytes() for path in sorted((folder / "out").iterdir())})
    assert written[0] == written[1] and list(written[0]) == ["x-latents.parquet", "x.json", "x.parquet"]
    path = tmp_path / "first" / "out" / "x.parquet"
    rows = tables.read(path)
    assert len(rows) == 2 * 2 * len(curves.METHODS) * 4 and {row["n"] for row in rows} == {5}
    assert all(row["value"] == pytest.approx(1) for row in rows if (row["direction"], row["share"]) == ("deletion", 0))
    flat = json.loads(written[0]["x.json"])["saes"]["x-s1"]
    for method in curves.METHODS:
        for direction in curves.DIRECTIONS:
            key = f"{direction}_{method}"
            assert flat[f"{key}_lo"] <= flat[key] <= flat[f"{key}_hi"]
            of_curve = [row["value"] for row in rows
                        if (row["sae"], row["direction"], row["method"]) == ("x-s1", direction, method)]  # fmt: skip
            assert flat[key] == pytest.approx(np.trapezoid(of_curve, dx=1 / 3))
    chapter = attribution.chapter(path)
    assert chapter["figures"]["attribution-x"].startswith("<svg") and len(chapter["rows"]) == 2 * len(curves.METHODS)
    assert "attribution.x-s1.deletion_sae_minus_pca" in _attributed(path)
    facts = Attributed([path]).facts("x-s0", 40)
    listed = [row for row in tables.read(path.with_name("x-latents.parquet")) if row["sae"] == "x-s0"]
    assert facts["attributed"].shape == (40, CLASSES) and (facts["attributed"] >= 0).sum() == len(listed) > 3
    assert Attributed([path]).facts("y-s0", 40) == {}
    bare = copy.deepcopy(backbone)
    bare.model.num_classes = 0
    with pytest.raises(SparsightError, match=r"attribution\.x: the model .* has no classes, whose logits"):
        evaluate.evaluate(section, saes, bare, stores, test, "x", 0, work, {})


def test_the_rest_of_the_model_gives_the_models_own_logits(
    backbone: Backbone, stores: Stores, manifest: Manifest
) -> None:
    one = sae.create("topk", backbone.d_in, 40, 4, seed=0)
    one.about = {"site": SITES["cls"], "tokens": "cls"}
    split = manifest.split("test")
    model = AtSite(backbone, place(one, backbone), split, stores["test"])
    stream = model.stream(np.array([2, 0]))
    whole = backbone(backbone.normalize(split.batch(np.array([2, 0]), backbone.preprocess)))
    torch.testing.assert_close(model.logits(stream, model.rows(stream)), whole, atol=1e-4, rtol=1e-4)


def overlay(**changes: Any) -> dict[str, Any]:
    settings: dict[str, Any] = copy.deepcopy(yaml.safe_load((ROOT / "params.yaml").read_text()))
    update_config(settings, copy.deepcopy(changes))
    return settings


def test_the_default_run_has_one_and_null_removes_it() -> None:
    assert list(load_run(overlay()).attribution) == ["topk"]
    assert load_run(overlay(attribution={"topk": None})).attribution == {}
    without = overlay(saes={"topk": None}, policies={"heads": None}, pruning=None)
    assert load_run(without).attribution == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attribution": {"topk": {"sae": "tpk"}}}, "attribution.topk.sae: there is no 'tpk'; known: topk"),
        ({"attribution": {"topk": {"sae": "resae"}}}, "attribution.topk.sae: 'resae' is a chain; name SAEs of one"),
        ({"attribution": {"topk": {"images": 0}}}, "attribution.topk.images: must be 1 or more, got 0"),
        ({"saes": {"e": {"kind": "topk", "backbone": "vit", "site": "embedding", "d_sae": 8, "k": 2}},
          "attribution": {"e": {"sae": "e"}}}, "'e' reads 'embedding'; latents are removed in the residual stream"),
        ({"attribution": {"a/b": {"sae": "topk"}}}, "the name 'a/b' becomes a folder"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_at_planning(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SparsightError) as caught:
        load_run(overlay(**changes))
    assert message in str(caught.value)
