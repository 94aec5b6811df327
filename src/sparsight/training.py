"""The loop that trains everything: seeded order, JSON-lines log, checkpoints, exact resumption.

Nothing random has a state to save: order and noise are derived from (seed, epoch) and (seed, step). A
checkpoint is written only where a log line ends, so a resumed run writes the same log.
"""

import json
import time
from functools import partial
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from sparsight.batches import Batches
from sparsight.errors import SparsightError
from sparsight.progress import Progress
from sparsight.seeds import derive_seed
from sparsight.work import Work, write_atomic

_CHECKPOINT_SECONDS = 15.0
_LOG_LINES = 200


B_contra = TypeVar("B_contra", contravariant=True)
B = TypeVar("B")


class Trainable(Protocol[B_contra]):
    """What the loop needs of the thing it trains."""

    def step(self, batch: B_contra, progress: float, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """One optimiser step on ``batch``; ``progress`` in [0, 1) is the share of training done.

        ``generator`` is a CPU generator seeded for this step. Returns scalars to log.
        """

    def epoch_end(self) -> dict[str, float]:
        """Scalars to log after each epoch, e.g. validation accuracy."""

    def state(self) -> dict[str, torch.Tensor]:
        """Every tensor that the next step depends on."""

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Take over what :meth:`state` returned."""


def train(trainable: Trainable[B], batches: Batches[B], epochs: int, seed: int, work: Work) -> None:
    """Run all epochs, continuing from ``work`` if it holds a checkpoint.

    Writes ``training.jsonl`` to ``work.out``: one line per logging step with the means since the last
    one, and one per epoch. Raises SparsightError if a logged value is not finite.
    """
    per_epoch = batches.per_epoch
    total = per_epoch * epochs
    log_every = max(1, total // _LOG_LINES)
    checkpoint, log_path = work.state / "checkpoint.safetensors", work.out / "training.jsonl"
    step, log_bytes = 0, 0
    if checkpoint.exists():
        state = load_file(checkpoint)
        step, log_bytes = (int(v) for v in state.pop("loop.position"))
        trainable.restore(state)
    with log_path.open("ab") as log, Progress(total, "steps", start=step) as progress:
        log.truncate(log_bytes)
        sums: dict[str, torch.Tensor] = {}
        count, saved = 0, time.monotonic()
        while step < total:
            epoch = step // per_epoch
            for batch in batches.epoch(epoch, skip=step % per_epoch):
                generator = torch.Generator().manual_seed(derive_seed(seed, "noise", step))
                scalars = trainable.step(batch, step / total, generator)
                step, count = step + 1, count + 1
                for name, value in scalars.items():
                    sums[name] = sums[name] + value.detach() if name in sums else value.detach().clone()
                last = step % per_epoch == 0
                if step % log_every == 0 or last:
                    line: dict[str, Any] = {"step": step, "epoch": round(step / per_epoch, 4)}
                    line |= {name: value.item() / count for name, value in sums.items()}
                    _write(log, line)
                    sums, count = {}, 0
                    if last and (extra := trainable.epoch_end()):
                        _write(log, {"step": step, "epoch": step // per_epoch, **extra})
                    progress(
                        step - progress.done, ", ".join(f"{k} {v:.4g}" for k, v in line.items() if k not in POSITION)
                    )
                    if time.monotonic() - saved > _CHECKPOINT_SECONDS:
                        log.flush()
                        position = torch.tensor([step, log.tell()])
                        state = {**trainable.state(), "loop.position": position}
                        write_atomic(checkpoint, partial(save_file, state))
                        saved = time.monotonic()


POSITION = ("step", "epoch")
"""Keys of a log line that say where it stands."""


def _write(log: Any, line: dict[str, Any]) -> None:
    if not all(np.isfinite(value) for value in line.values()):
        raise SparsightError(f"training diverged at {line}; lower lr, or look for extreme values in the inputs")
    log.write((json.dumps(line) + "\n").encode())


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The optimiser's tensors under flat names, for safetensors."""
    return {
        f"optimizer.{index}.{name}": value
        for index, slots in optimizer.state_dict()["state"].items()
        for name, value in slots.items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, torch.Tensor]) -> None:
    """Take over what :func:`optimizer_state` returned."""
    plain = optimizer.state_dict()
    plain["state"] = {}
    for key, value in state.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".", 2)
            plain["state"].setdefault(int(index), {})[name] = value
    optimizer.load_state_dict(plain)


def module_state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A module's parameters and buffers under flat names beside those of the optimiser."""
    return {f"module.{name}": value.contiguous() for name, value in module.state_dict().items()}


def restore_module(module: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Take over what :func:`module_state` returned."""
    module.load_state_dict({k.removeprefix("module."): v for k, v in state.items() if k.startswith("module.")})


def warmup_cosine(progress: float, warmup: float = 0.1) -> float:
    """Factor on the peak learning rate: linear over the first ``warmup``, then a half cosine to 0."""
    return min(1.0, progress / warmup + 1e-3) * 0.5 * (1 + float(np.cos(np.pi * progress)))
