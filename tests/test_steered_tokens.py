"""Steering of patches, of every token and of the mean over patches, against loops over single tokens.

Shapes: B batch, T tokens of the stream, S edited tokens of an image, D width (d_in), F latents (d_sae).
"""

import copy
import json
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import make_backbone, make_manifest
from extracted import Stores, extracted
from torch import Tensor

from sparsight import config, sae
from sparsight.activations.store import Rows
from sparsight.backbones.backbone import Backbone
from sparsight.common import tables
from sparsight.common.errors import SparsightError
from sparsight.common.work import Work
from sparsight.images.manifest import Manifest
from sparsight.sae import SAE
from sparsight.steering import class_latents, controls, vs2
from sparsight.steering.class_latents import ClassLatents
from sparsight.steering.evaluate import steer
from sparsight.steering.intervention import Intervention, attribution, place
from sparsight.steering.nearest_neighbours import nearest
from sparsight.steering.runner import Row, Runner
from sparsight.steering.vs2pp import NeighbourSteering

D, F, K, M = 48, 96, 6, 4
SITE, LATER = "blocks.1.output", "blocks.2.output"
TOKENS = {"cls": [0], "patches": list(range(1, 17)), "all": list(range(17))}
each = pytest.mark.parametrize("tokens", TOKENS)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_manifest(tmp_path_factory.mktemp("images"), per_class=20)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    """Random, with a threshold that gives half of the images each class: pseudo-labels and true ones differ."""
    backbone = make_backbone(classes=2, global_pool="avg", class_token=True)
    generator = torch.Generator().manual_seed(1)
    logits = backbone(torch.randn(64, 1, 16, 16, generator=generator) / 2)
    backbone.model.head.bias[0] -= (logits[:, 0] - logits[:, 1]).quantile(0.3)
    return backbone


