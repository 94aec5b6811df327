"""The contract of every SAE variant, found by itself, against plain dense float64 arithmetic.

Shapes: B batch, D width (d_in), F latents (d_sae), K active latents (k).
"""

import dataclasses
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import plain
import pytest
import torch
from conftest import train_sae
from safetensors.numpy import load_file
from torch import Tensor

from sparsight import kernels, sae
from sparsight.common.errors import SparsightError
from sparsight.sae import SAE, DenseCodes, SparseCodes, Trainer

B, D, F, K = 64, 12, 40, 5
FIXED_K = ("topk", "switch", "archetypal")
UNIT_ROWS = [kind for kind in sae.names() if kind != "archetypal"]
every_variant = pytest.mark.parametrize("kind", sae.names())


class Case(NamedTuple):
    """Sizes, and what is added to the biases that decide which latents are active."""

    rows: int = B
    d_in: int = D
    d_sae: int = F
    k: int = K
    bias: float = 0.0


CASES = {
    "plain": Case(),
    "nothing is positive": Case(bias=-1e4),
    "k = d_sae": Case(d_sae=16, k=16),
    "one row": Case(rows=1),
    "d_in 1152": Case(rows=8, d_in=1152, d_sae=72, k=8),
    "d_sae not a multiple of 8": Case(d_sae=51),
}


def activations(rows: int = B, d_in: int = D, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, d_in, generator=generator) @ torch.randn(d_in, d_in, generator=generator) / math.sqrt(d_in)
        + 1
    )


def perturbed(kind: str, case: Case = CASES["plain"], seed: int = 1) -> SAE:
    """An SAE in training none of whose parameters is at its initial value, some of whose latents are dead."""
    one = sae.create(kind, case.d_in, case.d_sae, case.k, seed)
    one.start(10.0)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in one.named_parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            if name in ("b_enc", "b_gate", "b_mag"):
                parameter.add_(case.bias)
        one.constrain()
        one.dead[::3] = True
    return one


def trained(kind: str, steps: int = 30) -> SAE:
    return train_sae(sae.create(kind, D, F, K, seed=1), lambda step: activations(seed=step), steps)


def setting(one: SAE) -> plain.Setting:
    points: Tensor | None = getattr(one, "points", None)
    return plain.Setting(one.kind, one.d_sae, one.k, one.aux_k, one.loss_scale, one.dead, points=points)


def parameters(one: SAE, dtype: torch.dtype = torch.float32) -> plain.Parameters:
    return {name: value.detach().to(dtype).requires_grad_() for name, value in one.named_parameters()}


