"""What a rule takes for the code of its stage, against the interpreter's own way of finding modules."""

import os
import re
from modulefinder import ModuleFinder
from pathlib import Path

import pytest
from conftest import ROOT

from sparsight.pipeline import code_digest

SCRIPTS = sorted(path.name for path in (ROOT / "workflow" / "scripts").glob("*.py"))


@pytest.fixture(scope="module")
def at_run_time(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The code without what is imported for types alone, which can change no result."""
    root = tmp_path_factory.mktemp("code")
    for path in (*ROOT.glob("src/**/*.py"), *ROOT.glob("workflow/scripts/*.py")):
        copy = root / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(re.sub(r"^if TYPE_CHECKING:\n(?:    .*\n)+", "", path.read_text(), flags=re.MULTILINE))
    return root


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_code_of_a_stage_is_what_its_script_can_import(script: str, at_run_time: Path) -> None:
    finder = ModuleFinder([str(at_run_time / "src")])  # it reads bytecode; other packages are not looked for
    finder.run_script(str(at_run_time / "workflow" / "scripts" / script))
    places = [getattr(module, "__file__", None) for module in finder.modules.values()]
    imported = {Path(place).relative_to(at_run_time).as_posix() for place in places if place}
    found = set(code_digest.files(ROOT, f"workflow/scripts/{script}"))
    assert imported <= found
    assert {path for path in found - imported if "/kernels/" not in path} == set(), "kernels are chosen at run time"


def test_a_digest_changes_with_any_of_its_files(tmp_path: Path) -> None:
    code, marked = [tmp_path / name for name in ("a.py", "b.py")], tmp_path / "deep" / "mark"
    for second, path in enumerate(code):
        path.write_text("x = 1\n")
        os.utime(path, (1000 + second, 1000 + second))
    code_digest.write_digest(marked, tmp_path, ["a.py", "b.py"])
    first = marked.read_text()
    assert marked.stat().st_mtime == 1001, "no newer than the code, for results that were made elsewhere"
    code_digest.write_digest(marked, tmp_path, ["a.py", "b.py"])
    assert marked.stat().st_mtime == 1001
    code[1].write_text("x = 2\n")
    os.utime(code[1], (500, 500))
    code_digest._digest.cache_clear()
    code_digest.write_digest(marked, tmp_path, ["a.py", "b.py"])
    assert marked.read_text() != first and marked.stat().st_mtime > 1001, "however old the changed file looks"
    assert [path.name for path in marked.parent.iterdir()] == ["mark"]
