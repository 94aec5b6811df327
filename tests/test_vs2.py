"""VS2, its gate and its controls, against their definitions."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import zarr
from conftest import make_backbone, make_manifest, write_store
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparsight import config, sae
from sparsight.activations.store import ActivationStore
from sparsight.backbones.backbone import Backbone
from sparsight.common import tables
from sparsight.common.errors import SparsightError
from sparsight.common.work import Work
from sparsight.images.manifest import Manifest
from sparsight.sae import SAE
from sparsight.steering import vs2
from sparsight.steering.edits import Batch, keep_norm
from sparsight.steering.evaluate import steer
from sparsight.steering.intervention import place

D, F, K = 48, 96, 6
SITE = "blocks.2.output"
SECTION = config.Steering(sae="sae", kind="vs2", strengths=(0.5, 2.0), quantiles=(0.5, 0.9))


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return make_manifest(tmp_path_factory.mktemp("images"), per_class=40)


def at_site(backbone: Backbone, manifest: Manifest, split: str) -> Tensor:
    images = backbone.normalize(manifest.split(split).batch(slice(None), backbone.preprocess))
    return backbone.run_blocks(backbone.tokens(images), 0, 3)[0]


@pytest.fixture(scope="module")
def store(manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    """What the model of :func:`make_backbone` has at the site for the train images."""
    x = at_site(make_backbone(classes=2), manifest, "train")[:, 0].numpy()
    path = write_store(tmp_path_factory.mktemp("store"), len(x), {SITE: (D,)}, dtype="float32")
    zarr.open_group(path, mode="r+")[SITE][:] = x
    return ActivationStore.open(path)


def make_sae(seed: int = 0, **about: Any) -> SAE:
    """Random, but centred where activations are, so that its error differs from image to image."""
    one = sae.create("topk", D, F, K, seed=seed).requires_grad_(False)
    one.b_dec.copy_(torch.randn(D, generator=torch.Generator().manual_seed(seed)))
    one.about = {"site": SITE, "tokens": "cls", "training": {"prototype_weight": 0.0}, **about}
    return one


def test_alpha_zero_changes_no_bit(store: ActivationStore) -> None:
    x = torch.from_numpy(store.rows(SITE)[:])
    one = make_sae()
    for name, edit in vs2.edits(one, vs2.Calibration.of(one, store.rows(SITE), 0)).items():
        assert torch.equal(edit.apply(Batch(x), 0.0), x), name
        assert not torch.equal(edit.apply(Batch(x), 0.1), x), name


@given(gamma=st.floats(1.0, 3.0), lam=st.floats(0.0, 10.0), seed=st.integers(0, 5))
def test_proposition_3_1_holds_in_float64(gamma: float, lam: float, seed: int) -> None:
    """X + lambda (D(gamma c) - D(c)) = x + alpha (x - b) + alpha eps, and only alpha matters."""
    one = make_sae(seed).double()
    x = torch.randn(20, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + one.b_dec
    z = one.encode(x).dense()
    moved = x + lam * (gamma * z @ one.W_dec - z @ one.W_dec)
    alpha = lam * (gamma - 1)
    eps = one(x) - x
    torch.testing.assert_close(moved, x + alpha * (x - one.b_dec) + alpha * eps, rtol=0, atol=1e-9)
    torch.testing.assert_close(moved, x + alpha * vs2.direction(one, x), rtol=0, atol=1e-9)


def test_edits_are_their_definitions(store: ActivationStore) -> None:
    one, alpha = make_sae(), 0.7
    found = vs2.Calibration.of(one, store.rows(SITE), 0)
    x = torch.from_numpy(store.rows(SITE)[:])
    z, mean = one.encode(x).dense(), x.mean(dim=0)
    basis = torch.linalg.svd(x - mean)[2][:K]
    v = z @ one.W_dec
    shuffled = z @ one.W_dec[found.permutation]
    expected = {
        "vs2": v,
        "mean-extrapolation": x - mean,
        "pca-extrapolation": (x - mean) @ basis.T @ basis,
        "random-latents": shuffled * (v.norm(dim=1) / shuffled.norm(dim=1)).unsqueeze(1),
    }
    edits = vs2.edits(one, found)
    assert edits.keys() == expected.keys()
    assert sorted(found.permutation.tolist()) == list(range(F)) and found.permutation.tolist() != list(range(F))
    for name, edit in edits.items():
        moved = x + alpha * expected[name]
        moved *= (x.norm(dim=1) / moved.norm(dim=1)).unsqueeze(1)
        torch.testing.assert_close(edit.apply(Batch(x), alpha), moved, rtol=1e-3, atol=1e-3)
    assert next(iter(vs2.edits(make_sae(training={"prototype_weight": 0.8}), found))) == "vs2-pass"


def test_length_is_kept_and_a_zero_edit_of_a_zero_vector_stays_finite() -> None:
    x, edit = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[1.0, -9.0], [0.0, 0.0]])
    moved = keep_norm(x, edit)
    assert moved[0].norm().item() == pytest.approx(5) and moved[1].tolist() == [0, 0]


@given(values=st.lists(st.floats(0, 9, width=32), min_size=1, max_size=60), quantile=st.floats(1e-6, 1))
def test_a_gate_at_quantile_q_steers_a_share_q_of_what_it_was_calibrated_on(
    values: list[float], quantile: float
) -> None:
    fvu = torch.tensor(sorted(values)) + torch.arange(len(values)) * 1e-3  # no two equal
    found = vs2.Calibration(torch.zeros(1), torch.zeros(1, 1), fvu, torch.zeros(1))
    share = float((fvu <= found.threshold(quantile)).double().mean())
    assert quantile - 1e-9 <= share <= quantile + 1 / len(values)


def run(folder: Path, store: ActivationStore, manifest: Manifest, one: SAE, **options: Any) -> Path:
    section = config.Steering(**{**vars(SECTION), **options})
    with Work(folder / "work", "key") as work:
        steer(section, {"vs2-s0": [one]}, make_backbone(classes=2), {"train": store}, {}, manifest, 0, work, {})
        work.finish(folder / "out")
    return folder / "out"


def test_tables_say_what_each_image_does_alone(manifest: Manifest, store: ActivationStore, tmp_path: Path) -> None:
    """Every row against the edit of the class token image by image, without the shared prefix."""
    one, backbone = make_sae(), make_backbone(classes=2)
    out = run(tmp_path, store, manifest, one)
    rows, summary = tables.read(out / "vs2-s0.parquet"), json.loads((out / "vs2-s0.json").read_text())
    edits = vs2.edits(one, vs2.Calibration.of(one, store.rows(SITE), 0))
    x, labels = at_site(backbone, manifest, "val"), torch.from_numpy(manifest.split("val").labels)

    def hits(cls: Tensor) -> Tensor:
        edited = torch.cat([cls.unsqueeze(1), x[:, 1:]], dim=1)
        return torch.stack([backbone.classify(edited[i : i + 1])[0].argmax() for i in range(len(x))]) == labels

    for row in rows:
        if row["split"] == "val" and row["method"] in ("none", "reconstruct", "vs2", "mean-extrapolation"):
            cls = x[:, 0] if row["method"] == "none" else one(x[:, 0])
            if row["method"] in edits:
                cls = edits[row["method"]].apply(Batch(x[:, 0]), row["strength"])
            assert row["accuracy"] == pytest.approx(float(hits(cls).double().mean())), row
            assert row["labels"] == "none" and row["n"] == len(x)
    on_test = [row for row in rows if row["split"] == "test"]
    names = ["none", "reconstruct", "vs2", "mean-extrapolation", "pca-extrapolation", "random-latents", "vs2-gated"]
    assert [row["method"] for row in on_test] == names, "one strength each"
    for name in names[2:6]:
        on_val = [row for row in rows if row["split"] == "val" and row["method"] == name]
        best = max(on_val, key=lambda row: (row["accuracy"], -row["strength"]))
        assert next(row for row in on_test if row["method"] == name)["strength"] == best["strength"]
    assert {line["control"] for line in summary["against_controls"]} == set(names[3:6])
    assert summary["cost"]["edit_macs"] == D * F + K * D


def test_the_gate_leaves_alone_what_is_badly_reconstructed(
    manifest: Manifest, store: ActivationStore, tmp_path: Path
) -> None:
    one, backbone = make_sae(), make_backbone(classes=2)
    out = run(tmp_path, store, manifest, one, quantiles=(0.1, 0.5, 1.0))
    curve = json.loads((out / "vs2-s0.json").read_text())["gate"]
    rows = tables.read(out / "vs2-s0.parquet")
    found = vs2.Calibration.of(one, store.rows(SITE), 0)
    x = at_site(backbone, manifest, "test")[:, 0]
    fvu = ((one(x) - x).square().sum(dim=1) / (x - found.mean).square().sum(dim=1)).numpy()
    assert [line["split"] for line in curve] == ["val"] * 3 + ["test"] * 3
    for line in curve[3:]:
        assert line["steered"] == pytest.approx((fvu <= line["threshold"]).mean())
    on_val = curve[:3]
    best = max(on_val, key=lambda line: (line["accuracy"], -line["quantile"]))
    assert [line["quantile"] for line in curve if line["chosen"]] == [best["quantile"]] * 2
    gated = next(row for row in rows if row["split"] == "test" and row["method"] == "vs2-gated")
    chosen = next(line for line in curve[3:] if line["chosen"])
    assert all(gated[key] == chosen[key] for key in ("accuracy", "delta", "n", "top5", "strength"))


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"site": "blocks.1.mlp"}, "the SAE reads blocks.1.mlp; it must read blocks"),
        ({"site": "blocks.7.input"}, "'blocks.7.input' does not exist; the blocks are numbered 0 to 2"),
    ],
)
def test_an_sae_of_another_place_is_refused(about: dict[str, Any], message: str) -> None:
    with pytest.raises(SparsightError, match=message):
        place(make_sae(**about), make_backbone(classes=2))


def test_an_sae_of_another_width_is_refused() -> None:
    with pytest.raises(SparsightError, match=r"reads activations of width 48, .* has 24; take the SAE"):
        place(make_sae(), make_backbone(classes=2, embed_dim=24))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strengths": (float("nan"),)}, r"strengths\[0\]: must be 0 or more and finite, got nan"),
        ({"strengths": (1.0, float("inf"))}, r"strengths\[1\]: must be 0 or more and finite, got inf"),
        ({"quantiles": (0.9, 0.5)}, "quantiles: give at least one, rising"),
        ({"quantiles": (0.5, 1.5)}, r"quantiles\[1\]: must be more than 0 and at most 1, got 1.5"),
    ],
)
def test_options_without_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SparsightError, match=message):
        config.Steering(sae="sae", kind="vs2", **options)
