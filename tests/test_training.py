"""The training loop: it stops at SIGTERM and continues there, and tells where a loss went wrong."""

import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsight.common.errors import SparsightError
from sparsight.training import checkpoints
from sparsight.training import loop as training_loop
from sparsight.training.batches import RowNumbers

EPOCHS, PER_EPOCH = 60, 11
TOTAL = EPOCHS * PER_EPOCH  # a log line every three steps, and at the end of an epoch


class Loop:
    """A linear regression; ``during`` is called in every step with its number, from 1 on."""

    def __init__(self, during: Callable[[int], object] = lambda step: None) -> None:
        torch.manual_seed(0)
        self.model, self.during = torch.nn.Linear(4, 1), during
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        self.steps: list[int] = []
        self.factor = 1.0

    def step(self, rows: np.ndarray, number: int, total: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        assert total == TOTAL
        self.steps.append(number)
        self.during(self.steps[-1])
        x = torch.randn(len(rows), 4, generator=generator) + torch.from_numpy(rows)[:, None] % 7
        loss = self.factor * (self.model(x)[:, 0] - x.sum(dim=1)).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"loss": loss, "a_second": x.mean()}

    def check(self) -> None:
        """No step fails without raising."""

    def epoch_end(self) -> dict[str, float]:
        return {"weight": self.model.weight.sum().item()}

    def state(self) -> dict[str, torch.Tensor]:
        return training_loop.module_state(self.model) | training_loop.optimizer_state(self.optimizer)

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        training_loop.restore_module(self.model, state)
        training_loop.restore_optimizer(self.optimizer, state)


def train(loop: Loop, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    training_loop.train(loop, RowNumbers(103, 10, seed=0), EPOCHS, 0, folder, folder / "training.jsonl")


def result(loop: Loop, folder: Path) -> dict[str, bytes]:
    """The bytes that training ended with."""
    save_file(loop.state(), folder / "weights.safetensors")
    return {name: (folder / name).read_bytes() for name in ("training.jsonl", "weights.safetensors")}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder, loop = tmp_path_factory.mktemp("undisturbed"), Loop()
    train(loop, folder)
    assert loop.steps == list(range(1, TOTAL + 1))
    return result(loop, folder)


def terminate_in(stop: int) -> Callable[[int], None]:
    """Sends SIGTERM to this process during one step."""
    return lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == stop else None


def test_stopped_by_sigterm_in_any_step_it_continues_with_the_next(
    undisturbed: dict[str, bytes], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    stops, steps = [1, 2, 3, 5, 11, 12, 301, 302, TOTAL], []
    before = signal.getsignal(signal.SIGTERM)
    for stop in stops:
        loop = Loop(terminate_in(stop))
        with pytest.raises(SystemExit) as stopped:
            train(loop, tmp_path)
        assert stopped.value.code == 143 and signal.getsignal(signal.SIGTERM) == before
        steps += loop.steps
        message = f"stopped by SIGTERM after step {stop} of {TOTAL}; the same command continues there"
        assert message in capfd.readouterr().err.splitlines()
    loop = Loop()
    train(loop, tmp_path)
    assert steps + loop.steps == list(range(1, TOTAL + 1))
    assert result(loop, tmp_path) == undisturbed


def test_a_second_sigterm_while_the_checkpoint_is_written_does_no_harm(
    undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def impatient(state: dict[str, torch.Tensor], path: Path) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        save_file(state, path)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr("sparsight.training.checkpoints.save_file", impatient)
        train(Loop(terminate_in(7)), tmp_path)
    loop = Loop()
    train(loop, tmp_path)
    assert loop.steps[0] == 8 and result(loop, tmp_path) == undisturbed


def test_killed_while_a_checkpoint_is_written_it_continues_from_the_one_before(
    undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(state: dict[str, torch.Tensor], path: Path) -> None:
        Path(path).write_bytes(b"half of it")
        raise KeyboardInterrupt

    def due(step: int) -> None:
        patch.setattr(checkpoints.Checkpoint, "due", step % 8 == 0)
        patch.setattr("sparsight.training.checkpoints.save_file", half if step == 16 else save_file)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        train(Loop(due), tmp_path)
    loop = Loop()
    train(loop, tmp_path)
    assert loop.steps[0] == 9 and result(loop, tmp_path) == undisturbed


def test_interrupted_between_checkpoints_it_repeats_the_steps_since_the_last(
    undisturbed: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(step: int) -> None:
        patch.setattr(checkpoints.Checkpoint, "due", step % 8 == 0)
        if step == last:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        for first, last in ((1, 7), (1, 21), (17, 30), (25, 309)):
            loop = Loop(interrupt)
            with pytest.raises(KeyboardInterrupt):
                train(loop, tmp_path)
            assert loop.steps == list(range(first, last + 1))
    with pytest.raises(SystemExit):
        train(Loop(terminate_in(305)), tmp_path)  # before it has written a line where the log was cut
    loop = Loop()
    train(loop, tmp_path)
    assert loop.steps[0] == 306 and result(loop, tmp_path) == undisturbed


@pytest.mark.parametrize(
    ("due", "message"),
    [
        (False, r"^step 51 of 660: loss nan \(mean of 3 steps\); lower lr, .*; no checkpoint was written before$"),
        (True, r"^step 50 of 660: loss nan .*; the last good checkpoint is .*/checkpoint.safetensors, after step 49$"),
    ],
)
def test_a_loss_that_turns_nan_is_told_with_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, due: bool, message: str
) -> None:
    def spoil(step: int) -> None:
        loop.factor = np.nan if step >= 50 else 1.0

    monkeypatch.setattr(checkpoints.Checkpoint, "due", due)
    loop = Loop(spoil)
    with pytest.raises(SparsightError, match=message):
        train(loop, tmp_path)
    assert (tmp_path / "checkpoint.safetensors").exists() == due
    if due:
        state = load_file(tmp_path / "checkpoint.safetensors")
        assert int(state["loop.position"][0]) == 49 and all(bool(v.isfinite().all()) for v in state.values())


def test_it_trains_in_another_thread_where_no_signal_can_be_handled(
    undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    loop = Loop()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(train, loop, tmp_path).result()
    assert result(loop, tmp_path) == undisturbed
