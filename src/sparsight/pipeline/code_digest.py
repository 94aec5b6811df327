"""One digest of all code that a stage can run, without comments and docstrings.

A changed line makes the stages stale that can reach it and no others: imports are followed from the stage's script.
The digest depends neither on times nor on Python's version, so results of another machine can be compared by it.
"""

import ast
import hashlib
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from sparsight.common.digests import digest

_BACKENDS = "src/sparsight/kernels/__init__.py"  # chooses at run time which kernels to load


def code_digest(root: Path, names: Iterable[str]) -> str:
    """The digest of files, given by their paths from ``root``; comments and docstrings of Python files don't count."""
    return digest([[name, _digest(root / name)] for name in names])


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
    nodes: list[ast.AST] = [_tree(root / path)]
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


@cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_bytes())


@cache
def _digest(path: Path) -> str:
    text = path.read_bytes()
    return hashlib.sha256(_bare(text, _tree(path)) if path.suffix == ".py" else text).hexdigest()


_STRING_OR_BLANK = re.compile(
    rb"""
    ( \"{3}(?:\\.|[^\\])*?\"{3} | '{3}(?:\\.|[^\\])*?'{3} | "(?:\\.|[^"\\\n])*" | '(?:\\.|[^'\\\n])*' )
    | (?: [ \t]* (?:\#[^\n]*)? \n )+
    """,
    re.DOTALL | re.VERBOSE,
)
"""A string, or the rest of a line that holds no code, with the lines after it that hold none."""


def _bare(text: bytes, tree: ast.Module) -> bytes:
    """The lines of a Python file without docstrings, comments and blank lines."""
    lines = text.split(b"\n")
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            end = node.end_lineno or node.lineno
            if not lines[node.lineno - 1][: node.col_offset].strip():  # else code stands before it
                lines[node.lineno - 1 : end - 1] = [b""] * (end - node.lineno)
                lines[end - 1] = lines[end - 1][node.end_col_offset :]
    return _STRING_OR_BLANK.sub(lambda match: match[1] or b"\n", b"\n".join(lines)).strip()
