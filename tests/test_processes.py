"""A section of SAEs over several processes: dealt out or split, the same SAEs; killed at any moment, the same bytes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import torch
from conftest import write_store

from sparsight import config, sae
from sparsight.activations.store import ActivationStore
from sparsight.common.errors import SparsightError
from sparsight.common.member import Member
from sparsight.common.work import Work
from sparsight.sae import Trainer
from sparsight.sae.fit import fit
from sparsight.sae.sharded import weights
from sparsight.sae.sharded.trainer import create
from sparsight.training.ranks import Ranks

SITE, SITES = "blocks.0.input", ["blocks.0.input", "blocks.1.input", "blocks.2.input"]
SIZES = 24, 128, 4  # d_in, d_sae, k
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "topk": ("topk", {}),
    "topk, more dead latents than aux_k": ("topk", {"aux_k": 1}),
    "batchtopk": ("batchtopk", {}),
    "matryoshka": ("matryoshka", {}),
    "switch": ("switch", {"experts": 16}),
    "switch, random": ("switch", {"experts": 16, "routing": "random"}),
    "switch, hash": ("switch", {"experts": 16, "routing": "hash"}),
}
SECTION: dict[str, Any] = {
    "backbone": "vit", "site": SITE, "d_sae": 64, "k": 4, "epochs": 1, "batch_size": 32, "seeds": (0,), "lr": 1e-3,
    "dead_after": 100, "aux_k": 4,
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_store(tmp_path_factory.mktemp("store"), 512, dict.fromkeys(SITES, (24,)), shard_images=64)


def whole(part: Any, folder: Path) -> sae.SAE:
    """The ordinary SAE that a split one is saved as."""
    part.save(folder)
    return sae.load(folder)


@pytest.mark.parametrize(
    ("name", "n_steps", "labelled"),
    [*((name, 200 if name == "topk" else 40, False) for name in KINDS), ("topk", 20, True)],
)
def test_eight_shards_are_the_sae_of_one_process(name: str, n_steps: int, labelled: bool, tmp_path: Path) -> None:
    kind, options = KINDS[name]
    one, part = sae.create(kind, *SIZES, seed=3, **options), create(kind, Ranks(), *SIZES, seed=3, **options)
    assert all(map(torch.equal, whole(part, tmp_path).parameters(), one.parameters()))
    data = forked.batches(SIZES[0], 20)
    assert torch.equal(one.encode(data[0]).dense(), part.encode(data[0]).dense())
    trainer = Trainer([one], lr=1e-3, dead_after=300)
    most_dead = 0
    for step in range(n_steps):
        trainer.step(data[step % 20], torch.arange(64) % 3 if labelled else None)
        most_dead = max(most_dead, int(one.dead.sum()))
    assert most_dead > one.aux_k or "more dead" not in name
    forked.steps(part, n_steps, labelled)
    assert torch.equal(one.dead, part.dead)
    after = whole(part, tmp_path)
    for expected, value in zip(one.state_dict().values(), after.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, atol=1e-5, rtol=0)
    codes, others = one.encode(data[0]).dense(), after.encode(data[0]).dense()
    assert torch.equal(codes > 0, others > 0)
    torch.testing.assert_close(others, codes, atol=1e-5, rtol=0)


def test_one_two_and_four_processes_give_the_same_bytes_twice(tmp_path: Path) -> None:
    for name, (kind, options) in KINDS.items():
        part = create(kind, Ranks(), *SIZES, seed=3, **options)
        forked.steps(part, 7)
        part.save(tmp_path / "1" / name)
    for n, turn in ((2, "a"), (2, "b"), (4, "a")):
        out, meeting = tmp_path / f"{n}{turn}", tmp_path / f"meeting-{n}{turn}"
        assert forked.run(n, forked.train, meeting, out, KINDS, (*SIZES, 3), 7) == [0] * n
        assert contents(out, "*.safetensors") == contents(tmp_path / "1", "*.safetensors")


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "switch"])
def test_a_split_sae_is_saved_as_the_whole_would_be(kind: str, tmp_path: Path) -> None:
    options = {"experts": 8} if kind == "switch" else {}
    part = create(kind, Ranks(), *SIZES, **options)
    whole(part, tmp_path / "parts").save(tmp_path / "whole", name="x")
    part.save(tmp_path / "parts", name="x")
    for file in ("sae.safetensors", "config.json"):
        assert (tmp_path / "parts" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


@pytest.mark.parametrize(("d_sae", "d_in"), [(8, 1), (40, 3), (64, 33), (200, 7)])
def test_initial_rows_are_those_of_the_whole(d_sae: int, d_in: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "_BLOCK", 32)
    expected = sae.create("topk", d_in, d_sae, 1, seed=5).W_dec.detach()
    for first, last in ((0, d_sae), (0, d_sae // 8), (d_sae // 2, d_sae // 2 + 1), (d_sae - d_sae // 8, d_sae)):
        assert torch.equal(weights.unit_rows(d_sae, d_in, 5, first, last), expected[first:last])


def contents(folder: Path, *names: str) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes()
        for name in names
        for p in sorted(folder.rglob(name))
        if p.is_file()
    }


@pytest.mark.parametrize(
    ("n", "options"),
    [
        (2, {"seeds": (0, 1, 2)}),
        (3, {"seeds": (0, 1, 2), "kind": "gated", "aux_k": 64}),
        (2, {"site": None, "sites": SITES}),
        (5, {"site": None, "sites": SITES, "seeds": (0, 1)}),
    ],
)
def test_saes_that_are_dealt_out_have_the_bytes_that_they_have_in_one_process(
    store: Path, tmp_path: Path, n: int, options: dict[str, Any]
) -> None:
    made = {}
    for size in (1, n):
        section = config.Sae(**{**SECTION, "aux_k": 64, **options}, processes=size)
        with Work(tmp_path / str(size), "key") as work:
            for rank in range(size):
                member = Member(rank, size, tmp_path)
                fit(section, ActivationStore.open(store), None, "one", 0, work, forked.CPU, {}, member)
        made[size] = contents(work.out, "*.safetensors", "*.jsonl")
    assert made[n] == made[1] and len(made[1]) > 2


ENDS = [("kill in step", 11), ("kill in part", 1), ("kill in part", 2), ("terminate", 6)]


@pytest.mark.parametrize(("end", "at"), ENDS)
def test_a_rank_that_ends_between_any_two_parts_leaves_a_run_that_continues_to_the_same_bytes(
    store: Path, tmp_path: Path, end: str, at: int
) -> None:
    made = []
    for name, interrupted in (("peace", False), ("ended", True)):
        folder = tmp_path / name
        with Work(folder / "work", "key") as work:
            if interrupted:
                codes = forked.run(2, forked.fit_section, folder, store, SECTION, end, at)
                assert codes == [143, 143] if end == "terminate" else codes[1] == -9
                (folder / "meeting").unlink(missing_ok=True)
                index = work.state / "checkpoint"
                assert index.exists() == ((end, at) != ("kill in part", 1))
                if end == "terminate":
                    assert index.read_text() == "6", "both have finished the same step"
            assert forked.run(2, forked.fit_section, folder, store, SECTION, "peace", 0) == [0, 0]
            assert len(list(work.state.glob("part-*"))) == 2, "older parts are removed"
        made.append(contents(folder / "work" / "out", "*"))
    assert made[0] == made[1] and len(made[0]) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"processes": 3},
            r"^processes: 3 for 1 SAE split each .* 2, 4 or 8 processes; set one of these, or set .* 1$",
        ),
        ({"processes": 4, "seeds": (0, 1, 2), "kind": "relu"}, r"^processes: 4 for 3 SAEs .* topk, batchtopk, .* 3$"),
        ({"processes": 4, "site": None, "sites": SITES}, r"^processes: 4 for 3 SAEs .* chain \(sites\); .* most 3$"),
        ({"processes": 2, "d_sae": 100}, r"a multiple of 8; round it"),
        ({"processes": 2, "kind": "switch"}, r"a multiple of 8 experts"),
        ({"processes": 2, "kind": "switch", "experts": 4}, r"a multiple of 8 experts"),
        ({"processes": 0}, r"processes: must be 1 or more"),
    ],
)
def test_what_cannot_be_split_is_refused(options: dict[str, Any], message: str) -> None:
    values = {**SECTION, "aux_k": 64, **options}
    with pytest.raises(SparsightError, match=message):
        config.Sae(**values)
    assert config.Sae(**{**values, "processes": 1}).split is False


def test_sums_have_the_same_bits_for_any_number_of_processes() -> None:
    generator = np.random.default_rng(0)
    shards = [torch.from_numpy(generator.standard_normal(1000)).float() for _ in range(8)]
    a, b, c, d = (shards[i] + shards[i + 1] for i in range(0, 8, 2))
    assert torch.equal(Ranks().total(shards), (a + b) + (c + d))
    assert not torch.equal(Ranks().total(shards), sum(shards[1:], shards[0])), "order matters"


STAGE = '''
"""A stage of three processes that do what their first argument says, without PyTorch."""
import os, signal, sys, time
from pathlib import Path
from sparsight.common.errors import SparsightError
from sparsight.common.progress import log
from sparsight.pipeline import stage

WHAT = sys.argv.pop(1)

def main(job):
    sys.argv.insert(1, WHAT)
    if job.runs_in(3):
        return
    rank, signs = job.member.rank, [job.work.state / f"rank-{rank}" for rank in range(3)]
    stopped = []
    if WHAT == "wait":
        signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    signs[rank].with_suffix(".new").write_text(str(os.getpid()))
    signs[rank].with_suffix(".new").rename(signs[rank])
    while not all(sign.exists() for sign in signs):
        time.sleep(0.01)
    log("a line of progress")
    if WHAT == "mistake" and rank:
        raise SparsightError("one line")
    if WHAT == "bug" and rank == 1:
        raise KeyError("of process 1")
    if WHAT == "end":
        (job.work.out / f"{rank}").write_text(WHAT)
        return
    while not stopped:
        time.sleep(0.01)
    time.sleep(0.1 * rank)
    (job.work.state / f"stopped-{rank}").touch()
    raise SystemExit(143)

stage.run(main, __doc__)
'''


class Three:
    """The stage with its three processes, as they run."""

    def __init__(self, folder: Path, what: str) -> None:
        (folder / "stage.py").write_text(STAGE)
        command = [
            sys.executable,
            str(folder / "stage.py"),
            what,
            f"--out={folder / 'out'}",
            f"--work={folder / 'work'}",
        ]
        self.errors = folder / "errors.txt"
        with self.errors.open("w") as errors:
            self.stage = subprocess.Popen(command, stderr=errors)
        self.signs = [folder / "work" / "state" / f"rank-{rank}" for rank in range(3)]

    def pids(self) -> list[int]:
        while not all(sign.exists() for sign in self.signs):
            assert self.stage.poll() is None
            time.sleep(0.01)
        return [int(sign.read_text()) for sign in self.signs]

    def end(self) -> tuple[int, str]:
        """Exit status and errors."""
        return self.stage.wait(timeout=300), self.errors.read_text()


def alive(pid: int) -> bool:
    """Whether a process has not ended; what nobody has waited for has ended, too."""
    try:
        return Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pids: list[int]) -> bool:
    """Whether all these processes end within a few seconds."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if not any(map(alive, pids)):
            return True
        time.sleep(0.02)
    return False


