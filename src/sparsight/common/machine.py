"""Describes the machine and the software versions, for results that depend on them."""

import importlib.metadata
import os
import platform
import socket
import subprocess
from pathlib import Path
from typing import Any

_PACKAGES = ("sparsight", "torch", "timm", "zarr", "numpy", "safetensors", "pyarrow", "snakemake")


def describe() -> dict[str, Any]:
    """Host, processor, cores, memory, system and accelerators."""
    return {
        "host": socket.gethostname(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": platform.platform(),
        "gpus": list(cards().values()),
    }


def cards() -> dict[str, str]:
    """Names of the NVIDIA GPUs by UUID, which is the same in every program; empty without a driver."""
    command = ["nvidia-smi", "--query-gpu=uuid,name", "--format=csv,noheader"]
    try:
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return {}
    return dict(line.split(", ", 1) for line in lines)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that influence results."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in _PACKAGES}}


def commit() -> str | None:
    """The git commit of the working directory, with ``+changes`` if tracked files differ; None outside git."""
    try:
        name = _git("rev-parse", "HEAD")
        return name + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def peak_memory() -> float:
    """Peak memory of this process, in MiB.

    getrusage would include the memory that the parent held when it started this process.
    """
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], check=True, capture_output=True, text=True).stdout.strip()


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
