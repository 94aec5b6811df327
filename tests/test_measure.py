"""Sparse probes, and everything that is measured of an SAE on stores, against scikit-learn and dense arithmetic."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from conftest import write_store
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from sparsight import sae
from sparsight.activations.store import ActivationStore
from sparsight.common import tables
from sparsight.common.errors import SparsightError
from sparsight.common.intervals import wilson
from sparsight.sae import SAE
from sparsight.sae.metrics import probing, reconstruction_only, split_rows
from sparsight.sae.metrics.firing import ByClass
from sparsight.sae.metrics.measure import Measured, measure
from sparsight.sae.metrics.monosemanticity import Monosemanticity, unit_rows
from sparsight.sae.metrics.reconstruction_only import measure_reconstruction

D, F, K, T, C = 24, 64, 4, 3, 4
SITE = "blocks.1.input"
N = {"train": 240, "test": 150, "val": 120}


def reference(x: np.ndarray, labels: np.ndarray, other: np.ndarray, counts: list[int]) -> dict[int, np.ndarray]:
    """Scores of scikit-learn's ridge regressions on the standardised features that differ most, class by class."""
    x, other = x.astype(np.float64), other.astype(np.float64)
    scaler = StandardScaler().fit(x)
    scores = {}
    for count in counts:
        columns = []
        for c in range(C):
            difference = np.abs(x[labels == c].mean(axis=0) - x.mean(axis=0)) if (labels == c).any() else 0 * x[0]
            with np.errstate(invalid="ignore"):
                score = np.where(x.std(axis=0) > 0, difference / x.std(axis=0), 0)
            at = np.argsort(-score, kind="stable")[:count]
            model = Ridge(alpha=probing.RIDGE * len(x)).fit(scaler.transform(x)[:, at], labels == c)
            columns.append(model.predict(scaler.transform(other)[:, at]))
        scores[count] = np.stack(columns, axis=1)
    return scores


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=10, deadline=None)
def test_probes_are_ridge_regressions_of_scikit_learn(seed: int) -> None:
    generator = np.random.default_rng(seed)
    labels, other_labels = generator.integers(C - 1, size=90), generator.integers(C, size=20)  # one is not in train
    labels[:3] = range(3)
    z = (generator.gamma(2, size=(110, F)) * (generator.random((110, F)) < 0.2)).astype(np.float32)
    z[:90][labels == 1, 5] += 2
    z[:, 7] = 0
    z[:, 8] = 1.5  # always fires, always the same
    train, other = z[:90], z[90:]
    scores = reference(train, labels, other, [1, 2, 5, 20])

    dense = probing.DenseMoments(F, C)
    for at in (slice(0, 40), slice(40, 90)):
        dense.update(train[at].astype(np.float64), labels[at])
    codes = ByClass(F, C)
    codes.update(sparse.csr_array(train), labels)
    chosen = probing.select(codes.means, codes.mean, codes.deviation, 20)
    union = np.unique(chosen)
    columns = sparse.csc_array(train[:, union].astype(np.float64))
    found = [*dense.probes("dense", np.eye(F), probing.COUNTS)]
    found += probing.sparse_probes("sparse", codes, chosen, columns, union)
    assert [(p.method, p.features) for p in found] == [(m, n) for m in ("dense", "sparse") for n in (1, 2, 5, 20)]
    for probe in found:
        features = other.astype(np.float64) if probe.method == "dense" else sparse.csr_array(other)
        given_scores: Any = features @ probe.W
        given_scores = given_scores.toarray() if sparse.issparse(given_scores) else given_scores
        np.testing.assert_allclose(given_scores + probe.b, scores[probe.features], rtol=1e-5, atol=1e-6)
        for at in (slice(0, 7), slice(7, 20)):
            probe.update(features[at], other_labels[at])
        right = scores[probe.features].argmax(axis=1) == other_labels
        assert probe.row() == {"features": probe.features, "method": probe.method, **wilson(right)}


