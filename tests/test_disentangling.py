"""Interchanges of attributes: a linear model with known directions, and every number against a plain reference."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sparsight import sae
from sparsight.bench.disentangling.das import Subspace, train_subspaces
from sparsight.bench.disentangling.interchange import Coordinates, Features, Latents, neurons, principal
from sparsight.bench.disentangling.pairs import draw_pairs, usable
from sparsight.bench.disentangling.readout import Readout
from sparsight.bench.disentangling.scores import Key, Outcome, best_rules, outcomes, table
from sparsight.bench.disentangling.selection import RULES, Rule, Separation, ranked
from sparsight.bench.disentangling.statistics import Fitted, Name, fit
from sparsight.common.errors import SparsightError
from sparsight.sae.metrics.baselines import Method, of_sae, random_dictionary
from sparsight.sae.metrics.firing import ByClass
from sparsight.sae.metrics.probing import DenseMoments
from sparsight.sae.metrics.sparse_codes import from_codes

D, SIZES, N = 32, (5, 4), 1200


@dataclass
class Linear:
    """Activations x = 3 u[digit] + 3 v[colour] + noise with orthonormal u and v; the rest of the model is a rotation.

    It is model, and rows of a split, at once.
    """

    seed: int
    n_images: int = N
    tokens: int = 1
    rows_per_image: int = 1
    largest: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        shared = np.random.default_rng(99)
        self.directions = np.linalg.qr(shared.standard_normal((D, D)))[0].T[: sum(SIZES)]
        self.rotation = torch.from_numpy(np.linalg.qr(shared.standard_normal((D, D)))[0]).float()
        generator = np.random.default_rng(self.seed)
        self.values = np.stack([generator.integers(size, size=self.n_images) for size in SIZES])
        clean = self.directions[self.values[0]] + self.directions[SIZES[0] + self.values[1]]
        self.x = torch.from_numpy(3 * clean + 0.1 * generator.standard_normal((self.n_images, D))).float()

    def stream(self, images: np.ndarray) -> Tensor:
        self.largest = max(self.largest, len(images))
        return self.x[images]

    def rows(self, stream: Tensor) -> Tensor:
        return stream

    def embedding(self, stream: Tensor, rows_RD: Tensor) -> Tensor:
        assert rows_RD.shape == stream.shape
        return rows_RD @ self.rotation

    def head(self, rows: int) -> Tensor:
        return self.x[:rows]

    def windows(self) -> Any:
        for start in range(0, self.n_images, 500):
            window = slice(start, min(start + 500, self.n_images))
            yield window, self.x[window], self.x[window].double().numpy()

    def embeddings(self, window: slice) -> np.ndarray:
        return (self.x[window] @ self.rotation).double().numpy()


def planted(directions: np.ndarray) -> Method:
    """A TopK SAE with a latent for every value."""
    one = sae.create("topk", D, 48, 2, seed=0).requires_grad_(False)
    rows = torch.zeros(48, D)
    rows[: len(directions)] = torch.from_numpy(directions).float()
    rows[len(directions) :] = one.W_dec[len(directions) :] * 1e-3  # they never win
    one.W_dec.copy_(rows)
    one.W_enc.copy_(rows.T)
    return of_sae(one)


@pytest.fixture(scope="module")
def train() -> Linear:
    return Linear(0)


@pytest.fixture(scope="module")
def dictionaries(train: Linear) -> dict[Name, Method]:
    drawn = [random_dictionary(sae.create("topk", D, 48, 2), train.x, seed) for seed in range(3)]
    return {
        Name("sae", ""): planted(train.directions),
        **{Name("random", str(i)): one for i, one in enumerate(drawn)},
    }


@pytest.fixture(scope="module")
def fitted(train: Linear, dictionaries: dict[Name, Method]) -> Fitted:
    return fit(train, train.values, SIZES, dictionaries)  # type: ignore[arg-type]


def scored(test: Linear, fitted: Fitted, features: Features, chosen: np.ndarray, attribute: int) -> Outcome:
    pairs = draw_pairs(test.values, 600, 1)
    key = Key("a", "", attribute, len(chosen), "")
    return outcomes(test, pairs, test.values, fitted.readouts, {key: (features, chosen)})[key]


@pytest.mark.parametrize("attribute", [0, 1])
def test_the_skyline_finds_the_directions(train: Linear, fitted: Fitted, attribute: int) -> None:
    k = SIZES[attribute] - 1  # the differences between the values span so many dimensions
    pairs = draw_pairs(train.values, 60 * 64, 0)
    random = torch.linalg.qr(torch.randn(D, k + 1, generator=torch.Generator().manual_seed(0))).Q
    wanted = [Subspace(attribute, random[:, :k]), Subspace(1 - attribute, random[:, k:])]
    basis, _ = train_subspaces(train, pairs, train.values, fitted.readouts, wanted, 64, 5e-2)
    (alone,) = train_subspaces(train, pairs, train.values, fitted.readouts, wanted[:1], 64, 5e-2)
    assert torch.equal(alone, basis), "a subspace does not depend on the others"
    torch.testing.assert_close(basis.T @ basis, torch.eye(k), atol=1e-5, rtol=0)
    found = scored(Linear(1), fitted, Coordinates(basis), np.arange(k), attribute)
    assert found.cause.mean() > 0.99 and found.isolate.mean() > 0.99


@pytest.mark.parametrize("attribute", [0, 1])
@pytest.mark.parametrize("rule", RULES)
def test_a_planted_dictionary_disentangles_and_a_random_one_does_not(
    fitted: Fitted, dictionaries: dict[Name, Method], attribute: int, rule: Rule
) -> None:
    test, count = Linear(1), SIZES[attribute]
    scores = {}
    for name, method in dictionaries.items():
        own, other = (fitted.separations[name][place] for place in (attribute, 1 - attribute))
        chosen = ranked(own, other, rule)[:count]
        scores[name] = float(scored(test, fitted, Latents(method), chosen, attribute).score.mean())
        if name.method == "sae":
            first = SIZES[0] * attribute
            assert sorted(chosen.tolist()) == list(range(first, first + count))
    assert scores.pop(Name("sae", "")) >= 0.95
    assert 0.4 < np.mean(list(scores.values())) < 0.65, "near 0.5, the score of an edit that changes nothing"


def test_taking_everything_causes_all_and_isolates_nothing_and_taking_nothing_the_reverse(fitted: Fitted) -> None:
    whole = Coordinates(torch.eye(D))
    for chosen, cause in ((np.arange(D), 1.0), (np.arange(0), 0.0)):
        found = scored(Linear(1), fitted, whole, chosen, 0)
        assert (found.cause.mean(), found.isolate.mean()) == (cause, 1 - cause)


def test_outcomes_are_those_of_a_loop_over_pairs(fitted: Fitted, dictionaries: dict[Name, Method]) -> None:
    test, generator = Linear(2, 80), np.random.default_rng(0)
    pairs = draw_pairs(test.values, 25, 5)
    edits: dict[Key, tuple[Features, np.ndarray]] = {}
    for name, method in dictionaries.items():
        for attribute in (0, 1):
            edits[Key(*name, attribute, 5, "")] = Latents(method), generator.permutation(48)[:5]
    for name, basis in fitted.bases.items():
        edits[Key(*name, 1, 7, "")] = basis, generator.permutation(D)[:7]
    for key, outcome in outcomes(test, pairs, test.values, fitted.readouts, edits).items():
        features, chosen = edits[key]
        for i, (base, donor) in enumerate(pairs):
            x, y = test.x[base].double(), test.x[donor].double()
            edited = x.clone()
            for feature in chosen:
                if isinstance(features, Latents):
                    z_x, z_y = features.method.encode(test.x[[base, donor]]).toarray()[:, feature]
                    edited += float(z_y - z_x) * torch.from_numpy(features.method.rows[feature]).double()
                else:
                    assert isinstance(features, Coordinates)
                    direction = features.basis_DF[:, feature].double()
                    edited += direction @ (y - x) * direction
            scores = [(edited @ test.rotation.double()) @ r.weight_EC.double() + r.bias_C for r in fitted.readouts]
            predicted = [int(one.argmax()) for one in scores]
            own, other = key.attribute, 1 - key.attribute
            assert outcome.cause[i] == (predicted[own] == test.values[own, donor])
            assert outcome.isolate[i] == (predicted[other] == test.values[other, base])


def eta(features: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Variance between values and in all, feature by feature."""
    features, values = features[values >= 0], values[values >= 0]
    between = sum(
        (values == v).mean() * (features[values == v].mean(axis=0) - features.mean(axis=0)) ** 2 for v in set(values)
    )
    return np.asarray(between), features.var(axis=0)


