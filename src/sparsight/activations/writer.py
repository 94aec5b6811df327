"""Writes an activation store: first the shards, by one or more processes, then the manifest.

Shapes: N images, T tokens, D width.
"""

import errno
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from sparsight.activations.shards import Layout, chunk_size, power_of_two, shard_file, write_shard
from sparsight.activations.statistics import Sums, combined, sums
from sparsight.activations.store import FORMAT_VERSION, NO_CHECKSUM, checksum, files_of, problems_of
from sparsight.common.digests import digest, file_digest
from sparsight.common.errors import SparsightError, reason
from sparsight.common.files import remove, write_atomic, write_json
from sparsight.common.slices import row_slices

_MIN_SHARDS = 8
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_GROUP = {"attributes": {}, "node_type": "group", "zarr_format": 3}


def shard_size(n_images: int, most: int) -> int:
    """Images per shard: a power of two, at most ``most``, and small enough for 8 shards."""
    return power_of_two(min(most, n_images // _MIN_SHARDS))


@dataclass(frozen=True)
class Plan:
    """The contents of a store, known before its first shard is written."""

    n_images: int
    """N."""
    shapes: Mapping[str, tuple[int, ...]]
    """Per site the shape of one image's activations, (T, D) or (D,)."""
    dtype: str
    """``float16`` or ``float32``."""
    shard_images: int
    """Images per shard, a power of two."""
    tokens: Mapping[str, str]
    """Per site what it stores: ``cls``, ``registers``, ``patches``, ``all``, ``mean``, or ``embedding``."""

    @cached_property
    def layouts(self) -> dict[str, Layout]:
        """Per site, the layout of its array."""
        size, dtype = self.shard_images, np.dtype(self.dtype)
        return {
            site: Layout((self.n_images, *shape), self.dtype, size, chunk_size(shape, dtype, size))
            for site, shape in self.shapes.items()
        }

    @property
    def shards(self) -> list[slice]:
        """The images of each shard."""
        return list(row_slices(self.n_images, self.shard_images))

    @property
    def image_bytes(self) -> int:
        """Bytes of one image's activations at all sites."""
        return sum(int(np.prod(shape)) for shape in self.shapes.values()) * np.dtype(self.dtype).itemsize

    def files(self, shard: int) -> dict[str, str]:
        """Per site the file of one shard, relative to the group."""
        return {site: f"{site}/{shard_file(shard, len(layout.shape))}" for site, layout in self.layouts.items()}


class StoreWriter:
    """Writes a store in whole shards; several writers may fill disjoint shards of one store.

    Args:
        path: the group, e.g. ``train.zarr``.
        plan: contents of the store.
        aside: folder for unfinished shards, on the file system of ``path``.
    """

    def __init__(self, path: Path, plan: Plan, aside: Path) -> None:
        self.path, self.plan, self._aside = path, plan, aside

    def make_way(self, shards: Sequence[int], others: bool) -> None:
        """Remove what an earlier store has left where ``shards`` will be, so that no value of it is mixed in.

        From now on the store does not look finished: the manifest goes first, then the metadata without which no Zarr
        reader opens it, and values only after them. Several writers of one store may do this at the same time.

        Args:
            shards: numbers of this writer's shards that are still to be written.
            others: also remove sites and shards that the new store does not have; for one of the writers.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self.path.with_suffix(".json").unlink(missing_ok=True)
        for metadata in (self.path / "zarr.json", *self.path.glob("*/zarr.json")):
            metadata.unlink(missing_ok=True)
        places = [self.path / site / "c" for site in self.plan.shapes]
        former = [place / str(shard) for place in places for shard in shards]
        if others:
            kept = {str(shard) for shard in range(len(self.plan.shards))}
            former += [site for site in self.path.iterdir() if site.name not in self.plan.shapes]
            former += [shard for place in places for shard in place.glob("*") if shard.name not in kept]
        for path in former:
            if path.exists():
                remove(path)

    def write(self, shard: int, values: Mapping[str, np.ndarray], uris: Sequence[str]) -> dict[str, Any]:
        """Write one shard of every site; returns its record for :func:`finish_store`.

        Args:
            shard: number of the shard.
            values: per site the activations of its images, in the store's dtype.
            uris: names of these images, for messages.

        Raises:
            SparsightError: a value that is not finite or that the dtype cannot hold, or a full disk.
        """
        files = self.plan.files(shard)
        with ThreadPoolExecutor(len(files)) as pool:  # sites are hashed and written in parallel
            results = pool.map(lambda site: self._write_site(site, files[site], values[site], uris), files)
            parts = dict(zip(files, results, strict=True))
        return {
            "files": {files[site]: part["sha256"] for site, part in parts.items()},
            "sums": {site: part["sums"] for site, part in parts.items()},
        }

    def _write_site(self, site: str, name: str, x: np.ndarray, uris: Sequence[str]) -> dict[str, Any]:
        layout = self.plan.layouts[site]
        found = sums((x[window] for window in row_slices(len(x), layout.chunk_images)), x.shape[-1])
        if not np.isfinite(found.square):
            row = int(np.flatnonzero(~np.isfinite(x).reshape(len(x), -1).all(axis=1))[0])
            if np.isnan(x[row]).any() or layout.dtype == "float32":
                raise SparsightError(
                    f"NaN or infinite activation at site {site!r}, image {uris[row]}; check the weights"
                )
            raise SparsightError(
                f"float16 overflow at site {site!r}, image {uris[row]}: more than 65504; set activations.dtype: float32"
            )
        temporary, target = self._aside / name.replace("/", "-"), self.path / name
        try:
            sha256 = write_shard(temporary, x, layout)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(temporary, target)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            advice = "make room" if error.errno in _FULL else "free the name or mend its permissions"
            raise SparsightError(
                f"{target}: cannot be written ({reason(error)}); {advice} and give the same command again,"
                " finished shards are kept"
            ) from None
        return {"sha256": sha256, "sums": {"total": found.total.tolist(), "square": found.square}}

    def verified(self, record: Mapping[str, Any]) -> bool:
        """Whether the shard that ``record`` describes is complete and unchanged on disk."""
        return not problems_of(self.path, record["files"])


def finish_store(path: Path, parts: Sequence[Path], manifest_path: Path) -> None:
    """Verify every shard, write the group's metadata, then write the manifest with all checksums.

    Args:
        path: the group; files that do not belong to it are removed.
        parts: JSON files from the writers of the shards, with ``plan``, ``about`` (entries of the manifest) and
            ``shards`` (records by number).
        manifest_path: ``<split>.json``.

    Raises:
        SparsightError: parts of different stores, or a shard that is missing or differs from its record.
    """
    contents = [json.loads(part.read_text()) for part in parts]
    for part, content in zip(parts, contents, strict=True):
        if any(content[key] != contents[0][key] for key in ("plan", "about")):
            raise SparsightError(f"{part}: belongs to another store than {parts[0]}; delete both and extract again")
    shapes = {site: tuple(shape) for site, shape in contents[0]["plan"]["shapes"].items()}
    plan = Plan(**{**contents[0]["plan"], "shapes": shapes})
    by_shard = {int(shard): record for content in contents for shard, record in content["shards"].items()}
    if sorted(by_shard) != list(range(len(plan.shards))):
        raise SparsightError(f"{path}: the parts hold {len(by_shard)} of {len(plan.shards)} shards; extract again")
    records = [by_shard[shard] for shard in sorted(by_shard)]
    files = {name: sha256 for record in records for name, sha256 in record["files"].items()}
    if problems := problems_of(path, files):
        names = ", ".join(part.name for part in parts)
        raise SparsightError(f"{path}: {problems[0]}; delete {names} and give the same command again")
    sites = {}
    for site, layout in plan.layouts.items():
        found = combined([Sums(**record["sums"][site]) for record in records], int(np.prod(layout.shape[:-1])))
        about = {"dtype": layout.dtype, "shape": list(layout.shape), "tokens": plan.tokens[site]}
        sites[site] = {**about, "mean": found.mean.tolist(), "rms": found.rms}
    metadata = {f"{site}/zarr.json": layout.metadata() for site, layout in plan.layouts.items()} | {"zarr.json": _GROUP}
    for name in files_of(path) - files.keys() - metadata.keys():  # what came in since make_way
        (path / name).unlink()
    for name, value in metadata.items():
        write_atomic(path / name, partial(write_json, value=value))
        files[name] = file_digest(path / name)
    manifest = {
        "format_version": FORMAT_VERSION,
        "sites": sites,
        "shard_images": plan.shard_images,
        "files": files,
        "sizes": {name: (path / name).stat().st_size for name in files},
        "digest": digest(files),
        "checksum": NO_CHECKSUM,
        **contents[0]["about"],
    }
    write_atomic(manifest_path, lambda aside: _write_checked(aside, manifest))


def _write_checked(path: Path, manifest: Mapping[str, Any]) -> None:
    write_json(path, manifest)
    text = path.read_bytes()
    path.write_bytes(text.replace(NO_CHECKSUM.encode(), checksum(text, NO_CHECKSUM).encode(), 1))
