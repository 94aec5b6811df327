"""What is measured of SAEs, each number against brute force or another library."""

import importlib
import itertools
import json
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from scipy.stats import entropy
from sklearn.decomposition import PCA
from sklearn.metrics import pairwise_distances_argmin
from sklearn.metrics.pairwise import cosine_similarity

from sparsight import sae
from sparsight.sae import DenseCodes, SparseCodes
from sparsight.sae.metrics import baselines, description_length, geometry
from sparsight.sae.metrics.firing import EDGES, ByClass, Firing, class_columns
from sparsight.sae.metrics.monosemanticity import Monosemanticity, unit_rows
from sparsight.sae.metrics.reconstruction import at_error_of, at_own_error
from sparsight.sae.metrics.sparse_codes import from_codes, pooled, times
from sparsight.sae.metrics.stability import write_stability

SEEDS = st.integers(0, 2**32 - 1)
D, F, K = 12, 20, 3


def random_codes(generator: np.random.Generator, n: int, width: int = F) -> np.ndarray:
    """Codes of many kinds of latents: rare ones, dead ones (the first), one that always fires (the last)."""
    z = generator.gamma(2, size=(n, width)) * (generator.random((n, width)) < generator.random(width) * 0.4)
    z[:, 0], z[:, -1] = 0, 0.5 + generator.random(n)
    return z.astype(np.float32)