@pytest.fixture(scope="module")
def stores(backbone: Backbone, manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Stores:
    return extracted(backbone, manifest, tmp_path_factory.mktemp("all"), sites=(SITE, LATER, "embedding"), tokens="all")


def make_sae(site: str = SITE, tokens: str = "all", seed: int = 0) -> SAE:
    one = sae.create("topk", D, F, K, seed=seed).requires_grad_(False)
    one.b_dec.copy_(torch.randn(D, generator=torch.Generator().manual_seed(seed)) / 4)
    one.about = {"site": site, "tokens": tokens, "training": {"prototype_weight": 0.0}}
    return one


def stream(backbone: Backbone, manifest: Manifest, split: str, block: int = 2) -> Tensor:
    images = backbone.normalize(manifest.split(split).batch(slice(None), backbone.preprocess))
    return backbone.run_blocks(backbone.tokens(images), 0, block)[0]


def after(backbone: Backbone, x: Tensor, block: int = 2) -> Tensor:
    """The stream after the last block."""
    return backbone.run_blocks(x, block, 3)[0]


def code(one: SAE, x_D: Tensor) -> Tensor:
    return one.encode(x_D[None]).dense()[0]


def steered(runner: Runner, method: str, strength: float, edits: Any, x: Tensor, classes: Tensor | None = None,
            labels: str = "none") -> Tensor:  # fmt: skip
    """The stream after the last block under a row, for a whole split."""
    with mock.patch.object(Backbone, "classify", lambda self, after: after):
        return runner._steered(x, Row(method, strength, labels), edits, classes, slice(0, len(x)))


def run(
    folder: Path, backbone: Backbone, stores: Stores, manifest: Manifest, saes: list[SAE], **options: Any
) -> list[dict[str, Any]]:
    """The table of a section."""
    section = config.Steering(**{"sae": "s", "strengths": (0.0, 20.0), **options})
    first, *layers = saes
    with Work(folder / "work", "key") as work:
        steer(section, {"s": [first, *layers]}, backbone, stores, stores, manifest, 0, work, {})
        work.finish(folder / "out")
    return tables.read(folder / "out" / "s.parquet")


def close(got: Tensor, expected: Tensor, unsteered: Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-3)
    assert (expected - unsteered).abs().max() > 0.01, "the edit has an effect"


@each
@pytest.mark.parametrize("edit", ["amplify", "clamp"])
def test_class_latents_of_each_token(
    tokens: Any, edit: Any, backbone: Backbone, stores: Stores, manifest: Manifest, tmp_path: Path
) -> None:
    """Ranked by the mean code over an image's tokens, applied to each token's own codes."""
    one, strength = make_sae(), 20.0
    rows = run(tmp_path, backbone, stores, manifest, [one], tokens=tokens, latents=M, edit=edit)
    train, labels = stream(backbone, manifest, "train")[:, TOKENS[tokens]], manifest.split("train").labels
    z = torch.stack([torch.stack([code(one, x) for x in image]).mean(dim=0) for image in train])
    mean = torch.stack([z[labels == c].mean(dim=0) for c in (0, 1)])
    latents = (mean - mean.flip(0)).argsort(dim=1, descending=True, stable=True)[:, :M]
    found = ClassLatents.load(tmp_path / "out" / "s.safetensors", torch.device("cpu"))
    assert found.latents.tolist() == latents.tolist()
    ways = {
        "random-latents": [z.mean(dim=0)[own] @ one.W_dec[own] for own in found.random_latents],
        "mean-difference": [train[labels == c].mean(dim=(0, 1)) - train.mean(dim=(0, 1)) for c in (0, 1)],
    }
    x, classes = stream(backbone, manifest, "val"), torch.from_numpy(manifest.split("val").labels).long()
    edited = {method: x.clone() for method in ("class-latents", *ways)}
    for image, c in enumerate(classes.tolist()):
        for t in TOKENS[tokens]:
            own = code(one, x[image, t])[latents[c]]
            change = (strength - 1) * own if edit == "amplify" else strength * mean[c, latents[c]] - own
            push = change @ one.W_dec[latents[c]]
            edited["class-latents"][image, t] += push
            for method, way in ways.items():
                edited[method][image, t] += way[c] / way[c].norm() * push.norm()
    runner, edits = Runner([one], backbone, tokens), [controls.edits(one, found, edit)]
    for method, x_edited in edited.items():
        expected = after(backbone, x_edited)
        close(steered(runner, method, strength, edits, x, classes, "oracle"), expected, after(backbone, x))
        key = ("val", method, "oracle", strength)
        (row,) = (row for row in rows if (row["split"], row["method"], row["labels"], row["strength"]) == key)
        assert row["accuracy"] == pytest.approx(
            float((backbone.classify(expected).argmax(dim=1) == classes).double().mean())
        )


@each
def test_vs2_of_each_token_and_its_gate(
    tokens: Any, backbone: Backbone, stores: Stores, manifest: Manifest, tmp_path: Path
) -> None:
    """Each token keeps its length. An image's FVU is over all of its edited tokens."""
    one, alpha = make_sae(), 1.5
    run(tmp_path, backbone, stores, manifest, [one], kind="vs2", tokens=tokens, strengths=(alpha,), quantiles=(0.5,))
    places, x = TOKENS[tokens], stream(backbone, manifest, "test")
    train = stream(backbone, manifest, "train")[:, places]
    mean = train.mean(dim=(0, 1))

    def fvu(image: Tensor) -> float:
        errors = [float((one(token[None])[0] - token).square().sum()) for token in image]
        return sum(errors) / sum(float((token - mean).square().sum()) for token in image)

    found = vs2.Calibration.load(tmp_path / "out" / "s.safetensors", torch.device("cpu"))
    np.testing.assert_allclose(found.fvu, sorted(fvu(image) for image in train), rtol=1e-4)
    basis = torch.linalg.svd(train.flatten(0, 1) - mean)[2][:K]
    edited = {method: x.clone() for method in vs2.edits(one, found)}
    for image in range(len(x)):
        for t in places:
            token = x[image, t]
            z = code(one, token)
            shuffled = z @ one.W_dec[found.permutation]
            for method, way in {
                "vs2": z @ one.W_dec,
                "mean-extrapolation": token - mean,
                "pca-extrapolation": (token - mean) @ basis.T @ basis,
                "random-latents": shuffled / shuffled.norm() * (z @ one.W_dec).norm(),
            }.items():
                moved = token + alpha * way
                edited[method][image, t] = moved / moved.norm() * token.norm()
    runner = Runner([one], backbone, tokens)
    for method, x_edited in edited.items():
        got = steered(runner, method, alpha, vs2.edits_by_site(runner.where.places, [found]), x)
        close(got, after(backbone, x_edited), after(backbone, x))
    summary = json.loads((tmp_path / "out" / "s.json").read_text())
    shares = [line["steered"] for line in summary["gate"] if line["split"] == "test"]
    fvus = [fvu(image) for image in x[:, places]]
    assert shares == [pytest.approx(np.mean(fvus <= found.fvu[int(np.ceil(0.5 * len(train))) - 1].numpy()))]
    assert summary["cost"]["edit_macs"] == len(places) * (D * F + K * D)


@each
def test_neighbours_give_every_edited_token_one_vector(
    tokens: Any, backbone: Backbone, stores: Stores, manifest: Manifest
) -> None:
    """The code and the activation of a neighbour are their means over its tokens."""
    one, n, alpha, places = make_sae(), 5, 2.0, TOKENS[tokens]
    at, truth = place(one, backbone, tokens), {name: manifest.split(name).labels for name in stores}
    (edits,) = NeighbourSteering(n, [at], backbone, stores, stores, truth, [7]).edits("test")
    (fresh,) = NeighbourSteering(n, [at], backbone, stores, stores, truth, [7]).permutations
    train, x = stream(backbone, manifest, "train")[:, places], stream(backbone, manifest, "test")
    z = torch.stack([torch.stack([code(one, token) for token in image]).mean(dim=0) for image in train])
    index = nearest(stores["test"].rows("embedding"), stores["train"].rows("embedding"), n, torch.device("cpu")).indices
    edited = {method: x.clone() for method in ("vs2++-majority", "mean-difference", "random-latents")}
    for image, near in enumerate(index.numpy()):
        own = truth["train"][near]
        top = own[0] if 2 * (own == own[0]).sum() > n else 1 - own[0]
        sides = [near[own == top], near[own != top]]

        def difference(values: Tensor, sides: list[np.ndarray] = sides) -> Tensor:
            means = [values[side].mean(dim=0) if len(side) else torch.zeros(values.shape[1]) for side in sides]
            return means[0] - means[1]

        main = difference(z) @ one.W_dec
        ways = {
            "vs2++-majority": main,
            "mean-difference": difference(train.mean(dim=1)),
            "random-latents": difference(z) @ one.W_dec[fresh],
        }
        for method, way in ways.items():
            for t in places:
                moved = x[image, t] + alpha * way / way.norm() * main.norm()
                edited[method][image, t] = moved / moved.norm() * x[image, t].norm()
    runner, classes = Runner([one], backbone, tokens), torch.from_numpy(truth["test"]).long()
    for method, x_edited in edited.items():
        got = steered(runner, method, alpha, [edits], x, classes, "oracle")
        close(got, after(backbone, x_edited), after(backbone, x))


@each
def test_attribution_sums_the_slopes_of_all_edited_tokens(tokens: Any, backbone: Backbone, manifest: Manifest) -> None:
    one, train = make_sae(), manifest.split("train")
    (got,) = attribution(Intervention([one], backbone, tokens), train, 2)
    double = copy.deepcopy(backbone).double()
    x, labels = stream(backbone, manifest, "train").double(), torch.from_numpy(train.labels).long()
    rows = x[:, TOKENS[tokens]]
    z = one.encode(rows.float().flatten(0, 1)).dense().double().unflatten(0, rows.shape[:2])

    def own_logit(sign: float, latent: int) -> Tensor:
        moved = x.clone()
        moved[:, TOKENS[tokens]] += sign * 1e-5 * z[:, :, latent, None] * one.W_dec[latent].double()
        return double.classify(after(double, moved)).gather(1, labels[:, None])[:, 0]

    for latent in z.sum(dim=(0, 1)).argsort(descending=True)[:3].tolist():
        slope = (own_logit(1, latent) - own_logit(-1, latent)) / 2e-5
        for c in (0, 1):
            assert float(got[c, latent]) == pytest.approx(float(slope[labels == c].mean()), rel=1e-3, abs=1e-6)


def test_the_mean_over_patches_moves_every_patch_alike(backbone: Backbone, manifest: Manifest) -> None:
    one, x = make_sae(tokens="mean"), stream(backbone, manifest, "val")
    at = place(one, backbone)
    assert (at.tokens, at.n_tokens) == ("mean", 1)
    torch.testing.assert_close(at.read(x), x[:, 1:].mean(dim=1))
    moved = at.write(x, one(at.read(x)))
    torch.testing.assert_close(at.read(moved), one(x[:, 1:].mean(dim=1)), atol=1e-5, rtol=1e-5)
    shift = (moved - x)[:, 1:]
    torch.testing.assert_close(shift, shift[:, :1].expand_as(shift), atol=1e-5, rtol=1e-5)
    assert torch.equal(moved[:, 0], x[:, 0]) and shift.abs().max() > 0.01


@pytest.mark.parametrize("kind", ["class-latents", "vs2", "vs2++"])
def test_the_class_token_of_a_store_of_all_tokens_is_steered_to_the_bit_as_that_of_a_store_of_its_own(
    kind: Any, backbone: Backbone, stores: Stores, manifest: Manifest, tmp_path: Path
) -> None:
    alone = extracted(backbone, manifest, tmp_path / "cls", sites=(SITE, "embedding"), tokens="cls")
    options: dict[str, Any] = (
        {"latents": M} if kind == "class-latents" else {"neighbours": 5} if kind == "vs2++" else {}
    )
    for name, own, one in (("own", alone, make_sae(tokens="cls")), ("all", stores, make_sae(tokens="cls"))):
        run(tmp_path / name, backbone, own, manifest, [one], kind=kind, **options)
    for file in ("s.safetensors", "s.parquet", "s-classes.parquet", "s.json"):
        assert (tmp_path / "own" / "out" / file).read_bytes() == (tmp_path / "all" / "out" / file).read_bytes(), file


def test_rankings_of_patches_hold_few_rows_at_a_time(stores: Stores, manifest: Manifest) -> None:
    rows, held, images = stores["train"].rows(SITE, "patches"), [], Rows.images
    labels = manifest.split("train").labels

    def seen(self: Rows, first: int, last: int, *rest: Any) -> Any:
        held.append((last - first) * 16)
        return images(self, first, last, *rest)

    whole = class_latents.find(make_sae(), rows, labels, 2, M, 0)
    with mock.patch.object(Rows, "images", seen), mock.patch.object(class_latents, "_ROWS", 50):
        parts = class_latents.find(make_sae(), rows, labels, 2, M, 0)
    assert set(held) <= {48, 16 * (len(labels) % 3)} and sum(held) == len(rows)
    for name, value in vars(whole).items():
        torch.testing.assert_close(value, getattr(parts, name))


@pytest.mark.parametrize(
    ("own", "tokens", "message"),
    [
        ("cls", "patches", "the SAE at blocks.1.output reads tokens cls, which cannot steer patches; train one on pat"),
        ("patches", "cls", "reads tokens patches, which cannot steer cls; train one on cls or all"),
        ("patches", "all", "reads tokens patches, which cannot steer all"),
        ("mean", "patches", "reads tokens mean, which cannot steer patches"),
    ],
)
def test_an_sae_steers_only_tokens_that_it_reads(own: str, tokens: str, message: str, backbone: Backbone) -> None:
    with pytest.raises(SparsightError, match=message):
        place(make_sae(tokens=own), backbone, tokens)


def test_a_model_without_a_class_token_is_steered_at_its_patches() -> None:
    pooled = make_backbone(classes=2, global_pool="avg", class_token=False)
    with pytest.raises(SparsightError, match=r"timm/vit_tiny_patch16_224 has no class token; steer its patches"):
        place(make_sae(), pooled, "cls")
    at = place(make_sae(), pooled, "patches")
    assert (at.positions, at.n_tokens) == (slice(0, 16), 16)
