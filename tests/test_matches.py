"""experiments/matches.py: decoder rows of one section that have a partner in another."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from sparsight import sae

D, F = 6, 8


def saved(run: Path, name: str, rows_FD: torch.Tensor) -> None:
    one = sae.create("topk", D, F, 2)
    with torch.no_grad():
        one.W_dec.copy_(rows_FD)
    one.save(run / "saes" / name, name=name, site="blocks.0.input", backbone="vit")


def printed(run: Path, *sections: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "experiments" / "matches.py"), str(run), *sections]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """``same`` has the rows of ``first`` in another order; half of the rows of ``half`` are like none of them."""
    basis = torch.eye(D)
    first = torch.cat([basis[:4], -basis[:4]])
    away = torch.stack([basis[4], basis[5], -basis[4], -basis[5]])
    for seed in range(2):
        saved(tmp_path, f"first-s{seed}", first.roll(seed, 0))
        saved(tmp_path, f"same-s{seed}", first.flip(0).roll(3 * seed, 0))
        saved(tmp_path, f"half-s{seed}", torch.cat([first[::2], away]))
    return tmp_path


def test_shares_of_rows_with_a_partner(run: Path) -> None:
    lines = printed(run, "first", "same").stdout.splitlines()
    assert lines[:2] == ["first-s0: cosine 1.000, over_0.7 1.000", "first-s1: cosine 1.000, over_0.7 1.000"]
    assert lines[2:] == ["cosine: 1.000 (1.000 to 1.000)", "over_0.7: 1.000 (1.000 to 1.000)"]
    assert printed(run, "first", "half").stdout.splitlines()[-1] == "over_0.7: 0.500 (0.500 to 0.500)"
    assert printed(run, "first", "first").stdout.splitlines()[0] == "first-s0: cosine 1.000, over_0.7 1.000"


def test_a_section_that_is_not_there(run: Path) -> None:
    done = printed(run, "first", "gone")
    assert done.returncode == 1
    assert done.stderr == f"error: {run}: has no SAEs of 'gone' of one site; name a section of the run\n"
