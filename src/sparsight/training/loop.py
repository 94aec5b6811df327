"""The training loop of backbones, SAEs and policies: seeded order, JSON-lines log, checkpoints, exact resumption.

There is no random state to save, because order and noise are derived from (seed, epoch) and (seed, step). A
checkpoint includes the sums of the unfinished log line, so a resumed run writes the same log.
"""

import io
import json
import signal
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from sparsight.common.errors import SparsightError
from sparsight.common.progress import Progress, log
from sparsight.common.seeds import derive_seed
from sparsight.training.batches import Batches
from sparsight.training.checkpoints import PLACE, Checkpoint, PartedCheckpoint
from sparsight.training.ranks import Ranks

_LOG_LINES = 200
_SUM = "loop.sum."


B_contra = TypeVar("B_contra", contravariant=True)
B = TypeVar("B")


class Trainable(Protocol[B_contra]):
    """The interface that the loop needs of an object to train it."""

    def step(self, batch: B_contra, number: int, total: int, generator: torch.Generator) -> dict[str, Tensor]:
        """One optimiser step on ``batch``, the ``number``-th of ``total``, from 1 on.

        ``generator`` is a CPU generator seeded for this step. Returns the scalars to log.
        """

    def check(self) -> None:
        """Raise SparsightError if a step so far has failed that did not raise. Called before a log line or checkpoint.

        A step on a GPU cannot raise without waiting for it.
        """

    def epoch_end(self) -> dict[str, float]:
        """Scalars to log after each epoch, e.g. validation accuracy."""

    def state(self) -> dict[str, Tensor]:
        """Every tensor that the next step depends on."""

    def restore(self, state: dict[str, Tensor]) -> None:
        """Restore what :meth:`state` returned."""


def train(
    trainable: Trainable[B], batches: Batches[B], epochs: int, seed: int, state: Path, log_path: Path,
    ranks: Ranks | None = None,
) -> None:  # fmt: skip
    """Run all epochs, continuing from the checkpoint in ``state`` if there is one.

    On SIGTERM, the loop finishes the current step, writes a checkpoint and exits with status 143. Of several ranks, all
    write their parts of the checkpoint after the same step; the first writes the log.

    Args:
        trainable: the object to train.
        batches: the training data.
        epochs: passes over the data.
        seed: seed of each step's generator.
        state: folder of the checkpoint.
        log_path: the log: one line per logging step with the means since the previous line, and one per epoch.
            A resumed run cuts it to its length at the checkpoint.
        ranks: the processes that make each step together; None for one alone.

    Raises:
        SparsightError: a step that fails, or a mean that is not finite; the message names the last checkpoint.
    """
    per_epoch, total = batches.per_epoch, batches.per_epoch * epochs
    log_every = max(1, total // _LOG_LINES)
    ranks = ranks or Ranks()
    checkpoint = Checkpoint(state / "checkpoint.safetensors") if ranks.size == 1 else PartedCheckpoint(state, ranks)
    step = log_bytes = count = 0
    sums: dict[str, Tensor] = {}
    if saved := checkpoint.load():
        step, log_bytes, count = (int(v) for v in saved.pop(PLACE))
        sums = {name.removeprefix(_SUM): saved.pop(name) for name in list(saved) if name.startswith(_SUM)}
        trainable.restore(saved)
    note = ""
    with (
        log_path.open("ab") if ranks.first else io.BytesIO() as log_file,
        Progress(_rows(batches, total), batches.unit, start=_rows(batches, step)) as progress,
        _sigterm_noted() as signals,
    ):
        log_file.truncate(log_bytes)
        log_file.seek(log_bytes)
        while step < total:
            epoch = step // per_epoch
            for batch in batches.epoch(epoch, skip=step % per_epoch):
                generator = torch.Generator().manual_seed(derive_seed(seed, "noise", step))
                step, count = step + 1, count + 1
                last = step % per_epoch == 0
                line_ends = step % log_every == 0 or last
                try:
                    scalars = trainable.step(batch, step, total, generator)
                    sums = {name: value.detach() + sums.get(name, 0) for name, value in scalars.items()}
                    stop, due = ranks.any(bool(signals), checkpoint.due)
                    save = stop or due
                    if line_ends or save:
                        trainable.check()
                    means = _means(sums, count) if line_ends or save else {}
                except SparsightError as error:
                    raise SparsightError(f"step {step} of {total}: {error}; {checkpoint}") from None
                if line_ends:
                    _write(log_file, {"step": step, "epoch": round(step / per_epoch, 4), **means})
                    sums, count, note = {}, 0, _note(means)
                if last and (extra := trainable.epoch_end()):
                    _write(log_file, {"step": step, "epoch": step // per_epoch, **extra})
                progress(_rows(batches, step) - progress.done, note)
                if save:
                    log_file.flush()
                    loop_state = {PLACE: torch.tensor([step, log_file.tell(), count])}
                    loop_state |= {f"{_SUM}{name}": value for name, value in sums.items()}
                    checkpoint.save(step, {**trainable.state(), **loop_state})
                if stop:
                    log(f"stopped by SIGTERM after step {step} of {total}; the same command continues there")
                    raise SystemExit(128 + signal.SIGTERM)


POSITION = ("step", "epoch")
"""Keys of a log line that give its position in training."""


@contextmanager
def _sigterm_noted() -> Iterator[list[int]]:
    """Inside ``with``, record SIGTERM in this list instead of terminating. Works only in the main thread."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, before)


def _rows(batches: Batches[Any], step: int) -> int:
    """Number of rows seen after ``step`` steps."""
    epochs, steps = divmod(step, batches.per_epoch)
    return epochs * batches.n_rows + steps * batches.batch_size


def _means(sums: Mapping[str, Tensor], count: int) -> dict[str, float]:
    values = torch.stack(list(sums.values())).tolist() if sums else []  # one copy from the device
    means = {name: value / count for name, value in zip(sums, values, strict=True)}
    for name, value in means.items():
        if not np.isfinite(value):
            raise SparsightError(
                f"{name} {value} (mean of {count} steps); lower lr, or look for extreme values in the inputs"
            )
    return means


def _note(means: Mapping[str, float]) -> str:
    """Short text of a log line; values of several SAEs (``topk-s0.fvu``, ``topk-s1.fvu``) are averaged."""
    values: dict[str, list[float]] = defaultdict(list)
    for name, value in means.items():
        values[name.rpartition(".")[2]].append(value)
    return ", ".join(f"{name} {np.mean(group):.4g}" for name, group in values.items())


def _write(log_file: Any, line: dict[str, Any]) -> None:
    log_file.write((json.dumps(line) + "\n").encode())


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's tensors under flat names, for safetensors."""
    return {
        f"optimizer.{index}.{name}": value
        for index, slots in optimizer.state_dict()["state"].items()
        for name, value in slots.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Tensor]) -> None:
    """Restore what :func:`optimizer_state` returned."""
    state_dict = optimizer.state_dict()
    state_dict["state"] = {}
    for key, value in state.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            state_dict["state"].setdefault(int(index), {})[name] = value
    optimizer.load_state_dict(state_dict)


def module_state(module: torch.nn.Module) -> dict[str, Tensor]:
    """A module's parameters and buffers under flat names, distinct from the optimiser's."""
    return {f"module.{name}": value.contiguous() for name, value in module.state_dict().items()}


def restore_module(module: torch.nn.Module, state: dict[str, Tensor]) -> None:
    """Restore what :func:`module_state` returned."""
    module.load_state_dict({k.removeprefix("module."): v for k, v in state.items() if k.startswith("module.")})
