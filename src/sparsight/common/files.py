"""Writing files so that readers see the old one or the whole new one."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` with a name beside ``path``, then rename: readers see the old file or the whole new one."""
    aside = path.with_name(f"{path.name}.aside")
    write(aside)
    os.replace(aside, path)


def write_shared(path: Path, text: str) -> None:
    """Write a file that several processes may be writing at the same time: one of them wins, whole."""
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    aside.write_text(text)
    os.replace(aside, path)


def write_json(path: Path, value: object) -> None:
    """Write JSON whose bytes are equal for equal values: sorted keys, one per line."""
    path.write_text(json_text(value))


def json_text(value: object) -> str:
    """What :func:`write_json` writes."""
    return json.dumps(value, indent=1, sort_keys=True) + "\n"


def remove(path: Path) -> None:
    """Delete a file or a folder with all it holds."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
