"""A real SLURM controller and node on this machine run the pipeline: pytest -m slurm, as root, on Debian."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import ROOT, TINY, snakemake, workspace
from runs import contents, holder

pytestmark = pytest.mark.slurm

# The profile as it is, but for what a cluster of one machine without accounting needs.
SUBMIT = (
    "--profile", str(ROOT / "profiles" / "slurm"), "--slurm-no-account", "--slurm-status-command", "squeue",
    "--slurm-init-seconds-before-status-checks", "2", "--seconds-between-status-checks", "2", "--latency-wait", "10",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    if find_spec("snakemake_executor_plugin_slurm") is None:
        pytest.fail("Snakemake's SLURM plugin is not installed: uv run --group slurm pytest -m slurm")
    script = str(ROOT / "tests" / "slurm" / "cluster.sh")
    try:
        subprocess.run(["bash", script, "up"], check=True)
        yield
    finally:
        subprocess.run(["bash", script, "down"], check=True)


def queue(*states: str) -> list[tuple[str, str, str]]:
    """Number, state and rule:wildcards of the jobs in these states; of all, finished ones too, if none is given."""
    command = ["squeue", "--noheader", "--sort=i", "--format=%i %T %k", "--states", ",".join(states) or "all"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    jobs = [line.split(maxsplit=2) for line in lines]
    return [
        (number, state, comment.removeprefix("rule_").replace("_wildcards_", ":")) for number, state, comment in jobs
    ]


def control(*words: str) -> None:
    subprocess.run(words, check=True)


def test_every_job_goes_through_slurm_and_survives_time_limit_requeue_and_scancel(tmp_path: Path) -> None:
    peace, folder = workspace(tmp_path / "peace"), workspace(tmp_path / "slurm")
    overlay = TINY.read_text().replace("activations:\n", "activations:\n  parts: 2\n")
    for place in (peace, folder):
        (place / "tiny.yaml").write_text(overlay)
    local = snakemake(peace, "--cores", "2")
    assert local.returncode == 0, local.stderr[-5000:]

    limit = ("--set-resources", "sae_1:runtime=1")
    command = [sys.executable, "-m", "snakemake", "--configfile", "tiny.yaml", *SUBMIT, *limit]
    with (folder / "output.txt").open("w") as output:
        run = subprocess.Popen(command, cwd=folder, stdout=output, stderr=subprocess.STDOUT)
    side_by_side, stopped, requeued, cancelled, resumable = 0, 0, "", "", False
    try:
        while run.poll() is None:
            running = [(number, rule) for number, _, rule in queue("RUNNING")]
            side_by_side = max(side_by_side, sum(rule.startswith("extract:") for _, rule in running))
            if not stopped and (process := holder(folder, "sae-topk", "state/training.jsonl")):
                os.kill(process, signal.SIGSTOP)  # it gets nowhere until its time is over
                stopped = process
            for number, rule in running:
                if rule == "policy:heads" and not requeued and holder(folder, "policy-heads", "lock"):
                    control("scontrol", "requeue", requeued := number)
                elif rule == "evaluate_1:topk" and not cancelled:
                    control("scancel", cancelled := number)
            resumable |= (folder / "results/tiny/.work/sae-topk/state/checkpoint.safetensors").exists()
            time.sleep(0.2)
    finally:
        run.kill()
    jobs = queue()
    said = (folder / "output.txt").read_text()
    assert run.returncode == 0, said[-5000:]

    assert [state for _, state, rule in jobs if rule == "sae_1:topk"] == ["TIMEOUT", "COMPLETED"] and resumable
    assert [(number, state) for number, state, rule in jobs if rule == "policy:heads"] == [(requeued, "COMPLETED")]
    assert (cancelled, "CANCELLED", "evaluate_1:topk") in jobs
    assert side_by_side >= 2
    submitted = {rule.partition(":")[0] for _, _, rule in jobs}
    planned = set(re.findall(r"^(?:local)?rule (\w+):$", local.stdout + local.stderr, re.MULTILINE))
    assert planned - submitted == {"all", "configuration", "summary"}

    expected, made = contents(peace), contents(folder)
    assert made.keys() == expected.keys()
    assert [name for name in made if made[name] != expected[name]] == []
    again = snakemake(folder, *SUBMIT)
    assert "Nothing to be done" in again.stdout + again.stderr


def test_a_job_on_a_gpu_asks_for_a_card_and_gets_it(tmp_path: Path) -> None:
    folder = workspace(tmp_path / "gpu")
    (folder / "tiny.yaml").write_text(TINY.read_text().replace("compute: {", "compute: {device: cuda, "))
    done = snakemake(folder, *SUBMIT, "--retries", "0", "results/tiny/backbones/vit/model.safetensors")
    assert done.returncode == 1
    assert "compute.device: torch finds no CUDA device" in done.stdout + done.stderr
    number = next(number for number, state, rule in queue() if (state, rule) == ("FAILED", "backbone:vit"))
    shown = subprocess.run(["scontrol", "show", "job", number], check=True, capture_output=True, text=True).stdout
    assert "TresPerJob=gres:gpu:1" in shown
