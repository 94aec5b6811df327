"""Why an imported SAE may not fit the activations: another site, other inputs, other orientation of the weights.

Shapes: N rows, D width (d_in).
"""

import copy
import math
from collections.abc import Callable

import torch
from torch import Tensor

from sparsight.activations.store import ActivationStore
from sparsight.common.errors import SparsightError
from sparsight.common.progress import followed
from sparsight.common.slices import row_slices
from sparsight.sae.base import SAE
from sparsight.sae.foreign.source import fold_inputs

_ENTRIES = 2**24  # codes at a time


def rows(store: ActivationStore, site: str, tokens: str | None, n: int, device: torch.device) -> Tensor:
    """The first activations of a site, float32 (N, D); images lie in random order.

    Raises:
        SparsightError: none are stored, or not finite ones.
    """
    x_ND = torch.from_numpy(store.rows(site, tokens)[:n]).to(device).float()
    if not len(x_ND):
        raise SparsightError(f"{store.path}: site {site!r} holds no activations; extract a split that has images")
    return x_ND


def fit(sae: SAE, x_ND: Tensor) -> tuple[float, Tensor]:
    """FVU over these rows, sum ||x - x_hat||^2 / sum ||x - mean||^2, and the number of active latents of each, (N,)."""
    error, l0 = 0.0, []
    for part in row_slices(len(x_ND), max(1, _ENTRIES // sae.d_sae)):
        codes = sae.encode(x_ND[part])
        error += float((x_ND[part] - sae.decode(codes)).double().square().sum())
        l0.append(codes.l0())
    variance = float((x_ND.double() - x_ND.double().mean(dim=0)).square().sum())
    return error / variance if variance else math.inf, torch.cat(l0)


def normalization(x_ND: Tensor, rms: bool) -> tuple[Tensor, float]:
    """The mean (D,) of activations, and their distance from it over sqrt(D): its mean, or its root mean square.

    The first is how saev 0.1.0 scales its inputs, the second how visaebench does.
    """
    mean_D = x_ND.double().mean(dim=0)
    distance_N = (x_ND.double() - mean_D).norm(dim=1)
    scale = (distance_N.square().mean().sqrt() if rms else distance_N.mean()) / x_ND.shape[1] ** 0.5
    return mean_D.float(), float(scale)


def elsewhere(sae: SAE, store: ActivationStore, site: str, tokens: str, n: int) -> dict[str, float]:
    """FVU at the other stored sites of the same width, with the same tokens where they are stored."""
    found = {}
    for other in followed(store.sites, len(store.sites), "sites"):
        if other == site:
            continue
        try:
            x_ND = rows(store, other, tokens, n, sae.W_dec.device)
        except SparsightError:  # other tokens are stored there
            x_ND = rows(store, other, None, n, sae.W_dec.device)
        if x_ND.shape[1] == sae.d_in:
            found[f"at {other}"] = fit(sae, x_ND)[0]
    return found


def misread(sae: SAE, x_ND: Tensor, normalized: bool, rms: bool) -> dict[str, float]:
    """FVU if the tool had scaled its inputs (or not), treated b_dec otherwise, or stored its weights otherwise."""
    mean_D, scale = normalization(x_ND, rms)
    if normalized:
        mean_D, scale = -mean_D / scale, 1 / scale
    changes: dict[str, Callable[[SAE], None]] = {
        f"with normalized: {str(not normalized).lower()}": lambda one: fold_inputs(one, mean_D, scale),
        "with encoder and decoder exchanged": _exchange,
        "without b_dec subtracted from the input": lambda one: _shift(one, 1),
        "with b_dec subtracted from the input": lambda one: _shift(one, -1),
    }
    if sae.d_in == sae.d_sae:
        changes["with the encoder transposed"] = lambda one: _transpose(one, "W_enc")
        changes["with the decoder transposed"] = lambda one: _transpose(one, "W_dec")
        changes["with encoder and decoder transposed"] = lambda one: _transpose(one, "W_enc", "W_dec")
    found = {}
    for what, change in followed(changes.items(), len(changes), "readings of the weights"):
        one = copy.deepcopy(sae)
        change(one)
        found[what] = fit(one, x_ND)[0]
    own = (x_ND - x_ND.mean(dim=1, keepdim=True)) / x_ND.std(dim=1, keepdim=True).clamp(min=1e-6)
    found["of activations that are each scaled by their own mean and deviation, which cannot be imported,"] = fit(
        sae, own
    )[0]
    return found


def better(found: dict[str, float], than: float) -> list[tuple[str, float]]:
    """The three smallest of these FVUs, of those below ``than``."""
    return sorted(((what, value) for what, value in found.items() if value < than), key=lambda pair: pair[1])[:3]


def _exchange(sae: SAE) -> None:
    encoder = sae.W_enc.clone()
    sae.W_enc.copy_(sae.W_dec.T)
    sae.W_dec.copy_(encoder.T)


def _transpose(sae: SAE, *names: str) -> None:
    for name in names:
        weight = getattr(sae, name)
        weight.copy_(weight.T.clone())


def _shift(sae: SAE, sign: int) -> None:
    """Add ``sign`` times what b_dec adds to pre-activations."""
    shift_F = sign * (sae.b_dec @ sae.W_enc)
    for name in ("b_enc", "b_gate"):
        if hasattr(sae, name):
            getattr(sae, name).add_(shift_F)
    if sae.kind == "gated":
        sae.get_parameter("b_mag").add_(sae.get_parameter("r_mag").exp() * shift_F)
