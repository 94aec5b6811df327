"""Export to and import from the folder format of SAELens 6 (cfg.json, sae_weights.safetensors).

SAELens has no Switch SAE. It runs BatchTopK and Matryoshka SAEs as JumpReLU with one threshold for all latents, which
is the same at inference. An exported SAE of these two kinds is therefore imported as JumpReLU.

Shapes: D width (d_in), F latents (d_sae).
"""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsight.common.errors import SparsightError
from sparsight.common.files import write_json
from sparsight.sae.base import SAE, create

_ARCHITECTURE = {
    "relu": "standard", "gated": "gated", "jumprelu": "jumprelu", "topk": "topk",
    "batchtopk": "jumprelu", "matryoshka": "jumprelu",
}  # fmt: skip
_KIND = {"standard": "relu", "gated": "gated", "jumprelu": "jumprelu", "topk": "topk"}


def export(sae: SAE, folder: str | Path) -> None:
    """Write ``sae`` so that ``sae_lens.SAE.load_from_disk(folder)`` encodes and decodes as it does.

    Raises:
        SparsightError: SAELens does not know the variant, or a BatchTopK SAE has no threshold yet.
    """
    if sae.kind not in _ARCHITECTURE:
        raise SparsightError(f"SAELens has no {sae.kind!r}; these can be exported: {', '.join(_ARCHITECTURE)}")
    weights = {name: value.float().contiguous() for name, value in sae.state_dict().items()}
    if "theta" in weights:
        weights["threshold"] = weights.pop("theta")
    elif "threshold" in weights:
        if weights["threshold"] < 0:
            raise SparsightError(f"this {sae.kind} SAE has no inference threshold yet; train it before the export")
        weights["threshold"] = weights["threshold"].repeat(sae.d_sae)
    config = {
        "architecture": _ARCHITECTURE[sae.kind],
        "d_in": sae.d_in,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"hook_name": sae.about.get("site"), "model_name": sae.about.get("backbone"), "k": sae.k},
    }
    if sae.kind == "topk":
        config |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "sae_weights.safetensors")
    write_json(folder / "cfg.json", config)


def load(folder: str | Path) -> SAE:
    """The SAE of a SAELens folder, with the same codes and reconstructions.

    Decoder rows keep their norm, unless SAELens rescales activations by it. If the variant has no k, ``k`` comes from
    the metadata of our own export, or is d_sae.

    Raises:
        SparsightError: no such folder, or an architecture or setting that has no counterpart here.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "cfg.json").read_text())
        weights = {name: value.float() for name, value in load_file(folder / "sae_weights.safetensors").items()}
    except OSError as error:
        raise SparsightError(f"{folder}: no SAELens SAE here ({error})") from None
    architecture = config.get("architecture", "standard")
    if architecture not in _KIND:
        raise SparsightError(
            f"{folder}: architecture {architecture!r} has no counterpart here; known: {', '.join(_KIND)} "
            "(save a trained SAE with SAELens's save_inference_model)"
        )
    for setting in ("normalize_activations", "reshape_activations"):
        if config.get(setting, "none") != "none":
            raise SparsightError(
                f"{folder}: {setting} = {config[setting]!r}; fold it into the weights in SAELens first"
            )
    if config.get("rescale_acts_by_decoder_norm"):
        norm_F = weights["W_dec"].norm(dim=1)
        weights["W_enc"], weights["b_enc"] = weights["W_enc"] * norm_F, weights["b_enc"] * norm_F
        weights["W_dec"] = weights["W_dec"] / norm_F.unsqueeze(1)
    if not config.get("apply_b_dec_to_input", True):
        subtract_b_dec_first(weights)
    if architecture == "jumprelu":
        weights["theta"] = weights.pop("threshold").clamp(min=0)  # SAELens also applies a ReLU
    k = config.get("k") or config.get("metadata", {}).get("k") or config["d_sae"]
    sae = create(_KIND[architecture], config["d_in"], config["d_sae"], k)
    sae.load_state_dict(weights)
    return sae


def subtract_b_dec_first(weights: dict[str, Tensor]) -> None:
    """Rewrite the encoder x W + b as (x - b_dec) W + (b + b_dec W)."""
    shift_F = weights["b_dec"] @ weights["W_enc"]
    for name in ("b_enc", "b_gate"):
        if name in weights:
            weights[name] = weights[name] + shift_F
    if "b_mag" in weights:
        weights["b_mag"] = weights["b_mag"] + torch.exp(weights["r_mag"]) * shift_F
