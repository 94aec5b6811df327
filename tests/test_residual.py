"""ReSAE: maps against plain ridge regression, the two ways of putting reconstructions back, its files."""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor

from sparsight import sae
from sparsight.common.errors import SparsightError
from sparsight.sae import Trainer, moments
from sparsight.sae.moments import Activations, Moments, fit_moments
from sparsight.sae.resae import ReSAE, affine, load_chain

N, D, F, K = 300, 10, 24, 4
SITES = ["blocks.1.input", "blocks.2.input", "blocks.3.input"]
GROUPS = ("cls", "patches")


def rows(group: str = "cls", n: int = N, seed: int = 0) -> dict[str, Tensor]:
    """A random model of three sites: each is an affine map of the one before, another per group, and news."""
    model = torch.Generator().manual_seed(GROUPS.index(group))
    data = torch.Generator().manual_seed(100 + seed)
    h = torch.randn(n, D, generator=data) + 5
    out = {SITES[0]: h}
    for site in SITES[1:]:
        h = h @ torch.randn(D, D, generator=model) / 3 + torch.randn(D, generator=model)
        h = h + 0.3 * torch.randn(n, D, generator=data)
        out[site] = h
    return out


def chain(fit: str = "full", ridge: float = 1e-3) -> ReSAE:
    saes = {site: sae.create("topk", D, F, K, seed=i) for i, site in enumerate(SITES)}
    moments = fit_moments([{group: rows(group) for group in GROUPS}], SITES)
    return ReSAE.fit(saes, moments, fit, ridge)  # type: ignore[arg-type]


def test_streamed_maps_equal_ridge_regression_on_all_rows() -> None:
    """Against the normal equations of the augmented least-squares problem, solved by QR in numpy."""
    data = rows()
    streamed = fit_moments(({"cls": {s: x[i : i + 37] for s, x in data.items()}} for i in range(0, N, 37)), SITES)
    for a, b in itertools.pairwise(SITES):
        A, c = affine(streamed["cls"], a, b, ridge=0.1)
        x, y = data[a].double().numpy(), data[b].double().numpy()
        xc, yc = x - x.mean(axis=0), y - y.mean(axis=0)
        weight = 0.1 * np.trace(xc.T @ xc) / D
        stacked = np.vstack([xc, np.sqrt(weight) * np.eye(D)])
        expected = np.linalg.lstsq(stacked, np.vstack([yc, np.zeros((D, D))]), rcond=None)[0].T
        np.testing.assert_allclose(A.numpy(), expected, rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(c.numpy(), y.mean(axis=0) - expected @ x.mean(axis=0), rtol=1e-8, atol=1e-8)


def test_a_map_is_of_the_first_rows_and_groups_count_by_all_of_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "_ENOUGH", 60)
    blocks = [{g: {s: x[i : i + 37] for s, x in rows(g).items()} for g in GROUPS} for i in range(0, N, 37)]
    blocks += [{"cls": rows("cls", 900, seed=1)}]
    found = fit_moments(blocks, SITES)
    first = fit_moments([{g: {s: x[:74] for s, x in rows(g).items()} for g in GROUPS}], SITES)
    saes = {site: sae.create("topk", D, F, K) for site in SITES}
    a, b = ReSAE.fit(saes, found), ReSAE.fit(saes, first)
    for group in GROUPS:
        for (A, c), (B, d) in zip(a.maps[group], b.maps[group], strict=True):
            torch.testing.assert_close(A, B)
            torch.testing.assert_close(c, d)
    means = {group: first[group].covariance(SITES[0], SITES[0])[1] for group in GROUPS}
    torch.testing.assert_close(a.statistics(found)[SITES[0]][0], 0.8 * means["cls"] + 0.2 * means["patches"])


def test_an_affine_model_leaves_no_residual_and_groups_have_maps_of_their_own() -> None:
    exact = rows()
    exact[SITES[1]] = exact[SITES[0]] @ torch.randn(D, D, generator=torch.Generator().manual_seed(3)) - 2
    moments = fit_moments([{"cls": exact, "patches": rows("patches")}], SITES)
    one = ReSAE.fit({site: sae.create("topk", D, F, K) for site in SITES}, moments, ridge=0.0)
    assert one.residuals(exact, "cls")[SITES[1]].abs().max() < 1e-4
    assert one.residuals(exact, "patches")[SITES[1]].abs().max() > 1


def test_controls_are_what_they_say() -> None:
    x = rows()
    a, b = x[SITES[0]], x[SITES[1]]
    torch.testing.assert_close(chain("zero").residuals(x, "cls")[SITES[1]], b)
    difference = b - a
    torch.testing.assert_close(chain("identity").residuals(x, "cls")[SITES[1]], difference - difference.mean(dim=0))
    diagonal = chain("diagonal", ridge=0.0).residuals(x, "cls")[SITES[1]]
    ac, bc = a - a.mean(dim=0), b - b.mean(dim=0)
    torch.testing.assert_close(diagonal, bc - ac * (ac * bc).sum(dim=0) / ac.square().sum(dim=0), rtol=1e-4, atol=1e-4)
    left = {fit: chain(fit, ridge=0.0).residuals(x, "cls")[SITES[1]].var(dim=0).sum() for fit in ("full", "diagonal")}
    assert left["full"] < left["diagonal"] < b.var(dim=0).sum()


