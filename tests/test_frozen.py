"""Frozen SAEs: what stays as it was drawn, what is trained, and how near soft-frozen rows stay.

Shapes: D width (d_in), F latents (d_sae), K active latents (k).
"""

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from conftest import write_store
from hypothesis import given, settings
from hypothesis import strategies as st
from interrupted import interrupted
from pretended_cuda import Activity, to_host
from torch import Tensor
from torch.nn.functional import normalize

from sparsight import config, sae
from sparsight.activations.store import ActivationStore
from sparsight.common.errors import SparsightError
from sparsight.common.seeds import derive_seed
from sparsight.common.work import Work
from sparsight.config.sae import SPLIT_KINDS, Frozen
from sparsight.sae import Trainer
from sparsight.sae.fit import fit
from sparsight.sae.frozen import LEAST_COSINE, Cones
from sparsight.sae.sharded.trainer import ShardedTrainer, create
from sparsight.training.ranks import Ranks

SITES, ROWS, D, F, K = ["blocks.0.input", "blocks.1.input"], 512, 12, 40, 4
KINDS = [kind for kind in sae.names() if kind != "archetypal"]
FROZEN = [frozen for frozen in get_args(Frozen) if frozen != "none"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("store"), ROWS, dict.fromkeys(SITES, (D,)), shard_images=128)


def train(store: Path, folder: Path, **options: Any) -> Path:
    values: dict[str, Any] = {"backbone": "vit", "site": SITES[0], "d_sae": F, "k": K, "epochs": 6, "seeds": (0,)}
    section = config.Sae(**{**values, "batch_size": 64, "lr": 6e-2, "dead_after": 256, **options})
    with Work(folder / "work", "key") as work:
        fit(section, ActivationStore.open(store), None, "m", 0, work, torch.device("cpu"), {})
        work.finish(folder / "saes")
    return folder / "saes"


def drawn(kind: str, folder: str = "m-s0") -> sae.SAE:
    """The SAE as it is before training."""
    return sae.create(kind, D, F, K, derive_seed(0, "sae", folder, "init")).requires_grad_(False)


