"""Every registered SAE variant, against the dense arithmetic and against its own contract."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from torch import Tensor

from sparsight import sae
from sparsight.errors import SparsightError
from sparsight.sae import SAE, Trainer

D, F, K = 12, 40, 5
every_variant = pytest.mark.parametrize("kind", sae.names())


def activations(n: int = 64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, D, generator=generator) @ torch.randn(D, D, generator=generator) + 3


def trained(kind: str, steps: int = 30) -> SAE:
    one = sae.create(kind, D, F, K, seed=1)
    trainer = Trainer([one], lr=3e-3)
    for step in range(steps):
        trainer.step(activations(seed=step))
    return one


def test_the_variants_are_listed() -> None:
    assert sae.names() == ["topk"]


def test_topk_equals_the_published_formula_in_numpy() -> None:
    one, x = trained("topk"), activations().numpy()
    W_enc, b_enc, W_dec, b_dec = (p.detach().numpy() for p in (one.W_enc, one.b_enc, one.W_dec, one.b_dec))
    pre = np.maximum((x - b_dec) @ W_enc + b_enc, 0)
    z = np.where(pre >= np.sort(pre, axis=1)[:, [-K]], pre, 0)
    codes = one.encode(x)
    np.testing.assert_allclose(codes.dense().detach().numpy(), z, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(one.decode(codes).detach().numpy(), z @ W_dec + b_dec, rtol=1e-4, atol=1e-5)
    assert codes.values.shape == codes.indices.shape == (64, K)


def test_topk_gradients_equal_finite_differences() -> None:
    one, x = trained("topk").double(), activations(16).double()
    one.zero_grad()
    one.loss(x).total.backward()
    generator = torch.Generator().manual_seed(0)
    for name, parameter in one.named_parameters():
        assert parameter.grad is not None
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        direction /= direction.norm()
        slope = float((parameter.grad * direction).sum())
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                parameter.add_(direction, alpha=sign * 1e-6)
                values.append(float(one.loss(x).total))
                parameter.sub_(direction, alpha=sign * 1e-6)
        assert slope == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4), name


@every_variant
def test_codes_are_sparse_and_not_negative(kind: str) -> None:
    codes = trained(kind).encode(activations())
    assert codes.dense().shape == (64, F)
    assert (codes.l0() <= K).all() and (codes.dense() >= 0).all()
    assert torch.equal(codes.l0(), (codes.dense() > 0).sum(dim=1))


@every_variant
def test_reconstruction_loss_has_no_normaliser_before_training(kind: str) -> None:
    one, x = sae.create(kind, D, F, K), activations()
    out = one.loss(x)
    expected = (x - one(x)).square().sum(dim=1).mean()
    torch.testing.assert_close(out.reconstruction, expected)
    assert torch.equal(out.total, out.reconstruction) and float(out.aux.detach()) == 0, "nothing is dead yet"


@every_variant
def test_training_keeps_unit_rows_improves_the_loss_and_repeats_to_the_bit(kind: str) -> None:
    one, again = trained(kind), trained(kind)
    torch.testing.assert_close(one.W_dec.norm(dim=1), torch.ones(F))
    assert (
        one.loss(activations()).reconstruction
        < 0.5 * sae.create(kind, D, F, K, seed=1).loss(activations()).reconstruction
    )
    for a, b in zip(one.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


@every_variant
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
    arrays = load_file(tmp_path / "sae" / "sae.safetensors")
    assert {n: arrays[n].shape for n in ("W_enc", "b_enc", "W_dec", "b_dec")} == {
        "W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,),
    }  # fmt: skip


@every_variant
def test_folded_scale_gives_the_sae_of_the_raw_activations(kind: str) -> None:
    one, x = trained(kind), activations()
    scaled_codes, scaled_x_hat = one.encode(x).dense(), one(x)
    one.fold_scale(7.5)
    torch.testing.assert_close(one.encode(7.5 * x).dense(), 7.5 * scaled_codes, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(one(7.5 * x), 7.5 * scaled_x_hat, rtol=1e-4, atol=1e-4)


@every_variant
def test_numpy_and_torch_inputs_agree(kind: str) -> None:
    one, x = trained(kind), activations()
    assert torch.equal(one(x.numpy().astype(np.float16)), one(x.half()))


@every_variant
def test_auxk_trains_dead_latents_only_and_the_encoder_too(kind: str) -> None:
    """Against the definition: dead latents model the detached residual, error relative to its variance."""
    one, x = trained(kind), activations()
    one.dead[[3, 8, 9, 20]] = True
    one.aux_k = 2
    out = one.loss(x)
    pre = one.preactivations(x)[:, [3, 8, 9, 20]]
    top = pre.topk(2, dim=1)
    e = (x - out.x_hat).detach()
    e_hat = torch.einsum("bk,bkd->bd", top.values.relu(), one.W_dec[torch.tensor([3, 8, 9, 20])][top.indices])
    expected = (e_hat - e).square().sum() / (e - e.mean(dim=0)).square().sum()
    torch.testing.assert_close(out.aux, expected)
    torch.testing.assert_close(out.total, out.reconstruction + one.aux_coefficient * out.aux)
    (gradient,) = torch.autograd.grad(out.aux, one.W_enc)
    touched = gradient.abs().sum(dim=0) > 0
    assert touched.any() and not touched[~one.dead].any()


def test_dead_counters_count_activations_since_a_latent_fired() -> None:
    one = sae.create("topk", D, F, 1)
    with torch.no_grad():
        one.b_enc[0] = 1e6  # latent 0 always wins
    trainer = Trainer([one], lr=0.0, dead_after=100)
    trainer.step(activations(64))
    assert not one.dead.any()
    trainer.step(activations(64))
    assert one.dead.sum() == F - 1 and not one.dead[0]
    assert trainer.since_fired[0][0] == 0 and trainer.since_fired[0][1] == 128


def test_several_saes_in_one_trainer_equal_one_by_one() -> None:
    pair = [sae.create("topk", D, F, K, seed=s) for s in (0, 1)]
    together = Trainer(pair, lr=1e-3)
    for step in range(5):
        together.step(activations(seed=step))
    for seed, one in enumerate(pair):
        alone = sae.create("topk", D, F, K, seed=seed)
        trainer = Trainer([alone], lr=1e-3)
        for step in range(5):
            trainer.step(activations(seed=step))
        assert torch.equal(alone.W_enc, one.W_enc) and torch.equal(alone.W_dec, one.W_dec)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sae.create("topk", 4, 8, 9), "k = 9; needs 1 <= k <= d_sae"),
        (lambda: sae.create("tpok", 4, 8, 2), "there is no SAE 'tpok'; known: topk"),
        (lambda: sae.create("topk", D, F, K).encode(torch.zeros(3, D + 1)), r"expected .*\(batch, 12\), got \(3, 13\)"),
        (lambda: sae.load("no/such/sae"), "no SAE here"),
    ],
)
def test_mistakes_are_explained(call: Callable[[], object], message: str) -> None:
    with pytest.raises(SparsightError, match=message):
        call()
