"""What must hold on a card. Without one, the same tests run on the pretended device.

``TRITON_INTERPRET=0 pytest -n 0 tests/test_card.py`` uses a card and compiled kernels, as benchmarks/gpu.py does.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import make_manifest
from pretended_cuda import pretended_cuda
from studies import two_classes
from torch import Tensor

from sparsight import config, sae
from sparsight.activations.extract import extract
from sparsight.common.work import Work
from sparsight.config import Compute
from sparsight.config.activations import StoredSite
from sparsight.sae import SAE, Trainer

B, D, F, K = 64, 32, 512, 4
DEVICE = torch.device("cuda")


class Card:
    """A real card, or the pretended one."""

    @contextmanager
    def nothing_waits(self) -> Iterator[None]:
        """Inside ``with``, the host may not wait for the device."""
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


class PretendedCard(Card):
    """Counts waits instead of refusing them."""

    def __init__(self, waits: dict[str, int]) -> None:
        self.waits = waits

    @contextmanager
    def nothing_waits(self) -> Iterator[None]:
        before = dict(self.waits)
        yield
        assert self.waits == before


@pytest.fixture
def card() -> Iterator[Card]:
    if torch.cuda.is_available() and os.environ["TRITON_INTERPRET"] == "0":
        yield Card()
        return
    with pretended_cuda() as activity:
        yield PretendedCard(activity.waits)


def batch(number: int) -> Tensor:
    return torch.randn(B, D, generator=torch.Generator().manual_seed(number))


def trained(kind: str, device: torch.device, steps: int = 4) -> SAE:
    # With this seed no latent fires on a single row alone: its first gradient would be rounding, which Adam blows up.
    one = sae.create(kind, D, F, K, seed=1).to(device)
    trainer = Trainer([one], dead_after=2 * B)
    for number in range(steps):
        trainer.step(batch(number).to(device))
    trainer.check()
    return one


@pytest.mark.parametrize("kind", sae.names())
def test_training_is_that_of_the_cpu_and_the_same_twice(kind: str, card: Card) -> None:
    expected = trained(kind, torch.device("cpu")).state_dict()
    one, two = (trained(kind, DEVICE).state_dict() for _ in range(2))
    for name, value in expected.items():
        torch.testing.assert_close(one[name].cpu(), value, rtol=1e-3, atol=1e-5)
        assert torch.equal(one[name].cpu(), two[name].cpu())


@pytest.mark.parametrize("kind", ["topk", "relu", "jumprelu", "gated", "switch"])
def test_no_step_waits(kind: str, card: Card) -> None:
    trainer = Trainer([sae.create(kind, D, F, K).to(DEVICE)])
    first, second = (batch(number).to(DEVICE) for number in range(2))
    trainer.step(first)
    with card.nothing_waits():
        trainer.step(second)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_extraction_gives_the_same_bytes_twice(precision: str, tmp_path: Path, card: Card) -> None:
    split = make_manifest(tmp_path, per_class=20).split("train")
    section = config.Activations(sites=(StoredSite("blocks.1.input"),), tokens="all", batch_size=4, shard_images=8)
    compute = Compute(device="cuda", precision="bf16" if precision == "bf16" else "fp32")
    backbone, found = two_classes().to(DEVICE), []
    for name in ("one", "two"):
        store = tmp_path / name / "train.zarr"
        with Work(tmp_path / name / "work", "key") as work:
            extract(backbone, split, section, compute, work, store, 0, {})
        found.append({p.relative_to(store): p.read_bytes() for p in store.rglob("*") if p.is_file()})
    assert len(found[0]) > 1
    assert found[0] == found[1]
