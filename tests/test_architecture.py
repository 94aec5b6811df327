"""Promises about the code itself: what may import what, and how long things are."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

SRC = ROOT / "src" / "sparsight"
# Data flows one way; a room may use the ones before it.
ROOMS = ("sources", "images", "backbones", "store", "extract", "sae", "steering", "pruning", "summary", "report")


def imports(path: Path) -> set[str]:
    """Modules that a file imports when it runs (not those for type checkers only)."""
    found: set[str] = set()
    nodes: list[ast.AST] = [ast.parse(path.read_text())]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        nodes += ast.iter_child_nodes(node)
    return found


def test_data_flows_one_way() -> None:
    for path in SRC.rglob("*.py"):
        room = path.relative_to(SRC).parts[0].removesuffix(".py")
        if room in ROOMS:
            later = {f"sparsight.{name}" for name in ROOMS[ROOMS.index(room) + 1 :]}
            wrong = [name for name in imports(path) if any(f"{name}.".startswith(f"{module}.") for module in later)]
            assert not wrong, f"{path.name} imports {wrong}"


def test_no_two_modules_import_each_other() -> None:
    modules = {".".join(("sparsight", *p.relative_to(SRC).with_suffix("").parts)): p for p in SRC.rglob("*.py")}
    graph = {name: {m for m in imports(path) if m in modules and m != name} for name, path in modules.items()}
    for name, others in graph.items():
        assert not [other for other in others if name in graph[other]]


def test_core_knows_neither_snakemake_nor_dvc() -> None:
    for path in SRC.rglob("*.py"):
        assert not {name for name in imports(path) if name.split(".")[0] in ("snakemake", "dvc")}, path


def test_importing_the_package_imports_no_heavy_library() -> None:
    code = "import sys, sparsight, sparsight.config; sparsight.sae.names()\n"
    code += "print([m for m in ('torch', 'timm', 'zarr', 'matplotlib', 'pyarrow') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_files_are_short_and_ascii() -> None:
    limits = {"src/**/*.py": 350, "workflow/scripts/*.py": 60, "workflow/rules/*.smk": 120, "Snakefile": 40}
    for pattern, limit in limits.items():
        files = list(ROOT.glob(pattern))
        assert files
        for path in files:
            text = path.read_bytes()
            assert text.isascii(), path
            assert len(text.splitlines()) <= limit, path


def test_every_stage_script_is_one_rule_and_one_call() -> None:
    rules = "".join(path.read_text() for path in (ROOT / "workflow" / "rules").glob("*.smk"))
    for path in (ROOT / "workflow" / "scripts").glob("*.py"):
        times = 2 if path.name == "images.py" else 1  # the run's images, and those beside them
        assert rules.count(f"python {{SCRIPTS}}/{path.name} ") == times, path.name
        assert [n.name for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)] == ["main"]


def test_configuration_page_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("build", ROOT / "docs" / "build.py")
    assert spec is not None and spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    assert (ROOT / "docs" / "configuration.md").read_text() == build.page(), "run python docs/build.py"