def test_zero_maps_give_plain_saes_whatever_the_protocol() -> None:
    one, x = chain("zero"), rows()
    for chained in (True, False):
        for site, x_hat in one.reconstruct(x, "cls", chained).items():
            assert torch.equal(x_hat, one.saes[site](x[site]))
    assert torch.equal(one.replace(1, x[SITES[1]], x[SITES[0]], "cls"), one.saes[SITES[1]](x[SITES[1]]))


def test_teacher_forced_errors_add_up_through_the_chain_only() -> None:
    """e_{m+1} = A_m e_m + the residual SAE's error when chained, the latter alone when not."""
    one, x = chain(), rows()
    clean = one.residuals(x, "cls")
    own = {site: one.saes[site](clean[site]) - clean[site] for site in SITES}
    chained, apart = one.reconstruct(x, "cls"), one.reconstruct(x, "cls", chained=False)
    error = own[SITES[0]]
    for m, site in enumerate(SITES):
        if m:
            error = error @ one.maps["cls"][m - 1][0].float().T + own[site]
        torch.testing.assert_close(chained[site] - x[site], error, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(apart[site] - x[site], own[site], rtol=1e-4, atol=1e-4)


def test_online_the_insertion_error_is_the_residual_saes_own() -> None:
    """Between the sites runs a nonlinear model that sees the replacements; nothing accumulates."""
    one, x = chain(), rows()
    generator = torch.Generator().manual_seed(5)
    h, before = x[SITES[0]], None
    for m, site in enumerate(SITES):
        inserted = one.replace(m, h, before, "cls")
        seen = h if before is None else h - one.carry(m - 1, before, "cls")
        torch.testing.assert_close(inserted - h, one.saes[site](seen) - seen, rtol=1e-4, atol=1e-4)
        assert (inserted - h).abs().max() > 0.1
        h, before = torch.tanh(inserted @ torch.randn(D, D, generator=generator)) + inserted, inserted


def test_residual_saes_train_on_the_chain_and_explain_more_of_the_later_sites() -> None:
    """The point of the method: at the same k, residuals that a map predicts need no latents."""

    def fvu(fit: str) -> float:
        one = chain(fit)
        trainer = Trainer([one.saes[SITES[1]]], lr=3e-3, sites=[SITES[1]])
        for step in range(100):
            trainer.step(one.residuals(rows(seed=step), "cls"))
        x = rows(seed=1000)
        x_hat = one.reconstruct(x, "cls", chained=False)[SITES[1]].detach()
        centred = x[SITES[1]] - x[SITES[1]].mean(dim=0)
        return float((x_hat - x[SITES[1]]).square().sum() / centred.square().sum())

    assert fvu("full") < 0.5 * fvu("zero")


def test_save_and_load_give_the_same_bits_readable_without_us(tmp_path: Path) -> None:
    one, x = chain(), rows()
    one.save(tmp_path / "resae", backbone="vit")
    loaded = load_chain(tmp_path / "resae")
    assert loaded.sites == SITES and loaded.saes[SITES[1]].about["backbone"] == "vit"
    for site, x_hat in loaded.reconstruct(x, "patches").items():
        assert torch.equal(x_hat, one.reconstruct(x, "patches")[site])
    arrays = load_file(tmp_path / "resae" / "affine.safetensors")
    assert {name: a.shape for name, a in arrays.items()} == {
        f"{name}.{group}.{m}": shape
        for name, shape in (("A", (D, D)), ("c", (D,)))
        for group in GROUPS
        for m in range(2)
    }
    assert sae.load(tmp_path / "resae" / SITES[2]).about["site"] == SITES[2]


def _moments(**changed: Tensor | None) -> Callable[[], object]:
    data: Activations = {site: x for site, x in {**rows(), **changed}.items() if x is not None}
    return lambda: Moments(SITES).update(data)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (_moments(**{SITES[1]: None}), "site 'blocks.2.input' needs rows of the shape of 'blocks.1.input'"),
        (_moments(**{SITES[2]: torch.zeros(3, D)}), "site 'blocks.3.input' needs rows of the shape"),
        (_moments(**{SITES[2]: torch.full((N, D), torch.nan)}), "NaN or infinite activation at site 'blocks.2.input'"),
        (lambda: chain("fulll"), "no fit 'fulll'; known: full, diagonal, identity, zero"),
        (lambda: ReSAE.fit({}, {}), "needs two or more sites of one width, got none"),
        (
            lambda: ReSAE.fit({s: sae.create("topk", D + i, F, K) for i, s in enumerate(SITES)}, {}),
            "two or more sites of one width",
        ),
        (lambda: affine(Moments(SITES), SITES[0], SITES[1]), "no activations to fit"),
        (lambda: load_chain("no/such/chain"), "no ReSAE chain here"),
    ],
)
def test_mistakes_are_explained(call: Callable[[], object], message: str) -> None:
    with pytest.raises(SparsightError, match=message):
        call()
