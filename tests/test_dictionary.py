"""Data from a known sparse dictionary: how many of its atoms an SAE finds, beside the same variant written plainly.

256 atoms in 64 dimensions, 5 active per sample with values in [0.5, 1.5]; d_sae 512, k 5. An atom is recovered
if a decoder row has cosine 0.9 with it. Every SAE takes STEPS steps of 512 fresh samples.
"""

from collections.abc import Iterator

import plain
import pytest
import torch
from torch import Tensor

from sparsight import sae
from sparsight.sae import Trainer

ATOMS, ACTIVE, D, F, K = 256, 5, 64, 512, 5
STEPS, ROWS, LR, DEAD_AFTER = 300, 512, 3e-3, 10_000


@pytest.fixture(scope="module")
def atoms() -> Tensor:
    rows = torch.randn(ATOMS, D, generator=torch.Generator().manual_seed(0))
    return rows / rows.norm(dim=1, keepdim=True)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Products this small are no faster on two threads, and wait long for each other where a core is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def batches(atoms: Tensor) -> Iterator[tuple[float, Tensor]]:
    """The learning rate's factor, falling to 0 over the last fifth, and samples (B, D)."""
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        active = torch.rand(ROWS, ATOMS, generator=generator).topk(ACTIVE, dim=1).indices
        values = torch.rand(ROWS, ACTIVE, generator=generator) + 0.5
        yield min(1.0, 5 * (1 - step / STEPS)), torch.einsum("bk,bkd->bd", values, atoms[active])


def recovered(atoms: Tensor, W_dec: Tensor) -> float:
    """Share of the atoms that a decoder row points along."""
    return float(((atoms @ W_dec.detach().T).amax(dim=1) > 0.9).float().mean())


def ours(kind: str, atoms: Tensor) -> float:
    one = sae.create(kind, D, F, K, seed=0)
    trainer = Trainer([one], lr=LR, dead_after=DEAD_AFTER)
    for factor, x in batches(atoms):
        trainer.schedule(factor)
        trainer.step(x)
    return recovered(atoms, one.W_dec)


def plainly(kind: str, atoms: Tensor) -> float:
    one = sae.create(kind, D, F, K, seed=0)  # for its initial weights
    _, x = next(batches(atoms))
    one.start(float((x - x.mean(dim=0)).square().sum() / len(x)))
    p = {name: value.detach().clone().requires_grad_() for name, value in one.named_parameters()}
    setting = plain.Setting(kind, F, K, D // 2, one.loss_scale, torch.zeros(F, dtype=torch.bool))
    plain.train(setting, p, batches(atoms), LR, DEAD_AFTER)
    return recovered(atoms, p["W_dec"])


def test_topk_recovers_the_dictionary(atoms: Tensor) -> None:
    assert ours("topk", atoms) >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["batchtopk", "matryoshka", "switch", "jumprelu", "gated"])
def test_variants_come_within_5_points_of_a_plain_implementation(kind: str, atoms: Tensor) -> None:
    share, expected = ours(kind, atoms), plainly(kind, atoms)
    assert share >= expected - 0.05
    assert expected >= 0.9 or kind == "switch", "experts must learn each atom anew"
