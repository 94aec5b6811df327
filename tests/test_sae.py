"""Training of SAEs: the published formula, the Trainer's step, its state, sites, PASS, mistakes."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import train_sae
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from sparsight import sae
from sparsight.common.errors import SparsightError
from sparsight.sae import SAE, DenseCodes, SparseCodes, Trainer
from sparsight.sae.class_means import ClassMeans

D, F, K = 12, 40, 5


def activations(n: int = 64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, D, generator=generator) @ torch.randn(D, D, generator=generator) + 3


def trained(kind: str, steps: int = 30) -> SAE:
    return train_sae(sae.create(kind, D, F, K, seed=1), lambda step: activations(seed=step), steps)


def same(a: SAE, b: SAE) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_the_variants_are_listed() -> None:
    assert sae.names() == ["archetypal", "batchtopk", "gated", "jumprelu", "matryoshka", "relu", "switch", "topk"]


def test_topk_equals_the_published_formula_in_numpy() -> None:
    one, x = trained("topk"), activations().numpy()
    W_enc, b_enc, W_dec, b_dec = (p.detach().numpy() for p in (one.W_enc, one.b_enc, one.W_dec, one.b_dec))
    pre = np.maximum((x - b_dec) @ W_enc + b_enc, 0)
    z = np.where(pre >= np.sort(pre, axis=1)[:, [-K]], pre, 0)
    codes = one.encode(x)
    np.testing.assert_allclose(codes.dense().detach().numpy(), z, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(one.decode(codes).detach().numpy(), z @ W_dec + b_dec, rtol=1e-4, atol=1e-5)


def test_topk_gradients_equal_finite_differences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSIGHT_KERNELS", "reference")
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


@pytest.mark.parametrize("kind", ["topk", "switch"])
def test_a_step_equals_plain_adam_with_clipping(kind: str) -> None:
    """Written plainly: project the gradient, clip to norm 1, Adam, unit rows."""
    one, plain = sae.create(kind, D, F, K, seed=1), sae.create(kind, D, F, K, seed=1)
    trainer = Trainer([one], lr=3e-3)
    adam = torch.optim.Adam(plain.parameters(), lr=3e-3, eps=6.25e-10)
    norms = []
    for step in range(10):
        x = (3, 1)[step % 2] * activations(seed=step)
        trainer.step(x)
        if step == 0:
            plain.start(float((x.double() - x.double().mean(dim=0)).square().sum() / len(x)))
        adam.zero_grad()
        plain.loss(x).total.backward()
        with torch.no_grad():
            assert plain.W_dec.grad is not None
            plain.W_dec.grad -= (plain.W_dec.grad * plain.W_dec).sum(dim=1, keepdim=True) * plain.W_dec
            norms.append(float(torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)))
            adam.step()
            plain.W_dec.div_(plain.W_dec.norm(dim=1, keepdim=True))
    assert min(norms) < 1 < max(norms), "clipping must happen, but not always"
    for (name, a), b in zip(one.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=name)


class _Shapes(TorchDispatchMode):
    """Records the shapes of every dense array made."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.layout == torch.strided:
            self.seen.add(tuple(out.shape))
        return out