def random_codes(generator: np.random.Generator) -> np.ndarray:
    z = generator.random((150, 12)) * (generator.random((150, 12)) < 0.4)
    z[:, [2, 5]] = 0
    return z.astype(np.float32)


CASES: dict[str, Callable[[np.random.Generator], tuple[np.ndarray, np.ndarray]]] = {
    "random": lambda g: (random_codes(g), g.integers(-1, 4, 150)),
    "one value": lambda g: (random_codes(g), np.zeros(150, np.int64)),
    "a value without images": lambda g: (random_codes(g), np.array([0, 2, 3])[g.integers(3, size=150)]),
    "nothing fires": lambda g: (np.zeros((150, 12), np.float32), g.integers(4, size=150)),
}


@pytest.mark.parametrize("case", CASES)
def test_separation_is_the_variance_between_values(case: str) -> None:
    generator = np.random.default_rng(3)
    z, values = CASES[case](generator)
    other_values = generator.integers(2, size=150)
    found, dense = [], []
    basis = np.linalg.qr(generator.standard_normal((12, 12)))[0]
    for some, size in ((values, 4), (other_values, 2)):
        sums, moments = ByClass(12, size), DenseMoments(12, size)
        for window in (slice(0, 40), slice(40, 150)):
            codes = sae.codes.DenseCodes(torch.from_numpy(z[window]))
            sums.update(from_codes(codes), some[window])
            moments.update(z[window].astype(np.float64), some[window])
        found.append(Separation.of_codes(sums))
        dense.append(Separation.of_basis(moments, basis))
        for one, features in ((found[-1], z.astype(np.float64)), (dense[-1], z @ basis)):
            between, variance = eta(features, some)
            np.testing.assert_allclose(one.between, between, atol=1e-12)
            np.testing.assert_allclose(one.variance, variance, atol=1e-12)
    own, other = found
    share = np.divide(own.between, own.variance, out=np.zeros(12), where=own.variance > 0)
    for rule, score in (("share", share), ("surplus", own.between - other.between)):
        order = ranked(own, other, rule)  # type: ignore[arg-type]
        assert sorted(order) == list(range(12))
        np.testing.assert_allclose(score[order], -np.sort(-score), atol=1e-9)
    if case in ("one value", "nothing fires"):
        assert ranked(own, other, "share").tolist() == list(range(12))


