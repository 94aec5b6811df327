"""Class latents: rankings and edits against their definitions.

Shapes: B batch, D width (d_in), F latents (d_sae), C classes, M latents per class.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_backbone, make_manifest
from torch import Tensor

from sparsight import config, sae
from sparsight.backbones.backbone import Backbone
from sparsight.common import tables
from sparsight.common.work import Work
from sparsight.images.manifest import Manifest
from sparsight.sae import SAE
from sparsight.steering import class_latents, controls
from sparsight.steering.edits import Batch
from sparsight.steering.evaluate import steer
from sparsight.steering.intervention import Intervention, attribution

D, F, K, M = 48, 96, 6, 4
SITE = "blocks.1.output"


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_manifest(tmp_path_factory.mktemp("images"), per_class=20)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return make_backbone(classes=2)


def make_sae() -> SAE:
    one = sae.create("topk", D, F, K, seed=0).requires_grad_(False)
    one.about = {"site": SITE, "tokens": "cls", "training": {"prototype_weight": 0.0}}
    return one


def stream(backbone: Backbone, manifest: Manifest, split: str = "train") -> Tensor:
    images = backbone.normalize(manifest.split(split).batch(slice(None), backbone.preprocess))
    return backbone.run_blocks(backbone.tokens(images), 0, 2)[0]


def test_attribution_is_the_slope_of_the_class_logit_along_each_latent(backbone: Backbone, manifest: Manifest) -> None:
    one, train = make_sae(), manifest.split("train")
    (got,) = attribution(Intervention([one], backbone), train, 2)
    double, x = make_backbone(classes=2).double(), stream(backbone, manifest).double()
    labels, z = torch.from_numpy(train.labels).long(), one.encode(x[:, 0].float()).dense().double()

    def own_logit(cls: Tensor) -> Tensor:
        after = double.run_blocks(torch.cat([cls[:, None], x[:, 1:]], dim=1), 2, 3)[0]
        return double.classify(after).gather(1, labels[:, None])[:, 0]

    h = 1e-4
    for latent in z.sum(dim=0).argsort(descending=True)[:5].tolist():
        push = h * z[:, latent, None] * one.W_dec[latent].double()
        slope = (own_logit(x[:, 0] + push) - own_logit(x[:, 0] - push)) / (2 * h)
        for c in (0, 1):
            expected = float(slope[labels == c].mean())
            assert float(got[c, latent]) == pytest.approx(expected, rel=1e-3, abs=1e-6), (latent, c)
    assert (got[:, z.sum(dim=0) == 0] == 0).all()


def find(backbone: Backbone, manifest: Manifest, ranking: Any = "mean-difference") -> class_latents.ClassLatents:
    x, labels = stream(backbone, manifest)[:, 0].numpy(), manifest.split("train").labels
    return class_latents.find(make_sae(), x, labels, 2, M, 0, ranking)


def test_latents_are_ranked_by_what_was_asked_for(backbone: Backbone, manifest: Manifest) -> None:
    z = make_sae().encode(stream(backbone, manifest)[:, 0]).dense().numpy()
    labels = manifest.split("train").labels
    mean = np.stack([z[labels == c].mean(axis=0) for c in (0, 1)])
    scores = torch.rand(2, F, generator=torch.Generator().manual_seed(0))
    for ranking, expected in (("mean", mean), ("mean-difference", mean - mean[::-1]), (scores, scores.numpy())):
        found = find(backbone, manifest, ranking)
        assert found.latents.tolist() == np.argsort(-expected, axis=1, kind="stable")[:, :M].tolist()


def test_clamped_latents_decode_to_the_factor_times_their_class_mean(backbone: Backbone, manifest: Manifest) -> None:
    one, found = make_sae(), find(backbone, manifest)
    x, labels = stream(backbone, manifest)[:, 0], torch.from_numpy(manifest.split("train").labels).long()
    z = one.encode(x).dense()
    for factor in (0.0, 3.0):
        wanted = z.clone()
        for row, c in enumerate(labels):
            wanted[row, found.latents[c]] = factor * found.mean_activation[c, found.latents[c]]
        expected = x + (wanted - z) @ one.W_dec
        edit = controls.edits(one, found, "clamp")["class-latents"]
        torch.testing.assert_close(edit.apply(Batch(x, labels), factor), expected, rtol=1e-4, atol=1e-4)
        if factor == 0:  # ablation, however it is asked for
            same = controls.edits(one, found, "amplify")["class-latents"].apply(Batch(x, labels), 0.0)
            torch.testing.assert_close(same, expected, rtol=1e-4, atol=1e-4)
    for name in ("random-latents", "mean-difference"):
        moved = controls.edits(one, found, "clamp")[name].apply(Batch(x, labels), 3.0)
        torch.testing.assert_close((moved - x).norm(dim=1), (expected - x).norm(dim=1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{"ranking": "attribution"}, {"edit": "clamp", "ranking": "mean"}])
def test_options_reach_the_tables(
    options: dict[str, Any], backbone: Backbone, manifest: Manifest, tmp_path: Path
) -> None:
    x_train = stream(backbone, manifest)[:, 0].numpy()

    class Store:
        def rows(self, site: str, tokens: str) -> np.ndarray:
            assert (site, tokens) == (SITE, "cls")
            return x_train

    section = config.Steering(sae="topk", latents=M, strengths=(0.0, 30.0), **options)
    stores: Any = {"train": Store()}
    with Work(tmp_path / "w", "key") as work:
        steer(section, {"s": [make_sae()]}, backbone, stores, {}, manifest, 0, work, {})
        work.finish(tmp_path / "out")
    found = class_latents.ClassLatents.load(tmp_path / "out" / "s.safetensors", torch.device("cpu"))
    ranking: Any = options["ranking"]
    if ranking == "attribution":
        (ranking,) = attribution(Intervention([make_sae()], backbone), manifest.split("train"), 2)
    assert torch.equal(found.latents, find(backbone, manifest, ranking).latents)
    edit = controls.edits(make_sae(), found, section.edit)["class-latents"]
    x, truth = stream(backbone, manifest, "val"), torch.from_numpy(manifest.split("val").labels).long()
    for row in tables.read(tmp_path / "out" / "s.parquet"):
        if (row["method"], row["labels"], row["split"]) == ("class-latents", "oracle", "val"):
            cls = edit.apply(Batch(x[:, 0], truth), row["strength"])
            logits = backbone.classify(backbone.run_blocks(torch.cat([cls[:, None], x[:, 1:]], dim=1), 2, 3)[0])
            assert row["accuracy"] == pytest.approx(float((logits.argmax(dim=1) == truth).double().mean()))
