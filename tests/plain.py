"""Every SAE variant as plain dense PyTorch, written from the papers alone: what sparsight is compared with.

Shapes: B batch, D width (d_in), F latents (d_sae), K active latents (k), E experts.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

Parameters = dict[str, Tensor]


@dataclasses.dataclass
class Setting:
    """What a formula needs beside parameters and activations."""

    kind: str
    d_sae: int
    k: int
    aux_k: int
    loss_scale: float
    dead: Tensor
    sparsity: float = 0.1
    points: Tensor | None = None


def pre(p: Parameters, x: Tensor) -> Tensor:
    return (x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]


def squared(setting: Setting, error: Tensor) -> Tensor:
    return error.square().sum(dim=1).mean() * setting.loss_scale


def selected(setting: Setting, p: Parameters, x: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    return pre(p, x).relu() * chosen, x.new_zeros(())


def matryoshka(setting: Setting, p: Parameters, x: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    z, penalty = selected(setting, p, x, chosen)
    for end in {math.ceil(share * setting.d_sae) for share in (1 / 32, 3 / 32, 7 / 32, 15 / 32)}:
        penalty = penalty + squared(setting, x - z[:, :end] @ p["W_dec"][:end] - p["b_dec"])
    return z, penalty


def relu(setting: Setting, p: Parameters, x: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    z = pre(p, x).relu()
    return z, setting.sparsity * math.sqrt(setting.loss_scale) * z.sum(dim=1).mean()


def gated(setting: Setting, p: Parameters, x: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    h = (x - p["b_dec"]) @ p["W_enc"]
    gate = (h + p["b_gate"]).relu()
    z = (p["r_mag"].exp() * h + p["b_mag"]).relu() * (gate > 0)
    error = x - gate @ p["W_dec"].detach() - p["b_dec"].detach()
    return z, setting.sparsity * math.sqrt(setting.loss_scale) * gate.sum(dim=1).mean() + squared(setting, error)


def jumprelu(setting: Setting, p: Parameters, x: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The published pseudo-gradients, as the slopes of functions that are linear in theta around its value."""
    h, theta, width = pre(p, x), p["theta"], 0.05 / math.sqrt(setting.loss_scale)
    now = theta.detach()
    active, near = (h > now).to(h.dtype), ((h - now).abs() < width / 2).to(h.dtype)
    step = active - near / width * (theta - now)
    jump = h * active - now / width * near * (theta - now)
    return jump, (step.sum() / (len(x) * setting.k) - 1).square()


def route(p: Parameters, x: Tensor, d_sae: int) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities (B, E), the expert (B,) and which latents are its own (B, F)."""
    probability = ((x - p["b_router"]) @ p["W_router"]).softmax(dim=1)
    expert = probability.argmax(dim=1)
    return probability, expert, torch.arange(d_sae) // (d_sae // probability.shape[1]) == expert.unsqueeze(1)


def switch(setting: Setting, p: Parameters, x: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    probability, expert, inside = route(p, x, setting.d_sae)
    z = ((x - p["b_dec"]) @ p["W_enc"]).relu() * chosen * inside * probability.max(dim=1, keepdim=True).values
    share = torch.nn.functional.one_hot(expert, probability.shape[1]).to(x.dtype).mean(dim=0)
    return z, 0.025 * probability.shape[1] * (share * probability.mean(dim=0)).sum()


# From parameters, activations and the (B, F) mask of chosen latents to codes and the weighted loss term of the
# variant's own. A new variant adds its own here.
FORMULAS: dict[str, Callable[[Setting, Parameters, Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "topk": selected, "batchtopk": selected, "matryoshka": matryoshka, "relu": relu, "gated": gated,
    "jumprelu": jumprelu, "switch": switch, "archetypal": selected,
}  # fmt: skip
WITH_AUXK = ("topk", "batchtopk", "matryoshka", "switch", "archetypal")


def decoder(setting: Setting, p: Parameters) -> Tensor:
    """Decoder rows (F, D)."""
    if setting.kind != "archetypal":
        return p["W_dec"]
    assert setting.points is not None
    return p["log_scale"].exp() * (p["weights"] @ setting.points.to(p["weights"].dtype) + p["deviation"])


def everything(setting: Setting, p: Parameters, x: Tensor) -> Tensor:
    """Codes (B, F) before any selection; of a Switch SAE, those of the routed expert."""
    chosen = torch.ones(len(x), setting.d_sae, dtype=x.dtype)
    return FORMULAS["switch" if setting.kind == "switch" else "topk"](setting, p, x, chosen)[0]


def top(z: Tensor, k: int) -> Tensor:
    """Which entries are the k largest of their row."""
    return torch.zeros_like(z, dtype=torch.bool).scatter(1, z.topk(k, dim=1).indices, True)


def choose(setting: Setting, p: Parameters, x: Tensor) -> Tensor:
    """The (B, F) mask of chosen latents, where a variant chooses."""
    if setting.kind not in WITH_AUXK:
        return torch.ones(len(x), setting.d_sae)
    z = everything(setting, p, x)
    if setting.kind in ("topk", "switch", "archetypal"):
        return top(z, setting.k)
    return top(z.view(1, -1), len(x) * setting.k).view_as(z)


def loss(setting: Setting, p: Parameters, x: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, reconstruction and total loss."""
    z, penalty = FORMULAS[setting.kind](setting, p, x, chosen)
    W_dec = decoder(setting, p)
    x_hat = z @ W_dec + p["b_dec"]
    total = squared(setting, x - x_hat) + penalty
    residual = (x - x_hat).detach()
    variance = (residual - residual.mean(dim=0)).square().sum()
    if setting.kind in WITH_AUXK and setting.dead.any() and variance > 1e-9:
        dead = everything(setting, p, x) * setting.dead
        dead = dead * top(dead.detach(), min(setting.aux_k, setting.d_sae))
        total = total + (dead @ W_dec - residual).square().sum() / variance / 32
    return z, x_hat, total


def train(setting: Setting, p: Parameters, batches: Iterator[tuple[float, Tensor]], lr: float, dead_after: int) -> None:
    """Plain training of ``p`` in place; ``batches`` yields the learning rate's factor and activations."""
    adam = torch.optim.Adam(p.values(), lr=lr, eps=6.25e-10)
    since_fired = torch.zeros(setting.d_sae)
    for factor, x in batches:
        adam.param_groups[0]["lr"] = lr * factor
        with torch.no_grad():
            chosen = choose(setting, p, x)
        z, _, total = loss(setting, p, x, chosen)
        adam.zero_grad()
        total.backward()
        W_dec: Any = p["W_dec"]
        with torch.no_grad():
            W_dec.grad -= (W_dec.grad * W_dec).sum(dim=1, keepdim=True) * W_dec
            torch.nn.utils.clip_grad_norm_(p.values(), 1.0)
            adam.step()
            W_dec /= W_dec.norm(dim=1, keepdim=True)
            if "theta" in p:
                p["theta"].clamp_(min=0)
            since_fired = torch.where((z > 0).any(dim=0), 0, since_fired + len(x))
            setting.dead = since_fired >= dead_after
            too_many = math.log(max(float((z > 0).sum(dim=1).float().mean()) / setting.k, 1e-3))
            setting.sparsity *= math.exp(0.02 * min(max(too_many, -1), 1))
