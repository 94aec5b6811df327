"""Milliseconds of the whole model by number of kept heads, masked and gathered.

Shapes: B batch, L blocks, H heads.
"""

import statistics
import time
from pathlib import Path

import torch
from torch import Tensor

from sparsight.backbones.attention import HeadMode
from sparsight.backbones.backbone import Backbone
from sparsight.common.files import write_json
from sparsight.common.machine import describe
from sparsight.common.progress import log
from sparsight.common.seeds import derive_seed

_BATCH, _SMALLEST_BATCH = 64, 8  # images per forward pass; fewer for a large model
_ROUNDS = 7
_FEWEST_ROUNDS = 3  # besides one to warm up
_SECONDS = 60.0  # time per model after which no round begins, once the fewest rounds are done


def measure(models: dict[str, Backbone], seed: int, path: Path) -> None:
    """Write ``timings.json``: per backbone and number of kept heads, ms per image, minimum and median.

    Every image keeps its own random heads in all blocks but the first. All cases take turns in each round, so that a
    slow moment of the machine affects all of them.
    """
    result = {"machine": describe(), "threads": torch.get_num_threads()}
    heads = {name: _measure(backbone, derive_seed(seed, "timing", name)) for name, backbone in models.items()}
    write_json(path, {**result, "heads": heads})
    for name, rows in heads.items():
        for row in rows:
            log(f"{name}, {row['kept']} heads: masked {row['masked_ms_min']} ms, gathered {row['gathered_ms_min']} ms")


@torch.no_grad()
def _measure(backbone: Backbone, seed: int) -> list[dict[str, float]]:
    generator = torch.Generator().manual_seed(seed)
    H, L, size = backbone.n_heads, backbone.n_blocks, backbone.preprocess.size
    images = torch.randn(_BATCH, backbone.preprocess.channels, *size, generator=generator).to(backbone.device)
    batch = _batch_size(backbone, images[:_SMALLEST_BATCH], passes=2 * (H + 1) * (1 + _FEWEST_ROUNDS))
    images = images[:batch]
    cases: dict[tuple[int, HeadMode], Tensor] = {}
    for kept in range(H + 1):
        order = torch.rand(batch, L, H, generator=generator).argsort(dim=2)
        mask = order < kept
        mask[:, 0] = True
        cases |= {(kept, "masked"): mask.to(backbone.device), (kept, "gathered"): mask.to(backbone.device)}
    seconds: dict[tuple[int, HeadMode], list[float]] = {case: [] for case in cases}
    start = time.perf_counter()
    for turn in range(_ROUNDS + 1):
        if turn > _FEWEST_ROUNDS and time.perf_counter() - start > _SECONDS:
            break
        for (kept, mode), mask in cases.items():
            elapsed = _seconds(backbone, images, mask, mode)
            if turn:  # the first round warms up
                seconds[kept, mode].append(elapsed)
    rows = []
    for kept in range(H + 1):
        row: dict[str, float] = {"kept": kept, "batch_size": batch, "rounds": len(seconds[kept, "masked"])}
        for mode in ("masked", "gathered"):
            per_image = [1000 * s / batch for s in seconds[kept, mode]]
            row[f"{mode}_ms_min"] = round(min(per_image), 5)
            row[f"{mode}_ms_median"] = round(statistics.median(per_image), 5)
        rows.append(row)
    return rows


def _batch_size(backbone: Backbone, images: Tensor, passes: int) -> int:
    """The largest batch with which ``passes`` forward passes fit into the time, estimated from one pass."""
    mask = torch.ones(len(images), backbone.n_blocks, backbone.n_heads, dtype=torch.bool, device=backbone.device)
    _seconds(backbone, images, mask, "masked")  # to warm up
    seconds_per_image = _seconds(backbone, images, mask, "masked") / len(images)
    batch = _BATCH
    while batch > _SMALLEST_BATCH and passes * batch * seconds_per_image > _SECONDS:
        batch //= 2
    return batch


def _seconds(backbone: Backbone, images: Tensor, mask: Tensor, mode: HeadMode) -> float:
    begin = time.perf_counter()
    backbone(images, head_mask=mask, heads=mode)
    if backbone.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin
