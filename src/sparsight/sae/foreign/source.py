"""What the loaders of other tools' files share: reading without running code, sites, and building our SAE.

A loader is a module named as its format, with ``load(path) -> Foreign``. It reads ``path`` and files beside it.

Shapes: D width (d_in), F latents (d_sae).
"""

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from sparsight.common.errors import SparsightError, reason
from sparsight.sae.base import SAE, create

# Hook points of TransformerLens, which SAELens and Prisma use. resid_post of a block is its output.
_HOOKS = {"hook_resid_pre": "input", "hook_resid_post": "output", "hook_attn_out": "attn", "hook_mlp_out": "mlp"}
_HOOK = re.compile(r"blocks\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Foreign:
    """An SAE of another tool."""

    sae: SAE
    """With the codes and reconstructions that the tool itself computes, in its units."""
    site: str | None = None
    """The place that the file names, as one of our sites; None if it names none."""
    named: str | None = None
    """What the file calls the place."""
    signed: bool = False
    """Whether the tool's TopK also keeps negative pre-activations, which ours never does."""


def site_of(where: Path, hook: str | None) -> str | None:
    """Our site of a hook point of TransformerLens, or of a name as ours.

    Raises:
        SparsightError: a hook point that is none of our sites.
    """
    if hook is None:
        return None
    match = _HOOK.fullmatch(hook)
    part = match and _HOOKS.get(match[2], match[2] if match[2] in _HOOKS.values() else None)
    if not (match and part):
        raise SparsightError(
            f"{where}: reads {hook!r}, which is no site here; sites are {', '.join(_HOOKS)} of a block"
        )
    return f"blocks.{match[1]}.{part}"


def settings_beside(path: Path, *names: str) -> dict[str, Any]:
    """The first of the files ``names`` (JSON or YAML) in the folder of ``path``.

    Raises:
        SparsightError: none of them, or one that holds no mapping.
    """
    file = next((path.parent / name for name in names if (path.parent / name).is_file()), None)
    if file is None:
        raise SparsightError(f"{path}: there is no {' or '.join(names)} beside it; copy the tool's whole folder")
    try:
        text = file.read_text()
        settings = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, OSError, yaml.YAMLError) as error:
        raise SparsightError(f"{file}: not readable ({reason(error)})") from None
    if not isinstance(settings, dict):
        raise SparsightError(f"{file}: holds no settings, but {type(settings).__name__}")
    return settings


def expect(
    where: Path, schema: str, found: Iterable[str], needed: Collection[str], ignored: Collection[str] = ()
) -> None:
    """Check the names of a file's tensors.

    Raises:
        SparsightError: a name is missing or unknown.
    """
    missing, unknown = sorted(set(needed) - set(found)), sorted(set(found) - set(needed) - set(ignored))
    if missing or unknown:
        wrong = [f"without {', '.join(missing)}"] * bool(missing) + [f"with {', '.join(unknown)}"] * bool(unknown)
        raise SparsightError(f"{where}: not of the schema {schema}: {' and '.join(wrong)}; check format")


def build(where: Path, kind: str, k: int | None, weights: Mapping[str, Tensor], **options: Any) -> SAE:
    """Our SAE with these parameters and buffers.

    Args:
        where: the file, for messages.
        kind: the variant.
        k: active latents; None for a kind without a fixed number, until it is measured.
        weights: by our names; W_enc is (D, F).
        options: of the variant.

    Raises:
        SparsightError: shapes that do not fit together.
    """
    b_latents = weights["b_gate" if kind == "gated" else "b_enc"]
    d_in, d_sae = weights["b_dec"].numel(), b_latents.numel()
    if k is not None and not 1 <= k <= d_sae:
        raise SparsightError(f"{where}: k = {k} does not fit {d_sae} latents")
    sae = create(kind, d_in, d_sae, d_sae if k is None else k, **options)
    for name, own in sae.state_dict().items():
        if weights[name].shape != own.shape:
            turned = "; it is transposed" if weights[name].shape == own.shape[::-1] and own.ndim == 2 else ""
            raise SparsightError(
                f"{where}: {name} has shape {tuple(weights[name].shape)}, but {d_in} dimensions and {d_sae} latents "
                f"(of the biases) need {tuple(own.shape)}{turned}"
            )
    sae.load_state_dict({name: value.float().contiguous() for name, value in weights.items()})
    return sae.requires_grad_(False)


@torch.no_grad()
def fold_inputs(sae: SAE, mean_D: Tensor, scale: float) -> None:
    """Turn an SAE of (x - mean) / scale into one of x with the same codes, whose output is in the units of x."""
    sae.W_enc.div_(scale)
    sae.W_dec.mul_(scale)
    sae.b_dec.copy_(sae.b_dec * scale + mean_D)
