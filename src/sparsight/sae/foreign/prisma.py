"""SAEs of Prisma (vit_prisma): weights.pt, with config.json beside it or the settings inside.

standard: z = activation((x - b_dec) W_enc + b_enc),  x_hat = z W_dec + b_dec, all as (d_in, d_sae).
gated: z = 1[h + b_gate > 0] * ReLU(exp(r_mag) * h + b_mag) with h = (x - b_dec) W_enc; b_enc is stored, but not used.

The format's traps:

- hook_resid_post of block N is our blocks.N.output, hook_resid_pre is blocks.N.input.
- ``normalize_activations`` other than none (layer_norm, constant_norm_rescale) scales every activation by its own
  statistics. No weights are equal to this, so such files are refused.
- Prisma's settings, if inside, are an object of its class. Their fields are read, its code is not run.
- ``topk`` keeps the k largest and then applies a ReLU, which is ours. k is 64 if ``activation_fn_kwargs`` has none.
"""

from pathlib import Path
from typing import Any

import torch

from sparsight.backbones.weights import read_weights
from sparsight.common.errors import SparsightError
from sparsight.sae.foreign.source import Foreign, build, expect, settings_beside, site_of

_NAMES = {
    "standard": {"W_enc", "b_enc", "W_dec", "b_dec"},
    "gated": {"W_enc", "b_gate", "r_mag", "b_mag", "W_dec", "b_dec"},
}


class _Settings:
    """Stands for Prisma's class of settings, so that the restricted unpickler takes it. It has no code."""


_CLASS: Any = (_Settings, "vit_prisma.sae.config.VisionModelSAERunnerConfig")


def load(path: Path) -> Foreign:
    """The SAE of a Prisma file.

    Raises:
        SparsightError: another kind of file, or a setting that has no counterpart here.
    """
    with torch.serialization.safe_globals([_CLASS]):
        weights = read_weights(path)
        inside = {} if path.suffix == ".safetensors" else torch.load(path, map_location="cpu", weights_only=True)
    settings = _settings(inside["cfg"]) if "cfg" in inside else settings_beside(path, "config.json")
    architecture = settings.get("architecture", "standard")
    if architecture not in _NAMES:
        raise SparsightError(f"{path}: Prisma's architecture {architecture!r} is not known; known: {', '.join(_NAMES)}")
    if settings.get("is_transcoder"):
        raise SparsightError(f"{path}: a transcoder, which maps one place to another; only SAEs can be imported")
    if settings.get("hook_point_head_index") is not None:
        raise SparsightError(f"{path}: reads one attention head, which is no site here")
    if (normalised := settings.get("normalize_activations")) not in (None, "", "none"):
        raise SparsightError(
            f"{path}: normalize_activations = {normalised!r} scales each activation by its own statistics, which no "
            "weights express; such an SAE cannot be imported"
        )
    function, arguments = settings.get("activation_fn_str"), settings.get("activation_fn_kwargs") or {}
    if function not in ("relu", "topk") or (architecture == "gated" and function != "relu"):
        raise SparsightError(
            f"{path}: activation {function!r} of the {architecture} architecture has no counterpart here"
        )
    unused = {"b_enc"} if architecture == "gated" else set()
    expect(path, f"Prisma {architecture}", weights, _NAMES[architecture], unused)
    kind = "gated" if architecture == "gated" else function
    k = int(arguments.get("k", 64)) if function == "topk" else None
    sae = build(path, kind, k, {name: weights[name] for name in _NAMES[architecture]})
    layer = settings.get("hook_point_layer")
    hook = f"blocks.{layer}.{settings.get('layer_subtype')}" if layer is not None else None
    return Foreign(sae, site_of(path, hook), hook)


def _settings(inside: Any) -> dict[str, Any]:
    return inside if isinstance(inside, dict) else vars(inside)