def cosines(one: sae.SAE, other: sae.SAE) -> Tensor:
    return (one.W_dec * other.W_dec).sum(dim=1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frozen", FROZEN)
def test_what_is_frozen_stays_and_the_rest_is_trained(store: Path, tmp_path: Path, kind: str, frozen: Frozen) -> None:
    before, after = drawn(kind), sae.load(train(store, tmp_path, kind=kind, frozen=frozen) / "m-s0")
    stays = {name for name in ("W_enc", "W_dec") if torch.equal(getattr(before, name), getattr(after, name))}
    assert stays == {"decoder": {"W_dec"}, "encoder": {"W_enc"}, "soft-decoder": set()}[frozen]
    assert not torch.equal(before.b_dec, after.b_dec), "biases are trained"
    if frozen == "soft-decoder":
        near = cosines(before, after)
        assert near.min() > LEAST_COSINE - 1e-5
        assert near.min() < LEAST_COSINE + 1e-3, "the bound was needed"
        torch.testing.assert_close(after.W_dec.norm(dim=1), torch.ones(F))
    assert after.about["training"]["frozen"] == frozen


@pytest.mark.parametrize("frozen", ["none", *FROZEN])
def test_an_interrupted_training_ends_with_the_same_bytes(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frozen: Frozen
) -> None:
    options: dict[str, Any] = {"frozen": frozen, "seeds": (0, 1), "epochs": 3}
    whole = train(store, tmp_path / "whole", **options)
    with interrupted(monkeypatch, step=9):
        train(store, tmp_path / "again", **options)
    again = train(store, tmp_path / "again", **options)
    for path in sorted(whole.rglob("*.*")):
        assert (again / path.relative_to(whole)).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("frozen", FROZEN)
def test_a_trainer_continues_from_the_state_of_another(frozen: Frozen) -> None:
    """Also one that began at other random rows."""
    x = [torch.randn(64, D, generator=torch.Generator().manual_seed(n)) for n in range(6)]
    one, other = (Trainer([sae.create("topk", D, F, K, seed)], lr=0.1, frozen=frozen) for seed in (0, 1))
    for batch in x[:3]:
        one.step(batch)
    other.restore(one.state())
    for batch in x[3:]:
        one.step(batch)
        other.step(batch)
    for name, value in one.state().items():
        assert torch.equal(other.state()[name], value), name


@pytest.mark.parametrize("frozen", FROZEN)
def test_every_sae_of_a_chain_is_frozen(store: Path, tmp_path: Path, frozen: Frozen) -> None:
    folder = train(store, tmp_path, site=None, sites=tuple(SITES), frozen=frozen) / "m-s0"
    for site in SITES:
        before, after = drawn("topk", f"m-s0/{site}"), sae.load(folder / site)
        assert torch.equal(before.W_enc, after.W_enc) == (frozen == "encoder")
        assert torch.equal(before.W_dec, after.W_dec) == (frozen == "decoder")
        assert cosines(before, after).min() > LEAST_COSINE - 1e-5 or frozen == "encoder"


@pytest.mark.parametrize("frozen", ["soft-decoder", "encoder"])
def test_seeds_that_are_made_alike_may_be_frozen_in_part(store: Path, tmp_path: Path, frozen: Frozen) -> None:
    plain = train(store, tmp_path / "plain", seeds=(0, 1), frozen=frozen)
    alike = train(store, tmp_path / "alike", seeds=(0, 1), frozen=frozen, mutual=0.5)
    for name in ("m-s0", "m-s1"):
        before, after = drawn("topk", name), sae.load(alike / name)
        assert torch.equal(before.W_enc, after.W_enc) == (frozen == "encoder")
        assert cosines(before, after).min() > LEAST_COSINE - 1e-5 or frozen == "encoder"
        assert not torch.equal(after.W_dec, sae.load(plain / name).W_dec)


@pytest.mark.parametrize("kind", SPLIT_KINDS)
@pytest.mark.parametrize("frozen", FROZEN)
def test_eight_shards_are_the_frozen_sae_of_one_process(kind: str, frozen: Frozen, tmp_path: Path) -> None:
    options = {"experts": 8} if kind == "switch" else {}
    one, part = sae.create(kind, D, F, K, **options), create(kind, Ranks(), D, F, K, **options)
    trainers = Trainer([one], lr=3e-2, frozen=frozen), ShardedTrainer([part], lr=3e-2, frozen=frozen)
    for number in range(12):
        for trainer in trainers:
            trainer.step(batch(number))
    part.save(tmp_path)
    for name, value in sae.load(tmp_path).state_dict().items():
        torch.testing.assert_close(value, one.state_dict()[name], rtol=1e-4, atol=1e-4)
    assert torch.equal(sae.load(tmp_path).W_dec, sae.create(kind, D, F, K).W_dec) == (frozen == "decoder")


@given(st.integers(0, 2**32 - 1), st.integers(2, 6))
@settings(max_examples=30, deadline=None)
def test_a_row_returns_to_the_nearest_unit_vector_of_its_cone(seed: int, width: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    axes, rows = (normalize(torch.randn(8, width, generator=generator, dtype=torch.float64), dim=1) for _ in range(2))
    W = axes.clone()
    cones = Cones([W])
    W.copy_(rows)
    cones.project()
    inside = (rows * axes).sum(dim=1) >= LEAST_COSINE
    assert torch.equal(W[inside], rows[inside])
    torch.testing.assert_close(W.norm(dim=1), torch.ones(8, dtype=torch.float64))
    assert ((W * axes).sum(dim=1) > LEAST_COSINE - 1e-9).all()
    others = normalize(torch.randn(20_000, width, generator=generator, dtype=torch.float64), dim=1)
    for row, axis, found in zip(rows, axes, W, strict=True):
        near = others[others @ axis >= LEAST_COSINE]
        assert not len(near) or (near @ row).max() <= found @ row + 1e-9
    before = W.clone()
    cones.project()
    assert torch.equal(W, before), "what lies on the cone stays"


B, DEVICE = 64, torch.device("cuda")


def batch(number: int) -> Tensor:
    return torch.randn(B, D, generator=torch.Generator().manual_seed(number))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frozen", FROZEN)
def test_steps_on_the_device_are_those_of_the_cpu_and_wait_for_nothing(
    kind: str, frozen: Frozen, cuda: Activity
) -> None:
    host, device = (
        Trainer([sae.create(kind, D, 64, K).to(place)], lr=3e-2, dead_after=2 * B, frozen=frozen)
        for place in (torch.device("cpu"), DEVICE)
    )
    start = {name: getattr(host.saes[0], name).detach().clone() for name in ("W_enc", "W_dec")}
    for number in range(5):
        if number:
            device.restore(host.state())
        x = batch(number).to(DEVICE)
        cuda.clear()
        (expected,), (found,) = host.step(batch(number)), device.step(x)
        assert number == 0 or not cuda.waits
        torch.testing.assert_close(to_host(found.total.detach()), expected.total.detach())
        state = host.state()
        for name, value in device.state().items():
            wanted = state[name]
            if f"{name}.exp_avg" in state:  # Adam divides by the gradient's size, also where that is rounding error
                size = state[f"{name}.exp_avg"].abs().reshape(value.shape)
                wanted = torch.where(size > 1e-3 * size.max(), wanted, to_host(value))
            torch.testing.assert_close(to_host(value), wanted, rtol=1e-3, atol=2e-4)
    one = device.saes[0]
    assert torch.equal(to_host(one.W_enc.detach()), start["W_enc"]) == (frozen == "encoder")
    assert torch.equal(to_host(one.W_dec.detach()), start["W_dec"]) == (frozen == "decoder")
    device.check()


def test_a_step_of_a_frozen_decoder_that_is_not_finite_is_found_on_the_device(cuda: Activity) -> None:
    trainer = Trainer([sae.create("topk", D, 64, K).to(DEVICE)], frozen="decoder")
    trainer.step(batch(0).to(DEVICE))
    trainer.step(torch.full((B, D), torch.nan).to(DEVICE))
    with pytest.raises(SparsightError, match="in step 2"):
        trainer.check()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "archetypal"}, "frozen: the rows of archetypal begin at data, not at random; choose another kind"),
        ({"mutual": 0.5, "seeds": (0, 1)}, "frozen: mutual makes decoders alike, and these do not move"),
        ({"controls": ("frozen-encoder",)}, "controls: are of a section that is trained, and this one is frozen"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SparsightError, match=f"^{message}"):
        config.Sae(backbone="vit", site=SITES[0], frozen="decoder", **options)


def test_gradients_of_what_is_trained_equal_finite_differences() -> None:
    """Freezing one weight leaves the gradient of the other as it was."""
    x = torch.randn(9, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for frozen, trained in (("decoder", "W_enc"), ("encoder", "W_dec")):
        one = sae.create("topk", D, F, K).double()
        Trainer([one], frozen=frozen)  # type: ignore[arg-type]
        one.loss(x).total.backward()
        weights = getattr(one, trained)
        assert {name for name in ("W_enc", "W_dec") if getattr(one, name).grad is not None} == {trained}
        generator = np.random.default_rng(0)
        for _ in range(12):
            place = tuple(int(generator.integers(size)) for size in weights.shape)
            sides = []
            for step in (1e-6, -1e-6):
                with torch.no_grad():
                    weights[place] += step
                    sides.append(float(one.loss(x).total))
                    weights[place] -= step
            assert (sides[0] - sides[1]) / 2e-6 == pytest.approx(float(weights.grad[place]), rel=1e-4, abs=1e-7)
