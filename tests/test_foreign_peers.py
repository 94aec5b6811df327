"""Files of dictionary_learning and ViSAE-Bench against these packages themselves (CONTRIBUTING.md has the command)."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign_files as files
import pytest
import torch
from foreign_files import D, F, K, draw
from test_foreign import DICTIONARIES, load
from torch import Tensor

pytestmark = pytest.mark.peers
TRAINERS: dict[str, tuple[str, dict[str, Any]]] = {
    "AutoEncoder": ("standard.StandardTrainer", {}),
    "GatedAutoEncoder": ("gdm.GatedSAETrainer", {}),
    "AutoEncoderTopK": ("top_k.TopKTrainer", {"k": K}),
    "BatchTopKSAE": ("batch_top_k.BatchTopKTrainer", {"k": K, "threshold_start_step": 10}),
    "MatryoshkaBatchTopKSAE": (
        "matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer",
        {"k": K, "threshold_start_step": 10, "group_fractions": [0.25, 0.75]},
    ),
    "JumpReluAutoEncoder": ("jumprelu.JumpReluTrainer", {"target_l0": 4.0, "bandwidth": 0.1}),
}


def agree(
    kind: str, path: Path, encode: Callable[[Tensor], Tensor], decode: Callable[[Tensor], Tensor], x: Tensor
) -> None:
    """Codes and the reconstruction error are the tool's own."""
    one = load(kind, path).sae
    with torch.no_grad():
        z = encode(x)
        x_hat = decode(z)
    assert z.count_nonzero()
    torch.testing.assert_close(one.encode(x).dense(), z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close((one(x) - x).square().sum(), (x_hat - x).square().sum(), rtol=1e-5, atol=0)


def batches(n: int) -> list[Tensor]:
    """Activations of a length that normalisation matters for."""
    directions = draw(F, D, seed=9)
    codes = (draw(n, 64, F, seed=3) - 1).relu()
    return list(5 * codes @ directions + 3)


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("name", TRAINERS)
def test_what_dictionary_learning_trains_is_read(name: str, normalized: bool, tmp_path: Path) -> None:
    training = importlib.import_module("dictionary_learning.training")
    place, settings = TRAINERS[name]
    module, _, trainer = place.partition(".")
    cls = getattr(importlib.import_module(f"dictionary_learning.trainers.{module}"), trainer)
    common = {
        "trainer": cls, "steps": 60, "activation_dim": D, "dict_size": F, "layer": 2, "lm_name": "vit", "device": "cpu",
        "lr": 1e-3, "warmup_steps": 5, "seed": 0,
    }  # fmt: skip
    if name in ("AutoEncoder", "GatedAutoEncoder", "JumpReluAutoEncoder"):
        common["sparsity_warmup_steps"] = 5
    training.trainSAE(
        batches(200), [common | settings], 60, save_dir=str(tmp_path), normalize_activations=normalized, device="cpu"
    )
    folder = tmp_path / "trainer_0"
    theirs, _ = importlib.import_module("dictionary_learning.utils").load_dictionary(str(folder), "cpu")
    agree("dictionary_learning", folder / "ae.pt", theirs.encode, theirs.decode, batches(200)[-1])
    assert load("dictionary_learning", folder / "ae.pt").site == "blocks.2.output"


@pytest.mark.parametrize("name", DICTIONARIES)
def test_dictionary_learning_reads_our_handwritten_files_alike(name: str, tmp_path: Path) -> None:
    """So the quick tests, which need no package, check what the package does."""
    written = files.dictionary_learning(tmp_path, files.weights(), name)
    theirs, _ = importlib.import_module("dictionary_learning.utils").load_dictionary(str(tmp_path), "cpu")
    agree("dictionary_learning", written.path, theirs.encode, theirs.decode, draw(300, D))


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("name", ["topk", "batchtopk", "jumprelu"])
def test_visaebench_reads_the_same_codes(name: str, old: bool, tmp_path: Path) -> None:
    written = files.visaebench(tmp_path, files.weights(), name, old)
    theirs = importlib.import_module("visaebench.hub").load_sae(str(tmp_path), device="cpu")
    agree("visaebench", written.path, theirs.encode, theirs.decode, draw(300, D))
