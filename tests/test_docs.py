"""Every code block of README, CONTRIBUTING and docs: Python is run, overlays are loaded, commands are checked.

Blocks marked text are no code. Python runs in order, page by page, where a run of the pipeline has just ended; the tiny
run plays the part of the default run, so blocks 3 and 5 of its deeper model stand for blocks 1 and 2.
"""

import argparse
import copy
import json
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT, workspace
from dvc.cli import parse_args as parse_dvc
from runs import TINY_RUN
from snakemake.cli import get_argument_parser
from snakemake.utils import update_config
from source_files import table

from sparsight.pipeline.run import load_run

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = {"python", "yaml", "sh", "text"}
BLOCK = re.compile(r"^```(.*)\n((?:.*\n)*?)```$", re.MULTILINE)
# Commands in running text; a word in angle brackets stands for whatever the reader has.
INLINE = re.compile(r"`((?:uv run|uv sync|python|snakemake|dvc|pytest) [^`<]+)`")
# Python that another test runs: page and first line of the block -> the test file, which reads it from the page.
ELSEWHERE = {
    ("extending.md", "# src/sparsight/sae/variants/inhibited.py"): "test_extending.py",
    ("extending.md", "# tests/plain.py"): "test_extending.py",
    ("pruning.md", "import json"): "test_export.py",
}


def blocks(page: Path, language: str) -> list[str]:
    return [text for name, text in BLOCK.findall(page.read_text()) if name == language]


def python(page: Path) -> list[str]:
    """The blocks of Python that are run here."""
    return [code for code in blocks(page, "python") if (page.name, code.partition("\n")[0]) not in ELSEWHERE]


