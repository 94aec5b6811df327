"""What a rule takes for the code of its stage, against the interpreter's own way of finding modules."""

import ast
import io
import re
import tokenize
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


def digest_of(folder: Path, text: str, name: str = "a.py") -> str:
    (folder / name).write_text(text)
    code_digest._digest.cache_clear()
    code_digest._tree.cache_clear()
    return code_digest.code_digest(folder, [name])


PLAIN = '''"""A module."""

import os


class Box:
    """A box."""

    side: int = 3
    """Its side."""


def text(box: Box) -> str:
    """Say it."""
    return "# no comment" + """
        a text, and no docstring  # nor a comment

    """ + os.sep
'''


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("import os\n", "import os  # for sep\n"),
        ("import os\n", "# the system\nimport os\n"),
        ("import os\n\n\n", "import os\n\n"),
        ('"""A box."""', '"""A box\n    of any size."""'),
        ('    """Its side."""\n', ""),
        ('"""Say it."""', "'''Say it.'''  # twice"),
        ("side: int = 3\n", "side: int = 3   \n"),
    ],
)
def test_words_about_code_are_no_code(tmp_path: Path, old: str, new: str) -> None:
    assert PLAIN.count(old) == 1
    assert digest_of(tmp_path, PLAIN) == digest_of(tmp_path, PLAIN.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("= 3", "= 4"),
        ('"# no comment"', '"# no"'),
        ("  # nor a comment", ""),
        ('\n\n    """ +', '\n    """ +'),
        ("    return", "    pass\n    return"),
    ],
)
def test_code_and_texts_are_code(tmp_path: Path, old: str, new: str) -> None:
    assert PLAIN.count(old) == 1
    assert digest_of(tmp_path, PLAIN) != digest_of(tmp_path, PLAIN.replace(old, new))


def test_a_digest_changes_with_any_of_its_files(tmp_path: Path) -> None:
    one = [digest_of(tmp_path, text, name) for name in ("b.py", "page.j2") for text in ("x = 1", "x = 2")]
    assert len(set(one)) == 4
    assert digest_of(tmp_path, "# a", "page.j2") != digest_of(tmp_path, "# b", "page.j2"), "a template has no comments"
    assert code_digest.code_digest(tmp_path, ["b.py", "page.j2"]) not in one


@pytest.mark.parametrize("path", sorted(ROOT.glob("src/**/*.py")), ids=lambda path: path.stem)
def test_what_is_left_of_a_module_is_its_code(path: Path) -> None:
    """No string was taken for a comment, and no comment for a string."""
    text = path.read_bytes()
    tree = ast.parse(text)
    docs = {
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    }
    code = [token.string for token in words(text) if token.type != tokenize.STRING or token.start[0] not in docs]
    assert [token.string for token in words(code_digest._bare(text, tree))] == code


def words(text: bytes) -> list[tokenize.TokenInfo]:
    layout = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    return [token for token in tokenize.tokenize(io.BytesIO(text).readline) if token.type not in layout]
