"""Files of other tools' SAEs, written by hand in their schemas, and what each tool computes from them.

Shapes: D width (d_in), F latents (d_sae).
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

D, F, K = 12, 40, 5
Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Written:
    """A file, and the tool's own encoder and decoder."""

    path: Path
    encode: Function
    decode: Function
    kind: str


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def weights(d_in: int = D, d_sae: int = F) -> dict[str, Tensor]:
    """Parameters under our names, with decoder rows of many norms and biases of both signs."""
    W_dec = draw(d_sae, d_in, seed=1) * torch.linspace(0.2, 0.6, d_sae)[:, None]
    W_enc = (W_dec.T + 0.1 * draw(d_in, d_sae)).contiguous()
    return {"W_enc": W_enc, "W_dec": W_dec, "b_enc": 0.2 * draw(d_sae), "b_dec": 0.3 * draw(d_in)}


def topk(h: Tensor, k: int) -> Tensor:
    top = h.topk(k, dim=1)
    return torch.zeros_like(h).scatter(1, top.indices, top.values)


def above(h: Tensor, threshold: Tensor | float) -> Tensor:
    return h * (h > threshold)


def coders(w: dict[str, Tensor], activation: Function, subtract: bool) -> tuple[Function, Function]:
    b_dec = w["b_dec"]
    return (
        lambda x: activation(((x - b_dec) if subtract else x) @ w["W_enc"] + w["b_enc"]),
        lambda z: z @ w["W_dec"] + b_dec,
    )


def saev(folder: Path, header: dict[str, Any], activation: str, subtract: bool, w: dict[str, Tensor]) -> Written:
    if activation == "TopK":
        w = w | {"b_enc": w["b_enc"] + 6}  # so that no row has fewer than K positive pre-activations
    theta = torch.tensor(0.4)
    functions: dict[str, Function] = {
        "Relu": torch.relu, "TopK": lambda h: topk(h, K), "BatchTopK": lambda h: above(h, theta),
    }  # fmt: skip
    state = w | ({"activation.threshold": theta} if activation == "BatchTopK" else {})
    path = folder / "sae.pt"
    with path.open("wb") as file:
        file.write((json.dumps(header) + "\n").encode())
        torch.save(state, file)
    return Written(path, *coders(w, functions[activation], subtract), activation.lower())


def saev_header(schema: int, activation: str) -> dict[str, Any]:
    about = {"cls": activation, "params": {"key": "", "top_k": K} if activation != "Relu" else {}}
    return {"schema": schema, "cfg": {"d_model": D, "d_sae": F, "activation": about}, "commit": "0", "lib": "0.1"}


def prisma(folder: Path, w: dict[str, Tensor], **settings: Any) -> Written:
    base = {
        "architecture": "standard", "activation_fn_str": "relu", "activation_fn_kwargs": {}, "is_transcoder": False,
        "hook_point_layer": 8, "layer_subtype": "hook_resid_post", "normalize_activations": "none", "d_in": D,
    }  # fmt: skip
    settings = {**base, **settings}
    (folder / "config.json").write_text(json.dumps(settings))
    path = folder / "weights.pt"
    if settings["architecture"] == "gated":
        gate, mag, r = draw(F, seed=5), draw(F, seed=6), 0.3 * draw(F, seed=7)
        torch.save(w | {"b_gate": gate, "b_mag": mag, "r_mag": r}, path)

        def encode(x: Tensor) -> Tensor:
            h = (x - w["b_dec"]) @ w["W_enc"]
            return (h + gate > 0) * ((x - w["b_dec"]) @ (w["W_enc"] * r.exp()) + mag).relu()

        return Written(path, encode, coders(w, torch.relu, True)[1], "gated")
    torch.save(w, path)
    kind = settings["activation_fn_str"]
    return Written(path, *coders(w, torch.relu if kind == "relu" else lambda h: topk(h, K).relu(), True), kind)


