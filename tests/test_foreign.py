"""Files of other tools are read with the codes and reconstructions of the tool; others are refused by name."""

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import foreign_files as files
import pytest
import torch
from foreign_files import D, F, K, Written, draw
from safetensors.torch import load_file, save_file

from sparsight import sae
from sparsight.common.errors import SparsightError
from sparsight.sae import saelens
from sparsight.sae.foreign.source import Foreign, fold_inputs

DICTIONARIES = (
    "AutoEncoder", "AutoEncoderNew", "GatedAutoEncoder", "AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE",
    "JumpReluAutoEncoder",
)  # fmt: skip
OLD = {"d_vit": D, "exp_factor": F // D, "sparsity_coeff": 4e-4, "seed": 0}
Write = Callable[[Path], Written]


def _of_saev(schema: int, name: str) -> Write:
    return lambda p: files.saev(p, files.saev_header(schema, name), name, schema == 1, files.weights())


def _of_prisma(**settings: Any) -> Write:
    return lambda p: files.prisma(p, files.weights(), **settings)


def _of_visaebench(name: str, old: bool) -> Write:
    return lambda p: files.visaebench(p, files.weights(), name, old)


def _of_dictionary(name: str) -> Write:
    return lambda p: files.dictionary_learning(p, files.weights(), name)


_FIRST = {"schema": 1, "cls": "TopK", "cfg": {"d_model": D, "top_k": K}}
FILES: dict[str, Write] = {
    "saev 0.1.0": lambda p: files.saev(p, OLD, "Relu", True, files.weights()),
    "saev 1, first form": lambda p: files.saev(p, _FIRST, "TopK", True, files.weights()),
    **{f"saev {n} {name}": _of_saev(n, name) for n in (1, 2, 5) for name in ("Relu", "TopK", "BatchTopK")},
    "prisma relu": _of_prisma(),
    "prisma topk": _of_prisma(activation_fn_str="topk", activation_fn_kwargs={"k": K}),
    "prisma gated": _of_prisma(architecture="gated"),
    **{
        f"visaebench {name}{' of overcomplete' * old}": _of_visaebench(name, old)
        for name in ("topk", "batchtopk", "jumprelu")
        for old in (False, True)
    },
    **{f"dictionary_learning {name}": _of_dictionary(name) for name in DICTIONARIES},
}


def load(kind: str, path: Path) -> Foreign:
    found: Foreign = importlib.import_module(f"sparsight.sae.foreign.{kind}").load(path)
    return found


@pytest.mark.parametrize("name", FILES)
def test_codes_and_reconstructions_are_the_tools_own(name: str, tmp_path: Path) -> None:
    written, x = FILES[name](tmp_path), draw(300, D) + 0.5
    read = load(name.partition(" ")[0], written.path).sae
    z = written.encode(x)
    assert read.kind == written.kind and 0 < (z != 0).float().mean() < 1
    torch.testing.assert_close(read.encode(x).dense(), z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(read(x), written.decode(z), rtol=1e-5, atol=1e-5)
    if read.kind == "topk":
        assert read.k == K
    # What is saved is an ordinary SAE folder.
    read.save(tmp_path / "saved")
    torch.testing.assert_close(sae.load(tmp_path / "saved")(x), read(x), rtol=0, atol=0)


def test_a_code_at_the_threshold_of_visaebench_is_kept(tmp_path: Path) -> None:
    """Its BatchTopK keeps codes >= threshold, ours codes above it."""
    w = files.weights() | {"W_enc": torch.eye(D, F), "b_enc": torch.zeros(F), "b_dec": torch.zeros(D)}
    one = load("visaebench", files.visaebench(tmp_path, w, "batchtopk").path).sae
    below = torch.nextafter(torch.tensor(0.5), torch.tensor(0.0))
    codes = one.encode(torch.stack([torch.full((D,), 0.5), below.expand(D)])).dense()[:, :D]
    assert (codes[0] == 0.5).all() and (codes[1] == 0).all()


def test_saelens_files_are_read_with_their_place(tmp_path: Path) -> None:
    own = sae.create("topk", D, F, K, seed=3)
    own.about["site"] = "blocks.3.input"
    saelens.export(own, tmp_path)
    found = load("saelens", tmp_path / "sae_weights.safetensors")
    assert found.site == found.named == "blocks.3.input"
    torch.testing.assert_close(found.sae(draw(9, D)), own(draw(9, D)))
    config = json.loads((tmp_path / "cfg.json").read_text())
    config["metadata"]["hook_name"] = "blocks.2.hook_resid_post"
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    assert load("saelens", tmp_path / "sae_weights.safetensors").site == "blocks.2.output"


@pytest.mark.parametrize(
    ("hook", "site"),
    [
        ("hook_resid_pre", "blocks.8.input"),
        ("hook_resid_post", "blocks.8.output"),
        ("hook_attn_out", "blocks.8.attn"),
        ("hook_mlp_out", "blocks.8.mlp"),
    ],
)
def test_hook_points_become_sites(hook: str, site: str, tmp_path: Path) -> None:
    assert load("prisma", files.prisma(tmp_path, files.weights(), layer_subtype=hook).path).site == site


@pytest.mark.parametrize(
    ("trainer", "site"),
    [
        ({"layer": 4}, "blocks.4.output"),
        ({"layer": 4, "submodule_name": "resid_pre_layer_4"}, "blocks.4.input"),
        ({"layer": 4, "submodule_name": "my module"}, None),
        ({"layer": None}, None),
    ],
)
def test_layers_of_dictionary_learning_become_sites(trainer: dict[str, Any], site: str, tmp_path: Path) -> None:
    found = load(
        "dictionary_learning", files.dictionary_learning(tmp_path, files.weights(), "AutoEncoder", **trainer).path
    )
    assert found.site == site


def test_input_scaling_is_folded_into_the_weights(tmp_path: Path) -> None:
    written, x = files.prisma(tmp_path, files.weights()), 4 * draw(64, D) + 2
    one, mean, scale = load("prisma", written.path).sae, draw(D), 3.0
    fold_inputs(one, mean, scale)
    z = written.encode((x - mean) / scale)
    torch.testing.assert_close(one.encode(x).dense(), z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(one(x), written.decode(z) * scale + mean, rtol=1e-5, atol=1e-5)


def _saev(path: Path, **changed: Any) -> Foreign:
    header = files.saev_header(5, "Relu") | changed
    return load("saev", files.saev(path, header, "Relu", False, files.weights()).path)


def _prisma(path: Path, **changed: Any) -> Foreign:
    return load("prisma", files.prisma(path, files.weights(), **changed).path)


def _visae(path: Path, **changed: Any) -> Foreign:
    written = files.visaebench(path, files.weights(), "topk")
    settings = {**json.loads((path / "config.json").read_text()), **changed}
    (path / "config.json").write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))
    return load("visaebench", written.path)


def _dictionary(path: Path, **changed: Any) -> Foreign:
    return load("dictionary_learning", files.dictionary_learning(path, files.weights(), "AutoEncoder", **changed).path)


def _without(path: Path) -> Foreign:
    written = files.prisma(path, files.weights())
    (path / "config.json").unlink()
    return load("prisma", written.path)


def _renamed(path: Path) -> Foreign:
    written = files.prisma(path, files.weights())
    torch.save({**files.weights(), "W_skip": torch.zeros(D, D)}, written.path)
    return load("prisma", written.path)


def _transposed(path: Path) -> Foreign:
    w = files.weights()
    return load("prisma", files.prisma(path, w | {"W_enc": w["W_enc"].T.contiguous()}).path)


def _pickled(path: Path) -> Foreign:
    written = files.prisma(path, files.weights())
    torch.save({"state_dict": files.weights(), "run": Path.cwd}, written.path)
    return load("prisma", written.path)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: _saev(p, schema=6), "saev's schema 6 is not known; known: none and 1 to 5"),
        (lambda p: _saev(p, cfg={"activation": {"cls": "Gelu"}}), "saev's activation 'Gelu' is not known"),
        (lambda p: load("saev", files.prisma(p, files.weights()).path), "not a checkpoint of saev"),
        (lambda p: _prisma(p, normalize_activations="layer_norm"), "'layer_norm' scales each activation by its own"),
        (lambda p: _prisma(p, architecture="jumprelu"), "architecture 'jumprelu' is not known; known: standard, gated"),
        (lambda p: _prisma(p, activation_fn_str="tanh-relu"), "activation 'tanh-relu' of the standard"),
        (lambda p: _prisma(p, is_transcoder=True), "a transcoder"),
        (lambda p: _prisma(p, hook_point_head_index=2), "reads one attention head"),
        (lambda p: _prisma(p, layer_subtype="ln2.hook_normalized"), "'blocks.8.ln2.hook_normalized', which is no site"),
        (_without, "there is no config.json beside it"),
        (_renamed, "not of the schema Prisma standard: with W_skip; check format"),
        (_transposed, r"W_enc has shape \(40, 12\), but 12 dimensions .* need \(12, 40\); it is transposed"),
        (_pickled, "holds more than tensors .code or objects. and is not loaded"),
        (lambda p: _visae(p, activation="gelu"), "activation 'gelu' is not known; known: topk, batchtopk, jumprelu"),
        (lambda p: _visae(p, k=None), "have no k, which topk needs"),
        (lambda p: _visae(p, k=F + 1), "k = 41 does not fit 40 latents"),
        (lambda p: _dictionary(p, dict_class="CrossCoder"), "dict_class 'CrossCoder' is not known; known: AutoEncoder"),
        (lambda p: load("saelens", files.prisma(p, files.weights()).path), "called sae_weights.safetensors"),
    ],
)
def test_what_is_not_known_is_refused_by_name(call: Callable[[Path], Foreign], message: str, tmp_path: Path) -> None:
    with pytest.raises(SparsightError, match=message):
        call(tmp_path)


