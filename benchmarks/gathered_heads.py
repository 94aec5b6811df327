"""Heads that are not computed: milliseconds of one attention layer and of the whole model, by heads kept.

Three ways take turns: AdaViT's masking (dense products, then q, k, v and the projection's input multiplied by
the mask), our masking (the heads' outputs multiplied), and gathering. Minimum and median over the rounds. Usage:

    python benchmarks/gathered_heads.py [--threads 2] [--rounds 7] [--device cpu] [--bf16] [--batch 64]
        [--no-model] [--cpu-time]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsight import backbones
from sparsight.backbones.attention import attend
from sparsight.backbones.backbone import Backbone
from sparsight.common import machine
from sparsight.config import Compute
from sparsight.pipeline.stage import prepare_torch

MODELS = {"ViT-S/16": "timm/vit_small_patch16_224", "ViT-B/16": "timm/vit_base_patch16_224"}


def adavit(layer: Any, x_BTD: Tensor, keep_BH: Tensor) -> Tensor:
    """AdaViT's ``--ada-head``: every product is computed, then the channels of the other heads are set to zero."""
    B, T, D = x_BTD.shape
    mask = keep_BH.to(x_BTD.dtype)[:, None, :, None]
    qkv = layer.qkv(x_BTD).view(B, T, 3, layer.num_heads, layer.head_dim) * mask[:, :, None]
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2) * mask
    return layer.proj(out.reshape(B, T, D))


def measure(
    ways: dict[str, Callable[[], object]], rounds: int, cuda: bool, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Milliseconds by way; the first round warms up."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            begin = clock()
            way()
            if cuda:
                torch.cuda.synchronize()
            if turn:
                found[name].append(1000 * (clock() - begin))
    return found


def report(title: str, found: dict[str, list[float]]) -> None:
    """One line: minimum / median of every way, and gathered over masked."""
    low = {name: min(values) for name, values in found.items()}
    cells = [f"{name} {low[name]:.1f} / {statistics.median(values):.1f}" for name, values in found.items()]
    median = {name: statistics.median(values) for name, values in found.items()}
    print(
        f"{title}: {', '.join(cells)} ms; gathered / masked {low['gathered'] / low['masked']:.2f} (min), "
        f"{median['gathered'] / median['masked']:.2f} (median)",
        flush=True,
    )


def masks(backbone: Backbone, batch: int, kept: int) -> dict[str, Tensor]:
    """Bool (B, L, H), the first block whole: one mask for the batch, and one per image and block."""
    L, H = backbone.n_blocks, backbone.n_heads
    generator = torch.Generator().manual_seed(0)
    one = (torch.arange(H) < kept).expand(batch, L, H).clone()
    own = torch.rand(batch, L, H, generator=generator).argsort(dim=2) < kept
    for mask in (one, own):
        mask[:, 0] = True
    return {"one mask": one.to(backbone.device), "a mask per image": own.to(backbone.device)}


@torch.no_grad()
def main() -> None:
    """Print one line per model, number of heads kept and kind of mask, for a layer and for the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--bf16", action="store_true", help="run inside torch.autocast")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--no-model", action="store_true", help="the layer alone")
    parser.add_argument("--cpu-time", action="store_true", help="of the process, for a machine that is not idle")
    arguments = parser.parse_args()
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    device = prepare_torch(Compute(threads=arguments.threads, device=arguments.device))
    cuda = device.type == "cuda"
    where = torch.cuda.get_device_name() if cuda else machine.describe()
    print(f"{where}, {arguments.threads} threads, batch {arguments.batch}, torch {torch.__version__}")
    with torch.autocast(device.type, torch.bfloat16, enabled=arguments.bf16):
        for name, timm_name in MODELS.items():
            backbone = backbones.load(timm_name).to(device)
            H, batch = backbone.n_heads, arguments.batch
            layer: Any = backbone.tower.parts(1).attention
            x = torch.randn(batch, backbone.n_prefix + backbone.n_patches, backbone.d_in, device=device)
            images = torch.randn(batch, 3, 224, 224, device=device)
            for kept in (H, H * 2 // 3, H // 3, 1, 0):
                for kind, mask in masks(backbone, batch, kept).items():
                    keep = mask[:, 1]
                    ways: dict[str, Callable[[], object]] = {
                        "AdaViT": partial(adavit, layer, x, keep),
                        "masked": partial(attend, layer, x, keep, "masked"),
                        "gathered": partial(attend, layer, x, keep, "gathered"),
                    }
                    title = f"{name}, {kept:2d} of {H} heads, {kind}"
                    report(f"{title}, layer", measure(ways, arguments.rounds, cuda, clock))
                    if arguments.no_model or kept not in (H, H // 3):
                        continue
                    ways = {
                        "masked": partial(backbone, images, head_mask=mask, heads="masked"),
                        "gathered": partial(backbone, images, head_mask=mask, heads="gathered"),
                    }
                    report(f"{title}, model", measure(ways, max(2, arguments.rounds // 3), cuda, clock))


if __name__ == "__main__":
    main()
