"""Every Triton kernel compiles for the cards of the last three generations, without one of them at hand."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from conftest import ROOT
from triton.runtime.interpreter import InterpretedFunction

from sparsight.kernels import batch, update
from sparsight.kernels import triton as kernels

REGISTERS = 128
"""A thread may take 255. With 128, a multiprocessor holds 512 threads."""


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    """What tests/compile_ahead.py prints where Triton's own default would not fuse products and sums."""
    command, environment = [sys.executable, "tests/compile_ahead.py"], {**os.environ, "TRITON_DEFAULT_FP_FUSION": "0"}
    text = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout
    return [json.loads(line) for line in text.splitlines()]


def test_every_kernel_compiles_for_every_card_without_spills(compiled: list[dict[str, Any]]) -> None:
    values = {**vars(kernels), **vars(batch), **vars(update)}
    names = {name for name, value in values.items() if isinstance(value, InterpretedFunction)}
    wanted = {
        (name, card, f"torch.{dtype}")
        for name in names for card in (80, 90, 100) for dtype in ("float32", "bfloat16", "float64")
    }  # fmt: skip
    assert names
    assert {(line["kernel"], line["architecture"], line["type"]) for line in compiled} == wanted
    for line in compiled:
        assert line["stack"] == line["local"] == 0, line
        assert line["registers"] <= REGISTERS, line
        assert line["shared"] <= 2**14, line


def test_products_and_sums_are_fused_whatever_triton_s_default(compiled: list[dict[str, Any]]) -> None:
    assert all(line["fused"] for line in compiled)