def test_visaebench_reads_the_threshold_among_the_tensors(tmp_path: Path) -> None:
    written, x = files.visaebench(tmp_path, files.weights(), "batchtopk", overcomplete=True), draw(50, D)
    (tmp_path / "config.json").write_text(json.dumps({"sae_type": "BatchTopK"}))
    save_file(load_file(written.path) | {"_running_threshold": torch.tensor(0.5)}, written.path)
    torch.testing.assert_close(load("visaebench", written.path).sae.encode(x).dense(), written.encode(x))


SAVED = Path(__file__).parent / "foreign"


@pytest.mark.parametrize("name", sorted(path.stem for path in SAVED.glob("*.pt")))
def test_files_that_tools_saved_are_read_with_the_codes_that_they_computed(name: str) -> None:
    """Of tests/foreign_fixtures.py: saev 0.1.0 and of today, and Prisma with its settings as an object inside."""
    found = load(name.partition("-")[0], SAVED / f"{name}.pt")
    theirs = load_file(SAVED / f"{name}.safetensors")
    torch.testing.assert_close(found.sae.encode(theirs["x"]).dense(), theirs["codes"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found.sae(theirs["x"]), theirs["x_hat"], rtol=1e-5, atol=1e-5)
    assert found.site == ("blocks.3.output" if name.startswith("prisma") else None)
