"""One digest file per stage script, so Snakemake checks one input instead of a hundred source files.

A changed line reruns the stages that can reach it and no others: imports are followed from the script.
"""

import ast
import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from sparsight.common.digests import digest, file_digest
from sparsight.common.files import write_shared

_BACKENDS = "src/sparsight/kernels/__init__.py"  # chooses at run time which kernels to load


def files(root: Path, script: str, *extra: str) -> list[str]:
    """A script and every file of sparsight that it can reach, by paths from the repository's root.

    Args:
        root: the repository.
        script: path of a stage script, from the repository's root.
        extra: files loaded by name at run time, such as an SAE variant or a template.
    """
    reached, todo = set(), [script, *extra]
    while todo:
        path = todo.pop()
        if path not in reached:
            reached.add(path)
            todo += _imports(root, path)
            if path == _BACKENDS:
                todo += (file.relative_to(root).as_posix() for file in (root / path).parent.glob("*.py"))
    return sorted(reached)


@cache
def _imports(root: Path, path: str) -> list[str]:
    """The files of src/sparsight that a Python file imports anywhere in it."""
    if not path.endswith(".py"):
        return []
    names: list[str] = []
    nodes: list[ast.AST] = [ast.parse((root / path).read_text())]
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
    # Importing a module also runs the packages above it.
    places = [Path("src", *name[:n]) for name in parts for n in range(1, len(name) + 1)]
    candidates = [p for place in places for p in (place.with_suffix(".py"), place / "__init__.py")]
    return [p.as_posix() for p in candidates if (root / p).exists()]


def write_digest(path: Path, root: Path, names: Iterable[str]) -> None:
    """Write the digest of files, given by their paths from ``root``, to ``path``.

    The first digest gets the time of the newest of the files. Otherwise the code would look newer than results that
    were made with it on another machine. A digest that replaces another one gets the present time.
    """
    sources = {name: root / name for name in names}
    text = digest([[name, _digest(source)] for name, source in sources.items()]) + "\n"
    previous = path.read_text() if path.exists() else None
    if previous == text:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    write_shared(path, text)
    if previous is None:
        newest = max(source.stat().st_mtime_ns for source in sources.values())
        os.utime(path, ns=(newest, newest))


_digest = cache(file_digest)
