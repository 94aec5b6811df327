"""Runs of the whole pipeline on a tiny model, which several test files look at; fixtures for all of them."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import shared_folder, snakemake, workspace

TINY_RUN = Path("results", "tiny")
# Files with times and hosts; everything else is byte-equal between equal runs.
VARYING = ("timings.json", "provenance.json", "logs/", "benchmarks/")
ODD = "it's a (test) [dir] {x} \u00e4 0"
"""Name of a folder with what a shell, a format string or a glob could take for its own."""


def contents(folder: Path) -> dict[str, bytes]:
    root = folder / TINY_RUN
    files = {p.relative_to(root).as_posix(): p for p in root.rglob("*") if p.is_file()}
    return {name: path.read_bytes() for name, path in sorted(files.items()) if not name.startswith(VARYING)}


def holder(folder: Path, stage: str, sign: str) -> int | None:
    """The process of a stage that is running and has come as far as writing ``sign``."""
    work = folder / TINY_RUN / ".work" / stage
    try:
        match = re.match(r"process (\d+) on", (work / "lock").read_text())
        alive = match is not None and Path("/proc", match[1]).exists() and (work / sign).stat().st_size > 0
    except OSError:
        return None
    return int(match[1]) if match and alive else None


def start(folder: Path, cores: int = 1) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "snakemake", "--configfile", "tiny.yaml", "--cores", str(cores)]
    with (folder / "output.txt").open("w") as output:  # not a pipe: what an orphan holds open never ends
        return subprocess.Popen(command, cwd=folder, stdout=output, stderr=subprocess.STDOUT)


# Stages to kill, each when a file of its working folder shows that it is in the middle of its work.
KILLED = {
    "images": "lock",
    "backbone-vit": "out/training.jsonl",
    "extract-vit-train-0": "state/shard-3.json",
    "sae-topk": "state/training.jsonl",
    "pruning-heads": "out/validation.parquet",
}


def run_with_kills(folder: Path) -> Path:
    """Run on one core, killing every stage of KILLED once, and give the same command until it succeeds."""
    left = dict(KILLED)
    while True:
        run = start(folder)
        while run.poll() is None:
            for stage, sign in list(left.items()):
                if process := holder(folder, stage, sign):
                    os.kill(process, signal.SIGKILL)
                    del left[stage]
            time.sleep(0.005)
        if run.returncode == 0:
            assert not left, "every stage was caught in the middle"
            return folder
        assert "SIGKILL" in (folder / "output.txt").read_text()


def run_in_peace(folder: Path) -> Path:
    """Run on two cores."""
    done = snakemake(folder, "--cores", "2")
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


IN_ONE_PROCESS = """
import runpy, shlex, sys

for command in sys.stdin.read().splitlines():
    _, *sys.argv = shlex.split(command)
    runpy.run_path(sys.argv[0], run_name="__main__")
"""


def commands(folder: Path, *targets: str) -> list[str]:
    """What Snakemake would run, in order."""
    plan = snakemake(folder, "--dry-run", "--printshellcmds", *targets)
    assert plan.returncode == 0, plan.stderr
    every = re.findall(r"(python \S*workflow/scripts/.*) > ", plan.stdout + plan.stderr)
    return [command for command in every if "provenance.py" not in command]  # it reads what Snakemake itself writes


def run_in_one_process(folder: Path) -> Path:
    """Run what Snakemake would, one command after the other, in a process that imports timm once."""
    python, plan = [sys.executable, "-c", IN_ONE_PROCESS], "\n".join(commands(folder))
    done = subprocess.run(python, cwd=folder, input=plan, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    for part in folder.rglob("*.part-*.json"):  # temporary, as Snakemake knows
        part.unlink()
    return folder


def copy_of(folder: Path, place: Path) -> Path:
    """A workspace that a test may change; not of hard links, for Snakemake writes logs and its memory in place."""
    shutil.copytree(folder, place, symlinks=True)
    return place


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workspace of a finished run without provenance. It is for reading."""
    return shared_folder(tmp_path_factory, ODD, lambda folder: run_in_one_process(workspace(folder)))


@pytest.fixture(scope="session")
def both_runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Workspaces of Snakemake's run left alone and of one killed again and again, made side by side, for reading."""
    peace, kills = (workspace(tmp_path_factory.mktemp(name) / ODD) for name in ("peace", "kills"))
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(run_in_peace, peace), pool.submit(run_with_kills, kills)
        return waiting[0].result(), waiting[1].result()


@pytest.fixture(scope="session")
def snakemake_run(both_runs: tuple[Path, Path]) -> Path:
    """The workspace that Snakemake left, for reading."""
    return both_runs[0]


@pytest.fixture
def own_run(snakemake_run: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return copy_of(snakemake_run, tmp_path / "own")
