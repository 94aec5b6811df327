"""Every backend against dense float64 autograd, screening against the dense product, and what routing computes."""

from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sparsight import kernels
from sparsight.common.errors import SparsightError
from sparsight.kernels import cpu, dense, screening
from sparsight.kernels.largest import largest

no_triton = pytest.mark.skipif(find_spec("triton") is None, reason="PyTorch comes without Triton on this system")
every_backend = pytest.mark.parametrize("backend", ["reference", "cpu", pytest.param("triton", marks=no_triton)])
# B, D, F, k and what is added to all pre-activations
CASES = {
    "plain": (24, 32, 96, 5, 0.0),
    "all negative": (8, 16, 48, 4, -1e3),
    "few positive": (16, 16, 40, 20, -4.0),
    "k = F": (6, 16, 24, 24, 0.0),
    "one row": (1, 16, 40, 3, 0.0),
    "one latent each": (9, 16, 40, 1, 0.0),
    "d_in 1152": (7, 1152, 64, 6, 0.0),
    "odd sizes": (10, 37, 53, 7, 0.0),
    "screened": (256, 16, 130, 2, 0.0),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def tensors(n: int, d_in: int, d_sae: int, shift: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, W_enc stored as (F, D), b_enc, W_dec."""
    generator = torch.Generator().manual_seed(0)
    x, W_enc, b_enc, W_dec = (
        torch.randn(*shape, generator=generator) for shape in ((n, d_in), (d_sae, d_in), (d_sae,), (d_sae, d_in))
    )
    return x.requires_grad_(), W_enc.T.requires_grad_(), (b_enc + shift).requires_grad_(), W_dec.requires_grad_()


def gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of a fixed random weighting of the outputs, zero where nothing depends on an input."""
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs]
    found = torch.autograd.grad(
        [(o * w).sum() for o, w in zip(outputs, weights, strict=True)], inputs, allow_unused=True
    )
    return [torch.zeros_like(i) if g is None else g for g, i in zip(found, inputs, strict=True)]


def exact(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().double().requires_grad_() for tensor in inputs]


def assert_equal_to_rounding(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        assert (a.double() - b).abs().max() <= 1e-5 * b.abs().max()


def autoencode(x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    values, indices = kernels.topk(x, W_enc, b_enc, k)
    return values, indices, kernels.decode(values, indices, W_dec)


@every_backend
@every_case
def test_topk_and_decode_equal_dense_float64_autograd(
    backend: str, case: tuple[int, int, int, int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSIGHT_KERNELS", backend)
    n, d_in, d_sae, k, shift = case
    inputs = tensors(n, d_in, d_sae, shift)
    values, indices, x_hat = autoencode(*inputs, k)
    x, W_enc, b_enc, W_dec = double = exact(inputs)
    pre = x @ W_enc + b_enc
    assert torch.equal(indices.sort(1).values, pre.topk(k, dim=1).indices.sort(1).values)
    expected = pre.gather(1, indices).relu()
    z = torch.zeros_like(pre).scatter(1, indices, expected)
    assert_equal_to_rounding([values, x_hat], [expected, z @ W_dec])
    assert_equal_to_rounding(gradients([values, x_hat], inputs), gradients([expected, z @ W_dec], double))


@every_backend
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("k", [3, 10])
def test_routed_topk_equals_dense_float64_autograd_on_its_expert(
    backend: str, biased: bool, k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSIGHT_KERNELS", backend)
    expert = torch.tensor([3, 0, 3, 3, 5, 0, 3, 0])  # one row for expert 5, none for 1, 2 and 4
    x, W_enc, b_enc, _ = tensors(len(expert), 16, 60)
    inputs = [x, W_enc, b_enc] if biased else [x, W_enc]
    values, indices = kernels.routed_topk(x, W_enc, b_enc if biased else None, expert, 6, k)
    double = exact(inputs)
    pre = double[0] @ double[1] + (double[2] if biased else 0)
    foreign = torch.arange(60) // 10 != expert.unsqueeze(1)
    assert torch.equal(
        indices.sort(1).values, pre.masked_fill(foreign, -torch.inf).topk(k, dim=1).indices.sort(1).values
    )
    expected = pre.gather(1, indices).relu()
    assert_equal_to_rounding([values], [expected])
    assert_equal_to_rounding(gradients([values], inputs), gradients([expected], double))


def test_routing_computes_no_other_expert() -> None:
    n, d_in, d_sae, experts, k = 128, 16, 512, 8, 4
    x, W_enc, _, W_dec = tensors(n, d_in, d_sae)
    expert = torch.arange(n) % experts
    with FlopCounterMode(display=False) as counter:
        values, indices = kernels.routed_topk(x, W_enc, None, expert, experts, k)
        kernels.decode(values, indices, W_dec).sum().backward()
    assert counter.get_total_flops() == 2 * n * d_in * d_sae // experts


@every_backend
def test_padding_counts_for_nothing(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSIGHT_KERNELS", backend)
    *_, W_dec = tensors(2, 16, 40)
    values = torch.tensor([[0.5, 2.0, 0.0], [1.5, 0.0, 0.0]], requires_grad=True)
    indices = torch.tensor([[0, 7, 0], [3, 0, 0]])
    x_hat = kernels.decode(values, indices, W_dec)
    torch.testing.assert_close(x_hat, torch.stack([0.5 * W_dec[0] + 2 * W_dec[7], 1.5 * W_dec[3]]))
    x_hat.sum().backward()
    assert values.grad is not None
    assert W_dec.grad is not None
    torch.testing.assert_close(values.grad, W_dec.detach().sum(1)[indices] * (values != 0))
    torch.testing.assert_close(W_dec.grad.sum(1) / 16, torch.zeros(40).index_put((indices,), values.detach(), True))


@every_backend
def test_same_bits_twice_and_gradients_in_the_layout_of_the_weights(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSIGHT_KERNELS", backend)
    inputs = tensors(40, 24, 80)
    first, second = ([*out, *gradients([out[0], out[2]], inputs)] for out in (autoencode(*inputs, 6) for _ in "12"))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    inputs[1].retain_grad()
    autoencode(*inputs, 6)[2].sum().backward()
    assert inputs[1].grad is not None
    assert inputs[1].grad.stride() == inputs[1].stride()


@every_backend
def test_latents_that_fire_on_every_row_or_on_none_get_their_whole_gradient(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSIGHT_KERNELS", backend)
    generator = torch.Generator().manual_seed(0)
    indices = torch.stack([torch.randperm(9, generator=generator)[:3] for _ in range(300)]) + 2
    indices[:, 0] = 1  # two more entries than two chunks of 128 hold, and the next latent starts within a chunk
    values, g = torch.randn(300, 3, generator=generator), torch.randn(300, 20, generator=generator)
    sums, totals = import_module(f"sparsight.kernels.{backend}").accumulate(values, indices, g, 14)
    z = torch.zeros(300, 14, dtype=torch.float64).scatter(1, indices, values.double())
    assert_equal_to_rounding([sums, totals], [z.T @ g.double(), z.sum(0)])


@no_triton
@pytest.mark.parametrize("n", [1, 127, 128, 129, 256, 385])
def test_parts_of_a_latent_end_where_chunks_do(n: int) -> None:
    kernels = import_module("sparsight.kernels.triton")
    g = torch.randn(n, 5, generator=torch.Generator().manual_seed(n))
    for before in (0, 1, 127):  # entries of the latent before
        rows = torch.cat([g[:1].expand(before, -1), g])
        latents = (torch.arange(before + n) >= before).long().unsqueeze(1)
        sums, totals = kernels.accumulate(torch.ones(before + n, 1), latents, rows, 3)
        expected = torch.stack([before * g[0].double(), g.double().sum(0), torch.zeros(5).double()])
        assert (sums - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert totals.tolist() == [before, n, 0]


@every_backend
def test_a_gradient_after_indices_changed_in_place_uses_the_new_ones(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARSIGHT_KERNELS", backend)
    indices, W = torch.tensor([[0, 3], [1, 2]]), torch.ones(5, 4, requires_grad=True)
    for move in (0, 1):
        indices += move
        (grad,) = torch.autograd.grad(kernels.decode(torch.ones(2, 2), indices, W).sum(), W)
        assert torch.equal(grad.sum(1) / 4, torch.zeros(5).index_fill_(0, indices.flatten(), 1.0))


def test_autocast_lowers_only_the_encoder_product() -> None:
    inputs = tensors(24, 32, 96)
    with torch.autocast("cpu", torch.bfloat16):
        values, indices, x_hat = autoencode(*inputs, 5)
        found = gradients([x_hat], inputs)
    x, W_enc, b_enc, W_dec = double = exact(inputs)
    chosen = (x @ W_enc + b_enc).gather(1, indices)
    assert 1e-4 < (values - chosen.relu()).abs().max() < 0.1
    fixed = chosen + (values.double() - chosen).detach()  # the values of the bf16 product, the gradients of the exact
    expected = torch.zeros(24, 96, dtype=torch.float64).scatter(1, indices, fixed) @ W_dec
    assert_equal_to_rounding([x_hat, *found], [expected, *gradients([expected], double)])


def spread(generator: torch.Generator) -> Tensor:
    return torch.randn(20, 1040, generator=generator)


def tied(generator: torch.Generator) -> Tensor:
    return torch.randint(0, 3, (20, 1040), generator=generator).float()


def equal(generator: torch.Generator) -> Tensor:
    return torch.full((20, 1040), -1.5)


def in_one_group(generator: torch.Generator) -> Tensor:
    rows = torch.randn(20, 1040, generator=generator)
    rows[:, 7::65] += 100  # columns at a distance of the number of groups
    return rows


def with_infinities(generator: torch.Generator) -> Tensor:
    rows = torch.randn(20, 1040, generator=generator)
    rows[torch.rand(rows.shape, generator=generator) < 0.02] = torch.inf
    rows[10:, 20:] = -torch.inf
    return rows


def at_the_end(generator: torch.Generator) -> Tensor:
    return torch.cat([torch.randn(20, 1030, generator=generator), torch.ones(20, 10) * 50], dim=1)[:, 3:]


@pytest.mark.parametrize("rows", [spread, tied, equal, in_one_group, with_infinities, at_the_end])
@pytest.mark.parametrize("k", [1, 7, 16, 17])
def test_the_largest_are_found_by_groups(rows: Callable[[torch.Generator], Tensor], k: int) -> None:
    pre = rows(torch.Generator().manual_seed(k))
    values, columns = largest(pre, k)
    assert torch.equal(values.sort(dim=1, descending=True).values, pre.topk(k, dim=1).values)
    assert torch.equal(pre.gather(1, columns), values)
    assert (columns.sort(dim=1).values.diff() > 0).all()


def test_the_largest_hide_no_nan() -> None:
    pre = torch.randn(6, 1040, generator=torch.Generator().manual_seed(0))
    pre[2, 1001] = torch.nan
    values, _ = largest(pre, 8)
    assert values.isnan().sum(dim=1).tolist() == [0, 0, 1, 0, 0, 0]


def test_an_unknown_backend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSIGHT_KERNELS", "metal")
    with pytest.raises(SparsightError, match=r"SPARSIGHT_KERNELS=metal: no such backend; use one of reference, cpu, "):
        autoencode(*tensors(2, 4, 8), 2)


def screened(x: Tensor, W_DF: Tensor, b: Tensor | None, k: int) -> tuple[Tensor, Tensor, int]:
    """Screened selection, and how many rows it left to the dense product."""
    redone: list[int] = []

    def whole(x_BD: Tensor, W_DF: Tensor, b_F: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
        redone.append(len(x_BD))
        return dense.select(x_BD, W_DF, b_F, k, 64)

    with torch.no_grad():
        values, indices = screening.select(x, W_DF, b, k, cpu.dots, whole)
    return values, indices, sum(redone)


def assert_true_top(x: Tensor, W_DF: Tensor, b: Tensor | None, values: Tensor, indices: Tensor) -> None:
    """The chosen latents are the k largest in float64; only latents within fp32 rounding may change places."""
    pre = x.double() @ W_DF.double() + (0 if b is None else b.double())
    magnitude = x.double().abs() @ W_DF.double().abs() + (0 if b is None else b.double().abs())
    error = 4 * 2**-24 * len(W_DF) ** 0.5 * magnitude.amax(1, keepdim=True)
    assert (indices.sort(1).values.diff() > 0).all()
    chosen = pre.gather(1, indices)
    assert ((values - chosen).abs() <= error).all()
    others = pre.scatter(1, indices, -torch.inf).amax(1, keepdim=True)
    assert (chosen >= others - error).all()


Problem = Callable[[torch.Generator], tuple[Tensor, Tensor, Tensor | None]]


def gaussian(
    generator: torch.Generator, n: int = 64, d_in: int = 64, d_sae: int = 1040
) -> tuple[Tensor, Tensor, Tensor]:
    x, W = torch.randn(n, d_in, generator=generator), torch.randn(d_sae, d_in, generator=generator)
    return x, (W / W.norm(dim=1, keepdim=True)).T, 0.1 * torch.randn(d_sae, generator=generator)


def duplicated(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    x, W, b = gaussian(generator)
    return x, W[:, torch.arange(1040) % 130], b[torch.arange(1040) % 130]


def nearly_equal(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    x, W, b = gaussian(generator)
    return x, W[:, :1] + 1e-6 * W, b * 1e-6


def large_biases(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    x, W, b = gaussian(generator)
    return x, W, 1000 + 1000 * b


def badly_scaled(generator: torch.Generator) -> tuple[Tensor, Tensor, None]:
    x, W, _ = gaussian(generator)
    scales = torch.logspace(-38, 18, len(x))
    return x * scales.unsqueeze(1), W, None


def one_heavy_latent(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    x, W, b = gaussian(generator)
    W = W.clone()
    W[:, 5] *= 1e6
    return x, W, b


def heavy_dimension(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    x, W, b = gaussian(generator)
    x[:, 3] += 300
    return x, W, b


def negative(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    x, W, b = gaussian(generator)
    return x, W, b - 100


def zeros(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    x, W, b = gaussian(generator)
    return x * 0, W, b * 0


def wide(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    return gaussian(generator, n=300, d_in=1152, d_sae=2048)


PROBLEMS: tuple[Problem, ...] = (
    gaussian, duplicated, nearly_equal, large_biases, badly_scaled, one_heavy_latent, heavy_dimension, negative,
    zeros, wide,
)  # fmt: skip


@pytest.mark.parametrize("problem", PROBLEMS)
def test_screening_selects_the_true_top_k(problem: Problem) -> None:
    x, W, b = problem(torch.Generator().manual_seed(0))
    values, indices, _ = screened(x, W, b, 16)
    assert_true_top(x, W, b, values, indices)


def test_screening_settles_nearly_all_rows_of_ordinary_data() -> None:
    x, W, b = gaussian(torch.Generator().manual_seed(0), n=512, d_in=256, d_sae=2048)
    values, _, redone = screened(x, W, b, 16)
    assert redone < 16
    plain, _ = dense.select(x, W, b, 16, 512)
    torch.testing.assert_close(values.sort(1).values, plain.sort(1).values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("problem", [duplicated, nearly_equal, zeros, negative])
def test_ties_and_doubtful_rows_are_the_dense_product_s(problem: Problem) -> None:
    x, W, b = problem(torch.Generator().manual_seed(0))
    values, indices, redone = screened(x, W, b, 13)  # 13 cuts through a group of 8 equal latents
    assert redone == len(x)
    plain, expected = dense.select(x, W, b, 13, 64)
    assert torch.equal(values, plain)
    assert torch.equal(indices, expected)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1), n=st.integers(1, 40), d_in=st.integers(1, 80), extra=st.integers(0, 40),
    k=st.integers(1, 6), levels=st.sampled_from([0, 3, 50]), shift=st.sampled_from([0.0, 1.0, 30.0]),
)  # fmt: skip
def test_screening_selects_the_true_top_k_of_anything(
    seed: int, n: int, d_in: int, extra: int, k: int, levels: int, shift: float
) -> None:
    x, W, b = gaussian(torch.Generator().manual_seed(seed), n, d_in, 64 * k + extra)
    if levels:  # few levels make many exact ties
        x, W, b = (torch.round(t * levels) / levels for t in (x, W, b))
    values, indices, _ = screened(x + shift, W, b, k)
    assert_true_top(x + shift, W, b, values, indices)


def test_screening_hides_no_nan() -> None:
    x, W, b = gaussian(torch.Generator().manual_seed(0))
    x[3, 2] = torch.nan
    values, _, _ = screened(x, W, b, 8)
    assert values[3].isnan().all()
    assert not values[:3].isnan().any()


def test_the_backend_follows_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPARSIGHT_KERNELS", raising=False)
    found: list[str] = []
    monkeypatch.setattr(kernels, "import_module", found.append)
    for device in ("cpu", "meta"):
        kernels._backend(torch.empty(1, device=device))
    assert found == ["sparsight.kernels.cpu", "sparsight.kernels.reference"]
