"""Switch SAEs without a router: the experts of a hash of each activation, fixed or drawn anew at every step.

Shapes: B batch, D width (d_in), F latents (d_sae), K active latents (k), E experts.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import train_sae
from torch import Tensor

from sparsight import sae
from sparsight.sae import SAE, SparseCodes, Trainer
from sparsight.sae.fixed_routing import PROJECTIONS, FixedRouter

B, D, F, K, E = 512, 12, 40, 5, 4
fixed = pytest.mark.parametrize("routing", ["random", "hash"])


def activations(seed: int = 0, n: int = B) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, D, generator=generator) @ torch.randn(D, D, generator=generator) + 1


def started(routing: str) -> SAE:
    one = sae.create("switch", D, F, K, seed=1, experts=E, routing=routing)
    one.set_center(activations().mean(dim=0))
    return one


def trained(routing: str) -> SAE:
    return train_sae(started(routing), lambda step: activations(step), 20)


def experts_of(codes: object) -> Tensor:
    """The expert of every row that has an active latent, (B,), and -1 for the others."""
    assert isinstance(codes, SparseCodes)
    experts = codes.indices // (F // E)
    active = codes.values > 0
    one = torch.where(active, experts, -1).amax(dim=1)
    assert (torch.where(active, experts, one.unsqueeze(1)) == one.unsqueeze(1)).all(), "a row has one expert"
    return one


def mixed(number: int) -> int:
    """MurmurHash3's finaliser, in Python's integers."""
    for factor in (0x85EBCA6B, 0xC2B2AE35):
        number = ((number ^ (number >> 16)) * factor) % 2**32
    return number ^ (number >> 16)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("redraw", [False, True])
def test_the_expert_is_the_hash_of_the_signs(training: bool, redraw: bool) -> None:
    router, x = FixedRouter(D, 7, seed=3, redraw=redraw), activations()
    router.steps.fill_(5)
    patterns = [sum(2**i for i in range(PROJECTIONS) if row[i] > 0) for row in (x @ router.planes).tolist()]
    expected = [mixed(mixed(p) + (6 if training and redraw else 0)) % 7 for p in patterns]
    routes = router(x, training)
    assert routes.argmax(dim=1).tolist() == expected and (routes.sum(dim=1) == 1).all()


@pytest.mark.parametrize("experts", [3, 4, 16])
def test_experts_get_equal_shares_of_correlated_activations(experts: int) -> None:
    x = activations(n=20_000)
    x = x - x.mean(dim=0)
    for step in range(3):
        router = FixedRouter(D, experts, seed=step, redraw=True)
        router.steps.fill_(step)
        for training in (False, True):
            share = router(x, training).mean(dim=0)
            np.testing.assert_allclose(share, 1 / experts, rtol=0.35)


def test_a_hash_is_the_same_in_training_and_at_inference_and_a_random_expert_is_not() -> None:
    x = activations()
    for routing in ("random", "hash"):
        one = trained(routing)
        at_inference, steps = experts_of(one.encode(x)), []
        for _ in range(3):
            codes, penalty = one.training_codes(x)
            steps.append(experts_of(codes))
            assert penalty is None
            one.learn(codes)
        assert torch.equal(experts_of(one.encode(x)), at_inference), "training does not move what inference does"
        for other in steps:
            agreed = float((other == at_inference).double().mean())
            assert agreed == 1 if routing == "hash" else agreed == pytest.approx(1 / E, abs=0.12)
        assert torch.equal(steps[0], steps[1]) == (routing == "hash")


@fixed
def test_codes_are_those_of_the_expert_without_a_factor(routing: str) -> None:
    one, x = trained(routing), activations()
    pre = ((x - one.b_dec) @ one.W_enc).detach()
    inside = torch.arange(F) // (F // E) == one.router(x - one.b_router, False).argmax(dim=1, keepdim=True)  # type: ignore[operator]
    best = pre.masked_fill(~inside, -torch.inf).topk(K, dim=1)
    expected = torch.zeros_like(pre).scatter(1, best.indices, best.values.relu())
    torch.testing.assert_close(one.encode(x).dense(), expected)
    assert one.macs_encode == D * (PROJECTIONS + F // E)


@fixed
def test_auxk_takes_dead_latents_of_the_expert_of_the_step(routing: str) -> None:
    one, x = started(routing), activations()
    one.dead[:] = True
    gradient = torch.autograd.grad(one.loss(x).aux, one.W_dec)[0].abs().sum(dim=1).view(E, -1).sum(dim=1)
    alone = one.router(x - one.b_router, True).argmax(dim=1)  # type: ignore[operator]
    assert (gradient > 0).all()
    (out,) = torch.autograd.grad(one.loss(x[alone == 2]).aux, one.W_dec)
    assert set(out.abs().sum(dim=1).nonzero().squeeze(1).tolist()) <= set(range(2 * F // E, 3 * F // E))


@fixed
def test_folded_scale_saving_and_loading_keep_the_experts(routing: str, tmp_path: Path) -> None:
    one, x = trained(routing), activations()
    before = one.encode(x).dense()
    one.fold_scale(7.5)
    torch.testing.assert_close(one.encode(7.5 * x).dense(), 7.5 * before, rtol=1e-4, atol=1e-4)
    one.save(tmp_path)
    assert torch.equal(sae.load(tmp_path).encode(x).dense(), one.encode(x).dense())
    torch.testing.assert_close(one.encode(x[:1]).dense(), one.encode(x).dense()[:1])


def test_the_config_of_a_file_older_than_the_option_is_of_a_learned_router(tmp_path: Path) -> None:
    one = trained("learned")
    one.save(tmp_path)
    about = json.loads((tmp_path / "config.json").read_text())
    assert about.pop("routing") == "learned"
    (tmp_path / "config.json").write_text(json.dumps(about))
    assert torch.equal(sae.load(tmp_path)(activations()), one(activations()))


@fixed
def test_a_restored_trainer_goes_on_to_the_same_bytes(routing: str) -> None:
    whole, before, after = (Trainer([started(routing)], lr=3e-3, dead_after=100) for _ in range(3))
    for number in range(9):
        whole.step(activations(number))
    for number in range(5):
        before.step(activations(number))
    after.restore({name: tensor.clone() for name, tensor in before.state().items()})
    for number in range(5, 9):
        after.step(activations(number))
    for name, value in whole.state().items():
        assert torch.equal(after.state()[name], value), name
