"""Every kind of SAE goes through every stage that takes an SAE, as loaded from its folder."""

import dataclasses
import json
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import zarr
from conftest import train_sae, write_store
from studies import SECTION, random_policy, two_class_images, two_classes

from sparsight import config, sae
from sparsight.activations.store import ActivationStore
from sparsight.backbones.backbone import Backbone
from sparsight.common import tables
from sparsight.common.work import Work
from sparsight.images.manifest import Manifest
from sparsight.pruning import evaluate as pruning
from sparsight.report.latents.gather import details, images_of_latents
from sparsight.sae import SAE
from sparsight.sae.evaluate import evaluate, evaluate_chains
from sparsight.sae.inputs import SaeInputs
from sparsight.sae.metrics.stability import write_stability
from sparsight.sae.moments import by_group, fit_moments
from sparsight.sae.resae import ReSAE
from sparsight.sae.variants.archetypal import Archetypal
from sparsight.steering.evaluate import cost, steer
from sparsight.steering.intervention import place

D, F, K, EXPERTS = 48, 64, 8, 2
SITES = ["blocks.1.input", "blocks.2.input"]
SPLITS = ("train", "val", "test")
CPU = torch.device("cpu")
STEERED = {
    "amplify": config.Steering(sae="sae", latents=4, strengths=(2.0, 9.0)),
    "clamp": config.Steering(sae="sae", latents=4, strengths=(0.0, 2.0), edit="clamp", ranking="mean"),
    "attribution": config.Steering(sae="sae", latents=4, strengths=(2.0, 9.0), ranking="attribution"),
    "vs2": config.Steering(sae="sae", kind="vs2", strengths=(0.5, 2.0), quantiles=(0.5, 0.9)),
    "vs2++": config.Steering(sae="sae", kind="vs2++", neighbours=3, strengths=(0.5, 2.0)),
}
every_kind = pytest.mark.parametrize("kind", sae.names())
Stores = dict[str, ActivationStore]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return two_class_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return two_classes()


