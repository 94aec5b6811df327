"""What a training step asks of a card, counted on the pretended device: launches, waits, and how it says it failed."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_store
from pretended_cuda import Activity, to_host
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sparsight import config, sae
from sparsight.activations.store import ActivationStore
from sparsight.common.errors import SparsightError
from sparsight.common.work import Work
from sparsight.kernels import routed_topk
from sparsight.kernels import triton as kernels
from sparsight.sae import Trainer
from sparsight.sae.fit import fit
from sparsight.training import loop

B, D, K = 64, 24, 4
DEVICE = torch.device("cuda")
LAUNCHES = {kind: 60 if kind == "topk" else 90 for kind in sae.names()}
"""The most launches that a step may take; a Switch SAE of these sizes has 16 experts."""
WITH_AUXK = ("topk", "batchtopk", "matryoshka", "switch")


def batch(number: int) -> Tensor:
    return torch.randn(B, D, generator=torch.Generator().manual_seed(number)).to(DEVICE)


def second_step(kind: str, d_sae: int, cuda: Activity, **options: Any) -> Trainer:
    """The device then shows what the second step did."""
    trainer = Trainer([sae.create(kind, D, d_sae, K).to(DEVICE)], **options)
    trainer.step(batch(0))
    cuda.clear()
    trainer.step(batch(1))
    return trainer


@pytest.mark.parametrize("kind", LAUNCHES)
def test_launches_do_not_depend_on_the_number_of_latents_and_nothing_waits(kind: str, cuda: Activity) -> None:
    counts = set()
    for d_sae in (4096, 16384, 65536 if kind == "topk" else 8192):
        second_step(kind, d_sae, cuda)
        assert not cuda.waits
        counts.add(sum(cuda.launches.values()))
    (count,) = counts
    assert count <= LAUNCHES[kind], cuda.launches


@pytest.mark.parametrize("kind", LAUNCHES)
def test_labels_of_the_host_make_no_step_wait(kind: str, cuda: Activity) -> None:
    trainer = second_step(kind, 256, cuda)
    trainer.step(batch(2), np.arange(B) % 3)
    assert not cuda.waits


@pytest.mark.parametrize("routing", ["random", "hash"])
def test_a_switch_sae_without_a_router_makes_no_step_wait(routing: str, cuda: Activity) -> None:
    trainer = Trainer([sae.create("switch", D, 256, K, routing=routing).to(DEVICE)], dead_after=2 * B)
    for number in range(3):
        cuda.clear()
        trainer.step(batch(number))
    assert not cuda.waits


@pytest.mark.parametrize("kind", WITH_AUXK)
def test_steps_with_dead_latents_do_not_wait_and_continue_from_their_state(kind: str, cuda: Activity) -> None:
    trainer = second_step(kind, 256, cuda, dead_after=2 * B)
    for number in (2, 3):
        (loss,) = trainer.step(batch(number))
    assert not cuda.waits
    assert 0 < to_host(trainer.saes[0].dead).sum() < 256 and to_host(loss.aux) > 0
    state = trainer.state()
    other = Trainer([sae.create(kind, D, 256, K).to(DEVICE)], dead_after=2 * B)
    other.restore(state)
    for continued in (trainer, other):
        continued.step(batch(4))
    for name, value in trainer.state().items():
        assert torch.equal(to_host(other.state()[name]), to_host(value)), name


def test_after_a_check_that_finds_no_latent_dead_auxk_costs_nothing_until_one_may_be(cuda: Activity) -> None:
    launches = []
    trainer = second_step("topk", 8, cuda, dead_after=3 * B)  # few latents, so that each fires in every step
    for number in range(2, 6):
        cuda.clear()
        trainer.step(batch(number))
        launches.append(sum(cuda.launches.values()))
        if number == 4:
            trainer.check()
    none, unknown, still, checked = launches
    assert checked <= none < still
    assert none <= unknown


DEAD = {"none": [], "one": [5], "fewer than aux_k": [0, 7, 9], "more than aux_k": range(0, 64, 3), "all": range(64)}


@pytest.mark.parametrize("dead", DEAD.values(), ids=DEAD)
@pytest.mark.parametrize("kind", WITH_AUXK)
def test_auxk_in_fixed_shapes_has_the_values_and_gradients_of_its_definition(
    kind: str, dead: Sequence[int], cuda: Activity
) -> None:
    pair = [sae.create(kind, D, 64, K, aux_k=6).to(device) for device in (torch.device("cpu"), DEVICE)]
    for one in pair:
        one.start(3.0)
        one.dead = torch.tensor([i in dead for i in range(64)]).to(one.dead.device)
        loss = one.loss(batch(0) if one.dead.is_cuda else to_host(batch(0)))
        loss.total.backward()
        pair[pair.index(one)].about["loss"] = to_host(loss.aux.detach())
    host, device = pair
    assert (host.about["loss"] > 0) == bool(len(dead))
    torch.testing.assert_close(device.about["loss"], host.about["loss"])
    for p, q in zip(host.parameters(), device.parameters(), strict=True):
        torch.testing.assert_close(to_host(q.grad), p.grad)


@pytest.mark.parametrize("labelled", [False, True], ids=["no labels", "labels"])
@pytest.mark.parametrize("kind", LAUNCHES)
def test_steps_on_the_device_are_those_of_the_cpu(kind: str, labelled: bool, cuda: Activity) -> None:
    host, device = (
        Trainer([sae.create(kind, D, 64, K).to(place)], lr=1e-3, dead_after=2 * B)
        for place in (torch.device("cpu"), DEVICE)
    )
    y = np.arange(B) % 3 if labelled else None
    for number in range(5):
        if number:
            device.restore(host.state())  # so that rounding in one step does not decide about codes in the next
        (expected,), (found,) = host.step(to_host(batch(number)), y), device.step(batch(number), y)
        for name in ("total", "reconstruction", "aux", "penalty", "x_hat"):
            torch.testing.assert_close(to_host(getattr(found, name).detach()), getattr(expected, name).detach())
        torch.testing.assert_close(to_host(found.codes.dense().detach()), expected.codes.dense().detach())
        assert torch.equal(to_host(found.codes.l0()), expected.codes.l0())
        assert torch.equal(to_host(found.codes.fired()), expected.codes.fired())
        state = host.state()
        for name, value in device.state().items():
            wanted = state[name]
            if f"{name}.exp_avg" in state:  # Adam divides by the gradient's size, also where that is rounding error
                size = state[f"{name}.exp_avg"].abs().reshape(value.shape)
                wanted = torch.where(size > 1e-4 * size.max(), wanted, to_host(value))
            torch.testing.assert_close(to_host(value), wanted, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("kind", ["batchtopk", "matryoshka"])
def test_a_row_may_hold_all_codes_of_the_batch(kind: str, cuda: Activity) -> None:
    host, device = (sae.create(kind, D, 128, K).to(place) for place in (torch.device("cpu"), DEVICE))
    x = to_host(batch(0)).clone()
    x[3] *= 1e4
    expected, found = host.loss(x), device.loss(x.to(DEVICE))
    assert expected.codes.l0()[3] > 4 * K
    assert torch.equal(to_host(found.codes.l0()), expected.codes.l0())
    torch.testing.assert_close(to_host(found.codes.dense().detach()), expected.codes.dense().detach())
    torch.testing.assert_close(to_host(found.total.detach()), expected.total.detach())
    assert not cuda.waits


@pytest.mark.parametrize(
    "experts",
    [torch.arange(50) % 6, torch.zeros(50), torch.full((50,), 5), torch.tensor([3, 0, 3, 3, 5, 0, 3]), torch.ones(1)],
    ids=["even", "first", "last", "few", "one row"],
)
@pytest.mark.parametrize("biased", [True, False])
def test_blocks_of_rows_select_what_a_loop_over_the_experts_does(experts: Tensor, biased: bool, cuda: Activity) -> None:
    generator = torch.Generator().manual_seed(0)
    x, W, b = (torch.randn(*shape, generator=generator) for shape in ((len(experts), D), (60, D), (60,)))
    bias, experts = b if biased else None, experts.long()
    values, indices = routed_topk(x, W.T, bias, experts, 6, 3)
    on_device = (None if bias is None else bias.to(DEVICE), experts.to(DEVICE))
    with FlopCounterMode(display=False) as counter:
        found, places = map(to_host, routed_topk(x.to(DEVICE), W.to(DEVICE).T, *on_device, 6, 3))
    order, expected = places.argsort(dim=1), indices.argsort(dim=1)
    assert torch.equal(places.gather(1, order), indices.gather(1, expected))
    torch.testing.assert_close(found.gather(1, order), values.gather(1, expected))
    assert not cuda.waits
    assert counter.get_total_flops() <= 2 * 2 * (len(experts) + 6) * D * 60 // 6, "twice what the rows need"


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "switch"])
def test_the_gradient_of_the_center_is_that_of_the_cpu(kind: str, cuda: Activity) -> None:
    grads = []
    for device in ("cpu", "cuda"):
        one = sae.create(kind, D, 64, K).to(device)
        one.set_center(torch.linspace(-1, 1, D).to(device))
        one.none_dead = True
        one.loss(batch(0).to(device)).total.backward()
        grads.append([to_host(p.grad) for p in one.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * float(a.abs().max()))
    assert cuda.operations["addmv"] == 1
    assert cuda.operations["_combine"] == 1, "decoding only"


def test_both_gradients_of_a_batch_share_one_sort(cuda: Activity) -> None:
    second_step("topk", 256, cuda)
    assert (cuda.operations["sort"], cuda.operations["_accumulate"]) == (1, 2)
    values, x = torch.ones(3, 2, device=DEVICE), torch.ones(3, D, device=DEVICE)
    indices = torch.tensor([[0, 5], [5, 2], [1, 0]], device=DEVICE)
    for n_latents in (6, 9):
        sums = kernels.accumulate(values, indices, x, n_latents)[1]
        assert to_host(sums).tolist() == [2, 1, 1, 0, 0, 2, *[0] * (n_latents - 6)]


@pytest.mark.parametrize("kind", ["topk", "archetypal"])  # with W_dec as a parameter, and without
@pytest.mark.parametrize("spoiled", [torch.nan, torch.inf, 1e30])
def test_the_first_step_that_is_not_finite_is_named_when_asked_and_the_weights_stay(
    spoiled: float, kind: str, cuda: Activity
) -> None:
    trainer = second_step(kind, 256, cuda)
    trainer.check()
    before = {name: to_host(value).clone() for name, value in trainer.saes[0].state_dict().items()}
    x = batch(2)
    x[5, 3] = spoiled
    for bad in (x, batch(3)):
        trainer.step(bad)
    named = rf"SAE 0 \({kind}\): loss (nan|inf), gradient norm \S+ in step 3; lower lr"
    with pytest.raises(SparsightError, match=named):
        trainer.check()
    for name, value in trainer.saes[0].state_dict().items():
        torch.testing.assert_close(to_host(value), before[name], rtol=1e-6, atol=1e-6)


def test_training_stops_with_the_log_line_and_names_the_step(
    tmp_path: Path, cuda: Activity, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ActivationStore.open(write_store(tmp_path, 400, {"blocks.0.input": (D,)}))
    section = config.Sae("vit", site="blocks.0.input", d_sae=64, k=4, epochs=2, batch_size=50, lr=1e-3)
    step, taken = Trainer.step, iter(range(1, 99))

    def spoil(self: Trainer, x: dict[str, Tensor], labels: Any) -> Any:
        if next(taken) == 6:
            x = {site: rows * torch.nan for site, rows in x.items()}
        return step(self, x, labels)

    monkeypatch.setattr(Trainer, "step", spoil)
    monkeypatch.setattr(loop, "_LOG_LINES", 2)
    named = "step 8 of 16: SAE 'x-s0' (topk): loss nan, gradient norm nan in step 6; lower lr"
    with Work(tmp_path / "work", "key") as work, pytest.raises(SparsightError, match=re.escape(named)):
        fit(section, store, None, "x", 0, work, DEVICE, {})