def windows(n: int) -> list[slice]:
    """Some windows that cover n rows, of different lengths."""
    return [slice(0, n // 3), slice(n // 3, n // 3 + 1), slice(n // 3 + 1, n)]


def activations(n: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, D, generator=generator) @ torch.randn(D, D, generator=generator) + 2


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_codes_become_the_same_matrix_whatever_holds_them(seed: int) -> None:
    generator = np.random.default_rng(seed)
    values = torch.from_numpy(generator.random((7, K)).astype(np.float32) * (generator.random((7, K)) < 0.6))
    # Padding repeats indices of active latents; active indices differ within a row.
    active = torch.from_numpy(np.stack([generator.choice(F, K, replace=False) for _ in range(7)]))
    codes = SparseCodes(values, torch.where(values > 0, active, active[:, :1]), F)
    dense = codes.dense().numpy()
    for given_codes in (codes, DenseCodes(codes.dense())):
        z = from_codes(given_codes)
        assert z.nnz == (dense > 0).sum() and np.array_equal(z.toarray(), dense)
    table = generator.standard_normal((F, D)).astype(np.float32)
    np.testing.assert_allclose(times(z, table), dense @ table, rtol=1e-5, atol=1e-6)
    full = sparse.csr_array(random_codes(generator, 6) + 1)
    np.testing.assert_allclose(times(full, table), full.toarray() @ table, rtol=1e-5, atol=1e-5)
    means = full.toarray().reshape(2, 3, F).mean(axis=1)
    np.testing.assert_allclose(pooled(full, 3).toarray(), means, rtol=1e-6)


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_firing_is_counted_as_on_the_dense_codes(seed: int) -> None:
    z = random_codes(np.random.default_rng(seed), 40)
    firing = Firing(F, unit=1.5)
    for at in windows(40):
        firing.update(sparse.csr_array(z[at]))
    np.testing.assert_allclose(firing.frequency, (z > 0).mean(axis=0))
    np.testing.assert_allclose(firing.largest, z.max(axis=0))
    for latent in range(F):
        own = z[:, latent][z[:, latent] > 0]
        assert firing.mean[latent] == pytest.approx(own.mean() if len(own) else 0)
        expected = np.histogram(own, [0, *(1.5 * EDGES), np.inf])[0]
        assert firing.histogram[latent].tolist() == expected.tolist()
    assert firing.frequency[0] == 0 and firing.frequency[-1] == 1


@given(SEEDS)
@settings(max_examples=20, deadline=None)
def test_class_of_a_latent_is_chosen_on_train_and_measured_on_test(seed: int) -> None:
    generator = np.random.default_rng(seed)
    splits, sums = [], []
    for n in (50, 30):
        z, labels = random_codes(generator, n), generator.integers(3, size=n)  # the fourth class has no images
        one = ByClass(F, 4)
        for at in windows(n):
            one.update(sparse.csr_array(z[at]), labels[at])
        splits.append((z.astype(np.float64), labels))
        sums.append(one)
    np.testing.assert_allclose(sums[0].deviation, splits[0][0].std(axis=0), atol=1e-7)
    found = class_columns(*sums)
    (train, train_labels), (test, test_labels) = splits
    for latent in range(F):
        if not train[:, latent].any():
            assert found["best_class"][latent] == -1 and np.isnan(found["class_precision"][latent])
            continue
        means = [train[train_labels == c, latent].mean() if (train_labels == c).any() else 0 for c in range(4)]
        best = int(np.argmax(means))
        assert found["best_class"][latent] == best
        fires, inside = test[:, latent] > 0, test_labels == best
        if not fires.any():
            assert np.isnan(found["class_precision"][latent]) and np.isnan(found["selectivity"][latent])
            continue
        assert found["class_precision"][latent] == pytest.approx(inside[fires].mean())
        a = test[inside, latent].mean() if inside.any() else 0
        b = test[~inside, latent].mean() if (~inside).any() else 0
        assert found["selectivity"][latent] == pytest.approx((a - b) / (a + b))


def pair_loop(z: np.ndarray, u: np.ndarray) -> list[float]:
    """The score as the paper defines it, pair by pair."""
    scores = []
    for a in z.T.astype(np.float64):
        if a.max() == a.min():
            scores.append(np.nan)
            continue
        a = (a - a.min()) / (a.max() - a.min())
        pairs = list(itertools.combinations(range(len(a)), 2))
        weights = np.array([a[i] * a[j] for i, j in pairs])
        cosines = np.array([u[i] @ u[j] for i, j in pairs])
        scores.append(float(weights @ cosines / weights.sum()) if weights.sum() > 0 else np.nan)
    return scores


@given(SEEDS, st.booleans())
@settings(max_examples=20, deadline=None)
def test_monosemanticity_is_that_of_the_loop_over_pairs(seed: int, signed: bool) -> None:
    generator = np.random.default_rng(seed)
    z, u = random_codes(generator, 18), unit_rows(generator.standard_normal((18, 5)))
    z[:, 1] = 0
    z[4, 1] = 2  # fires on one image, so on no pair
    z[:, 2] = 3  # the same everywhere, so it tells no image from another
    if signed:
        z[:, 3] -= generator.random(18).astype(np.float32)
    one = Monosemanticity(F, 5)
    for at in windows(18):
        one.update(sparse.csr_array(z[at]), u[at])
    scores = one.scores()
    np.testing.assert_allclose(scores, pair_loop(z, u), rtol=1e-6, atol=1e-9)
    assert np.isnan(scores[:3]).all() and not np.isnan(scores[-1])
    expected = np.mean([u[i] @ u[j] for i, j in itertools.combinations(range(18), 2)])
    assert one.of_all_images() == pytest.approx(expected)


def test_monosemanticity_of_extremes() -> None:
    u = unit_rows(np.repeat(np.eye(2), 5, axis=0))
    z = np.zeros((10, 2), np.float32)
    z[:5, 0], z[:, 1] = 1, [1, 0] * 5
    one = Monosemanticity(2, 2)
    one.update(sparse.csr_array(z), u)
    assert one.scores()[0] == pytest.approx(1) and one.scores()[1] < 0.5
    assert np.array_equal(unit_rows(np.zeros((2, 3))), np.zeros((2, 3)))


@given(SEEDS, st.floats(0.05, 3))
@settings(max_examples=20, deadline=None)
def test_bits_are_scipy_s_entropies(seed: int, step: float) -> None:
    z = random_codes(np.random.default_rng(seed), 60)
    z[:, 3] *= -1
    bits = description_length.Bits(F)
    for at in windows(60):
        symbols = description_length.quantised(sparse.csr_array(z[at]), step)
        bits.update(symbols)
        expected = np.rint(z[at].astype(np.float64) / step) * step
        np.testing.assert_allclose(description_length.restored(symbols, step).toarray(), expected, rtol=1e-5, atol=1e-6)
    rounded = np.rint(z.astype(np.float64) / step)
    expected = sum(entropy(np.unique(column, return_counts=True)[1], base=2) for column in rounded.T)
    assert bits.per_activation() == pytest.approx(expected, abs=1e-9)


def test_bits_of_a_choice_are_the_entropy_of_the_choice() -> None:
    chosen = np.array([0, 1, 1, 2, 2, 2, 2, 2])
    bits = description_length.Bits(4)
    bits.update(sparse.csr_array(np.eye(4)[chosen]))
    assert bits.of_the_choice() == pytest.approx(entropy([1, 2, 5], base=2))
    assert bits.per_activation() > bits.of_the_choice()


def test_step_is_the_largest_that_keeps_to_the_target() -> None:
    x = activations(200)
    method = baselines.of_sae(sae.create("topk", D, F, K).requires_grad_(False))
    z = method.encode(x)
    own = description_length.squared_error(method, x.numpy(), z)

    def error(step: float) -> float:
        return description_length.squared_error(
            method, x.numpy(), description_length.restored(description_length.quantised(z, step), step)
        )

    step = description_length.step_for(method, x.numpy(), z, 1.05 * own)
    assert own < error(step) <= 1.05 * own < error(step * 2 ** (26 / 2**16))
    nothing = sparse.csr_array(z.shape, dtype=np.float32)
    assert description_length.step_for(method, x.numpy(), nothing, own) == 1.0
    generous = description_length.step_for(method, x.numpy(), z, 1e9)
    assert description_length.quantised(z, generous).nnz == 0, "an error that all may have takes no bits"
    finest = description_length.step_for(method, x.numpy(), z, 0.0)
    assert error(finest) == pytest.approx(own, rel=1e-4), "an error that none can have takes the finest step"


def test_bits_of_pca_are_taken_at_the_error_of_the_quantised_sae() -> None:
    x = activations(300)
    mean, components = x.mean(dim=0), torch.linalg.eigh(torch.cov(x.T))[1]
    random = sae.create("topk", D, F, K).requires_grad_(False)
    random.set_center(mean)
    one = baselines.of_sae(random)
    widths = {"monosemanticity": D}
    own = at_own_error(one, x, widths)
    found = [own, at_error_of(own, baselines.pca("all", mean, components), x, widths)]
    for board in found:
        z = board.method.encode(x)
        board.update(x.numpy(), z, z, {"monosemanticity": unit_rows(x.numpy())})
    variance = float((x - mean).square().sum())
    of_sae, of_pca = (board.row(len(x), variance) for board in found)
    assert of_sae["fvu_quantised"] == pytest.approx(1.05 * of_sae["fvu"], rel=1e-3)
    assert of_pca["fvu_quantised"] == pytest.approx(of_sae["fvu_quantised"], rel=1e-3) and of_pca["fvu"] < 1e-9
    assert of_pca["macs"] == 2 * D * D and of_sae["macs"] == D * F + of_sae["l0"] * D
    error = x - torch.from_numpy(one.decode(one.encode(x)))
    expected = 1 - float(error.var(dim=0, correction=0).sum()) * len(x) / variance
    assert of_sae["explained_variance"] == pytest.approx(expected, rel=1e-5)
    assert of_sae["fvu"] == pytest.approx(float(error.square().sum()) / variance, rel=1e-5)


def test_pca_is_that_of_scikit_learn() -> None:
    x, other = activations(100), activations(50, seed=1)
    reference = PCA(K).fit(x.double().numpy())
    mean, covariance = x.double().mean(dim=0), torch.cov(x.double().T)
    method = baselines.pca("pca", mean, torch.linalg.eigh(covariance)[1].flip(1)[:, :K])
    expected = reference.inverse_transform(reference.transform(other.double().numpy()))
    np.testing.assert_allclose(method.decode(method.encode(other)), expected, rtol=1e-4, atol=1e-4)
    assert method.encode(other).shape == (50, K)


def test_k_means_gives_the_nearest_centre_and_the_same_ones_every_time() -> None:
    x = activations(200)
    one, again, other = (baselines.kmeans(x, 16, seed) for seed in (1, 1, 2))
    assert np.array_equal(one.rows, again.rows) and not np.array_equal(one.rows, other.rows)
    nearest = pairwise_distances_argmin(x.numpy(), one.rows)
    np.testing.assert_allclose(one.decode(one.encode(x)), one.rows[nearest], rtol=1e-6)
    within = np.square(x.numpy() - one.rows[nearest]).sum()
    assert within < 0.6 * np.square(x.numpy() - x.numpy().mean(axis=0)).sum()
    assert len(baselines.kmeans(x, 5000, 0).rows) == 200 // 8, "8 rows a centre"
    assert len(baselines.kmeans(x[:3], 5000, 0).rows) == 1
    few = baselines.kmeans(x[:3].repeat(40, 1), 15, 0)  # more centres than there are different rows
    np.testing.assert_allclose(few.decode(few.encode(x[:3])), x[:3].numpy(), rtol=1e-4)


def test_neurons_are_the_dimensions_farthest_from_their_mean() -> None:
    x = activations(30)
    method = baselines.neurons(x.mean(dim=0), K)
    centred = (x - x.mean(dim=0)).numpy()
    kept = np.abs(centred) >= np.sort(np.abs(centred), axis=1)[:, [-K]]
    np.testing.assert_allclose(method.decode(method.encode(x)), x.mean(dim=0).numpy() + centred * kept, atol=1e-5)


def test_the_random_dictionary_has_the_best_length_and_is_drawn_from_its_seed() -> None:
    x, like = activations(400), sae.create("relu", D, F, K)
    one, again, other = (baselines.random_dictionary(like, x, seed) for seed in (1, 1, 2))
    assert np.array_equal(one.rows, again.rows) and not np.array_equal(one.rows, other.rows)
    norms = np.linalg.norm(one.rows, axis=1)
    assert np.ptp(norms) < 1e-5 and (one.encode(x).toarray() > 0).sum(axis=1).max() == K
    centred, x_hat = x.numpy() - one.offset, one.decode(one.encode(x)) - one.offset
    errors = [np.square(centred - factor * x_hat).sum() for factor in (0.98, 1, 1.02)]
    assert errors[1] == min(errors)


@given(SEEDS, st.sampled_from([1, 2, 4]))
@settings(max_examples=20, deadline=None)
def test_nearest_rows_are_those_of_the_full_cosine_matrix(seed: int, experts: int) -> None:
    W = np.random.default_rng(seed).standard_normal((F, 4)).astype(np.float32)
    W[3] = 2 * W[7]
    cosines = cosine_similarity(W)
    for i, j in itertools.product(range(F), range(F)):
        if (i == j) if experts == 1 else (i * experts // F == j * experts // F):
            cosines[i, j] = -np.inf
    cosine, index = geometry.nearest(torch.from_numpy(W), experts)
    np.testing.assert_allclose(cosine.numpy(), cosines.max(axis=1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(cosines[np.arange(F), index.numpy()], cosines.max(axis=1), rtol=1e-5, atol=1e-6)
    if experts == 1:
        assert index[3] == 7 and index[7] == 3 and cosine[3] == pytest.approx(1)


def test_redundancy_is_the_mean_of_the_largest_cosines_with_and_without_the_map(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(geometry._cosines, "__defaults__", (3 * F,))  # some rows at a time
    generator = np.random.default_rng(0)
    later, earlier, A = (generator.standard_normal(shape).astype(np.float32) for shape in ((15, 4), (F, 4), (4, 4)))
    for transport, rows in ((None, earlier), (torch.from_numpy(A).double(), earlier @ A.T)):
        best = cosine_similarity(later, rows).max(axis=1)
        found = geometry.redundancy(torch.from_numpy(later), torch.from_numpy(earlier), transport)
        assert found["mean"] == pytest.approx(best.mean(), rel=1e-5)
        assert found["over_0.7"] == (best > 0.7).mean() and found["over_0.9"] == (best > 0.9).mean()
        assert 0 < found["over_0.9"] < found["over_0.7"] < 1
    assert geometry.redundancy(*[torch.from_numpy(later)] * 2)["mean"] == pytest.approx(1)


@given(SEEDS)
@settings(max_examples=15, deadline=None)
def test_matching_is_the_best_of_all_permutations(seed: int) -> None:
    a, b = np.random.default_rng(seed).standard_normal((2, 6, 4)).astype(np.float32)
    cosines = cosine_similarity(a, b)
    best = max(itertools.permutations(range(6)), key=lambda p: cosines[range(6), p].sum())
    found = geometry.matching(torch.from_numpy(a), torch.from_numpy(b))
    assert found["matched"] == 6 and found["cosine"] == pytest.approx(cosines[range(6), best].mean(), rel=1e-5)
    assert found["over_0.7"] == (cosines[range(6), best] > 0.7).mean()


def test_dictionaries_too_large_to_match_are_matched_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geometry, "_ENTRIES", 5 * F)
    a = geometry.random_rows(torch.empty(F, D), 0)
    found = geometry.matching(a, a.flip(0))
    assert found["matched"] == 5 and found["cosine"] == pytest.approx(1)


@pytest.mark.peers
def test_matching_and_duplicates_are_those_of_overcomplete(monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(mpl.cm, "get_cmap"):  # gone since matplotlib 3.9, still imported by overcomplete 0.3
        monkeypatch.setattr(mpl.cm, "get_cmap", mpl.colormaps.__getitem__, raising=False)
    metrics = importlib.import_module("overcomplete.metrics")
    a, b = (geometry.random_rows(torch.empty(F, D), seed) for seed in (0, 1))
    total = F - float(metrics.cosine_hungarian_loss(a, b))
    assert geometry.matching(a, b)["cosine"] == pytest.approx(total / F, rel=1e-5)
    similarities = metrics.dictionary_collinearity(a)[1].fill_diagonal_(-1)
    torch.testing.assert_close(geometry.nearest(a)[0], similarities.max(dim=1).values)


def test_stability_of_equal_and_of_unrelated_saes(tmp_path: Path) -> None:
    folders = []
    for seed in range(3):
        one = sae.create("topk", 48, 64, K, seed=0).requires_grad_(False)
        one.W_dec.copy_(one.W_dec[torch.randperm(64, generator=torch.Generator().manual_seed(seed))])
        one.save(tmp_path / f"same-s{seed}", site="a")
        sae.create("topk", 48, 64, K, seed=seed).save(tmp_path / f"other-s{seed}", site="b")
        folders += [tmp_path / f"same-s{seed}", tmp_path / f"other-s{seed}"]
    write_stability(folders, 0, tmp_path / "found.json", {"config": None})
    content = json.loads((tmp_path / "found.json").read_text())
    same, other = content["sites"]["a"], content["sites"]["b"]
    assert same["pairs"] == other["pairs"] == 3 and same["matched"] == 64 and content["record"] == {"config": None}
    assert same["cosine"] == pytest.approx(1) and same["over_0.7_min"] == 1
    assert other["cosine_min"] <= other["cosine"] <= other["cosine_max"] < 0.6
    assert other["cosine"] == pytest.approx(other["cosine_random"], abs=0.02) and other["over_0.7_random"] == 0
