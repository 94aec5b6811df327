"""The plumbing of benchmarks/gpu.py, on the pretended device."""

import sys

import pytest
import torch
from conftest import ROOT, script
from pretended_cuda import Activity

from sparsight import sae
from sparsight.pipeline import stage


def test_every_part_has_its_lines(
    cuda: Activity, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.setattr(stage, "prepare_torch", lambda compute: torch.device(compute.device))  # there is no card
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--small", "--rounds", "1"])
    script("benchmarks/gpu.py").main()
    lines = capsys.readouterr().out.splitlines()
    names = {line[:52].strip() for line in lines if line.startswith("  ")}
    assert names >= {"its encoder product", "sparsight", "dense PyTorch", *sae.names()}
    assert names >= {"bare model", "class token stored", "all", "masked", "gathered"}
    for peer in ("eai-sparsify", "sae-lens"):
        assert peer in names or any(line.startswith(f"{peer} is not installed") for line in lines)
