"""The C library's allocator, in a process of its own."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from sparsight.config import Compute
from sparsight.pipeline.stage import prepare_torch
prepare_torch(Compute(threads=1))
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    arrays = [torch.ones(2**22) for _ in range(8)]
    del arrays
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="no glibc")
def test_new_arrays_take_the_memory_of_freed_ones() -> None:
    faults = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True).stdout
    assert int(faults) < 2 * 8 * 4096, "eight arrays of 4,096 pages are new memory more than twice"
