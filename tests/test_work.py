"""Working folders: locks, promotion, interrupted promotion."""

import subprocess
import sys
from pathlib import Path

import pytest

from sparsight.common.errors import SparsightError
from sparsight.common.files import write_atomic
from sparsight.common.work import Work


def test_second_process_is_refused_while_the_first_works(tmp_path: Path) -> None:
    script = "import sys, time; from sparsight.common.work import Work; from pathlib import Path\n"
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
