"""Working folders: locks, promotion, stages that are killed and continued."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from sparsight.errors import SparsightError
from sparsight.work import Work, write_atomic


def test_second_process_is_refused_while_the_first_works(tmp_path: Path) -> None:
    script = "import sys, time; from sparsight.work import Work; from pathlib import Path\n"
    script += "with Work(Path(sys.argv[1]), 'key'): print('locked', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "w")], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "locked\n"
        with pytest.raises(SparsightError, match=f"in use by process {other.pid} on .*: this stage is still running"):
            Work(tmp_path / "w", "key").__enter__()
    finally:
        other.kill()
        other.communicate()
    with Work(tmp_path / "w", "key"):
        pass  # the lock dies with its process


def test_state_survives_under_the_same_key_only(tmp_path: Path) -> None:
    for key, kept in (("a", False), ("a", True), ("b", False)):
        with Work(tmp_path / "w", key) as work:
            assert (work.state / "checkpoint").exists() == kept
            (work.state / "checkpoint").touch()


def test_finish_puts_files_in_place_among_others_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "out" / "topk-s0").mkdir(parents=True)
    (tmp_path / "out" / "topk-s0" / "metrics.json").write_text("another stage's")
    (tmp_path / "out" / "topk-s0" / "config.json").write_text("old")
    with Work(tmp_path / "w", "key") as work:
        (work.out / "topk-s0").mkdir()
        (work.out / "topk-s0" / "config.json").write_text("new")
        (work.out / "all.json").write_text("{}")
        work.finish(tmp_path / "out")
    found = {p.relative_to(tmp_path).as_posix(): p.read_text() for p in tmp_path.rglob("*") if p.is_file()}
    assert found == {
        "out/all.json": "{}", "out/topk-s0/config.json": "new", "out/topk-s0/metrics.json": "another stage's",
    }  # fmt: skip


def test_finish_interrupted_in_the_middle_is_finished_although_outputs_were_deleted(tmp_path: Path) -> None:
    """Snakemake deletes the outputs of a killed job before it runs the job again."""
    out = tmp_path / "out"
    with pytest.raises(IsADirectoryError), Work(tmp_path / "w", "key") as work:
        (work.out / "a.json").write_text("a")
        (work.out / "b.json").write_text("b")
        (out / "b.json").mkdir(parents=True)  # stands for the kill: b cannot be put here
        work.finish(out)
    assert (out / "a.json").exists()
    (out / "a.json").unlink()
    (out / "b.json").rmdir()
    with Work(tmp_path / "w", "key") as work:
        assert work.complete
        work.finish(out)
    assert sorted(p.name for p in out.iterdir()) == ["a.json", "b.json"]
    assert not (tmp_path / "w").exists()


def test_atomic_write_leaves_the_old_file_if_writing_fails(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("old")

    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError

    with pytest.raises(OSError):
        write_atomic(tmp_path / "f", fail)
    assert (tmp_path / "f").read_text() == "old"


TRAIN = """
import sys, time
from pathlib import Path
import torch
from safetensors.torch import save_file
from sparsight import training
from sparsight.batches import RowNumbers
from sparsight.work import Work

training._CHECKPOINT_SECONDS = 0.0
slow = float(sys.argv[2])

class Loop:
    def __init__(self):
        torch.manual_seed(0)
        self.model = torch.nn.Linear(4, 1)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
    def step(self, rows, progress, generator):
        time.sleep(slow)
        x = torch.randn(len(rows), 4, generator=generator) + torch.from_numpy(rows)[:, None] % 7
        loss = (self.model(x)[:, 0] - x.sum(dim=1)).square().mean()
        self.optimizer.zero_grad(); loss.backward(); self.optimizer.step()
        return {"loss": loss}
    def epoch_end(self):
        return {"weight": float(self.model.weight.sum())}
    def state(self):
        return training.module_state(self.model) | training.optimizer_state(self.optimizer)
    def restore(self, state):
        training.restore_module(self.model, state); training.restore_optimizer(self.optimizer, state)

with Work(Path(sys.argv[1]) / "work", "key") as work:
    loop = Loop()
    training.train(loop, RowNumbers(103, 10, seed=0), 30, seed=0, work=work)
    save_file(loop.state(), work.out / "weights.safetensors")
    work.finish(Path(sys.argv[1]) / "out")
"""


def test_training_killed_again_and_again_gives_the_bytes_of_training_left_alone(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(textwrap.dedent(TRAIN))

    def start(name: str, slow: float) -> subprocess.Popen[bytes]:
        command = [sys.executable, str(tmp_path / "train.py"), str(tmp_path / name), str(slow)]
        return subprocess.Popen(command, stderr=subprocess.DEVNULL)

    assert start("undisturbed", 0).wait() == 0
    for kills in range(2):
        process = start("killed", 0.03)
        checkpoint = tmp_path / "killed" / "work" / "state" / "checkpoint.safetensors"
        seen = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
        while not checkpoint.exists() or checkpoint.stat().st_mtime_ns == seen:
            assert process.poll() is None, f"finished before kill {kills}"
            time.sleep(0.02)
        time.sleep(0.1)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "killed" / "out").exists()
    assert start("killed", 0).wait() == 0
    names = sorted(p.name for p in (tmp_path / "undisturbed" / "out").iterdir())
    assert names == ["training.jsonl", "weights.safetensors"]
    for name in names:
        assert (tmp_path / "killed" / "out" / name).read_bytes() == (
            tmp_path / "undisturbed" / "out" / name
        ).read_bytes()