def test_probes_on_a_basis_are_probes_on_projections() -> None:
    generator = np.random.default_rng(0)
    x, labels = generator.standard_normal((80, D)), generator.integers(C, size=80)
    basis = np.linalg.qr(generator.standard_normal((D, D)))[0][:, :6]
    dense = probing.DenseMoments(D, C)
    dense.update(x, labels)
    found = list(dense.probes("pca", basis, (1, 5, 20)))
    assert [probe.features for probe in found] == [1, 5], "there are no 20 features"
    for probe in found:
        expected = reference(x @ basis, labels, x @ basis, [probe.features])[probe.features]
        np.testing.assert_allclose(x @ probe.W + probe.b, expected, rtol=1e-6, atol=1e-9)


@pytest.fixture(scope="module")
def labels() -> dict[str, np.ndarray]:
    return {name: np.random.default_rng(9).permutation(n) % C for name, n in N.items()}


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory, labels: dict[str, np.ndarray]) -> dict[str, ActivationStore]:
    """Three tokens, two of which differ by class; embeddings of another width."""
    made = {}
    for seed, (name, n) in enumerate(N.items()):
        shapes = {SITE: (T, D), "embedding": (10,)}
        path = write_store(tmp_path_factory.mktemp(name), n, shapes, "all", seed, dtype="float32")
        group = zarr.open_group(path, mode="r+")
        centres = np.random.default_rng(3).standard_normal((C, 1, D)) * np.array([2.0, 0, 1])[:, None]
        group[SITE][:] = (group[SITE][:] + centres[labels[name]] + 1).astype(np.float32)
        group["embedding"][:] = group["embedding"][:] + np.eye(10, dtype=np.float32)[labels[name]] * 2
        made[name] = ActivationStore.open(path)
    return made


def make(kind: str = "topk", **options: Any) -> SAE:
    one = sae.create(kind, D, F, K, **options).requires_grad_(False)
    one.set_center(torch.ones(D))
    return one


@pytest.fixture(scope="module")
def found(stores: dict[str, ActivationStore], labels: dict[str, np.ndarray]) -> Measured:
    return measure([make()], SITE, stores, labels, C, 0)[0]


def rows(store: ActivationStore) -> np.ndarray:
    return np.asarray(store.rows(SITE)[:])


def test_what_is_measured_is_that_of_dense_codes(
    stores: dict[str, ActivationStore], labels: dict[str, np.ndarray], found: Measured
) -> None:
    one = make()
    train, test = (rows(stores[split]) for split in ("train", "test"))
    z = one.encode(test).dense().numpy()
    images = z.reshape(-1, T, F).mean(axis=1)
    x_hat = one(test).numpy().astype(np.float64)
    variance = np.square(test - test.mean(axis=0, dtype=np.float64)).sum()
    assert found.metrics["fvu"] == pytest.approx(np.square(test - x_hat).sum() / variance, rel=1e-5)
    expected = 1 - (test - x_hat).var(axis=0).sum() * len(test) / variance
    assert found.metrics["explained_variance"] == pytest.approx(expected, rel=1e-5)
    assert found.metrics["n"] == N["test"] * T and found.metrics["l0"] == pytest.approx((z > 0).sum(axis=1).mean())
    assert found.metrics["dense_test"] == ((z > 0).mean(axis=0) > 0.1).sum() > 0
    assert found.metrics["activation_unit"] == pytest.approx(math.sqrt(train.var(axis=0, dtype=np.float64).sum()))
    assert found.metrics["macs_encode"] == D * F and found.metrics["macs_decode"] == found.metrics["l0"] * D
    pca = PCA(K).fit(train.astype(np.float64))
    of_pca = pca.inverse_transform(pca.transform(test.astype(np.float64)))
    assert found.metrics["fvu_pca_k"] == pytest.approx(np.square(test - of_pca).sum() / variance, rel=1e-4)

    unit = unit_rows(np.asarray(stores["test"].rows("embedding")[:]))
    score = Monosemanticity(F, 10)
    score.update(sparse.csr_array(images), unit)
    latents = {key: np.array([row[key] for row in found.latents]) for key in found.latents[0]}
    np.testing.assert_allclose(latents["monosemanticity"], score.scores(), rtol=1e-5)
    assert found.metrics["embedding"] == "embedding"
    assert found.metrics["monosemanticity"] > found.metrics["monosemanticity_of_all_images"] > 0
    assert latents["latent"].tolist() == list(range(F))
    np.testing.assert_allclose(latents["frequency"], (z > 0).mean(axis=0))
    np.testing.assert_allclose(latents["max_activation"], z.max(axis=0), rtol=1e-5)
    np.testing.assert_allclose(latents["decoder_norm"], 1, rtol=1e-5)
    assert (latents["histogram"].sum(axis=1) == (z > 0).sum(axis=0)).all()
    train_images = one.encode(train).dense().numpy().reshape(-1, T, F).mean(axis=1)
    means = np.stack([train_images[labels["train"] == c].mean(axis=0) for c in range(C)])
    assert latents["best_class"].tolist() == means.argmax(axis=0).tolist()
    for row in found.latents:
        fires = images[:, row["latent"]] > 0
        assert row["class_precision"] == pytest.approx((labels["test"] == row["best_class"])[fires].mean())


