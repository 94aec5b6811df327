"""Archetypal SAEs: decoder rows near the convex hull of centroids of the activations.

Shapes: B batch, D width (d_in), F latents (d_sae), K active latents (k), N candidates.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_store
from interrupted import interrupted
from scipy.optimize import nnls
from torch import Tensor

from sparsight import config, sae
from sparsight.activations.store import ActivationStore
from sparsight.common.errors import SparsightError
from sparsight.common.work import Work
from sparsight.sae.fit import fit
from sparsight.sae.resae import load_chain
from sparsight.sae.variants.archetypal import Archetypal

SITES, ROWS, D, F, K, N = ["blocks.0.input", "blocks.1.input"], 512, 12, 40, 5, 16


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("store"), ROWS, dict.fromkeys(SITES, (D,)), shard_images=128)


def train(store: Path, folder: Path, **options: Any) -> Path:
    values = {
        "kind": "archetypal",
        "backbone": "vit",
        "site": SITES[0],
        "d_sae": F,
        "k": K,
        "epochs": 3,
        "seeds": (0, 1),
    }
    section = config.Sae(**{**values, "batch_size": 64, "lr": 1e-2, "candidates": N, "dead_after": 300, **options})
    with Work(folder / "work", "key") as work:
        fit(section, ActivationStore.open(store), None, "arch", 0, work, torch.device("cpu"), {})
        work.finish(folder / "saes")
    return folder / "saes"


def made(candidates: int = N, seed: int = 1, **options: Any) -> Archetypal:
    one = sae.create("archetypal", D, F, K, seed, candidates=candidates, **options)
    assert isinstance(one, Archetypal)
    return one


def activations(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(64, D, generator=generator) @ torch.randn(D, D, generator=generator) + 1


def from_hull(row_D: np.ndarray, points_ND: np.ndarray) -> float:
    """Distance of a row from the convex hull: non-negative least squares, with a heavy equation for the sum."""
    heavy = 1e4
    system = np.vstack([points_ND.T, np.full(len(points_ND), heavy)])
    weights, _ = nnls(system, np.append(row_D, heavy))
    return float(np.linalg.norm(weights / weights.sum() @ points_ND - row_D))


@pytest.mark.parametrize("delta", [0.0, 0.3])
def test_trained_rows_stay_as_near_the_hull_of_data_as_delta(store: Path, tmp_path: Path, delta: float) -> None:
    folder = train(store, tmp_path, delta=delta)
    data = np.asarray(ActivationStore.open(store).rows(SITES[0])[:], np.float64)
    data = (data - data.mean(axis=0)) / data.std(axis=0).mean()
    points = []
    for name in ("arch-s0", "arch-s1"):
        one = sae.load(folder / name)
        assert isinstance(one, Archetypal) and one.delta == delta and one.candidates == N
        points.append(one.points.double().numpy())
        rows = (one.W_dec / one.log_scale.exp()).detach().double().numpy()
        assert (one.weights >= 0).all()
        torch.testing.assert_close(one.weights.sum(dim=1), torch.ones(F))
        distances = np.array([from_hull(row, points[-1]) for row in rows])
        assert distances.max() <= delta + 1e-3
        assert (distances.max() > 0.1) == (delta > 0), "the bound is used"
        free = rows / np.linalg.norm(rows, axis=1, keepdims=True) * 20
        assert min(from_hull(row, points[-1]) for row in free) > 1, "what lies outside is found"
    for own in points:
        assert (own >= data.min(axis=0) - 0.5).all() and (own <= data.max(axis=0) + 0.5).all()
        assert np.linalg.norm(own[:, None] - data[None], axis=2).min(axis=1).max() < np.sqrt(D), "each lies among rows"
    assert not np.array_equal(points[0], points[1]), "every seed has centroids of its own"


def test_an_archetypal_sae_of_a_grid_has_the_bytes_that_it_has_alone(store: Path, tmp_path: Path) -> None:
    grid, alone = train(store, tmp_path / "grid"), train(store, tmp_path / "alone", seeds=(1,))
    for file in ("sae.safetensors", "training.jsonl"):
        assert (grid / "arch-s1" / file).read_bytes() == (alone / "arch-s1" / file).read_bytes()


def test_an_interrupted_training_ends_with_the_same_bytes(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(store, tmp_path / "whole")
    with interrupted(monkeypatch, step=9):
        train(store, tmp_path / "again")
    again = train(store, tmp_path / "again")
    for name in ("arch-s0", "arch-s1"):
        for file in ("sae.safetensors", "training.jsonl", "config.json"):
            assert (again / name / file).read_bytes() == (whole / name / file).read_bytes()


def test_chains_have_candidates_of_their_residuals(store: Path, tmp_path: Path) -> None:
    chain = load_chain(train(store, tmp_path, site=None, sites=tuple(SITES), seeds=(0,)) / "arch-s0")
    first, second = (chain.saes[site].get_buffer("points") for site in SITES)
    assert first.shape == second.shape == (N, D) and not torch.equal(first, second)
    assert second.norm(dim=1).mean() < 3 * np.sqrt(D), "residuals have unit variance in training"


def test_gradients_equal_finite_differences() -> None:
    one, x = made(delta=0.5).double(), activations().double()
    one.start(10.0)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        one.constrain()
    one.dead[::4] = True
    before = {name: value.clone() for name, value in one.state_dict().items()}
    one.loss(x).total.backward()
    assert all(torch.equal(value, before[name]) for name, value in one.state_dict().items())
    for name, parameter in one.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        values = []
        with torch.no_grad():
            for sign in (1, -1):
                parameter.add_(direction, alpha=sign * 1e-6)
                values.append(float(one.loss(x).reconstruction + one.aux_coefficient * _aux(one, x)))
                parameter.sub_(direction, alpha=sign * 1e-6)
        expected = float((parameter.grad * direction).sum())
        assert expected == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4, abs=1e-8), name


_RESIDUALS: dict[int, Tensor] = {}


def _aux(one: Archetypal, x: Tensor) -> Tensor:
    """The AuxK loss on the residual of the first call: it has no gradient through the residual."""
    residual = _RESIDUALS.setdefault(id(one), x - one.loss(x).x_hat)
    W_dec = (one.weights @ one.points + one.deviation) * one.log_scale.exp()
    pre = ((x - one.b_dec) @ one.W_enc + one.b_enc).masked_fill(~one.dead, -torch.inf)
    best = pre.topk(min(one.aux_k, int(one.dead.sum())), dim=1)
    error = torch.einsum("bk,bkd->bd", best.values.relu(), W_dec[best.indices]) - residual
    return error.square().sum() / (residual - residual.mean(dim=0)).square().sum()


def test_an_untrained_row_reconstructs_itself_with_a_code_of_one() -> None:
    one = made()
    pre = one.W_dec @ one.W_enc
    torch.testing.assert_close(pre.diagonal(), torch.ones(F))


def test_no_two_rows_start_alike() -> None:
    for candidates in (8, N, F, 3 * F):
        one = made(candidates)
        weights = one.weights.detach()
        torch.testing.assert_close(weights.sum(dim=1), torch.ones(F))
        assert len(weights.unique(dim=0)) == F
        assert (weights.max(dim=0).values > 0).sum() == min(candidates, F)


def test_a_row_that_loses_all_weights_becomes_the_mean_of_the_candidates() -> None:
    one = made(delta=0)
    with torch.no_grad():
        one.weights[3] = -1
    one.constrain()
    torch.testing.assert_close(one.W_dec[3], one.points.mean(dim=0))
    assert one.W_dec.isfinite().all() and not one.deviation.any()


def test_mistakes_are_explained(store: Path, tmp_path: Path) -> None:
    with pytest.raises(SparsightError, match=r"candidates: must be 1 or more and at most 512, got 513"):
        config.Sae(backbone="vit", site=SITES[0], kind="archetypal", candidates=513)
    small = write_store(tmp_path / "small", 10, {SITES[0]: (D,)})
    with pytest.raises(SparsightError, match="candidates: 16 are more than the 10 activations; lower it"):
        train(small, tmp_path / "out", batch_size=5)
    with pytest.raises(SparsightError, match=r"candidates: expected \(16, 12\), got \(3, 12\)"):
        made().set_points(torch.zeros(3, D))
    with pytest.raises(SparsightError, match="split each over its latents, which is possible for topk"):
        config.Sae(backbone="vit", site=SITES[0], kind="archetypal", seeds=(0,), processes=2)
