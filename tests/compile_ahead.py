"""Compiles the Triton kernels for cards that are not there, as the CUDA backend launches them; prints JSON lines.

    python tests/compile_ahead.py

A line has the kernel's name, the card's architecture, the type of the numbers, and what a thread takes of the card:
``registers``, bytes of ``stack`` and ``local`` memory (above 0 where registers spill), the ``shared`` bytes of a block,
and whether products and sums are ``fused``. The tests interpret the kernels, so this is a process of its own, in which
TRITON_INTERPRET is not set.
"""

import json
import os
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction, MockTensor

from sparsight.kernels import batch, update
from sparsight.kernels import triton as kernels

ARCHITECTURES = (80, 90, 100)
"""sm_80: A100; sm_90: H100 and H200; sm_100: B200."""
TYPES = (torch.float32, torch.bfloat16, torch.float64)
_TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class _Card:
    """What Triton asks of a driver when it compiles."""

    architecture = 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture  # kernels are kept by device

    def get_current_stream(self, device: int) -> int:
        return 0


def main() -> None:
    """Compile what one training step launches, with a k and a width that 16 divides and with others."""
    compiled: dict[str, Any] = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        shapes = [MockTensor(z.dtype, list(z.shape)) if isinstance(z, torch.Tensor) else z for z in args]
        kernel = run(self, *shapes, grid=grid, warmup=True, **options)
        compiled[kernel.hash] = kernel

    JITFunction.run = compile_only
    for _Card.architecture in ARCHITECTURES:
        driver.set_active(_Card())
        for dtype in TYPES:
            compiled.clear()
            for k, d_in in ((32, 768), (5, 37)):
                _launch(dtype, k, d_in)
            for kernel in compiled.values():
                about = {"kernel": kernel.name, "architecture": _Card.architecture, "type": str(dtype)}
                fused = kernel.metadata.enable_fp_fusion
                print(json.dumps({**about, **_usage(kernel.asm["cubin"]), "fused": fused}), flush=True)


def _launch(dtype: torch.dtype, k: int, d_in: int) -> None:
    n, d_sae = 8, 64
    values, x = torch.ones(n, k, dtype=dtype), torch.ones(n, d_in, dtype=dtype)
    indices, W = torch.zeros(n, k, dtype=torch.int64), torch.ones(d_sae, d_in, dtype=dtype)
    kernels.combine(values, indices, W)
    kernels.dots(x, W, indices, values > 0)
    kernels.accumulate(values, indices, x, d_sae)
    one, state = torch.ones(()), {"exp_avg": W, "exp_avg_sq": W, "step": torch.ones(())}
    update.prepare(W, W, one, (0.9, 0.999), torch.ones(3))
    update.judge(one.to(dtype), one.to(dtype), torch.ones(2), one)
    update.update(W, W, state, torch.ones(3), one, one, 1e-3, (0.9, 0.999), 1e-8)
    batch.cut(values.flatten(), indices.flatten(), n, d_sae, k)


def _usage(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_TOOL), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    assert found is not None, text
    return dict(zip(("registers", "stack", "shared", "local"), map(int, found.groups()), strict=True))


if __name__ == "__main__":
    main()
