"""Batches for training: the order of the rows, and reading them from memory or from an activation store.

The order depends only on a seed and the epoch, so training continues exactly where it stopped: its position is
the number of batches seen. The rows of a store are already in a seeded random order of images. Every epoch
shuffles them again, within pools that fit into memory. Pools are read in their order on disk, but each epoch
starts at another pool. Jumping between pools would waste the disk's read-ahead and mix the rows no better.

Shapes: B batch, D width.
"""

import math
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from sparsight.common.devices import sent
from sparsight.common.errors import SparsightError
from sparsight.common.seeds import derive_seed
from sparsight.common.slices import row_slices

T_co = TypeVar("T_co", covariant=True)


class Batches(Protocol[T_co]):
    """A data set cut into batches, epoch after epoch."""

    @property
    def unit(self) -> str:
        """Name of a row's kind, for messages."""

    @property
    def n_rows(self) -> int:
        """Rows in an epoch."""

    @property
    def batch_size(self) -> int:
        """Rows in every batch but the last of an epoch."""

    @property
    def per_epoch(self) -> int:
        """Batches in an epoch."""

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[T_co]:
        """The batches of one epoch from the ``skip``-th on."""


@dataclass(frozen=True)
class RowNumbers:
    """Row numbers of images, int64 (B,): one permutation per epoch; the last batch may be smaller."""

    n_rows: int
    batch_size: int
    seed: int
    unit: ClassVar[str] = "images"

    @property
    def per_epoch(self) -> int:
        return math.ceil(self.n_rows / self.batch_size)

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[np.ndarray]:
        order = np.random.default_rng(derive_seed(self.seed, "order", epoch)).permutation(self.n_rows)
        for start in range(skip * self.batch_size, self.n_rows, self.batch_size):
            yield order[start : start + self.batch_size]


class Batch(NamedTuple):
    """Activations of the same rows at one or several sites."""

    rows: np.ndarray
    """int64 (B,): row r is token r % tokens_per_image of image r // tokens_per_image."""
    x: dict[str, Tensor]
    """Per site (B, D), in the stored dtype, on the device of the batches."""


class Source(Protocol):
    """Rows of one site, such as :class:`sparsight.activations.store.Rows`."""

    dtype: np.dtype[Any]
    shape: tuple[int, int]
    tokens_per_image: int
    chunk_images: int

    def images(self, first: int, last: int, out: np.ndarray | None = None) -> np.ndarray:
        """The rows of images ``first`` to ``last`` - 1, (rows, D), written to ``out`` if given."""


class _Pool(NamedTuple):
    first: int
    """First image."""
    last: int
    order: np.ndarray
    """Rows in the order of drawing, counted from the pool's first row."""


