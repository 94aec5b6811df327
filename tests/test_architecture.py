"""Promises about the code itself: what may import what, and how long things are."""

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, script

SRC = ROOT / "src" / "sparsight"


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """The contracts of pyproject.toml on the sources in ``folder``."""
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    command += ["--config", str(ROOT / "pyproject.toml"), "--no-cache"]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_imports_keep_the_contracts() -> None:
    done = lint_imports(ROOT / "src")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("common/errors.py", "import sparsight.report.page", "Data flows one way"),
        ("sae/variants/topk.py", "import sparsight.sae.variants.switch", "SAE variants do not know each other"),
        ("pipeline/run.py", "import snakemake", "The core knows neither Snakemake nor DVC"),
    ],
)
def test_an_import_against_the_order_breaks_its_contract(file: str, line: str, contract: str, tmp_path: Path) -> None:
    shutil.copytree(SRC, tmp_path / "sparsight", ignore=shutil.ignore_patterns("__pycache__"))
    with (tmp_path / "sparsight" / file).open("a") as changed:
        changed.write(f"{line}\n")
    done = lint_imports(tmp_path)
    broken = re.findall(r"^(.*) BROKEN$", done.stdout, re.MULTILINE)
    assert done.returncode == 1 and any(name.startswith(contract) for name in broken), done.stdout


def test_every_package_says_in_one_line_what_belongs_there() -> None:
    entries = [path.name for path in SRC.iterdir() if path.name != "__pycache__"]
    assert len(entries) <= 16, entries
    for path in SRC.rglob("__init__.py"):
        doc = ast.get_docstring(ast.parse(path.read_text()))
        assert doc and len(doc.splitlines()[0]) > 20, path


def test_importing_the_package_imports_no_heavy_library() -> None:
    code = "import sys, sparsight, sparsight.config; sparsight.sae.names()\n"
    code += "print([m for m in ('torch', 'timm', 'zarr', 'matplotlib', 'pyarrow') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_training_an_sae_imports_no_compiler_and_no_tables() -> None:
    code = "import sys, torch, sparsight, sparsight.sae.fit\n"
    code += "sparsight.sae.Trainer([sparsight.sae.create('topk', 8, 16, 2)], lr=0.1).step(torch.randn(4, 8))\n"
    code += "print([m for m in ('torch._dynamo', 'pyarrow', 'timm') if m in sys.modules])"
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


def test_what_the_docs_take_from_the_code_is_up_to_date() -> None:
    build = script("docs/build.py")
    for file, make in build.MADE.items():
        assert (ROOT / "docs" / file).read_text() == make(), f"{file}: run python docs/build.py"
    counts, names = build.imports(), build.layers()
    assert all(names.index(a) <= names.index(b) for a, b in counts if not {a, b} & {"follow", "store"}), (
        "drawn as it is"
    )