def test_probes_see_the_train_split_alone_and_answer_for_images_of_test(
    stores: dict[str, ActivationStore], labels: dict[str, np.ndarray], found: Measured
) -> None:
    one = make()
    train, test = (rows(stores[split]) for split in ("train", "test"))
    pooled = {name: x.reshape(-1, T, D).mean(axis=1) for name, x in (("train", train), ("test", test))}
    codes = {
        name: one.encode(x).dense().numpy().reshape(-1, T, F).mean(axis=1)
        for name, x in (("train", train), ("test", test))
    }
    components = PCA().fit(train.astype(np.float64)).components_.T
    features = {
        "sae": codes,
        "neurons": pooled,
        "pca": {name: x @ components for name, x in pooled.items()},
    }
    table = {(row["method"], row["features"]): row for row in found.probing}
    counts = [1, 2, 5, 20]
    assert set(table) == {(m, n) for m in (*features, "random") for n in counts} | {("activation", D)}
    for method, own in features.items():
        scores = reference(own["train"], labels["train"], own["test"], counts)
        for count in counts:
            hits = scores[count].argmax(axis=1) == labels["test"]
            assert table[method, count]["accuracy"] == pytest.approx(hits.mean()), (method, count)
            assert table[method, count]["n"] == N["test"]
    scores = reference(pooled["train"], labels["train"], pooled["test"], [D])
    assert table["activation", D]["accuracy"] == (scores[D].argmax(axis=1) == labels["test"]).mean() > 0.9
    assert found.metrics["probing_sae_20"] == table["sae", 20]["accuracy"] > 1 / C + 0.2


def test_every_baseline_has_a_row(found: Measured) -> None:
    table = {row["method"]: row for row in found.baselines}
    assert list(table) == ["sae", "pca", "random", "kmeans", "neurons", "pca-all"]
    assert table["pca"]["l0"] == table["neurons"]["l0"] == K and table["kmeans"]["l0"] == 1
    assert table["pca-all"]["fvu"] < 1e-9 and table["pca"]["fvu"] < table["neurons"]["fvu"]
    assert found.metrics["fvu_random"] == table["random"]["fvu"] > table["pca"]["fvu"]
    assert found.metrics["bits"] == table["sae"]["bits"] and found.metrics["bits_pca"] == table["pca-all"]["bits"]
    assert table["kmeans"]["step"] is None and 0 < table["kmeans"]["bits"] <= math.log2(table["kmeans"]["features"])
    for row in table.values():
        assert row["bits"] > 0 and 0 <= row["fvu"] <= row["fvu_quantised"] <= max(1.06 * row["fvu"], 2)
    assert table["neurons"]["macs"] == 0 and table["pca"]["macs"] == 2 * D * K


