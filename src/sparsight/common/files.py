"""Atomic file writes, JSON files with reproducible bytes, and removal of files and folders."""

import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` create a temporary file beside ``path``, then rename it.

    Readers see either the old file or the complete new one.
    """
    temporary = path.with_name(f"{path.name}.aside")
    write(temporary)
    os.replace(temporary, path)


def write_shared(path: Path, text: str) -> None:
    """Write a file that several processes may write at the same time; one of them wins, with its complete text.

    The temporary name is random: processes of several machines that share a disk may have the same number.
    """
    temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    temporary.write_text(text)
    os.replace(temporary, path)


def write_json(path: Path, value: object) -> None:
    """Write JSON with sorted keys, one per line, so that equal values give equal bytes."""
    path.write_text(json_text(value))


def json_text(value: object) -> str:
    """The text that :func:`write_json` writes."""
    return json.dumps(value, indent=1, sort_keys=True) + "\n"


def remove(path: Path) -> None:
    """Delete a file, or a folder with everything in it."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