def test_all_processes_end_and_only_the_first_shows_its_progress(tmp_path: Path) -> None:
    three = Three(tmp_path, "end")
    code, errors = three.end()
    assert code == 0 and errors.count("a line of progress") == 1 and errors.count("processor time") == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0", "1", "2"]


def test_a_mistake_that_several_processes_find_is_told_once_and_ends_all(tmp_path: Path) -> None:
    three = Three(tmp_path, "mistake")
    pids = three.pids()
    code, errors = three.end()
    assert code == 1 and errors.endswith("error: one line\n") and errors.count("one line") == 1
    assert gone(pids)


def test_a_bug_in_one_process_keeps_its_traceback_and_ends_all(tmp_path: Path) -> None:
    three = Three(tmp_path, "bug")
    pids = three.pids()
    code, errors = three.end()
    assert code == 1 and errors.endswith("error: process 1 of 3 failed with status 1\n")
    assert errors.count("KeyError: 'of process 1'") == 1 and gone(pids)


def test_a_killed_process_is_named_and_ends_all(tmp_path: Path) -> None:
    three = Three(tmp_path, "wait")
    pids = three.pids()
    os.kill(pids[1], signal.SIGKILL)
    code, errors = three.end()
    assert code == 1 and "error: process 1 of 3 was killed by SIGKILL (out of memory?); the same" in errors
    assert errors.count("error") == 1 and gone(pids)


def test_no_process_survives_its_stage_and_none_starts_before_all_have_ended(tmp_path: Path) -> None:
    three = Three(tmp_path, "wait")
    pids = three.pids()
    os.kill(pids[0], signal.SIGSTOP)  # it cannot end before it goes on
    three.stage.kill()
    three.end()
    assert gone(pids[1:])
    with pytest.raises(SparsightError, match="is in use by"), Work(tmp_path / "work", "key"):
        pass
    os.kill(pids[0], signal.SIGCONT)
    assert gone(pids)
    with Work(tmp_path / "work", "key"):
        pass


def test_at_sigterm_the_stage_waits_until_every_process_has_stopped(tmp_path: Path) -> None:
    three = Three(tmp_path, "wait")
    pids = three.pids()
    three.stage.terminate()
    code, _ = three.end()
    assert code == 143 and gone(pids)
    assert len(list((tmp_path / "work" / "state").glob("stopped-*"))) == 3


def stage_of(store: Path, folder: Path, n: int) -> "subprocess.Popen[bytes]":
    """The stage on its own, with ``n`` processes."""
    folder.mkdir(exist_ok=True)
    options = {**SECTION, "seeds": None, "epochs": 40, "processes": n, "threads": 1}
    manifest = store.with_suffix(".json")
    places = {"from-images": manifest, "from-store": manifest, "out": folder / "out", "work": folder / "work"}
    words = {**places, **{name.replace("_", "-"): value for name, value in options.items() if value is not None}}
    script = Path(__file__).parent.parent / "workflow" / "scripts" / "sae.py"
    command = [
        sys.executable,
        str(script),
        "--name=one",
        "--from-backbone",
        "--seeds",
        "0",
        *(f"--{k}={v}" for k, v in words.items()),
    ]
    with (folder / "errors.txt").open("w") as errors:
        return subprocess.Popen(command, stderr=errors)


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 4])
def test_the_stage_killed_at_random_moments_ends_with_the_same_bytes(store: Path, tmp_path: Path, n: int) -> None:
    generator = np.random.default_rng(n)
    begin = time.monotonic()
    assert stage_of(store, tmp_path / "peace", n).wait() == 0
    seconds = time.monotonic() - begin
    folder, codes = tmp_path / "killed", []
    for victim in ("stage", "rank", "terminate", "rank", "stage", "terminate"):
        stage = stage_of(store, folder, n)
        time.sleep(generator.uniform(0, seconds))
        ranks = children(stage.pid)
        if victim == "rank" and ranks:
            os.kill(ranks[generator.integers(len(ranks))], signal.SIGKILL)
        else:
            stage.send_signal(signal.SIGTERM if victim == "terminate" else signal.SIGKILL)
        codes.append(stage.wait())
        assert gone(ranks), "no process survives"
    assert set(codes) <= {-signal.SIGKILL, -signal.SIGTERM, 143, 1, 0}
    assert stage_of(store, folder, n).wait() == 0, (folder / "errors.txt").read_text()
    assert contents(folder / "out", "*") == contents(tmp_path / "peace" / "out", "*")
    assert not (folder / "work").exists()
