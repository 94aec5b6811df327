"""A key that stands twice in one section of a YAML file: the loader keeps the last and says nothing."""

from collections.abc import Iterable
from pathlib import Path

import yaml

from sparsight.common.errors import SparsightError

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one in C is ten times as fast, and not in every build


def check_no_key_twice(files: Iterable[str | Path]) -> None:
    """Look for keys that stand twice. A key of an anchor that is merged (``<<``) may stand again: it is replaced.

    Args:
        files: configuration files; those that are not YAML are left out.

    Raises:
        SparsightError: the first such key, with its lines.
    """
    for file in map(Path, files):
        if file.suffix in (".yaml", ".yml"):
            root = yaml.compose(file.read_text(encoding="utf-8"), Loader=_LOADER)
            _check(root, file, set())


def _check(node: yaml.Node | None, file: Path, seen: set[int]) -> None:
    if id(node) in seen:  # an alias is the node of its anchor
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _check(value, file, seen)
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.value in lines:
                where = f"{file}, line {line}: {key.value}"
                raise SparsightError(f"{where}: stands in line {lines[key.value]} of this section already; remove one")
            lines[key.value] = line
            _check(value, file, seen)
