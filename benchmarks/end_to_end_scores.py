"""How well the SAEs of benchmarks/end_to_end.py reconstruct patches of images that none of them saw.

Every package's file is read as it is, without the package, and run with that package's own forward pass: the scaling of
its inputs, what it subtracts before the encoder, and TopK or ReLU.

Shapes: B rows, D width (d_in), F latents (d_sae).
"""

import dataclasses
import io
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from end_to_end_contestants import D_IN, Task, patches, pictures, vit
from safetensors.torch import load_file
from torch import Tensor

from sparsight.sae import base

ROWS = 4096  # at a time
OURS = Path("results", "run", "saes", "topk-s0")
SAEV_SAMPLES = 2**19  # saev's n_random_samples


@dataclasses.dataclass(frozen=True)
class Plain:
    """x_hat = scale ((act(((x - mean) / scale - offset) W_enc + b_enc)) W_dec + b_dec) + mean."""

    weights: Mapping[str, Tensor]
    """W_enc (D, F), b_enc, W_dec (F, D) and b_dec."""
    k: int | None
    """None for ReLU without TopK."""
    subtracts: bool = True
    """Whether the offset is b_dec, or zero."""
    mean: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(D_IN))
    scale: float = 1.0

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (B, F) and reconstruction (B, D) of x (B, D)."""
        y = (x - self.mean) / self.scale
        w = self.weights
        pre = (y - w["b_dec"] if self.subtracts else y) @ w["W_enc"] + w["b_enc"]
        if self.k is None:
            z = pre.relu()
        else:
            values, indices = pre.topk(self.k, dim=1)
            z = torch.zeros_like(pre).scatter(1, indices, values.relu())
        return z, (z @ w["W_dec"] + w["b_dec"]) * self.scale + self.mean


def held_out(task: Task) -> Tensor:
    """All patches of ``task.images``, fp32, (B, D)."""
    model = vit(task)
    return torch.cat(list(patches(task, model, pictures(task, model))))


def score(name: str, folder: Path, task: Task, x: Tensor) -> dict[str, Any]:
    """Number of latents, L0 and FVU of the SAE that a contestant left in ``folder``; nothing if it left none.

    Ours is computed once more by sparsight itself, which must find the same.
    """
    if name == "vit-prisma":
        return {}
    sae = READERS.get(name, _ours)(folder, task)
    l0, fvu = _l0_and_fvu(sae, x)
    if name.startswith("sparsight"):
        own = base.load(folder / OURS).requires_grad_(False)
        again = _l0_and_fvu(lambda rows: ((z := own.encode(rows)).dense(), own.decode(z)), x)
        assert math.isclose(fvu, again[1], rel_tol=1e-3), f"FVU {fvu} here, {again[1]} by sparsight itself"
    return {"d_sae": len(sae.weights["W_dec"]), "l0": l0, "fvu": fvu}


def _l0_and_fvu(sae: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor) -> tuple[float, float]:
    squares, active = 0.0, 0
    for rows in x.split(ROWS):
        z, x_hat = sae(rows)
        squares += float((rows - x_hat).double().square().sum())
        active += int(z.count_nonzero())
    variance = float((x - x.mean(dim=0)).double().square().sum())
    return active / len(x), squares / variance


def _ours(folder: Path, task: Task) -> Plain:
    return Plain(load_file(folder / OURS / "sae.safetensors"), k=task.k)


def _plain(folder: Path, task: Task) -> Plain:
    return Plain(load_file(folder / "sae.safetensors"), k=task.k)


def _sae_lens(folder: Path, task: Task) -> Plain:
    settings = json.loads((folder / "sae" / "cfg.json").read_text())
    assert settings["normalize_activations"] == "none", settings
    weights = load_file(folder / "sae" / "sae_weights.safetensors")
    if settings["rescale_acts_by_decoder_norm"]:  # h = norm (x W_enc + b_enc), x_hat = z W_dec / norm
        norm = weights["W_dec"].norm(dim=1)
        weights |= {"W_enc": weights["W_enc"] * norm, "b_enc": weights["b_enc"] * norm}
        weights["W_dec"] = weights["W_dec"] / norm[:, None]
    return Plain(weights, k=settings["k"], subtracts=settings["apply_b_dec_to_input"])


def _saev(folder: Path, task: Task) -> Plain:
    """The checkpoint, and the scaling of saev's ``Dataset``, which the checkpoint does not hold, computed as there."""
    with (folder / "sae.pt").open("rb") as file:
        file.readline()
        weights = torch.load(io.BytesIO(file.read()), weights_only=True)
    about = next(folder.glob("*/metadata.json"))
    n_images = json.loads(about.read_text())["n_imgs"]
    shape = (-1, task.n_patches + 1, D_IN)
    shards = [np.memmap(path, np.float32, mode="r") for path in sorted(about.parent.glob("acts*.bin"))]
    x = np.concatenate([shard.reshape(shape)[:n_images, 1:] for shard in shards])[:n_images].reshape(-1, D_IN)
    sample = torch.from_numpy(x[np.random.default_rng(42).permutation(len(x))[:SAEV_SAMPLES]])
    mean = sample.mean(dim=0)
    scale = float(torch.linalg.norm(sample - mean, dim=1).mean()) / math.sqrt(D_IN)
    return Plain(weights, k=None, mean=mean, scale=scale)


READERS = {"timm and PyTorch": _plain, "sae-lens": _sae_lens, "saev": _saev}
