"""SAEs of ViSAE-Bench: sae.pt or model.safetensors, with config.json (or .yaml) beside it.

h = ReLU(x W + b),  z = activation(h),  x_hat = z D (+ decoder.bias). Weights are stored as (d_sae, d_in).

The format's traps:

- The encoder subtracts nothing. Here the decoder's bias is folded into b_enc.
- ``batchtopk`` keeps h >= threshold, ours h > threshold, so the next smaller number is taken. ``jumprelu`` keeps
  h > theta.
- The threshold is in the settings or, named ``_running_threshold``, among the tensors; without either it is 0.
- ``overcomplete`` files have other names, no bias, and a decoder to be multiplied with exp(multiplier).
- The SAE is applied to (x - mean) / s with one s, the root mean square of x - mean. The file does not hold these
  numbers. The setting ``normalized`` takes them from the train split.
- Activations of its DINOv2 are after the model's final norm, which is no site but ``embedding``.
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsight.backbones.weights import read_weights
from sparsight.common.errors import SparsightError
from sparsight.sae.foreign.source import Foreign, build, expect, settings_beside, site_of
from sparsight.sae.saelens import subtract_b_dec_first

_KINDS = ("topk", "batchtopk", "jumprelu")
_OWN = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec"}
_OVERCOMPLETE = {
    "encoder.final_block.0.weight": "W_enc", "encoder.final_block.0.bias": "b_enc", "dictionary._weights": "W_dec",
}  # fmt: skip
_JUMPS = ("jump_thresholds", "thresholds")


def load(path: Path) -> Foreign:
    """The SAE of a ViSAE-Bench folder.

    Raises:
        SparsightError: another kind of file, or an activation that is not known.
    """
    settings = settings_beside(path, "config.json", "config.yaml", "config.yml")
    names = ("activation", "sae_type", "architecture")
    kind = str(next((settings[name] for name in names if name in settings), "topk")).lower()
    if kind not in _KINDS:
        raise SparsightError(f"{path}: ViSAE-Bench's activation {kind!r} is not known; known: {', '.join(_KINDS)}")
    found = read_weights(path)
    own = "encoder.weight" in found
    renamed = _OWN if own else _OVERCOMPLETE
    rest = {"decoder.bias"} if own else {"dictionary.multiplier"}
    expect(path, f"ViSAE-Bench {kind}", found, set(renamed), rest | {"_running_threshold", *_JUMPS})
    weights = {name: found[theirs] for theirs, name in renamed.items()}
    weights["W_enc"] = weights["W_enc"].T
    weights["b_dec"] = found.get("decoder.bias", torch.zeros(weights["W_dec"].shape[-1]))
    if "dictionary.multiplier" in found:
        weights["W_dec"] = weights["W_dec"] * found["dictionary.multiplier"].exp()
    weights |= _thresholds(kind, settings, found, len(weights["b_enc"]))
    k = settings.get("k")
    if kind == "topk" and k is None:
        raise SparsightError(f"{path}: its settings have no k, which topk needs; add it to the file beside it")
    if weights["b_dec"].any():
        subtract_b_dec_first(weights)
    layer = settings.get("layer")
    hook = f"blocks.{layer}.output" if isinstance(layer, int) and layer >= 0 else None
    return Foreign(build(path, kind, k if kind == "topk" else None, weights), site_of(path, hook), hook)


def _thresholds(kind: str, settings: dict[str, Any], found: dict[str, Tensor], d_sae: int) -> dict[str, Tensor]:
    """The parameter of the activation, by our name."""
    if kind == "jumprelu":
        theta_F = next((found[name] for name in _JUMPS if name in found), torch.full((d_sae,), 0.01))
        return {"theta": theta_F.clamp(min=0)}  # the ReLU before it
    if kind == "batchtopk":
        given = settings.get("threshold")
        threshold = torch.tensor(float(found.get("_running_threshold", 0.0) if given is None else given))
        if threshold <= 0:
            return {"threshold": torch.tensor(0.0)}
        return {"threshold": torch.nextafter(threshold, torch.tensor(-math.inf))}
    return {}
