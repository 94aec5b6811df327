import ast
from functools import cache
from pathlib import Path

# Flags that every stage script takes; the stage's own section follows them.
COMMON = f"--seed {RUN.seed} {to_flags(RUN.compute)}"
THREADS = RUN.compute.threads


def sources(script, *extra):
    """A stage script and every file of sparsight that it can reach, so that a changed line reruns the stage.

    What is loaded by name at run time (an SAE variant, a template) is given as ``extra``.
    """
    found, todo = set(), [str(Path("workflow/scripts", script)), *extra]
    while todo:
        path = todo.pop()
        if path not in found:
            found.add(path)
            todo += imports(path)
    return sorted(found)


@cache
def imports(path):
    """The files of src/sparsight that a Python file imports anywhere in it."""
    if not path.endswith(".py"):
        return []
    names, nodes = [], [ast.parse(Path(path).read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom):
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        nodes += ast.iter_child_nodes(node)
    files = [Path("src", *name.split(".")) for name in names]
    candidates = [p for file in files for p in (file.with_suffix(".py"), file / "__init__.py")]
    return [str(p) for p in candidates if p.exists()]