class StoreBatches:
    """Shuffled batches of a store's rows, read with a bounded amount of memory; the last one may be smaller.

    Args:
        sites: rows of each site; all sites have the same number of rows.
        batch_size: B.
        seed: seed of the order.
        memory: bytes for activations, half for the current pool and half for the next one. A store that fits
            as a whole is one pool, read once and kept.
        workers: number of threads that read the next pool in the background; 0 reads a pool when it is
            needed. The order does not depend on this.
        device: device of the batches. A CUDA device with enough memory keeps all rows. The order does not
            depend on this.

    Raises:
        SparsightError: no rows, sites with different numbers of rows, or memory for less than two chunks.
    """

    unit = "rows"

    def __init__(
        self, sites: Mapping[str, Source], batch_size: int, seed: int, memory: int,
        workers: int = 1, device: torch.device | str = "cpu",
    ) -> None:  # fmt: skip
        self.sites, self.batch_size, self.seed, self.workers = dict(sites), batch_size, seed, workers
        self.device = torch.device(device)
        counts = {name: source.shape[0] for name, source in self.sites.items()}
        self.n_rows = next(iter(counts.values()))
        if self.n_rows == 0 or len(set(counts.values())) > 1:
            raise SparsightError(f"batches need rows, and as many of every site; found {counts}")
        self._tokens = next(iter(self.sites.values())).tokens_per_image
        self._n_images = self.n_rows // self._tokens
        image_bytes = sum(source.dtype.itemsize * source.shape[1] * self._tokens for source in self.sites.values())
        self._chunk = max(source.chunk_images for source in self.sites.values())
        fits = memory // image_bytes
        self._pool_images = self._n_images if fits >= self._n_images else fits // 2 // self._chunk * self._chunk
        if self._pool_images == 0:
            raise SparsightError(
                f"{memory / 1e6:.1f} MB of memory hold less than two chunks of {self._chunk} images,"
                f" {self._chunk * image_bytes / 1e6:.1f} MB each; allow more"
            )
        self._keeps = self._pool_images == self._n_images
        if self.device.type == "cuda":
            self._keeps = self._n_images * image_bytes < torch.cuda.mem_get_info(self.device)[0] // 2
        self._kept: dict[str, Tensor] | None = None
        self._buffers: list[dict[str, Tensor]] = []

    @property
    def per_epoch(self) -> int:
        """Batches in an epoch."""
        return math.ceil(self.n_rows / self.batch_size)

    def epoch(self, epoch: int, skip: int = 0) -> Generator[Batch, None, None]:
        """The batches of one epoch from the ``skip``-th on.

        Raises:
            SparsightError: a damaged shard, or a value that is not finite; the message names its place.
        """
        pools = self._plan(epoch, skip * self.batch_size)
        batches = self._draw(self._from_kept(pools) if self._keeps else self._from_store(pools))
        if self.device.type == "cpu":
            yield from batches
            return
        for rows, x in batches:
            yield Batch(rows, {site: sent(value, self.device) for site, value in x.items()})

    def _plan(self, epoch: int, skip: int) -> list[_Pool]:
        """The pools of an epoch without its first ``skip`` rows."""
        slices = list(row_slices(self._n_images, self._pool_images))
        first_pool = int(np.random.default_rng(derive_seed(self.seed, "pools", epoch)).integers(len(slices)))
        pools = []
        for images in slices[first_pool:] + slices[:first_pool]:
            n_rows = (images.stop - images.start) * self._tokens
            if skip < n_rows:
                generator = np.random.default_rng(derive_seed(self.seed, "order", epoch, images.start))
                pools.append(_Pool(images.start, images.stop, generator.permutation(n_rows)[skip:]))
            skip = max(0, skip - n_rows)
        return pools

    def _from_kept(self, pools: list[_Pool]) -> Iterator[tuple[_Pool, dict[str, Tensor]]]:
        if self._kept is None:
            kept = self._buffer(self._n_images, self.device)
            slices = row_slices(self._n_images, self._pool_images)
            all_pools = [_Pool(images.start, images.stop, np.empty(0, np.int64)) for images in slices]
            if self.device.type == "cpu":
                self._run(self._jobs(all_pools[0], kept))
            else:
                for pool, x in self._from_store(all_pools):
                    for site, value in x.items():
                        kept[site][self._rows(pool)] = value.to(self.device)
                self._buffers = []
            self._kept = kept  # set only once every row was read without an error
        for pool in pools:
            yield pool, {site: value[self._rows(pool)] for site, value in self._kept.items()}

    def _from_store(self, pools: list[_Pool]) -> Iterator[tuple[_Pool, dict[str, Tensor]]]:
        """Each pool in one of two buffers, while the next pool is read into the other."""
        while len(self._buffers) < min(2, len(pools)):
            self._buffers.append(self._buffer(self._pool_images, "cpu"))
        with ThreadPoolExecutor(max(1, self.workers)) as threads:

            def start(number: int) -> list[Callable[[], object]]:
                if number >= len(pools):
                    return []
                jobs = self._jobs(pools[number], self._buffers[number % 2])
                return [threads.submit(job).result for job in jobs] if self.workers else jobs

            waiting = start(0)
            try:
                for number, pool in enumerate(pools):
                    for finish in waiting:
                        finish()
                    waiting = start(number + 1)
                    n_rows = (pool.last - pool.first) * self._tokens
                    yield pool, {site: value[:n_rows] for site, value in self._buffers[number % 2].items()}
            finally:
                threads.shutdown(cancel_futures=True)

    def _jobs(self, pool: _Pool, buffer: dict[str, Tensor]) -> list[Callable[[], object]]:
        """Jobs that each read one chunk and together fill ``buffer`` with a pool."""
        return [
            partial(source.images, pool.first + part.start, pool.first + part.stop, out)
            for site, source in self.sites.items()
            for part in row_slices(pool.last - pool.first, self._chunk)
            for out in [buffer[site][part.start * self._tokens : part.stop * self._tokens].numpy()]
        ]

    def _run(self, jobs: list[Callable[[], object]]) -> None:
        with ThreadPoolExecutor(max(1, self.workers)) as threads:
            for done in [threads.submit(job) for job in jobs]:
                done.result()

    def _draw(self, pools: Iterator[tuple[_Pool, dict[str, Tensor]]]) -> Iterator[Batch]:
        """Cut the rows of successive pools into batches; a batch may end in the next pool."""
        parts: list[Batch] = []
        missing = self.batch_size
        for pool, x in pools:
            order = sent(torch.from_numpy(pool.order), next(iter(x.values())).device)
            start = 0
            while start < len(order):
                rows = pool.order[start : start + missing] + pool.first * self._tokens
                picked = order[start : start + missing]
                parts.append(Batch(rows, {site: self._gather(value, picked) for site, value in x.items()}))
                start += missing
                missing -= len(rows)
                if missing == 0:
                    yield _join(parts)
                    parts, missing = [], self.batch_size
        if parts:
            yield _join(parts)

    def _gather(self, x: Tensor, rows: Tensor) -> Tensor:
        if self._keeps:
            return x.index_select(0, rows)
        return torch.from_numpy(np.take(x.numpy(), rows.numpy(), axis=0))  # one thread, as another reads the next pool

    def _rows(self, pool: _Pool) -> slice:
        return slice(pool.first * self._tokens, pool.last * self._tokens)

    def _buffer(self, n_images: int, device: torch.device | str) -> dict[str, Tensor]:
        n_rows = n_images * self._tokens
        return {
            site: torch.empty(n_rows, source.shape[1], dtype=getattr(torch, source.dtype.name), device=device)
            for site, source in self.sites.items()
        }


def _join(parts: list[Batch]) -> Batch:
    if len(parts) == 1:
        return parts[0]
    x = {site: torch.cat([part.x[site] for part in parts]) for site in parts[0].x}
    return Batch(np.concatenate([part.rows for part in parts]), x)
