"""Mutual feature regularisation: the seeds of a section are made alike while they train.

Shapes: D width (d_in), F latents (d_sae), K active latents (k).
"""

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_store
from interrupted import interrupted
from torch import Tensor

from sparsight import config, sae
from sparsight.activations.store import ActivationStore
from sparsight.common.errors import SparsightError
from sparsight.common.work import Work
from sparsight.sae import Trainer, mutual
from sparsight.sae.fit import fit
from sparsight.sae.mutual import penalty

SITES, ROWS, D, F, K = ["blocks.0.input", "blocks.1.input"], 512, 12, 40, 5


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("store"), ROWS, dict.fromkeys(SITES, (D,)), shard_images=128)


def train(store: Path, folder: Path, **options: Any) -> Path:
    values: dict[str, Any] = {"backbone": "vit", "site": SITES[0], "d_sae": F, "k": K, "epochs": 3, "seeds": (0, 1, 2)}
    section = config.Sae(**{**values, "batch_size": 64, "lr": 1e-2, **options})
    with Work(folder / "work", "key") as work:
        fit(section, ActivationStore.open(store), None, "m", 0, work, torch.device("cpu"), {})
        work.finish(folder / "saes")
    return folder / "saes"


def decoders(*rows: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, D, generator=generator, dtype=dtype) for n in rows]


def dense(all_rows: list[Tensor]) -> Tensor:
    """The formula, with every cosine at once."""
    values = []
    for a, b in combinations(all_rows, 2):
        cosines = torch.nn.functional.cosine_similarity(a[:, None], b[None], dim=2)
        values.append((cosines.max(dim=1).values.mean() + cosines.max(dim=0).values.mean()) / 2)
    return 1 - torch.stack(values).mean()


def mmcs(folder: Path) -> float:
    """Mean over the pairs of seeds in a folder."""
    return 1 - float(dense([sae.load(path).W_dec.detach() for path in sorted(folder.iterdir())]))


@pytest.mark.parametrize("entries", [2**24, 100, 1])
@pytest.mark.parametrize("rows", [(F, F), (F, F, F, F), (F, 7, 19)])
def test_value_and_gradient_equal_the_dense_formula(
    rows: tuple[int, ...], entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mutual, "_ENTRIES", entries)
    all_rows = [W.requires_grad_() for W in decoders(*rows)]
    value, gradients = penalty(all_rows)
    expected = dense(all_rows)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradients, list(torch.autograd.grad(expected, all_rows)))


def test_gradients_equal_finite_differences() -> None:
    all_rows = decoders(F, F, F)
    _, gradients = penalty(all_rows)
    for W, gradient in zip(all_rows, gradients, strict=True):
        direction = torch.randn(W.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        up, down = (penalty([V + sign * 1e-6 * direction if V is W else V for V in all_rows])[0] for sign in (1, -1))
        assert float((gradient * direction).sum()) == pytest.approx(float(up - down) / 2e-6, rel=1e-5)


def test_equal_decoders_have_no_penalty() -> None:
    (W,) = decoders(F)
    value, gradients = penalty([W, 3 * W[torch.randperm(F)]])
    assert abs(float(value)) < 1e-12 and all(gradient.abs().max() < 1e-12 for gradient in gradients)


def test_a_step_adds_the_gradient_at_the_decoders_before_it() -> None:
    """Against a plain step of Adam on the loss plus the dense penalty; no SAE sees what another one's step did."""
    x = torch.randn(64, D, generator=torch.Generator().manual_seed(1))
    together, plain = ([sae.create("topk", D, F, K, seed=seed) for seed in range(3)] for _ in range(2))
    for one in (*together, *plain):
        one.start(float(D))
    Trainer(together, lr=1e-2, mutual=0.5).step(x)
    rows = [one.W_dec.detach().clone().requires_grad_() for one in plain]
    pulls = torch.autograd.grad(dense(rows), rows)
    for one, other, pull in zip(together, plain, pulls, strict=True):
        adam = torch.optim.Adam(other.parameters(), lr=1e-2, eps=6.25e-10)
        other.loss(x).total.backward()
        assert other.W_dec.grad is not None
        other.W_dec.grad += 0.5 * pull
        other.remove_parallel_gradient()
        torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
        adam.step()
        other.constrain()
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_weight_0_gives_the_bytes_of_seeds_alone_and_a_weight_makes_them_alike(store: Path, tmp_path: Path) -> None:
    plain, alike = train(store, tmp_path / "0", mutual=0.0), train(store, tmp_path / "1", mutual=1.0)
    for seed in range(3):
        alone = train(store, tmp_path / f"alone-{seed}", seeds=(seed,)) / f"m-s{seed}"
        for file in ("sae.safetensors", "training.jsonl"):
            assert (plain / f"m-s{seed}" / file).read_bytes() == (alone / file).read_bytes()
            assert (alike / f"m-s{seed}" / file).read_bytes() != (alone / file).read_bytes()
    assert mmcs(alike) > mmcs(plain) + 0.05
    lines = [json.loads(line) for line in (alike / "m-s0" / "training.jsonl").read_text().splitlines()]
    assert lines[-1]["mutual"] < lines[0]["mutual"]
    assert 1 - mmcs(alike) == pytest.approx(lines[-1]["mutual"], abs=0.1)


def test_the_sites_of_a_chain_are_compared_apart(store: Path, tmp_path: Path) -> None:
    chain: dict[str, Any] = {"site": None, "sites": tuple(SITES), "seeds": (0, 1)}
    both = train(store, tmp_path / "chain", **chain, mutual=1.0)
    apart = train(store, tmp_path / "single", seeds=(0, 1), mutual=1.0)
    first = [json.loads((folder / "training.jsonl").read_text().splitlines()[0]) for folder in
             (both / "m-s0" / SITES[0], both / "m-s0" / SITES[1], apart / "m-s0")]  # fmt: skip
    assert all(np.isfinite(line["mutual"]) for line in first) and first[0]["mutual"] != first[1]["mutual"]


def test_an_interrupted_training_ends_with_the_same_bytes(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(store, tmp_path / "whole", mutual=0.3)
    with interrupted(monkeypatch, step=9):
        train(store, tmp_path / "again", mutual=0.3)
    again = train(store, tmp_path / "again", mutual=0.3)
    for path in sorted(whole.rglob("*.*")):
        assert (again / path.relative_to(whole)).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": (0,)}, "makes the seeds of a section alike, and this one has one; name two or more"),
        ({"processes": 2}, "in one process; set processes to 1"),
        ({"processes": 8, "d_sae": 64}, "in one process; set processes to 1"),
        ({"mutual": -0.1}, "must be 0 or more, got -0.1"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SparsightError, match=f"^mutual: .*{message}"):
        config.Sae(**{"backbone": "vit", "site": SITES[0], "mutual": 0.5, "seeds": (0, 1), **options})
