"""The code that a stage runs, so that a changed line reruns the stages that can reach it and no others."""

import ast
import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from sparsight.common.digests import digest, file_digest
from sparsight.common.files import write_shared

_BACKENDS = "src/sparsight/kernels/__init__.py"  # which kernels it loads is decided at run time


def files(script: str, *extra: str) -> list[str]:
    """A script and every file of sparsight that it can reach, by paths from the repository's root.

    Args:
        script: path of a stage script.
        extra: what is loaded by name at run time: an SAE variant, a template.
    """
    found, todo = set(), [script, *extra]
    while todo:
        path = todo.pop()
        if path not in found:
            found.add(path)
            todo += _imports(path)
            if path == _BACKENDS:
                todo += map(str, Path(path).parent.glob("*.py"))
    return sorted(found)


@cache
def _imports(path: str) -> list[str]:
    """The files of src/sparsight that a Python file imports anywhere in it."""
    if not path.endswith(".py"):
        return []
    names: list[str] = []
    nodes: list[ast.AST] = [ast.parse(Path(path).read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        nodes += (child for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr))
    parts = [name.split(".") for name in names]
    places = [Path("src", *name[:n]) for name in parts for n in range(1, len(name) + 1)]  # packages run, too
    candidates = [p for place in places for p in (place.with_suffix(".py"), place / "__init__.py")]
    return [str(p) for p in candidates if p.exists()]


def write_digest(path: Path, of: Iterable[str]) -> None:
    """Write a file that stands for many: their digest. Snakemake asks it of every job, and not a hundred files.

    The first time it gets the time of the newest of them, so that code does not look newer than results that were made
    with it elsewhere. A digest that differs from the one that is there has the present time.
    """
    paths = list(of)
    text = digest([[name, _digest(Path(name))] for name in paths]) + "\n"
    known = path.read_text() if path.exists() else None
    if known == text:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_shared(path, text)
    if known is None:
        newest = max(Path(name).stat().st_mtime_ns for name in paths)
        os.utime(path, ns=(newest, newest))


_digest = cache(file_digest)
