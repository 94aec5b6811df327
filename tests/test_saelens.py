"""SAELens: our folders are read by its package and its folders by us, with the same codes.

The checks against the package itself are marked ``peers``; CONTRIBUTING.md has the command.
"""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsight import sae
from sparsight.common.errors import SparsightError
from sparsight.sae import SAE, Trainer, saelens

D, F, K = 12, 40, 5
EXPORTED = ("relu", "gated", "jumprelu", "topk", "batchtopk", "matryoshka")


def activations(n: int = 64) -> Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(n)) + 1


def trained(kind: str) -> SAE:
    one = sae.create(kind, D, F, K, seed=1)
    trainer = Trainer([one], lr=3e-3)
    for step in range(30):
        trainer.step(activations(64 + step))
    return one


def agree(one: SAE, codes: Tensor, x_hat: Tensor, x: Tensor) -> None:
    torch.testing.assert_close(one.encode(x).dense(), codes, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one(x), x_hat, rtol=1e-5, atol=1e-5)


@pytest.fixture
def package() -> Any:
    return importlib.import_module("sae_lens")


@pytest.mark.parametrize("kind", EXPORTED)
def test_export_and_import_keep_codes_and_reconstructions(kind: str, tmp_path: Path) -> None:
    one, x = trained(kind), activations()
    saelens.export(one, tmp_path)
    back = saelens.load(tmp_path)
    assert back.kind == ("jumprelu" if kind in ("batchtopk", "matryoshka") else kind) and back.k == K
    agree(back, one.encode(x).dense(), one(x), x)


@pytest.mark.peers
@pytest.mark.parametrize("kind", EXPORTED)
def test_sae_lens_reads_ours(kind: str, tmp_path: Path, package: Any) -> None:
    one, x = trained(kind), activations()
    saelens.export(one, tmp_path)
    theirs = package.SAE.load_from_disk(tmp_path)
    agree(one, theirs.encode(x), theirs.decode(theirs.encode(x)), x)


@pytest.mark.peers
@pytest.mark.parametrize("changed", [{}, {"apply_b_dec_to_input": False}], ids=str)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("StandardSAE", {}),
        ("GatedSAE", {}),
        ("JumpReLUSAE", {}),
        ("TopKSAE", {"k": K, "rescale_acts_by_decoder_norm": False}),
        ("TopKSAE", {"k": K, "rescale_acts_by_decoder_norm": True}),
    ],
    ids=str,
)
def test_we_read_theirs(
    name: str, options: dict[str, object], changed: dict[str, bool], tmp_path: Path, package: Any
) -> None:
    theirs = getattr(package, name)(getattr(package, f"{name}Config")(d_in=D, d_sae=F, **options, **changed))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    theirs.save_model(tmp_path)
    x = activations()
    agree(saelens.load(tmp_path), theirs.encode(x), theirs.decode(theirs.encode(x)), x)


def _changed(tmp_path: Path, **config: object) -> Path:
    saelens.export(trained("relu"), tmp_path)
    path = tmp_path / "cfg.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return tmp_path


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda path: saelens.export(trained("switch"), path), "SAELens has no 'switch'; these can be exported: relu"),
        (lambda path: saelens.export(sae.create("batchtopk", D, F, K), path), "no inference threshold yet; train it"),
        (lambda path: saelens.load(path), "no SAELens SAE here"),
        (lambda path: saelens.load(_changed(path, architecture="transcoder")), "'transcoder' has no counterpart"),
        (lambda path: saelens.load(_changed(path, normalize_activations="layer_norm")), "fold it into the weights"),
    ],
)
def test_mistakes_are_explained(call: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    with pytest.raises(SparsightError, match=message):
        call(tmp_path)


def test_settings_of_sae_lens_are_folded_into_the_weights(tmp_path: Path) -> None:
    """Without the package: its documented meaning of apply_b_dec_to_input = False."""
    path, x = _changed(tmp_path, apply_b_dec_to_input=False), activations()
    weights = load_file(path / "sae_weights.safetensors")
    weights["b_dec"] += 1
    save_file(weights, path / "sae_weights.safetensors")
    codes = (x @ weights["W_enc"] + weights["b_enc"]).relu()
    agree(saelens.load(path), codes, codes @ weights["W_dec"] + weights["b_dec"], x)
