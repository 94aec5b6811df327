"""Milliseconds of the whole model against the number of heads kept, masked and gathered.

Shapes: B batch, L blocks, H heads.
"""

import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from sparsight.attention import HeadMode
from sparsight.backbones import Backbone
from sparsight.machine import describe
from sparsight.progress import say
from sparsight.seeds import derive_seed
from sparsight.work import write_json

_BATCH = 64
_ROUNDS = 15
_SECONDS = 60.0  # after three rounds, no more are begun for one model


def measure(models: dict[str, Backbone], seed: int, path: Path) -> None:
    """Write ``timings.json``: per backbone and number of kept heads, ms per image, minimum and median.

    Every image keeps its own random heads in all blocks but the first. The ways take turns in each round,
    so that a slow moment of the machine meets all of them.
    """
    result = {"machine": describe(), "threads": torch.get_num_threads(), "batch_size": _BATCH}
    heads = {name: _measure(backbone, derive_seed(seed, "timing", name)) for name, backbone in models.items()}
    write_json(path, {**result, "heads": heads})
    for name, rows in heads.items():
        for row in rows:
            say(f"{name}, {row['kept']} heads: masked {row['masked_ms_min']} ms, gathered {row['gathered_ms_min']} ms")


@torch.no_grad()
def _measure(backbone: Backbone, seed: int) -> list[dict[str, float]]:
    generator = torch.Generator().manual_seed(seed)
    H, L, size = backbone.n_heads, backbone.n_blocks, backbone.preprocess.size
    images = torch.randn(_BATCH, backbone.preprocess.channels, *size, generator=generator).to(backbone.device)
    cases: dict[tuple[int, HeadMode], Tensor] = {}
    for kept in range(H + 1):
        order = torch.rand(_BATCH, L, H, generator=generator).argsort(dim=2)
        mask = order < kept
        mask[:, 0] = True
        cases |= {(kept, "masked"): mask.to(backbone.device), (kept, "gathered"): mask.to(backbone.device)}
    seconds: dict[tuple[int, HeadMode], list[float]] = {case: [] for case in cases}
    start = time.perf_counter()
    for turn in range(_ROUNDS + 1):
        if turn > 3 and time.perf_counter() - start > _SECONDS:
            break
        for (kept, mode), mask in cases.items():
            begin = time.perf_counter()
            backbone(images, head_mask=mask, heads=mode)
            if backbone.device.type == "cuda":
                torch.cuda.synchronize()
            if turn:  # the first round warms up
                seconds[kept, mode].append(time.perf_counter() - begin)
    rows = []
    for kept in range(H + 1):
        row: dict[str, float] = {"kept": kept, "rounds": len(seconds[kept, "masked"])}
        for mode in ("masked", "gathered"):
            per_image = [1000 * s / _BATCH for s in seconds[kept, mode]]
            row[f"{mode}_ms_min"] = round(min(per_image), 5)
            row[f"{mode}_ms_median"] = round(statistics.median(per_image), 5)
        rows.append(row)
    return rows
