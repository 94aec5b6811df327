"""Cards handed out by lock files; the list of cards is pretended by a program that stands for nvidia-smi."""

import os
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

STAGE = "import os; from sparsight.pipeline.gpu_slots import take_cards; take_cards(int(os.getenv('CARDS', 1))); "
STAGE += "print(os.environ.get('CUDA_VISIBLE_DEVICES'), flush=True); input()"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of two cards, and a place for its lock files."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho GPU-a, NVIDIA A\necho GPU-b, NVIDIA A\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


class Stage:
    """A process that takes a card and keeps it until it is stopped."""

    def __init__(self, errors: Path, **environment: str) -> None:
        self.errors = errors / f"{time.monotonic_ns()}.txt"
        with self.errors.open("w") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-c", STAGE],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env={**os.environ, **environment},
            )

    def __enter__(self) -> "Stage":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def card(self) -> str:
        """What it sees, as soon as it has a card."""
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], 60)[0], "it still waits for a card"
        return self.process.stdout.readline().strip()


def test_two_stages_get_two_cards_and_a_third_waits_until_one_is_killed(machine: Path) -> None:
    with Stage(machine) as first, Stage(machine) as second:
        taken = [first.card(), second.card()]
        assert sorted(taken) == ["GPU-a", "GPU-b"]
        with Stage(machine) as third:
            while not third.errors.read_text().endswith("\n"):
                assert third.process.poll() is None
                time.sleep(0.02)
            message = "every card (GPU-a, GPU-b) is in use by another stage; waiting for one\n"
            assert third.errors.read_text() == message
            second.process.kill()
            assert third.card() == taken[1]
            assert third.errors.read_text() == message, "said once"


def test_a_stage_of_two_cards_takes_both_at_once_and_holds_none_while_it_waits(machine: Path) -> None:
    with Stage(machine) as first:
        first.card()
        with Stage(machine, CARDS="2") as two:
            while not two.errors.read_text().endswith("are free; waiting for 2\n"):
                assert two.process.poll() is None
                time.sleep(0.02)
            with Stage(machine) as third:
                assert third.card() == "GPU-b"
                first.process.kill()
            assert two.card() == "GPU-a,GPU-b"


def test_more_cards_than_there_are_are_refused(machine: Path) -> None:
    with Stage(machine, CARDS="3") as stage:
        _, errors = stage.process.communicate()
        assert "processes: 3 processes need as many cards, there are 2" in stage.errors.read_text() + (errors or "")


@pytest.mark.parametrize("visible", ["0,1", None])
def test_the_two_cards_that_slurm_gives_for_two_processes_are_taken_as_they_are(
    machine: Path, visible: str | None
) -> None:
    environment = {"SLURM_JOB_ID": "7", "CARDS": "2"} | ({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    with Stage(machine, **environment) as stage:
        assert stage.card() == str(visible)


def test_cards_named_by_the_user_are_the_only_ones_handed_out(machine: Path) -> None:
    with Stage(machine, CUDA_VISIBLE_DEVICES="3, 5") as first, Stage(machine, CUDA_VISIBLE_DEVICES="3,5") as second:
        assert sorted([first.card(), second.card()]) == ["3", "5"]


@pytest.mark.parametrize(("first", "second"), [("0", "GPU-a"), ("GPU-b", "1"), ("GPU-a", "0,"), (" 1", "GPU-b")])
def test_one_card_has_one_lock_whatever_its_name(machine: Path, first: str, second: str) -> None:
    with Stage(machine, CUDA_VISIBLE_DEVICES=first) as holder:
        holder.card()
        with Stage(machine, CUDA_VISIBLE_DEVICES=second) as waiting:
            assert waiting.process.stdout is not None
            while not waiting.errors.read_text().endswith("\n"):
                assert waiting.process.poll() is None
                assert not select.select([waiting.process.stdout], [], [], 0)[0], "it took a card that is in use"
                time.sleep(0.02)
            assert "is in use by another stage; waiting for one" in waiting.errors.read_text()
            holder.process.kill()
            assert waiting.card() == second.strip(" ,")


@pytest.mark.parametrize(("visible", "card"), [("-1", "-1"), ("-1,0", "-1,0"), ("", "")])
def test_without_a_visible_card_nothing_is_locked(machine: Path, visible: str, card: str) -> None:
    with Stage(machine, CUDA_VISIBLE_DEVICES=visible) as first, Stage(machine, CUDA_VISIBLE_DEVICES=visible) as second:
        assert first.card() == second.card() == card


@pytest.mark.parametrize("visible", ["1", None, "NoDevFiles"])
def test_the_one_card_that_slurm_gives_is_taken_as_it_is(machine: Path, visible: str | None) -> None:
    job = {"SLURM_JOB_ID": "7"} | ({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    with Stage(machine, **job) as first, Stage(machine, **job) as second:
        assert first.card() == second.card() == str(visible)


@pytest.mark.parametrize("known", [True, False])
def test_stages_side_by_side_in_a_slurm_job_of_two_cards_take_one_each(machine: Path, known: bool) -> None:
    """The numbers may be the job's own, so another job of the same numbers has other cards."""
    if not known:
        (machine / "bin" / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")
    one, other = ({"SLURM_JOB_ID": job, "CUDA_VISIBLE_DEVICES": "0,1"} for job in ("7", "8"))
    with Stage(machine, **one) as a, Stage(machine, **one) as b, Stage(machine, **other) as c:
        assert sorted([a.card(), b.card()]) == ["0", "1"]
        assert c.card() == "0"


@pytest.mark.parametrize("program", ["#!/bin/sh\nexit 9\n", None])
def test_a_machine_without_cards_leaves_everything_as_it_is(machine: Path, program: str | None) -> None:
    path = machine / "bin" / "nvidia-smi"
    path.unlink()
    if program:
        path.write_text(program)
        path.chmod(0o755)
    with Stage(machine) as stage:
        assert stage.card() == "None"
