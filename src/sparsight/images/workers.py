"""Worker processes that decode the batches of a split.

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
    """The images of each window, uint8 (B, H, W, C), in order, decoded by worker processes.

    Args:
        split: the images.
        windows: rows of each batch.
        preprocess: how pictures become pixels.
        threads: number of decoding threads if ``workers`` is 0, as in :meth:`Split.stream`.
        workers: number of processes, which decode a batch each.
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
    """Each worker's share of the windows; the loader takes one window from every worker in turn."""

    def __init__(self, split: Split, windows: Sequence[Rows], preprocess: Preprocess) -> None:
        self.split, self.windows, self.preprocess = split, windows, preprocess

    def __iter__(self) -> Iterator[Any]:
        worker = data.get_worker_info()
        assert worker is not None
        try:
            for pixels in self.split.stream(self.windows[worker.id :: worker.num_workers], self.preprocess):
                yield torch.from_numpy(pixels)
        except SparsightError as error:  # an exception would arrive wrapped in a traceback
            yield str(error)


def _end_with_parent(_: int) -> None:
    """End this worker when a signal ends its parent.

    Torch watches only the fork server, which stays alive as long as its workers.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
