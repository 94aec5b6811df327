"""The SAE stage as the pipeline runs it, killed and terminated: what it ends with is what it would have been."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, write_store
from safetensors import safe_open

pytestmark = pytest.mark.slow
SITE, EPOCHS, PER_EPOCH = "blocks.0.input", 10, 64
TOTAL = EPOCHS * PER_EPOCH  # a log line every three steps
STAGE = str(ROOT / "workflow" / "scripts" / "sae.py")
SECTION = {
    "backbone": "vit", "site": SITE, "kind": "topk", "d_sae": 256, "k": 2, "epochs": EPOCHS, "batch_size": 256,
    "memory_mb": 1, "lr": 1e-3, "aux_k": 16, "dead_after": 500, "threads": 1,
}  # fmt: skip

# A process that runs the stage's own script in a fork for every line it is given, so that imports cost once. The
# script then steps slowly, marks every step it takes, and writes a checkpoint after every fourth.
FORKS = """
import itertools, os, runpy, sys, time
from sparsight.pipeline.stage import set_threads
set_threads(1)  # nothing runs in parallel here, so that forks are sound
import torch
from sparsight.sae import fit, trainer
from sparsight.sae.variants import topk
from sparsight.training import loop

marks, step, calls = open(sys.argv[1], "a"), trainer.Trainer.step, itertools.count(1)

def slow(self, *rest):
    print(".", end="", file=marks, flush=True)
    time.sleep(0.01)
    return step(self, *rest)

trainer.Trainer.step = slow
loop.Checkpoint.due = property(lambda self: next(calls) % 4 == 0)
sys.argv = sys.argv[2:]
for _ in sys.stdin:
    child = os.fork()
    if child == 0:
        runpy.run_path(sys.argv[0], run_name="__main__")
        break
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_store(tmp_path_factory.mktemp("store"), 512, {SITE: (32, 64)}, tokens="all", shard_images=32)
    assert sum(file.stat().st_size for file in path.rglob("0")) > 2**20, "more than memory_mb: several pools"
    return path.with_suffix(".json")


class Stage:
    """The stage on a folder of its own, a context manager for :meth:`interrupt`."""

    def __init__(self, store: Path, folder: Path) -> None:
        self.folder, self.marks, self.errors = folder, folder / "marks", folder / "errors"
        self.marks.touch()
        words = [f"--{name.replace('_', '-')}={value}" for name, value in SECTION.items()]
        images = f"--from-images={store}"  # any file: without a PASS term no label is read
        places = [
            images,
            f"--from-store={store}",
            "--from-backbone",
            f"--out={folder / 'out'}",
            f"--work={folder / 'work'}",
        ]
        self.command = [STAGE, *places, "--name=grid", "--seeds", "0", "1", *words]

    def __enter__(self) -> "Stage":
        command = [sys.executable, "-c", FORKS, str(self.marks), *self.command]
        with self.errors.open("w") as errors:
            self.forks = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        self.forks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.forks.__exit__(*error)

    def run(self) -> dict[str, bytes]:
        """Everything that it makes when left alone."""
        done = subprocess.run([sys.executable, *self.command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        out = self.folder / "out"
        return {p.relative_to(out).as_posix(): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}

    def interrupt(self, number: signal.Signals, steps: int, seconds: float) -> int:
        """Start it and send a signal ``seconds`` after so many steps; returns the exit status."""
        goal = self.steps() + steps
        assert self.forks.stdin is not None and self.forks.stdout is not None
        self.forks.stdin.write("start\n")
        self.forks.stdin.flush()
        process = int(self.forks.stdout.readline())
        while self.steps() < goal:
            assert Path("/proc", str(process)).exists(), self.errors.read_text()
            time.sleep(0.002)
        time.sleep(seconds)
        os.kill(process, number)
        return int(self.forks.stdout.readline())

    def steps(self) -> int:
        """Steps taken slowly so far, again or not."""
        return self.marks.stat().st_size

    def position(self) -> int:
        """The step after which the next run continues."""
        path = self.folder / "work" / "state" / "checkpoint.safetensors"
        if not path.exists():
            return 0
        with safe_open(path, "np") as state:
            return int(state.get_tensor("loop.position")[0])


@pytest.fixture(scope="module")
def undisturbed(store: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    made = Stage(store, tmp_path_factory.mktemp("undisturbed")).run()
    files = ("config.json", "sae.safetensors", "training.jsonl")
    assert sorted(made) == [f"grid-s{seed}/{file}" for seed in (0, 1) for file in files]
    for seed in (0, 1):
        lines = [json.loads(line) for line in made[f"grid-s{seed}/training.jsonl"].splitlines()]
        assert lines[-1]["step"] == TOTAL and lines[0]["step"] == 3
        assert sum(line["dead"] > 0 and line["aux"] > 0 for line in lines) > 20, "AuxK has dead latents to revive"
    return made


def test_killed_at_ten_random_moments_it_ends_with_the_same_bytes(
    store: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    generator, positions = random.Random(0), []
    with Stage(store, tmp_path) as stage:
        for _ in range(10):
            status = stage.interrupt(signal.SIGKILL, generator.randrange(1, 55), generator.uniform(0, 0.02))
            assert status == -signal.SIGKILL and not (tmp_path / "out").exists()
            positions.append(stage.position())
    assert len(set(positions)) > 5 and positions == sorted(positions), "it came further in most runs"
    assert stage.steps() > positions[-1], "steps behind the last checkpoint were taken again"
    assert stage.run() == undisturbed


def test_terminated_it_exits_with_143_and_continues_exactly_there(
    store: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    generator = random.Random(1)
    with Stage(store, tmp_path) as stage:
        for _ in range(4):
            assert stage.interrupt(signal.SIGTERM, generator.randrange(1, 90), generator.uniform(0, 0.02)) == 143
            last = stage.errors.read_text().splitlines()[-1]
            assert stage.position() == stage.steps(), "every step was taken once"
            assert last == (
                f"stopped by SIGTERM after step {stage.steps()} of {TOTAL}; the same command continues there"
            )
            assert not (tmp_path / "out").exists() and not list(tmp_path.rglob("*.aside"))
    assert stage.run() == undisturbed
