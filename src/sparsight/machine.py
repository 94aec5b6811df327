"""Names of the machine and of the software, for results that depend on them."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

_PACKAGES = ("sparsight", "torch", "timm", "zarr", "numpy", "safetensors", "pyarrow", "snakemake")


def describe() -> dict[str, Any]:
    """Processor, cores, system and accelerator."""
    about: dict[str, Any] = {"processor": _processor(), "cores": os.cpu_count(), "system": platform.platform()}
    if "torch" in sys.modules:
        import torch

        if torch.cuda.is_available():
            about["gpu"] = torch.cuda.get_device_name()
    return about


def versions() -> dict[str, str]:
    """Python and the packages that decide results."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in _PACKAGES}}


def commit() -> str | None:
    """The git commit of the working directory, with ``+changes`` if it differs from it; None outside git."""
    try:
        name = _git("rev-parse", "HEAD")
        return name + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def peak_memory() -> float:
    """Most memory that this process has held, in MiB; getrusage would count what its parent held when it started it."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], check=True, capture_output=True, text=True).stdout.strip()


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
