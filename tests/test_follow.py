"""Following a run: the state of each stage from its files, and curves for TensorBoard."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparsight import follow
from sparsight.common import curves
from sparsight.common.errors import SparsightError


def planned(folder: Path, *names: str) -> Path:
    """A run of which these stages were planned."""
    run = folder / "results" / "r"
    for name in names:
        mark = folder / ".snakemake" / "sparsight" / "r" / "marks" / name / "mark"
        mark.parent.mkdir(parents=True)
        mark.touch()
        os.utime(mark, (0, 0))
    for part in ("records", "logs", ".work"):
        (run / part).mkdir(parents=True)
    return run


def work_on(run: Path, name: str, process: int, log: str) -> None:
    (run / ".work" / name).mkdir()
    (run / ".work" / name / "lock").write_text(f"process {process} on {socket.gethostname()}")
    (run / "logs" / f"{name}.log").write_text(log)


def test_every_stage_has_the_state_that_its_files_say(tmp_path: Path) -> None:
    run = planned(tmp_path, "images", "backbone-vit", "sae-topk", "report", "summary")
    for name in ("images", "summary"):
        (run / "records" / f"{name}.json").write_text("{}")
    os.utime(tmp_path / ".snakemake/sparsight/r/marks/summary/mark")  # it is to run again
    os.utime(run / "records" / "summary.json", (time.time() - 60,) * 2)
    work_on(run, "sae-topk", os.getpid(), "begin\n300/400 rows, 33.3 rows/s, 75 s left, fvu 0.25, l0 8, dead 3\n310/4")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    work_on(run, "backbone-vit", dead.pid, "error: lr: too high; lower it\n")
    found = {stage.name: stage for stage in follow.stages(run)}
    states = {name: stage.state for name, stage in found.items()}
    assert states == {
        "images": "done", "summary": "waiting", "report": "waiting", "sae-topk": "running", "backbone-vit": "stopped",
    }  # fmt: skip
    assert (found["sae-topk"].share, found["sae-topk"].seconds_left) == (0.75, 75)
    first, stopped, running = follow.screen(run, list(found.values()), 200)
    assert first == f"{run}: 5 stages: 1 done, 1 running, 1 stopped, 2 waiting"
    assert stopped == "stopped  backbone-vit  error: lr: too high; lower it"
    assert running.split(maxsplit=2)[2] == "[###############.....]  75 %  01:15 left  fvu 0.25, l0 8, dead 3"
    assert all(len(line) <= 30 for line in follow.screen(run, list(found.values()), 30))


def test_a_finished_run_names_its_report_and_another_folder_is_refused(tmp_path: Path) -> None:
    run = planned(tmp_path, "images")
    (run / "records" / "images.json").write_text("{}")
    *_, last = follow.screen(run, follow.stages(run), 999)
    assert last == f"the report: {run / 'report' / 'index.html'}"
    with pytest.raises(SparsightError, match="other: no run was planned here"):
        follow.stages(tmp_path / "results" / "other")


def test_curves_of_a_followed_and_then_finished_log_hold_each_point_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points: list[tuple[str, str, float, int]] = []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr(
        curves.Curves, "_writer", lambda self, name: type(
            "W", (), {"add_scalar": lambda _, *point: points.append((name, *point)), "flush": lambda _: None}
        )(),
    )  # fmt: skip
    writer = curves.Curves(tmp_path)
    live = tmp_path / ".work" / "sae-resae" / "state" / "training.jsonl"
    live.parent.mkdir(parents=True)
    lines = [{"step": s, "epoch": s / 2, "resae-s0/blocks.1.input.fvu": 1 / s, "resae-s1/blocks.1.input.fvu": 2 / s}
             for s in (1, 2)]  # fmt: skip
    live.write_text(json.dumps(lines[0]) + "\n" + json.dumps(lines[1])[:9])
    writer.write()
    assert points == [("saes/resae-s0/blocks.1.input", "fvu", 1.0, 1), ("saes/resae-s1/blocks.1.input", "fvu", 2.0, 1)]
    live.unlink()
    done = tmp_path / "saes" / "resae-s0" / "blocks.1.input" / "training.jsonl"
    done.parent.mkdir(parents=True)
    done.write_text("".join(json.dumps({"step": s, "epoch": s / 2, "fvu": 1 / s}) + "\n" for s in (1, 2)))
    with done.open("a") as log:
        log.write(json.dumps({"step": 2, "epoch": 1, "val_accuracy": 0.5}) + "\n")  # the line of an epoch's end
    writer.write()
    writer.write()
    name = "saes/resae-s0/blocks.1.input"
    assert points[2:] == [(name, "fvu", 0.5, 2), (name, "val_accuracy", 0.5, 2)]
