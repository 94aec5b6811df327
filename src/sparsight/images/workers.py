"""Processes that decode the batches of a split beside the one that uses them.

Shapes: B batch, H height, W width, C channels.
"""

import multiprocessing
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils import data

from sparsight.common.errors import SparsightError
from sparsight.images.preprocess import Preprocess
from sparsight.images.split import Rows, Split


def stream(
    split: Split, windows: Sequence[Rows], preprocess: Preprocess, threads: int, workers: int
) -> Iterator[np.ndarray]:
    """The images of each window, uint8 (B, H, W, C), decoded by processes; the order is that of the windows.

    Args:
        split: the images.
        windows: rows of each batch.
        preprocess: how pictures become pixels.
        threads: that decode where ``workers`` is 0, as in :meth:`Split.stream`.
        workers: processes that decode a batch each.
    """
    if not workers:
        yield from split.stream(windows, preprocess, threads)
        return
    context = multiprocessing.get_context("forkserver")  # a plain fork would copy the locks of torch's threads
    context.set_forkserver_preload(["sparsight.images.split", "sparsight.images.workers"])
    loader: data.DataLoader[Any] = data.DataLoader(
        _Share(split, windows, preprocess),
        batch_size=None,
        num_workers=workers,
        multiprocessing_context=context,
        worker_init_fn=_end_with_parent,
    )
    for pixels in loader:
        if isinstance(pixels, str):
            raise SparsightError(pixels)
        yield pixels.numpy()


class _Share(data.IterableDataset[Any]):
    """In each worker, its share of the windows; the loader takes one from every worker in turn."""

    def __init__(self, split: Split, windows: Sequence[Rows], preprocess: Preprocess) -> None:
        self.split, self.windows, self.preprocess = split, windows, preprocess

    def __iter__(self) -> Iterator[Any]:
        own = data.get_worker_info()
        assert own is not None
        try:
            for pixels in self.split.stream(self.windows[own.id :: own.num_workers], self.preprocess):
                yield torch.from_numpy(pixels)
        except SparsightError as error:  # raised here, it would arrive wrapped in a traceback
            yield str(error)


def _end_with_parent(_: int) -> None:
    """End this worker when a signal ends its parent: torch watches the fork server, which lives on for its workers."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
