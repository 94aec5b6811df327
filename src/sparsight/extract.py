"""Images x backbone -> activation store, shard by shard.

Shapes: B batch, T tokens, D width.
"""

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from sparsight import sites
from sparsight.backbones import Backbone
from sparsight.batches import in_order
from sparsight.config import Activations
from sparsight.errors import SparsightError
from sparsight.images import Split
from sparsight.progress import Progress
from sparsight.store import StoreWriter, shard_size
from sparsight.work import Work, write_atomic


def extract(
    backbone: Backbone, split: Split, section: Activations, work: Work, name: str, about: dict[str, Any], threads: int
) -> None:
    """Write ``<name>.zarr`` and its manifest ``<name>.json`` to ``work.out``.

    Batches do not cross shards, so a run that was stopped and continued writes the same bytes; shards
    that are complete and verify are kept.

    Raises:
        SparsightError: a site that the model does not have, no class token where one is asked for, too
            little disk space, an image that cannot be read, or a value that cannot be stored.
    """
    for site in section.sites:
        sites.check(site, backbone.n_blocks, "activations.sites")
    if section.tokens == "cls" and not backbone.model.has_class_token:
        raise SparsightError("activations.tokens: the backbone has no class token; use patches, all or mean")
    shapes = _shapes(backbone, section)
    needed = len(split) * sum(int(np.prod(shape)) for shape in shapes.values()) * np.dtype(section.dtype).itemsize
    free = shutil.disk_usage(work.folder).free
    if needed > free:
        raise SparsightError(
            f"activations of {name}: need {needed / 1e9:.1f} GB, {work.folder} has {free / 1e9:.1f} GB free"
        )
    size = shard_size(len(split), section.shard_images)
    writer = StoreWriter(work.out / f"{name}.zarr", len(split), shapes, section.dtype, size)
    records: dict[int, Any] = {}
    for shard in range(len(writer.shards)):
        path = _record_path(work, shard)
        if path.exists() and writer.verified(record := json.loads(path.read_text())):
            records[shard] = record
    todo = [shard for shard in range(len(writer.shards)) if shard not in records]
    windows = [_inside(writer.shards[shard], section.batch_size) for shard in todo]
    batches = split.stream([rows for shard in windows for rows in shard], backbone.preprocess, threads)
    done = sum(writer.shards[shard].stop - writer.shards[shard].start for shard in records)
    with Progress(len(split), "images", start=done) as progress:
        for shard, shard_windows in zip(todo, windows, strict=True):
            parts: dict[str, list[np.ndarray]] = {site: [] for site in section.sites}
            for _ in shard_windows:
                pixels = next(batches)
                for site, x in backbone.taps(backbone.normalize(pixels), section.sites).items():
                    parts[site].append(_pick(x, section.tokens, backbone.n_prefix).float().cpu().numpy())
                progress(len(pixels))
            values = {site: np.concatenate(blocks) for site, blocks in parts.items()}
            record = writer.write(shard, values, split.uris[writer.shards[shard]])
            text = json.dumps(record)
            write_atomic(_record_path(work, shard), partial(Path.write_text, data=text))
            records[shard] = record
    n_class, n_prefix = int(backbone.model.has_class_token), backbone.n_prefix
    patches = backbone.model.patch_embed.num_patches
    positions = {
        "class": [0][:n_class],
        "register": list(range(n_class, n_prefix)),
        "patches": [n_prefix, n_prefix + patches],
    }
    writer.write_manifest(
        work.out / f"{name}.json",
        [records[shard] for shard in sorted(records)],
        {"split": name, "tokens": section.tokens, "token_positions": positions, **about},
    )


def _record_path(work: Work, shard: int) -> Path:
    return work.state / f"shard-{shard}.json"


def _inside(shard: slice, batch_size: int) -> list[slice]:
    return [slice(shard.start + w.start, shard.start + w.stop) for w in in_order(shard.stop - shard.start, batch_size)]


def _shapes(backbone: Backbone, section: Activations) -> dict[str, tuple[int, ...]]:
    patches = backbone.model.patch_embed.num_patches
    n_tokens = {"patches": patches, "all": patches + backbone.n_prefix}.get(section.tokens)
    d = backbone.d_in
    return {site: (d,) if n_tokens is None or site == "embedding" else (n_tokens, d) for site in section.sites}


def _pick(x: Tensor, tokens: str, n_prefix: int) -> Tensor:
    """The wanted tokens of (B, T, D); ``embedding`` is (B, D) already."""
    if x.ndim == 2 or tokens == "all":
        return x
    if tokens == "cls":
        return x[:, 0]
    return x[:, n_prefix:] if tokens == "patches" else x[:, n_prefix:].mean(dim=1)
