"""Kernels of the training step on a card, through Triton's interpreter, against plain formulas.

Shapes: B batch, D width (d_in), F latents (d_sae), K active latents (k).
"""

import math

import pytest
import torch
from torch import Tensor

from sparsight.kernels import batch, functions, update

LR, BETAS, EPS = 1e-2, (0.9, 0.999), 6.25e-10


def unit_rows(n: int, d_in: int, generator: torch.Generator) -> Tensor:
    rows = torch.randn(n, d_in, generator=generator)
    return rows / rows.norm(dim=1, keepdim=True)


def moments(like: Tensor) -> dict[str, Tensor]:
    return {"exp_avg": torch.zeros_like(like), "exp_avg_sq": torch.zeros_like(like), "step": torch.zeros(())}


@pytest.mark.parametrize(("n", "d_in"), [(9, 37), (4, 192), (1, 1)])
@pytest.mark.parametrize("size", [1e-3, 10.0], ids=["not clipped", "clipped"])
def test_the_update_is_parallel_gradient_clipping_adam_and_unit_rows(n: int, d_in: int, size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    W = unit_rows(n, d_in, generator)
    plain, state, bias = W.double().requires_grad_(), moments(W), torch.zeros(3)
    adam = torch.optim.Adam([plain], LR, BETAS, EPS)
    for t in range(1, 4):
        gradient = size * torch.randn(n, d_in, generator=generator)
        rows = plain.detach()
        across = gradient - (gradient * rows).sum(dim=1, keepdim=True) * rows
        norms = update.prepare(gradient, W, state["step"], BETAS, bias)
        torch.testing.assert_close(norms, across.norm(dim=1).float(), rtol=1e-5, atol=size * 1e-6)
        torch.testing.assert_close(bias, torch.tensor([t, *(1 - beta**t for beta in BETAS)]), rtol=1e-6, atol=0)
        clip = norms.norm().clamp(min=1)
        update.update(gradient, W, state, bias, clip, torch.zeros(()), LR, BETAS, EPS)
        plain.grad = across / across.norm().clamp(min=1)
        adam.step()
        with torch.no_grad():
            plain.div_(plain.norm(dim=1, keepdim=True))
        if d_in > 1:  # of a row of one number, everything lies along the row
            torch.testing.assert_close(W, plain.detach().float(), rtol=1e-5, atol=1e-5)
            for name in ("exp_avg", "exp_avg_sq"):
                torch.testing.assert_close(state[name], adam.state[plain][name].float(), rtol=1e-4, atol=1e-6 * size)
        assert state["step"] == t
        torch.testing.assert_close(W.norm(dim=1), torch.ones(n))


def test_a_failed_step_leaves_weights_moments_and_count() -> None:
    generator = torch.Generator().manual_seed(0)
    W, bias, failed = unit_rows(5, 16, generator), torch.zeros(3), torch.zeros(())
    state, first = moments(W), torch.zeros(2)
    gradient = torch.randn(5, 16, generator=generator)
    before = []
    for loss in (1.0, math.nan, 2.0):
        norm = update.prepare(gradient, W, state["step"], BETAS, bias).norm()
        clip = update.judge(torch.tensor(loss), norm, first, failed)
        update.update(gradient, W, state, bias, clip, failed, LR, BETAS, EPS)
        before.append([W.clone(), *(value.clone() for value in state.values())])
    for values in before[1:]:
        assert all(torch.equal(a, b) for a, b in zip(before[0], values, strict=True))
    assert state["step"] == 1


@pytest.mark.parametrize("bad", [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (-math.inf, math.inf)])
def test_the_verdict_keeps_the_first_numbers_that_are_not_finite(bad: tuple[float, float]) -> None:
    first, failed = torch.zeros(2), torch.zeros(())
    for (loss, norm), fails in (((3e38, 3e38), 0), ((2.0, 0.5), 0), (bad, 1), ((3.0, 4.0), 1)):
        clip = update.judge(torch.tensor(loss), torch.tensor(norm), first, failed)
        assert failed == fails
        if not math.isnan(norm):
            assert clip == max(norm, 1)
        expected = torch.tensor(bad if fails else (loss, norm))
        torch.testing.assert_close(first, expected, equal_nan=True)


CASES = {"even": 0.0, "one row has them all": 100.0, "few are positive": -3.0}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("product", [2**28, 90, 1], ids=["in one block", "in blocks of three rows", "row by row"])
@pytest.mark.parametrize("ends", [None, [5], [1, 7, 29]], ids=["rows", "two ranges", "four ranges"])
def test_a_batch_s_largest_entries_are_cut_into_parts_that_hold_each_once(
    case: str, product: int, ends: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "_PRODUCT", product)
    generator = torch.Generator().manual_seed(0)
    n, d_in, d_sae, k = 7, 8, 30, 4
    x, W, b = (torch.randn(*shape, generator=generator) for shape in ((n, d_in), (d_in, d_sae), (d_sae,)))
    if CASES[case] > 0:
        x[3] *= CASES[case]
    else:
        b += CASES[case]
    bounds = None if ends is None else torch.tensor(ends)
    pre, latents, groups = functions.batch_topk(x, W, b, k, bounds)
    assert pre.shape == latents.shape and len(groups) == len(pre) and (groups.diff() >= 0).all()
    ranges = 0 if bounds is None else torch.bucketize(latents, bounds, right=True)
    assert ((groups.unsqueeze(1) // n == ranges) | (pre == 0)).all()
    found = torch.zeros(n, d_sae).index_put((groups.unsqueeze(1) % n, latents), pre, accumulate=True)
    everything = torch.addmm(b, x, W)
    least = everything.flatten().topk(n * k).values.min()
    torch.testing.assert_close(found, everything * (everything >= least))