def visaebench(folder: Path, w: dict[str, Tensor], activation: str, overcomplete: bool = False) -> Written:
    w = w | ({"b_dec": torch.zeros(D)} if overcomplete else {})
    own = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "decoder.weight": w["W_dec"]}
    state = own | {"decoder.bias": w["b_dec"]}
    if overcomplete:
        keys = ("encoder.final_block.0.weight", "encoder.final_block.0.bias", "dictionary._weights")
        multiplier = torch.tensor(0.4)
        state = dict(zip(keys, own.values(), strict=True)) | {"dictionary.multiplier": multiplier}
        w = w | {"W_dec": w["W_dec"] * multiplier.exp()}
    theta = 0.5 + 0.3 * draw(F, seed=4)
    settings: dict[str, Any] = {"activation": activation, "input_dim": D, "hidden_dim": F}
    functions: dict[str, Function] = {
        "topk": lambda h: topk(h.relu(), K),
        "batchtopk": lambda h: h.relu() * (h.relu() >= 0.5),
        "jumprelu": lambda h: above(h.relu(), theta),
    }
    own_settings: dict[str, dict[str, Any]] = {"topk": {"k": K}, "batchtopk": {"threshold": 0.5}, "jumprelu": {}}
    settings |= own_settings[activation]
    if activation == "jumprelu":
        state["jump_thresholds"] = theta
    path = folder / "model.safetensors"
    save_file({name: value.contiguous() for name, value in state.items()}, path)
    (folder / "config.json").write_text(json.dumps(settings))
    return Written(path, *coders(w, functions[activation], False), activation)


def dictionary_learning(folder: Path, w: dict[str, Tensor], name: str, **trainer: Any) -> Written:
    linear = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "decoder.weight": w["W_dec"].T}
    threshold, theta = torch.tensor(0.4), 0.2 * draw(F, seed=4)
    norm = w["W_dec"].norm(dim=1)
    of_k = {"k": torch.tensor(K, dtype=torch.int), "threshold": threshold}
    plain = coders(w, torch.relu, True)
    both: tuple[Function, Function]
    groups = torch.tensor([8, F - 8])
    if name == "GatedAutoEncoder":
        gate, mag, r = draw(F, seed=5), draw(F, seed=6), 0.3 * draw(F, seed=7)
        state = {name: linear[name] for name in ("encoder.weight", "decoder.weight")}
        state |= {"decoder_bias": w["b_dec"], "r_mag": r, "gate_bias": gate, "mag_bias": mag}

        def encode(x: Tensor) -> Tensor:
            h = (x - w["b_dec"]) @ w["W_enc"]
            return (h + gate > 0) * (r.exp() * h + mag).relu()

        kind, both = "gated", (encode, plain[1])
    else:
        state, kind, both = {
            "AutoEncoder": (
                linear | {"bias": w["b_dec"]},
                "relu",
                (lambda x: norm * plain[0](x), lambda z: plain[1](z / norm)),
            ),
            "AutoEncoderNew": (linear | {"decoder.bias": w["b_dec"]}, "relu", coders(w, torch.relu, False)),
            "AutoEncoderTopK": (
                linear | {"b_dec": w["b_dec"]} | of_k, "topk", coders(w, lambda h: topk(h.relu(), K), True),
            ),
            "BatchTopKSAE": (
                linear | {"b_dec": w["b_dec"]} | of_k, "batchtopk",
                coders(w, lambda h: above(h.relu(), threshold), True),
            ),
            "MatryoshkaBatchTopKSAE": (
                w | of_k | {"group_sizes": groups}, "matryoshka",
                coders(w, lambda h: above(h.relu(), threshold), True),
            ),
            "JumpReluAutoEncoder": (
                w | {"threshold": theta}, "jumprelu", coders(w, lambda h: above(h, theta).relu(), False),
            ),
        }[name]  # fmt: skip
    path = folder / "ae.pt"
    torch.save(state, path)
    (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": name, "k": K, **trainer}}))
    return Written(path, both[0], both[1], kind)