@pytest.fixture(scope="module")
def stores(backbone: Backbone, manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Stores:
    """The class token at both sites and the embedding, for every split."""
    found = {}
    for name in SPLITS:
        split = manifest.split(name)
        taps = backbone.taps(backbone.normalize(split.batch(slice(None), backbone.preprocess)), [*SITES, "embedding"])
        path = write_store(
            tmp_path_factory.mktemp(name), len(split), dict.fromkeys([*SITES, "embedding"], (D,)), dtype="float32"
        )
        group = zarr.open_group(path, mode="r+")
        for site, x in taps.items():
            group[site][:] = (x if site == "embedding" else x[:, 0]).numpy()
        about = json.loads(path.with_suffix(".json").read_text())
        about["token_positions"] = {"class": [0], "register": [], "patches": [1, 17]}
        del about["checksum"]
        path.with_suffix(".json").write_text(json.dumps(about))
        found[name] = ActivationStore.open(path)
    return found


@pytest.fixture
def saes(stores: Stores, kind: str, tmp_path: Path) -> dict[str, SAE]:
    """Two trained seeds by name, loaded from their folders in ``saes``."""
    x = torch.from_numpy(stores["train"].rows(SITES[1])[:]).float()
    options: dict[str, Any] = {"switch": {"experts": EXPERTS}, "archetypal": {"candidates": 32}}.get(kind, {})
    training = {"prototype_weight": 0.0}
    for seed in (0, 1):
        new = sae.create(kind, D, F, K, seed, **options)
        if isinstance(new, Archetypal):
            new.set_center(x.mean(dim=0))
            new.set_points(x[seed : seed + 32] - x.mean(dim=0))
        one = train_sae(new, lambda step: x, 30)
        about = {"site": SITES[1], "tokens": "cls", "backbone": "vit", "training": training}
        one.save(tmp_path / "saes" / f"sae-s{seed}", **about)
    return {f"sae-s{seed}": sae.load(tmp_path / "saes" / f"sae-s{seed}") for seed in (0, 1)}


def finite(rows: list[dict[str, Any]], *columns: str) -> bool:
    return bool(rows) and all(np.isfinite(row[column]) for row in rows for column in columns)


@every_kind
def test_evaluation_splicing_and_the_browser_of_latents(
    kind: str, saes: dict[str, SAE], backbone: Backbone, stores: Stores, manifest: Manifest, tmp_path: Path
) -> None:
    images = {name: manifest.split(name) for name in SPLITS}
    with Work(tmp_path / "work", "key") as work:
        evaluate(saes, backbone, stores, images, 0, work, {})
        work.finish(tmp_path / "out")
    for name, one in saes.items():
        metrics = json.loads((tmp_path / "out" / name / "metrics.json").read_text())
        assert 0 < metrics["fvu"] < 1 and metrics["kl_spliced"] >= 0 and metrics["macs_encode"] == one.macs_encode
        rows = tables.read(tmp_path / "out" / name / "latents.parquet")
        assert len(rows) == F
        largest, seen = np.array([row["max_activation"] for row in rows]), SaeInputs(stores["test"], SITES[1], CPU)
        shown = images_of_latents(one, seen, len(images["test"]), 3, largest, 0)
        np.testing.assert_allclose(shown.top_values[:, 0], largest, atol=1e-5)
        assert details(one, seen, shown, largest, np.arange(5)).strengths[1].max() > 0


@every_kind
def test_chains(
    kind: str, saes: dict[str, SAE], backbone: Backbone, stores: Stores, manifest: Manifest, tmp_path: Path
) -> None:
    chain = ReSAE.fit(
        dict(zip(SITES, saes.values(), strict=True)),
        fit_moments(by_group(stores["train"], SITES, torch.device("cpu")), SITES),
    )
    with Work(tmp_path / "work", "key") as work:
        evaluate_chains(
            {"chain": chain}, backbone, stores, {name: manifest.split(name) for name in SPLITS}, 0, work, {}
        )
        work.finish(tmp_path / "out")
    metrics = json.loads((tmp_path / "out" / "chain" / "metrics.json").read_text())
    assert finite([metrics], "fvu", "redundancy", "redundancy_random", "kl_online", "accuracy_forced")


@every_kind
def test_stability(kind: str, saes: dict[str, SAE], tmp_path: Path) -> None:
    write_stability(sorted((tmp_path / "saes").iterdir()), 0, tmp_path / "stability.json", {})
    site = json.loads((tmp_path / "stability.json").read_text())["sites"][SITES[1]]
    assert site["saes"] == 2 and site["matched"] == F and 0 < site["cosine_random"] < 1


@every_kind
def test_steering(
    kind: str, saes: dict[str, SAE], backbone: Backbone, stores: Stores, manifest: Manifest, tmp_path: Path
) -> None:
    one = saes["sae-s0"]
    for name, section in STEERED.items():
        with Work(tmp_path / "work", name) as work:
            steer(section, {name: [one]}, backbone, stores, stores, manifest, 0, work, {})
            work.finish(tmp_path / name)
        rows = tables.read(tmp_path / name / f"{name}.parquet")
        assert finite(rows, "accuracy", "lo", "hi", "delta", "delta_lo", "delta_hi")
        assert len({row["method"] for row in rows}) > 4
    encoder = D * (EXPERTS + F // EXPERTS) if kind == "switch" else D * F
    assert cost([place(one, backbone)], backbone)["edit_macs"] == encoder + K * D


@every_kind
def test_pruning(kind: str, saes: dict[str, SAE], backbone: Backbone, manifest: Manifest, tmp_path: Path) -> None:
    section = dataclasses.replace(SECTION, strengths=(30.0,), bias_strengths=(5.0,))
    with Work(tmp_path / "work", "key") as work:
        pruning.evaluate(section, backbone, random_policy(), saes, manifest, 0, work, 1, {})
        work.finish(tmp_path / "out")
    overall = tables.read(tmp_path / "out" / "overall.parquet")
    assert {row["strategy"] for row in overall} == set(get_args(config.Strategy))
    assert finite(overall, "accuracy", "lo", "hi", "delta", "usage_last", "macs")
    encoder = D * (EXPERTS + F // EXPERTS) if kind == "switch" else D * F
    by_key = {(row["strategy"], row["labels"]): row for row in reversed(overall)}
    none = by_key["none", "none"]
    per_head = (by_key["all-heads", "none"]["macs"] - by_key["zero-heads", "none"]["macs"]) / 6
    for key in (("uniform", "none"), ("reconstruct", "none"), ("class-latents", "oracle"), ("random-sae", "oracle")):
        row = by_key[key]
        heads = 6 * 3 * (row["usage_all"] - none["usage_all"])
        assert row["macs"] - none["macs"] == pytest.approx(encoder + heads * per_head)
