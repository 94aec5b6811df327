"""SAEs of dictionary_learning: ae.pt, with config.json beside it.

z = activation((x - b) W + c),  x_hat = z D + b. ``trainer.dict_class`` of the settings says which names this has.

The format's traps:

- nn.Linear stores (out, in): encoder.weight is (d_sae, d_in), decoder.weight (d_in, d_sae). JumpReLU and Matryoshka
  SAEs have W_enc (d_in, d_sae) and W_dec (d_sae, d_in).
- AutoEncoderNew and JumpReluAutoEncoder subtract nothing from the input. Here their bias is folded into b_enc.
- ``normalize_activations`` divides by one number in training. Biases and thresholds are multiplied with it before they
  are saved, so ``norm_factor`` in the settings is not applied again.
- AutoEncoder is scaled to decoder rows of unit norm when it is loaded, also here.
- AutoEncoderTopK has a threshold, which its encoder does not use. BatchTopKSAE and MatryoshkaBatchTopKSAE use theirs;
  -1 means that training has not set it, and all positive codes are kept.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsight.backbones.weights import read_weights
from sparsight.common.errors import SparsightError
from sparsight.sae.foreign.source import Foreign, build, expect, settings_beside
from sparsight.sae.saelens import subtract_b_dec_first

_LINEAR = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec"}
_OURS = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
_GATED = {
    "encoder.weight": "W_enc", "decoder.weight": "W_dec", "decoder_bias": "b_dec", "r_mag": "r_mag",
    "gate_bias": "b_gate", "mag_bias": "b_mag",
}  # fmt: skip
_CLASSES: dict[str, tuple[str, dict[str, str]]] = {
    "AutoEncoder": ("relu", _LINEAR | {"bias": "b_dec"}),
    "AutoEncoderNew": ("relu", _LINEAR | {"decoder.bias": "b_dec"}),
    "GatedAutoEncoder": ("gated", _GATED),
    "AutoEncoderTopK": ("topk", _LINEAR | {"b_dec": "b_dec"}),
    "BatchTopKSAE": ("batchtopk", _LINEAR | {"b_dec": "b_dec", "threshold": "threshold"}),
    "MatryoshkaBatchTopKSAE": ("matryoshka", _OURS | {"threshold": "threshold"}),
    "JumpReluAutoEncoder": ("jumprelu", _OURS | {"threshold": "theta"}),
}
_PLACES = {"resid_pre": "input", "resid_post": "output", "attn_out": "attn", "mlp_out": "mlp"}


def load(path: Path) -> Foreign:
    """The SAE of a dictionary_learning folder.

    Raises:
        SparsightError: another kind of file, or a class that is not known.
    """
    trainer = settings_beside(path, "config.json").get("trainer") or {}
    name = trainer.get("dict_class")
    if name not in _CLASSES:
        raise SparsightError(f"{path}: dict_class {name!r} is not known; known: {', '.join(_CLASSES)}")
    kind, renamed = _CLASSES[name]
    found = read_weights(path)
    expect(path, f"dictionary_learning {name}", found, set(renamed), {"k", "threshold", "group_sizes"})
    weights = {ours: found[theirs] for theirs, ours in renamed.items()}
    if "encoder.weight" in renamed:
        weights["W_enc"], weights["W_dec"] = weights["W_enc"].T, weights["W_dec"].T
    if name == "AutoEncoder":
        _normalise(weights)
    if name in ("AutoEncoderNew", "JumpReluAutoEncoder"):
        subtract_b_dec_first(weights)
    for threshold in ("theta", "threshold"):
        if threshold in weights:
            weights[threshold] = weights[threshold].clamp(min=0)  # a ReLU comes with it
    options: dict[str, Any] = {}
    if kind == "matryoshka":
        options["prefixes"] = (found["group_sizes"].cumsum(0) / found["group_sizes"].sum()).tolist()
    k = int(found.get("k", trainer.get("k", 0))) if kind == "topk" else None
    site = _site(trainer)
    return Foreign(build(path, kind, k, weights, **options), site, site and f"layer {trainer['layer']}")


def _normalise(weights: dict[str, Tensor]) -> None:
    """Give decoder rows unit norm without a change of the reconstruction."""
    norm_F = weights["W_dec"].norm(dim=1)
    if not torch.allclose(norm_F, torch.ones_like(norm_F)):
        weights["W_dec"] = weights["W_dec"] / norm_F[:, None]
        weights["W_enc"], weights["b_enc"] = weights["W_enc"] * norm_F, weights["b_enc"] * norm_F


def _site(trainer: dict[str, Any]) -> str | None:
    """Our site, if the settings name one: a layer's residual stream after it, unless the submodule says otherwise."""
    layer, module = trainer.get("layer"), str(trainer.get("submodule_name") or "resid_post")
    part = next((ours for theirs, ours in _PLACES.items() if theirs in module), None)
    if part is None or re.search(r"\d", str(layer)) is None:
        return None
    return f"blocks.{layer}.{part}"