@pytest.fixture(params=kernels.BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "triton" and not torch.cuda.is_available():
        pytest.skip("no CUDA device; tests of the kernels run triton through its interpreter")
    monkeypatch.setenv("SPARSIGHT_KERNELS", request.param)
    return str(request.param)


def test_every_variant_has_a_reference() -> None:
    assert sorted(plain.FORMULAS) == sae.names(), "write the new variant's plain arithmetic in tests/plain.py"


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@every_variant
def test_values_and_gradients_equal_the_dense_float64_reference(kind: str, case: Case, backend: str) -> None:
    one, x = perturbed(kind, case), activations(case.rows, case.d_in)
    one.aux_k = case.d_sae
    out = one.loss(x)
    out.total.backward()
    p = parameters(one, torch.float64)
    z, x_hat, total = plain.loss(setting(one), p, x.double(), out.codes.dense().detach() > 0)
    total.backward()
    for value, exact in ((out.codes.dense(), z), (out.x_hat, x_hat), (out.total, total)):
        assert (value - exact).norm() <= 1e-5 * exact.norm()
    for name, parameter in one.named_parameters():
        expected = p[name].grad
        if expected is None or not expected.any():
            assert parameter.grad is None or not parameter.grad.any(), name
        else:
            assert parameter.grad is not None, name
            assert (parameter.grad - expected).norm() < 1e-5 * expected.norm(), name
    if case.bias < 0 and kind != "switch":
        assert out.codes.l0().sum() == 0 and torch.equal(out.x_hat, one.b_dec.expand_as(x))


@pytest.mark.parametrize("kind", plain.WITH_AUXK)
def test_the_right_latents_are_chosen(kind: str, backend: str) -> None:
    """The reference above reuses the chosen latents; here nothing left out may exceed what was kept."""
    one, x = perturbed(kind), activations()
    codes, _ = one.training_codes(x)
    everything, chosen = plain.everything(setting(one), parameters(one), x), codes.dense() > 0
    left = everything.masked_fill(chosen, 0)
    kept = torch.where(chosen, everything, torch.inf)
    if kind in FIXED_K:
        assert (left.amax(dim=1) <= kept.amin(dim=1) + 1e-6).all()
        assert torch.equal(codes.l0(), (everything > 0).sum(dim=1).clamp(max=K))
    else:
        assert left.max() <= kept.min() + 1e-6
        assert codes.l0().sum() == min(B * K, int((everything > 0).sum()))


@every_variant
def test_codes_are_sparse_and_not_negative(kind: str) -> None:
    one, x = trained(kind), activations()
    codes = one.encode(x)
    assert codes.dense().shape == (B, F) and (codes.dense() >= 0).all()
    assert torch.equal(codes.l0(), (codes.dense() > 0).sum(dim=1))
    assert torch.equal(codes.fired(), (codes.dense() > 0).any(dim=0))
    if kind in FIXED_K:
        assert isinstance(codes, SparseCodes) and codes.values.shape == codes.indices.shape == (B, K)
        assert (codes.l0() <= K).all()


@every_variant
def test_decoding_is_affine(kind: str) -> None:
    one, x = perturbed(kind), activations()
    codes = one.encode(x)
    name = "z_BF" if isinstance(codes, DenseCodes) else "values"
    tripled = dataclasses.replace(codes, **{name: 3 * getattr(codes, name)})  # type: ignore[type-var]
    torch.testing.assert_close(one.decode(tripled) - one.b_dec, 3 * (one.decode(codes) - one.b_dec))
    torch.testing.assert_close(one.decode(codes), codes.dense() @ one.W_dec + one.b_dec)


@every_variant
def test_reconstruction_loss_has_no_normaliser_before_training(kind: str) -> None:
    one, x = sae.create(kind, D, F, K), activations()
    out = one.loss(x)
    torch.testing.assert_close(out.reconstruction, (x - one(x)).square().sum(dim=1).mean())
    torch.testing.assert_close(out.total, out.reconstruction + out.penalty)
    assert float(out.aux.detach()) == 0, "nothing is dead yet"


@every_variant
def test_training_keeps_unit_rows_improves_the_loss_and_repeats_to_the_bit(kind: str, backend: str) -> None:
    one, again, fresh = trained(kind), trained(kind), sae.create(kind, D, F, K, seed=1)
    if kind in UNIT_ROWS:
        torch.testing.assert_close(one.W_dec.norm(dim=1), torch.ones(F))
    one.loss_scale = 1.0
    assert one.loss(activations()).reconstruction < 0.8 * fresh.loss(activations()).reconstruction
    for a, b in zip(one.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", UNIT_ROWS)
def test_decoder_gradient_does_not_point_along_its_rows(kind: str) -> None:
    one = trained(kind)
    one.zero_grad()
    one.loss(activations()).total.backward()
    one.remove_parallel_gradient()
    assert one.W_dec.grad is not None and one.W_dec.grad.abs().max() > 0
    assert (one.W_dec.grad * one.W_dec).sum(dim=1).abs().max() < 1e-5 * one.W_dec.grad.norm()


@every_variant
def test_save_and_load_give_the_same_bits_readable_without_us(kind: str, tmp_path: Path) -> None:
    one = trained(kind)
    one.save(tmp_path / "sae", site="blocks.1.input")
    loaded = sae.load(tmp_path / "sae")
    assert loaded.about["site"] == "blocks.1.input" and loaded.kind == kind
    assert torch.equal(loaded(activations()), one(activations()))
    assert torch.equal(loaded.loss(activations()).x_hat, one.loss(activations()).x_hat)
    arrays = load_file(tmp_path / "sae" / "sae.safetensors")
    shapes = {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,)}
    assert {n: a.shape for n, a in arrays.items() if n in shapes} == {n: s for n, s in shapes.items() if n in arrays}
    loaded.save(tmp_path / "again", **loaded.about)
    for file in ("sae.safetensors", "config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "sae" / file).read_bytes()


@every_variant
def test_folded_scale_gives_the_sae_of_the_raw_activations(kind: str) -> None:
    one, x = perturbed(kind), activations()
    for seed in (1, 2):
        one.learn(one.training_codes(activations(seed=seed))[0])  # batchtopk then has a threshold
    scaled_codes, scaled_x_hat = one.encode(x).dense(), one(x)
    one.fold_scale(7.5)
    torch.testing.assert_close(one.encode(7.5 * x).dense(), 7.5 * scaled_codes, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(one(7.5 * x), 7.5 * scaled_x_hat, rtol=1e-4, atol=1e-4)


@every_variant
def test_the_loss_is_relative_to_the_variance(kind: str) -> None:
    """Training on x and on 7.5 x is the same problem, so one setting of weights serves every site."""
    one, x = perturbed(kind), activations()
    before = one.loss(x)
    one.fold_scale(7.5)
    one.loss_scale /= 7.5**2
    after = one.loss(7.5 * x)
    for name in ("total", "reconstruction", "aux", "penalty"):
        torch.testing.assert_close(getattr(after, name), getattr(before, name), rtol=1e-4, atol=1e-4)


@every_variant
def test_numpy_and_torch_inputs_agree(kind: str) -> None:
    one, x = trained(kind), activations()
    assert torch.equal(one(x.numpy().astype(np.float16)), one(x.half()))


@every_variant
def test_a_row_is_encoded_alike_alone_and_in_a_batch(kind: str) -> None:
    one, x = trained(kind), activations()
    torch.testing.assert_close(one.encode(x[:1]).dense(), one.encode(x).dense()[:1])


@every_variant
def test_auxk_reaches_the_encoder_of_dead_latents_only(kind: str) -> None:
    one, x = perturbed(kind), activations()
    out = one.loss(x)
    if not one.has_auxk:
        assert float(out.aux.detach()) == 0
        return
    decoder = one.get_parameter("W_dec" if kind in UNIT_ROWS else "deviation")
    gradient_enc, gradient_dec = torch.autograd.grad(out.aux, [one.W_enc, decoder])
    for touched in (gradient_enc.abs().sum(dim=0) > 0, gradient_dec.abs().sum(dim=1) > 0):
        assert touched.any() and not touched[~one.dead].any()


@pytest.mark.parametrize("aux_k", [2, F])  # some of the dead latents, all of them
@pytest.mark.parametrize("kind", ["topk", "switch"])
def test_auxk_takes_the_largest_dead_latents(kind: str, aux_k: int) -> None:
    """Against the definition: the top aux_k dead latents model the detached residual, error over its variance."""
    one, x = perturbed(kind), activations()
    one.aux_k = aux_k
    assert 2 < one.dead.sum() < F
    out = one.loss(x)
    p = parameters(one)
    pre = plain.everything(setting(one), p, x)
    top = pre.masked_fill(~one.dead, -torch.inf).topk(aux_k, dim=1)
    e = (x - out.x_hat).detach()
    e_hat = torch.einsum("bk,bkd->bd", top.values.relu(), p["W_dec"][top.indices])
    expected = (e_hat - e).square().sum() / (e - e.mean(dim=0)).square().sum()
    torch.testing.assert_close(out.aux, expected)
    torch.testing.assert_close(out.total, out.reconstruction + out.aux / 32 + out.penalty)
    ours = torch.autograd.grad(out.aux, [one.W_enc, one.W_dec])
    torch.testing.assert_close(ours, torch.autograd.grad(expected, [p["W_enc"], p["W_dec"]]))


@pytest.mark.parametrize("kind", ["batchtopk", "matryoshka"])
def test_inference_threshold_is_learnt_saved_and_keeps_l0(kind: str, tmp_path: Path) -> None:
    one, x = trained(kind, steps=300), activations(4096)
    l0 = one.encode(x).l0().float().mean()
    assert 0.7 * K < l0 < 1.3 * K
    threshold = float(one.threshold)  # type: ignore[arg-type]
    dense = one.encode(x).dense()
    assert dense[dense > 0].min() > threshold > 0
    one.save(tmp_path)
    assert float(sae.load(tmp_path).threshold) == threshold  # type: ignore[arg-type]


def test_batchtopk_finds_the_largest_even_if_one_row_has_them_all() -> None:
    one, x = sae.create("batchtopk", D, F, 1), activations(32)
    x[0] *= 1e4
    codes, _ = one.training_codes(x)
    positive = int(((x[0] - one.b_dec) @ one.W_enc + one.b_enc > 0).sum())
    assert int(codes.l0()[0]) == min(positive, 32) and int(codes.l0().sum()) == 32
    assert positive > 16, "more than the candidates first taken per row"


@pytest.mark.parametrize("kind", ["relu", "gated", "jumprelu"])
def test_variants_without_fixed_k_are_steered_to_it(kind: str) -> None:
    one = trained(kind, steps=800)
    assert 0.6 * K < one.encode(activations(1024)).l0().float().mean() < 1.6 * K


@every_variant
def test_a_step_in_bf16_is_close_to_fp32(kind: str) -> None:
    losses = {}
    precisions: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
    for precision in precisions:
        one = sae.create(kind, D, F, K, seed=1)
        trainer = Trainer([one], lr=3e-3, precision=precision)
        for step in range(30):
            (loss,) = trainer.step(activations(seed=step))
        assert all(p.dtype == torch.float32 for p in one.parameters())
        losses[precision] = float(loss.reconstruction.detach())
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.1) and losses["bf16"] != losses["fp32"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: x[:, :-1], r"expected activations of shape \(batch, 12\), got \(64, 11\)"),
        (lambda x: x[0], r"expected activations of shape \(batch, 12\), got \(12,\)"),
        (lambda x: x.index_fill(0, torch.tensor([7]), torch.nan), "NaN or infinite activation in row 7"),
        (lambda x: x.index_fill(0, torch.tensor([3]), -torch.inf), "NaN or infinite activation in row 3"),
    ],
)
@every_variant
def test_bad_activations_are_refused_and_change_nothing(
    kind: str, spoil: Callable[[Tensor], Tensor], message: str
) -> None:
    one = sae.create(kind, D, F, K)
    before = {name: value.clone() for name, value in one.state_dict().items()}
    for call in (one.encode, one.loss, Trainer([one], lr=1e-3).step):
        with pytest.raises(SparsightError, match=message):
            call(spoil(activations()))
    assert all(torch.equal(value, before[name]) for name, value in one.state_dict().items()) and not one.started


@every_variant
def test_k_larger_than_d_sae_and_unknown_options_are_refused(kind: str) -> None:
    with pytest.raises(SparsightError, match=r"k = 9; needs 1 <= k <= d_sae"):
        sae.create(kind, 4, 8, 9)
    with pytest.raises(SparsightError, match=f"the SAE '{kind}' has no option 'colour'; it has aux_k"):
        sae.create(kind, 4, 8, 2, colour=3)


def test_overflowing_sums_of_finite_activations_are_not_refused() -> None:
    x = torch.full((4, D), 3e38)
    assert sae.create("topk", D, F, K).encode(x).dense().shape == (4, F)


def test_no_variant_file_is_long() -> None:
    folder = importlib.util.find_spec("sparsight.sae.variants")
    assert folder is not None and folder.submodule_search_locations is not None
    for path in (Path(folder.submodule_search_locations[0]) / f"{name}.py" for name in sae.names()):
        assert len(path.read_text().splitlines()) <= 120, path