def pages(chosen: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("page", chosen, ids=lambda page: page.stem)


@pages(PAGES)
def test_every_block_says_what_it_is(page: Path) -> None:
    text = page.read_text()
    assert {name for name, _ in BLOCK.findall(text)} <= LANGUAGES
    prose = BLOCK.sub("", text)
    assert "```" not in prose
    assert re.search(r"\n\n(?: {4}|\t)", prose) is None, "code by indentation would be run by nobody"


def test_what_is_run_elsewhere_is_there() -> None:
    first_lines = {(page.name, code.partition("\n")[0]) for page in PAGES for code in blocks(page, "python")}
    assert ELSEWHERE.keys() <= first_lines
    for (page, _), test in ELSEWHERE.items():
        assert f'"{page}"' in (ROOT / "tests" / test).read_text()


@pytest.fixture
def after_the_run(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working folder of a reader whose run has ended, and who has a table of pictures."""
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "default").symlink_to(run_folder / TINY_RUN)
    table(tmp_path / "my" / "tables" / "train.parquet", [(b"a", 0), (b"b", 1)], ["no", "yes"])
    monkeypatch.chdir(tmp_path)


@pages([page for page in PAGES if python(page)])
@pytest.mark.usefixtures("after_the_run")
def test_python_runs(page: Path) -> None:
    names: dict[str, Any] = {}
    for code in python(page):
        tiny = code.replace("blocks.3.", "blocks.1.").replace("blocks.5.", "blocks.2.")
        exec(compile(tiny, page.name, "exec"), names)
    if page.stem in RESULTS:
        RESULTS[page.stem](names)


def check_readme(names: dict[str, Any]) -> None:
    assert names["codes"].values.shape == (256, 4) and names["x_hat"].shape == names["x"].shape
    assert names["logits"].shape == (64, 10)
    masked = names["backbone"](names["images"], policy=names["policy"])
    torch.testing.assert_close(names["logits"], masked, atol=1e-4, rtol=1e-4)


def check_images(names: dict[str, Any]) -> None:
    assert sorted(path.read_bytes() for path in Path("my/images").rglob("*.jpg")) == [b"a", b"b"]
    assert {path.parent.name for path in Path("my/images").rglob("*.jpg")} == {"no", "yes"}


def check_sae(names: dict[str, Any]) -> None:
    assert names["sae"].load("my/switch").kind == "switch"
    assert names["chain"].sites == names["sites"] and names["chain"].maps["cls"]


def check_store(names: dict[str, Any]) -> None:
    assert len(names["batch"].x["blocks.2.input"]) == len(names["batch"].rows) > 0


def check_store_format(names: dict[str, Any]) -> None:
    assert names["about"]["shape"][1:] == list(names["x"].shape[1:]) and names["x"].any()


def check_tutorial(names: dict[str, Any]) -> None:
    metrics = json.loads(Path("results/default/saes/topk-s0/metrics.json").read_text())
    assert names["fvu"](names["sae"]) == pytest.approx(metrics["fvu"], rel=1e-3)
    assert names["fvu"](names["own"]) < 0.5
    assert max(range(10), key=names["by_class"].__getitem__) == names["wanted"]
    assert (names["amplified"] != names["plain"]).any()
    assert (names["answers"] != names["plain"]).float().mean() > 0.5, "at the greatest strength"
    assert names["pruned"].shape == names["whole"].shape and not all(mask.all() for mask in names["masks"].values())


RESULTS = {
    "README": check_readme,
    "images": check_images,
    "sae": check_sae,
    "store": check_store,
    "store-format": check_store_format,
    "tutorial": check_tutorial,
}


@pages([page for page in PAGES if blocks(page, "yaml")])
def test_overlays_are_valid(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for text in blocks(page, "yaml"):
        overlay = yaml.safe_load(text)
        for images in (overlay.get("images"), *overlay.get("other_images", {}).values()):
            for key in {"path", "masks"} & (images or {}).keys():
                Path(images[key]).mkdir(parents=True)
        config: dict[str, Any] = copy.deepcopy(yaml.safe_load((ROOT / "params.yaml").read_text()))
        update_config(config, overlay)
        run = load_run(config)
        for kind in ("backbones", "saes", "policies", "steering"):
            for name, section in overlay.get(kind, {}).items():
                assert (name in getattr(run, kind)) == (section is not None), f"{kind}.{name}"


def commands(text: str) -> Iterator[list[str]]:
    """The commands of lines of shell, as words."""
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        while "&&" in words:
            yield words[: words.index("&&")]
            words = words[words.index("&&") + 1 :]
        if words:
            yield words


def overlays(page: Path) -> dict[str, str]:
    """The overlays of a page that begin with their file's name."""
    found = (re.match(r"# (\S+\.yaml)\n", text) for text in blocks(page, "yaml"))
    return {match[1]: match.string for match in found if match}


@pages(PAGES)
def test_commands_are_understood(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prose = BLOCK.sub("", page.read_text()).replace("\n", " ")
    for text in (*blocks(page, "sh"), *INLINE.findall(prose)):
        for words in commands(text):
            understood(words, page, monkeypatch)


def understood(words: list[str], page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail unless what the command names is there and its program knows its options."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    named = {"--group": project["dependency-groups"], "--extra": project["project"]["optional-dependencies"]}
    match words:
        case ["git", "clone", "REPOSITORY", _] | ["cd", _]:
            pass  # wherever the reader has found this page
        case ["pip", "download", "--no-deps", _] | ["lint-imports"]:
            pass
        case ["pip", "install", "uv"]:
            assert "pip install --quiet uv" in (ROOT / ".ci" / "run").read_text()
        case ["uv", "sync", *rest]:
            assert not rest or rest[1] in named[rest[0]]
        case ["uv", "run", "--group", group, *rest]:
            assert group in named["--group"]
            understood(rest, page, monkeypatch)
        case ["uv", "run", "--with", _, *rest]:
            understood(["uv", "run", *rest], page, monkeypatch)
        case ["uv", "run", *rest]:
            understood(rest, page, monkeypatch)
        case ["bash", script, *rest]:
            text = (ROOT / script).read_text()
            assert all(f"{word}()" in text for word in rest)
        case ["pytest", *rest]:
            assert all((ROOT / word).is_file() for word in rest if word.startswith("tests/"))
        case ["dvc", *rest]:
            parse_dvc(rest)
        case ["python", "-m", module, *rest]:
            place = ROOT / "src" / module.replace(".", "/")
            parsed(place / "__main__.py" if place.is_dir() else place.with_suffix(".py"), rest, monkeypatch)
        case ["python", script, *rest]:
            text = (ROOT / script).read_text()
            if "ArgumentParser" in text:
                parsed(ROOT / script, rest, monkeypatch)
            else:
                assert " ".join(words) in text, "its docstring says how it is called"
        case ["snakemake", *rest]:
            options, unknown = get_argument_parser().parse_known_args(rest)
            # The plugin for SLURM, which has options of its own, is not installed here.
            assert all(f'"{word}"' in (ROOT / "tests" / "slurm" / "test_cluster.py").read_text() for word in unknown)
            files = [*(options.configfile or []), *(options.profile or [])]
            assert all((ROOT / file).exists() or str(file) in overlays(page) for file in files)
        case _:
            pytest.fail(f"nobody knows how to check: {shlex.join(words)}")


class Parsed(BaseException):
    """Ends a script when its arguments are parsed."""


def parsed(script: Path, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a script as far as its arguments are parsed."""
    parse = argparse.ArgumentParser.parse_args

    def stop(self: argparse.ArgumentParser) -> None:
        parse(self)
        raise Parsed

    with monkeypatch.context() as patch, pytest.raises(Parsed):
        patch.setattr(argparse.ArgumentParser, "parse_args", stop)
        patch.setattr(sys, "argv", [str(script), *words])
        patch.syspath_prepend(script.parent)
        runpy.run_path(str(script), run_name="__main__")


def pipelines(page: Path) -> set[str]:
    """The blocks' calls of snakemake on this machine, each once."""
    lines = [words for text in blocks(page, "sh") for words in commands(text.replace(" --dry-run", ""))]
    return {shlex.join(w[w.index("snakemake") :]) for w in lines if "snakemake" in w and "--profile" not in w}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "line"), [pytest.param(p, line, id=f"{p.stem}: {line}") for p in PAGES for line in sorted(pipelines(p))]
)
def test_snakemake_plans_what_the_page_says(page: Path, line: str, tmp_path: Path) -> None:
    folder = workspace(tmp_path / "work")
    for name, text in overlays(page).items():
        (folder / name).write_text(text)
        if path := yaml.safe_load(text).get("images", {}).get("path"):
            (folder / path).mkdir(parents=True)
    command = [sys.executable, "-m", *shlex.split(line), "--dry-run"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^total +[1-9]", done.stdout + done.stderr, re.MULTILINE)
