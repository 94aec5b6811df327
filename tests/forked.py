"""Processes that train together, forked from one that has imported torch already, which takes seconds."""

import multiprocessing
import multiprocessing.connection
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch

from sparsight import config
from sparsight.activations.store import ActivationStore
from sparsight.common.member import Member
from sparsight.common.work import Work
from sparsight.config import Compute
from sparsight.pipeline.stage import prepare_torch
from sparsight.sae.fit import fit
from sparsight.sae.sharded.base import Sharded
from sparsight.sae.sharded.trainer import ShardedTrainer, create
from sparsight.training import checkpoints
from sparsight.training.ranks import Ranks

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["forked"])
CPU = torch.device("cpu")


def run(n: int, target: Callable[..., None], *arguments: Any) -> list[int | None]:
    """Call ``target(rank, n, *arguments)`` in ``n`` processes; their exit statuses. When one dies, all are ended."""
    processes = [SERVER.Process(target=_alone, args=(target, rank, n, *arguments)) for rank in range(n)]
    for process in processes:
        process.start()
    waiting: dict[Any, Any] = {process.sentinel: process for process in processes}
    while waiting:
        for sentinel in multiprocessing.connection.wait(list(waiting)):
            ended = waiting.pop(sentinel)
            ended.join()
            if ended.exitcode not in (0, 128 + signal.SIGTERM):
                for other in waiting.values():
                    other.kill()
    return [process.exitcode for process in processes]


def _alone(target: Callable[..., None], *arguments: Any) -> None:
    prepare_torch(Compute(threads=1))
    target(*arguments)


def batches(d_in: int, n: int) -> list[torch.Tensor]:
    """Batches (64, D) of sums of a few directions out of 40."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(40, d_in, generator=generator)
    active = torch.rand(n, 64, 40, generator=generator) * (torch.rand(n, 64, 40, generator=generator) < 0.1)
    return list(active @ directions + 0.1 * torch.randn(n, 64, d_in, generator=generator))


def steps(one: Sharded, n: int, labels: bool = False) -> None:
    """Train a split SAE for ``n`` steps."""
    trainer = ShardedTrainer([one], lr=1e-3, dead_after=300)
    data = batches(one.d_in, 20)
    for step in range(n):
        trainer.step(data[step % 20], torch.arange(64) % 3 if labels else None)


def train(
    rank: int, size: int, meeting: Path, out: Path, kinds: dict[str, tuple[str, Any]], sizes: Sequence[int], n: int
) -> None:
    """Train split SAEs of several kinds as one of several ranks and save each in its folder."""
    ranks = Ranks(rank, size).join(meeting)
    for name, (kind, options) in kinds.items():
        one = create(kind, ranks, *sizes, **options)
        steps(one, n)
        one.save(out / name)
    ranks.leave()


def fit_section(rank: int, size: int, folder: Path, store: Path, options: dict[str, Any], end: str, at: int) -> None:
    """Train a section with a checkpoint in every fourth step, and end as ``end`` says in step or checkpoint ``at``."""
    calls = {"step": 0, "part": 0}
    trainer, files = cast(Any, ShardedTrainer), cast(Any, checkpoints)
    step, save_file = trainer.step, files.save_file

    def counted_step(self: ShardedTrainer, *arguments: Any) -> Any:
        calls["step"] += 1
        files.Checkpoint.due = calls["step"] % 4 == 0
        if calls["step"] == at and end in ("kill in step", "terminate") and rank == size - 1:
            os.kill(os.getpid(), signal.SIGTERM if end == "terminate" else signal.SIGKILL)
        return step(self, *arguments)

    def counted_save(state: Any, path: Path) -> None:
        calls["part"] += 1
        if calls["part"] == at and end == "kill in part" and rank == size - 1:
            Path(path).write_bytes(b"half of it")
            os.kill(os.getpid(), signal.SIGKILL)
        save_file(state, path)

    trainer.step, files.save_file = counted_step, counted_save
    section = config.Sae(**options, processes=size)
    work = Work(folder / "work", "")
    fit(section, ActivationStore.open(store), None, "one", 0, work, CPU, {}, Member(rank, size, folder))