def test_quantisation_steps_are_chosen_on_val(stores: dict[str, ActivationStore], found: Measured) -> None:
    """There the SAE loses 5 %, and all components of train reach the same error."""
    steps = {row["method"]: row["step"] for row in found.baselines}
    one, (train, val) = make(), (rows(stores[split]).astype(np.float64) for split in ("train", "val"))
    z = one.encode(val).dense().double()

    def error(x_hat: Any) -> float:
        return float(np.square(val - np.asarray(x_hat)).sum())

    def decoded(codes: Any) -> Any:
        return codes @ one.W_dec.double() + one.b_dec.double()

    quantised = error(decoded((z / steps["sae"]).round() * steps["sae"]))
    assert quantised == pytest.approx(1.05 * error(decoded(z)), rel=1e-3)
    pca = PCA().fit(train)
    rounded = np.rint(pca.transform(val) / steps["pca-all"]) * steps["pca-all"]
    assert error(pca.inverse_transform(rounded)) == pytest.approx(quantised, rel=2e-3)


def test_windows_change_nothing_and_equal_runs_give_equal_bytes(
    stores: dict[str, ActivationStore], labels: dict[str, np.ndarray], found: Measured, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    again = measure([make()], SITE, stores, labels, C, 0)[0]
    assert json.dumps(again.metrics) == json.dumps(found.metrics)
    for name in ("latents", "baselines", "probing"):
        for turn, one in enumerate((found, again)):
            tables.write(tmp_path / f"{name}-{turn}.parquet", getattr(one, name))
        assert (tmp_path / f"{name}-0.parquet").read_bytes() == (tmp_path / f"{name}-1.parquet").read_bytes()
    monkeypatch.setattr(split_rows, "_ENTRIES", 70 * F)
    parts = measure([make()], SITE, stores, labels, C, 0)[0]
    for part, whole in zip([parts.metrics, *parts.latents], [found.metrics, *found.latents], strict=True):
        assert part.keys() == whole.keys()
        for key, value in whole.items():
            assert part[key] == (
                value if isinstance(value, str | list) else pytest.approx(value, rel=1e-5, nan_ok=True)
            )


@pytest.mark.parametrize("kind", ["topk", "switch", "relu"])
def test_the_reconstruction_alone_is_what_all_metrics_say_of_it(
    stores: dict[str, ActivationStore], labels: dict[str, np.ndarray], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = [make(kind), make(kind)]
    two[1].W_dec.mul_(-1)
    nothing = {split: np.full(n, -1) for split, n in N.items()}
    whole, alone = measure(two, SITE, stores, nothing, 0, 0), measure_reconstruction(two, SITE, stores, nothing)
    for a, b in zip(whole, alone, strict=True):
        missing = set(a.metrics) - set(b.metrics)
        assert all(
            key.startswith(("bits", "fvu_", "dead_train", "monosem", "embedding", "n_labelled")) for key in missing
        )
        assert set(b.metrics) <= set(a.metrics)
        for key, value in b.metrics.items():
            assert value == pytest.approx(a.metrics[key], rel=1e-6), key
        for row, same in zip(b.latents, a.latents, strict=True):
            assert all(same[key] == value or value is None for key, value in row.items() if key != "best_class")
        assert [row["method"] for row in b.baselines] == ["sae", "pca"] and b.probing == []
    assert alone[0].metrics["fvu"] != alone[1].metrics["fvu"]
    monkeypatch.setattr(reconstruction_only, "_TEST", 20 * T + 1)
    test = rows(stores["test"])[: 20 * T]
    (part, _) = measure_reconstruction(two, SITE, stores, nothing)
    error = np.square(test - two[0](test).numpy().astype(np.float64)).sum()
    assert part.metrics["n"] == 20 * T
    assert part.metrics["fvu"] == pytest.approx(error / np.square(test - test.mean(axis=0)).sum(), rel=1e-4)


@pytest.mark.parametrize("kind", sae.names())
def test_every_variant_is_measured(
    stores: dict[str, ActivationStore], labels: dict[str, np.ndarray], kind: str
) -> None:
    one = make(kind)
    if kind in ("batchtopk", "matryoshka"):
        one.get_buffer("threshold").fill_(0.5)  # before training there is none, and codes depend on the window
    metrics = measure([one], SITE, stores, labels, C, 0)[0].metrics
    test = rows(stores["test"])
    error = np.square(test - one(test).numpy().astype(np.float64)).sum()
    assert metrics["fvu"] == pytest.approx(error / np.square(test - test.mean(axis=0)).sum(), rel=1e-4)
    assert metrics["macs_encode"] == (D * (4 + F // 4) if kind == "switch" else D * F)
    assert ("other_expert_cosine" in metrics) == (kind == "switch")


def test_a_dead_sae_is_measured_too(
    stores: dict[str, ActivationStore], labels: dict[str, np.ndarray], tmp_path: Path
) -> None:
    one = make()
    one.b_enc.fill_(-1e6)
    found = measure([one], SITE, stores, labels, C, 0)[0]
    assert found.metrics["l0"] == found.metrics["bits"] == found.metrics["macs_decode"] == 0
    assert found.metrics["dead_test"] == found.metrics["dead_train"] == F and found.metrics["dense_test"] == 0
    assert "monosemanticity" not in found.metrics and found.metrics["fvu"] >= 1
    assert json.loads(json.dumps(found.metrics, allow_nan=False)) == found.metrics
    row = found.latents[3]
    assert row["frequency"] == row["mean_activation"] == row["max_activation"] == sum(row["histogram"]) == 0
    assert row["best_class"] == -1 and np.isnan([row["class_precision"], row["monosemanticity"]]).all()
    guess = np.bincount(labels["train"]).argmax()
    table = {(row["method"], row["features"]): row["accuracy"] for row in found.probing}
    assert table["sae", 20] == (labels["test"] == guess).mean(), (
        "what never fires tells nothing but the commonest class"
    )
    tables.write(tmp_path / "latents.parquet", found.latents)
    assert tables.read(tmp_path / "latents.parquet")[3]["histogram"] == row["histogram"]


def test_a_latent_that_always_fires_is_dense(stores: dict[str, ActivationStore], labels: dict[str, np.ndarray]) -> None:
    one = make("relu")
    one.b_enc.fill_(-1e6)
    one.b_enc[5] = 100
    found = measure([one], SITE, stores, labels, C, 0)[0]
    assert found.metrics["dense_test"] == 1 and found.latents[5]["frequency"] == 1
    assert found.latents[5]["class_precision"] == pytest.approx(
        (labels["test"] == found.latents[5]["best_class"]).mean()
    )
    assert not math.isnan(found.latents[5]["monosemanticity"]) and found.metrics["l0"] == 1


def test_one_class_is_always_right(stores: dict[str, ActivationStore]) -> None:
    found = measure([make()], SITE, stores, {name: np.zeros(n, np.int64) for name, n in N.items()}, 1, 0)[0]
    assert all(row["accuracy"] == 1 for row in found.probing)
    assert all(row["class_precision"] == 1 for row in found.latents if row["frequency"])


def test_without_embeddings_images_are_compared_by_the_site_itself(
    tmp_path: Path, labels: dict[str, np.ndarray]
) -> None:
    store = ActivationStore.open(write_store(tmp_path, 150, {SITE: (D,)}, dtype="float32"))
    found = measure([make()], SITE, dict.fromkeys(N, store), dict.fromkeys(N, labels["test"]), C, 0)[0]
    assert found.metrics["embedding"] == SITE
    score = Monosemanticity(F, D)
    score.update(sparse.csr_array(make().encode(rows(store)).dense().numpy()), unit_rows(rows(store)))
    scores = [row["monosemanticity"] for row in found.latents]
    np.testing.assert_allclose(scores, score.scores(), rtol=1e-5)


def test_activations_that_are_all_the_same_and_stores_of_other_images_are_refused(
    stores: dict[str, ActivationStore], labels: dict[str, np.ndarray], tmp_path: Path
) -> None:
    path = write_store(tmp_path, N["test"], {SITE: (T, D), "embedding": (10,)}, "all", dtype="float32")
    zarr.open_group(path, mode="r+")[SITE][:] = 0.1
    constant = ActivationStore.open(path)
    with pytest.raises(
        SparsightError, match=r"train.zarr, site 'blocks.1.input': activations are all the same, nothing"
    ):
        measure([make()], SITE, {**stores, "test": constant}, labels, C, 0)[0]
    with pytest.raises(SparsightError, match=r"150 images, but the manifest of images lists 240; extract again"):
        measure([make()], SITE, {**stores, "train": constant}, labels, C, 0)[0]