@pytest.mark.parametrize("seed", range(3))
def test_pairs_differ_in_both_attributes_and_bases_come_once_before_any_comes_twice(seed: int) -> None:
    values = np.random.default_rng(seed).integers(-1, 3, (2, 200))
    known = np.flatnonzero((values >= 0).all(axis=0))
    pairs = draw_pairs(values, len(known), seed)
    assert np.array_equal(np.sort(pairs[:, 0]), known) and np.isin(pairs[:, 1], known).all()
    assert (values[:, pairs[:, 0]] != values[:, pairs[:, 1]]).all()
    assert np.array_equal(pairs, draw_pairs(values, len(known), seed))
    many = draw_pairs(values, 5 * len(known) // 2, seed)
    assert set(np.bincount(many[:, 0], minlength=200)[known]) == {2, 3}


@pytest.mark.parametrize("values", [[[0, 0, 0], [0, 1, 2]], [[0, 1, 0], [0, -1, 0]], [[0, 1, 2], [-1, -1, -1]]])
def test_without_two_images_that_differ_in_both_there_is_no_pair(values: list[list[int]]) -> None:
    with pytest.raises(SparsightError, match="no two images differ in both attributes"):
        draw_pairs(np.array(values), 3, 0)


def test_only_images_that_are_read_rightly_are_in_pairs() -> None:
    values = np.array([[0, 1, 2], [0, 1, 0]])
    right = [np.array([True, True, False]), np.array([True, False, True])]
    assert usable(values, right).tolist() == [[0, -1, -1], [0, -1, -1]]


def outcome(generator: np.random.Generator, p: float) -> Outcome:
    return Outcome(generator.random(300) < p, generator.random(300) < 0.5)


def test_rules_are_chosen_on_val_and_the_table_compares_means_over_seeds() -> None:
    generator = np.random.default_rng(0)
    keys = [Key("sae", f"s{seed}", 0, 4, rule) for seed in (0, 1) for rule in RULES] + [Key("pca", "", 0, 4, "share")]
    on_val = {key: outcome(generator, 0.9 if key.rule == RULES[key.sae == "s1"] else 0.1) for key in keys}
    best = best_rules(on_val)
    assert best == {Key("sae", "s0", 0, 4, RULES[0]), Key("sae", "s1", 0, 4, RULES[1]), keys[-1]}
    on_test = {key: outcome(generator, 0.7) for key in keys if key in best}
    rows, leads = table(["digit", "colour"], on_test, on_val, 0)
    assert [(row["method"], row["sae"], row["rule"], row["features"]) for row in rows] == [
        ("sae", "s0", RULES[0], 4), ("sae", "s1", RULES[1], 4), ("pca", None, "share", 4),
    ]  # fmt: skip
    for row, (key, one) in zip(rows, on_test.items(), strict=True):
        assert row["cause"] == one.cause.mean() and row["isolate"] == one.isolate.mean()
        assert row["score"] == pytest.approx((one.cause.mean() + one.isolate.mean()) / 2)
        assert row["score_val"] == on_val[key].score.mean() and row["n"] == 300
        error = one.score.std() / 300**0.5
        assert row["score_hi"] - row["score_lo"] == pytest.approx(2 * 1.96 * error, rel=0.1)
    (lead,) = leads
    s0, s1, pca = (one.score for one in on_test.values())
    difference = (s0 + s1) / 2 - pca
    assert lead["delta"] == pytest.approx(difference.mean()) and (lead["control"], lead["n_saes"]) == ("pca", 2)
    assert lead["delta_hi"] - lead["delta_lo"] == pytest.approx(2 * 1.96 * difference.std() / 300**0.5, rel=0.1)


def test_what_is_read_at_a_time_does_not_grow_with_the_number_of_images(fitted: Fitted) -> None:
    for n in (400, 4000):
        test = Linear(3, n)
        outcomes(
            test, draw_pairs(test.values, n, 0), test.values, fitted.readouts,
            {Key("neurons", "", 0, 2, ""): (neurons(D, torch.device("cpu")), np.arange(2))},
        )  # fmt: skip
        assert test.largest == 125


def test_principal_components_come_in_order_and_are_orthonormal() -> None:
    x = np.random.default_rng(0).standard_normal((500, 6)) * np.array([1, 5, 2, 4, 3, 0.5])
    basis = principal(np.cov(x.T), torch.device("cpu")).basis_DF.double().numpy()
    np.testing.assert_allclose(basis.T @ basis, np.eye(6), atol=1e-6)
    assert (np.diff((x @ basis).var(axis=0)) < 0).all()


def test_a_readout_predicts_the_largest_score() -> None:
    readout = Readout(torch.tensor([[1.0, 0], [0, 1.0]]), torch.tensor([0.0, 0.5]))
    assert readout(torch.tensor([[1.0, 0.4], [1.0, 0.6]])).tolist() == [0, 1]