@pytest.mark.parametrize("kind", ["topk", "switch"])
def test_no_dense_codes_are_made_behind_the_encoder(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSIGHT_KERNELS", "cpu")
    one, x = sae.create(kind, D, F, 2), activations(64)
    with _Shapes() as forward:
        out = one.loss(x)
    with _Shapes() as backward:
        out.total.backward()
    assert (64, F) not in backward.seen and (F, 64) not in backward.seen
    assert (64, D) in backward.seen and (F, D) in backward.seen
    if kind == "switch":
        assert (64, F) not in forward.seen, "no product over all experts"


def test_switch_computes_the_routed_expert_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiply-adds of all matrix products of a step: one expert's encoder, the router, the active latents."""
    monkeypatch.setenv("SPARSIGHT_KERNELS", "cpu")
    rows, d_sae, experts = 256, 1024, 16
    one = sae.create("switch", D, d_sae, 2, experts=experts)
    with FlopCounterMode(display=False) as counter:
        one.loss(activations(rows)).total.backward()
    everything, active = 2 * rows * D * d_sae, 2 * rows * D * 2
    encoder, router = everything // experts, 2 * rows * D * experts
    counted = counter.get_total_flops()
    assert encoder + router <= counted <= encoder + 3 * router + 8 * active < everything / 4


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


def test_a_grid_gives_each_sae_the_bytes_it_gets_alone() -> None:
    kinds = sae.names()
    grid = [sae.create(kind, D, F, K, seed=3) for kind in kinds]
    together = Trainer(grid, dead_after=100)
    for step in range(8):
        together.step(activations(seed=step))
    for kind, one in zip(kinds, grid, strict=True):
        alone = sae.create(kind, D, F, K, seed=3)
        trainer = Trainer([alone], dead_after=100)
        for step in range(8):
            trainer.step(activations(seed=step))
        assert same(alone, one), kind


@pytest.mark.parametrize("labelled", [False, True])
def test_a_restored_trainer_goes_on_to_the_same_bytes(labelled: bool) -> None:
    def step(trainer: Trainer, number: int) -> None:
        trainer.schedule(1 / (1 + number))
        labels = torch.arange(64) % (3 + number // 4) if labelled else None
        trainer.step(activations(seed=number), labels)

    straight, first, second = ([sae.create(kind, D, F, K, seed=3) for kind in sae.names()] for _ in range(3))
    whole, before, after = (Trainer(saes, dead_after=100) for saes in (straight, first, second))
    for number in range(9):
        step(whole, number)
    for number in range(5):
        step(before, number)
    state = {name: tensor.clone() for name, tensor in before.state().items()}
    assert all(tensor.is_contiguous() for tensor in state.values()), "safetensors writes no strides"
    after.restore(state)
    for number in range(5, 9):
        step(after, number)
    for one, other in zip(straight, second, strict=True):
        assert same(one, other), one.kind
    for name, tensor in whole.state().items():
        assert torch.equal(tensor, after.state()[name]), name


def test_learning_rate_follows_the_width_unless_given() -> None:
    saes = [sae.create("topk", D, d_sae, K) for d_sae in (16, 64)]
    trainer = Trainer(saes)
    assert trainer.lrs == [2e-4 * math.sqrt(2**14 / 16), 2e-4 * math.sqrt(2**14 / 64)]
    trainer.schedule(0.5)
    assert trainer.adams[0].lr == 0.5 * trainer.lrs[0]
    assert Trainer(saes, lr=1e-3).lrs == [1e-3, 1e-3]


def test_training_normalises_by_the_first_batch_unless_told_before() -> None:
    x = activations()
    one, told = sae.create("topk", D, F, K), sae.create("topk", D, F, K)
    told.start(4.0)
    for trainer in (Trainer([one], lr=1e-3), Trainer([told], lr=1e-3)):
        trainer.step(x)
        trainer.step(7 * x)
    assert one.loss_scale == pytest.approx(1 / float(x.double().var(dim=0, unbiased=False).sum()))
    assert told.loss_scale == 0.25


def test_each_sae_of_several_sites_sees_its_own() -> None:
    sites = {"blocks.1.input": activations(seed=1), "blocks.2.input": activations(seed=2)}
    saes = [sae.create("topk", D, F, K, seed=s) for s in (0, 1)]
    saes[0].about["site"], saes[1].about["site"] = "blocks.2.input", "blocks.1.input"
    losses = Trainer(saes, lr=1e-3).step(sites)
    for one, loss, site in zip(saes, losses, ("blocks.2.input", "blocks.1.input"), strict=True):
        fresh = sae.create("topk", D, F, K, seed=saes.index(one))
        assert torch.equal(loss.x_hat, fresh(sites[site]))
    named = Trainer(saes, lr=1e-3, sites=["blocks.1.input"] * 2).step(sites)
    assert not torch.equal(named[0].x_hat, losses[0].x_hat)
    (only,) = Trainer([sae.create("topk", D, F, K)], lr=1e-3).step({"any": sites["blocks.1.input"]})
    assert torch.isfinite(only.total)


def test_pass_pulls_the_codes_of_a_class_together() -> None:
    """Two classes, each a cloud: the larger the term's weight, the closer the codes to their class's mean."""
    centres, y = activations(2, seed=9), torch.arange(256) % 2

    def spread(weight: float) -> float:
        one = sae.create("topk", D, F, K, seed=1)
        trainer = Trainer([one], lr=3e-3, prototype_weight=weight)
        for step in range(150):
            trainer.step({"site": centres[y] + 0.3 * activations(256, seed=step)}, labels=y)
        z = one.encode(x).dense().detach()
        within = torch.stack([z[y == c].var(dim=0).sum() for c in (0, 1)]).mean()
        return float(within / (z[y == 0].mean(dim=0) - z[y == 1].mean(dim=0)).square().sum())

    x = centres[y] + 0.3 * activations(256, seed=1000)
    assert spread(0.0) > spread(0.8) > spread(5.0)


def test_pass_term_and_means_equal_their_definition() -> None:
    one, x, y = trained("topk"), activations(), torch.arange(64) % 3
    codes = one.encode(x)
    assert isinstance(codes, SparseCodes)
    prototypes = ClassMeans(F, torch.device("cpu"))
    prototypes.grow(3)
    assert float(prototypes.term(codes, y).detach()) == 0, "no class has a mean yet"
    prototypes.learn(codes, y)
    z = codes.dense().detach()
    means = torch.stack([z[y == c].mean(dim=0) for c in range(3)])
    torch.testing.assert_close(prototypes.means_CF, means)
    prototypes.grow(4)
    other = torch.arange(64) % 4  # class 3 has no mean
    expected = (z - means[other.clamp(max=2)]).square().sum(dim=1)[other < 3].sum() / 64
    torch.testing.assert_close(prototypes.term(codes, other), expected)
    torch.testing.assert_close(prototypes.term(DenseCodes(z), other), expected)
    half = one.encode(0.5 * x)
    prototypes.learn(half, torch.zeros(64, dtype=torch.int64))
    torch.testing.assert_close(prototypes.means_CF[0], 0.9 * means[0] + 0.1 * half.dense().mean(dim=0))
    torch.testing.assert_close(prototypes.means_CF[1], means[1])


def test_geometric_median_ignores_outliers_and_centres_the_sae() -> None:
    x = activations(1001)
    x[::10] += 1e4
    median = sae.geometric_median(x)
    gradient = ((x - median) / (x - median).norm(dim=1, keepdim=True)).sum(dim=0)
    assert gradient.norm() < 1e-2, "the unit vectors to the rows balance at the geometric median"
    assert median.norm() < 20 < x.mean(dim=0).norm()
    assert torch.equal(sae.geometric_median(x.numpy()), median), "rows of a store are numpy arrays"
    one = sae.create("switch", D, F, K)
    one.set_center(median)
    assert torch.equal(one.b_dec, median) and torch.equal(one.b_router, median)  # type: ignore[arg-type]


def _step(x: object, labels: object = None, **options: object) -> Callable[[], object]:
    return lambda: Trainer([sae.create("topk", D, F, K)], lr=1e-3, **options).step(x, labels)  # type: ignore[arg-type]


def _diverge() -> None:
    one = sae.create("topk", D, F, K)
    one.about["name"] = "topk-s1"
    one.start(1e-40)
    Trainer([one], lr=1e-3).step(1e20 * activations())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sae.create("tpok", 4, 8, 2), "there is no SAE 'tpok'; known: archetypal, batchtopk, .*, topk$"),
        (lambda: sae.load("no/such/sae"), "no SAE here"),
        (lambda: sae.create("switch", D, 40, 5, experts=3), "experts: 3 must divide d_sae = 40"),
        (lambda: sae.create("switch", D, 40, 5, experts=10), "leave each at least k = 5"),
        (lambda: sae.create("matryoshka", D, 40, 5, prefixes=(0.5, 0.25, 1)), "shares of d_sae rising to 1"),
        (lambda: sae.create("matryoshka", D, 40, 5, prefixes=(0.5,)), "shares of d_sae rising to 1"),
        (_step(activations(), sites=["a", "b"]), "2 sites for 1 SAEs"),
        (_step({"a": activations()}, sites=["b"]), "trains on site 'b', the step has a;"),
        (_step({"a": activations(), "b": activations()}), "trains on site None, the step has a, b;"),
        (_step(activations(), labels=torch.arange(3)), r"expected 64 class numbers from 0, got \(3,\)"),
        (_step(activations(), labels=torch.arange(64) - 1), "expected 64 class numbers from 0"),
        (_diverge, r"SAE 'topk-s1' \(topk\): loss inf"),
    ],
)
def test_mistakes_are_explained(call: Callable[[], object], message: str) -> None:
    with pytest.raises(SparsightError, match=message):
        call()
