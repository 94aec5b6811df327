"""Runs images through a backbone and writes the shards of an activation store.

Shapes: B batch, T tokens, D width.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsight.activations.transfers import Transfers
from sparsight.activations.writer import Plan, StoreWriter, shard_size
from sparsight.backbones.backbone import Backbone
from sparsight.common import sites
from sparsight.common.devices import log_slow_bf16
from sparsight.common.errors import SparsightError
from sparsight.common.files import write_atomic, write_json
from sparsight.common.progress import Progress
from sparsight.common.slices import row_slices
from sparsight.common.tokens import EMBEDDING
from sparsight.common.work import Work
from sparsight.config import Activations, Compute
from sparsight.images.split import Split
from sparsight.images.workers import stream


def extract(
    backbone: Backbone, split: Split, section: Activations, compute: Compute, work: Work, store: Path, part: int,
    about: Mapping[str, Any],
) -> None:  # fmt: skip
    """Write one part's shards of ``store``, and their records to ``<split>.part-<part>.json`` in ``work.out``.

    Batches do not cross shards, so neither the number of parts nor an interruption changes a byte. Complete
    shards with matching checksums are kept.

    Args:
        store: ``<split>.zarr``. An existing store is no longer readable from the start, and is replaced shard by
            shard.
        part: this part's number, below ``section.parts``.
        about: entries of the manifest about images and backbone.

    Raises:
        SparsightError: a site that the model does not have, tokens that it does not have, too little disk
            space, an image that cannot be read, or a value that cannot be stored.
    """
    if compute.precision == "bf16":
        log_slow_bf16(backbone.device, "compute.precision: bf16")
    plan = _plan(backbone, section, len(split))
    writer = StoreWriter(store, plan, work.state)
    records = _records(writer, work, part, section.parts)
    todo = [shard for shard, record in records.items() if record is None]
    writer.make_way(todo, others=part == 0)
    _check_space(plan, todo, store)
    windows = {shard: _inside(plan.shards[shard], section.batch_size) for shard in todo}
    pixels = stream(
        split,
        [rows for shard in todo for rows in windows[shard]],
        backbone.preprocess,
        backbone.decoding_threads,
        compute.workers,
    )
    transfers = Transfers(backbone.device)
    free = [_buffers(plan, backbone.device) for _ in todo[:2]]  # one is filled while the other is written
    writing: Future[None] | None = None

    def write(shard: int, values: dict[str, Tensor], arrived: Callable[[], None]) -> None:
        arrived()
        arrays = {site: x.numpy() for site, x in values.items()}
        records[shard] = writer.write(shard, arrays, split.uris(plan.shards[shard]))
        write_atomic(_record_path(work, shard), partial(write_json, value=records[shard]))
        free.append(values)

    n_images = sum(plan.shards[shard].stop - plan.shards[shard].start for shard in records)
    n_todo = sum(plan.shards[shard].stop - plan.shards[shard].start for shard in todo)
    with ThreadPoolExecutor(1) as thread, Progress(n_images, "images", start=n_images - n_todo) as progress:
        for shard in todo:
            buffers, start = free.pop(), plan.shards[shard].start
            for rows in windows[shard]:
                images = backbone.normalize(transfers.sent(torch.from_numpy(next(pixels))))
                with precision(compute, backbone.device):
                    taps = backbone.taps(images, list(plan.shapes))
                for site, x in taps.items():
                    stored = _pick(x, plan.tokens[site], backbone).to(getattr(torch, section.dtype))
                    transfers.store(stored, buffers[site][rows.start - start : rows.stop - start])
                progress(rows.stop - rows.start)
            if writing is not None:
                writing.result()
            size = plan.shards[shard].stop - start
            writing = thread.submit(write, shard, {site: x[:size] for site, x in buffers.items()}, transfers.so_far())
        if writing is not None:
            writing.result()
    positions = {
        "class": backbone.class_positions,
        "register": backbone.register_positions,
        "patches": list(backbone.patch_positions),
    }
    result = {
        "plan": dataclasses.asdict(plan),
        "about": {"token_positions": positions, **about},
        "shards": records,
    }
    write_json(work.out / f"{store.stem}.part-{part}.json", result)


def precision(compute: Compute, device: torch.device) -> AbstractContextManager[object]:
    """Autocast to bfloat16 if ``compute.precision`` is ``bf16``."""
    return torch.autocast(device.type, torch.bfloat16, enabled=compute.precision == "bf16")


def _plan(backbone: Backbone, section: Activations, n_images: int) -> Plan:
    n_registers = len(backbone.register_positions)
    n_tokens = {
        "registers": n_registers,
        "patches": backbone.n_patches,
        "all": backbone.n_prefix + backbone.n_patches,
    }
    shapes: dict[str, tuple[int, ...]] = {}
    for site, tokens in section.tokens_by_site.items():
        sites.check(site, backbone.n_blocks, "activations.sites")
        lacks = {"cls": not backbone.class_positions, "registers": not n_registers}
        if lacks.get(tokens):
            missing = "class token" if tokens == "cls" else "register tokens"
            raise SparsightError(
                f"activations: {site} cannot store {tokens}, the backbone has no {missing}; use patches, all or mean"
            )
        width = backbone.d_embedding if tokens == EMBEDDING else backbone.d_in
        shapes[site] = (n_tokens[tokens], width) if tokens in n_tokens else (width,)
    return Plan(n_images, shapes, section.dtype, shard_size(n_images, section.shard_images), section.tokens_by_site)


def _records(writer: StoreWriter, work: Work, part: int, parts: int) -> dict[int, dict[str, Any] | None]:
    """Record of each shard of the part; None if the shard is still to be written."""
    n_shards = len(writer.plan.shards)
    records: dict[int, dict[str, Any] | None] = {}
    for shard in range(n_shards * part // parts, n_shards * (part + 1) // parts):
        path = _record_path(work, shard)
        record = json.loads(path.read_text()) if path.exists() else None
        records[shard] = record if record is not None and writer.verified(record) else None
    return records


def _record_path(work: Work, shard: int) -> Path:
    return work.state / f"shard-{shard}.json"


def _check_space(plan: Plan, todo: list[int], store: Path) -> None:
    needed = len(todo) * plan.shard_images * plan.image_bytes
    free = shutil.disk_usage(store).free
    if needed > free:
        raise SparsightError(f"{store}: needs {needed / 1e9:.1f} GB, there are {free / 1e9:.1f} GB free; make room")


def _inside(shard: slice, batch_size: int) -> list[slice]:
    return [
        slice(shard.start + window.start, shard.start + window.stop)
        for window in row_slices(shard.stop - shard.start, batch_size)
    ]


def _buffers(plan: Plan, device: torch.device) -> dict[str, Tensor]:
    """Buffers for one shard of every site, page-locked if a GPU copies to them."""
    pinned = device.type == "cuda"
    return {
        site: torch.empty((plan.shard_images, *shape), dtype=getattr(torch, plan.dtype), pin_memory=pinned)
        for site, shape in plan.shapes.items()
    }


def _pick(x: Tensor, tokens: str, backbone: Backbone) -> Tensor:
    """The tokens to store of (B, T, D); ``embedding`` is (B, D) already."""
    if tokens in ("all", EMBEDDING):
        return x
    if tokens == "cls":
        return x[:, 0]
    if tokens == "registers":
        return x[:, backbone.register_positions]
    patches = x[:, backbone.n_prefix :]
    return patches if tokens == "patches" else patches.mean(dim=1)
