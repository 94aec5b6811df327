"""The report for every reader: with a keyboard, a screen reader, a phone, in the dark, on paper, with many classes."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from browsers import needs_chromium
from runs import TINY_RUN

from sparsight import config
from sparsight.common import tables
from sparsight.report import page as report
from sparsight.report.chapters import steering
from sparsight.report.figures.pruning import CLASSES
from sparsight.report.grid import end_of_grid

DESK, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
BOXES = "[...document.querySelectorAll('.wide, .plate, pre')].filter(box => box.scrollWidth > box.clientWidth + 1)"


@pytest.fixture
def opened(chromium: Any) -> Iterator[Any]:
    """Opens a page with all that is folded unfolded; a complaint of the console fails the test."""
    context = chromium.new_context()
    wrong: list[str] = []

    def open_page(path: Path, size: dict[str, int], scheme: str = "light", unfold: bool = True) -> Any:
        page = context.new_page()
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.set_viewport_size(size)
        page.emulate_media(color_scheme=scheme)
        page.goto(path.as_uri())
        if unfold:
            page.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)")
            page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        return page

    yield open_page
    context.close()
    assert wrong == []


@pytest.fixture
def index(run_folder: Path) -> Path:
    return run_folder / TINY_RUN / "report" / "index.html"


@needs_chromium
@pytest.mark.parametrize(("size", "scheme"), [(DESK, "light"), (DESK, "dark"), (PHONE, "light"), (PHONE, "dark")])
def test_axe_finds_no_violation(opened: Any, index: Path, size: dict[str, int], scheme: str) -> None:
    found = Axe().run(opened(index, size, scheme)).response
    assert [(one["id"], [node["html"][:200] for node in one["nodes"]]) for one in found["violations"]] == []
    assert {"color-contrast", "region", "svg-img-alt", "bypass"} <= {one["id"] for one in found["passes"]}


@needs_chromium
@pytest.mark.parametrize("width", [1280, 1920])
def test_every_column_is_seen_at_a_desk(opened: Any, index: Path, width: int) -> None:
    page = opened(index, {"width": width, "height": 900})
    assert page.evaluate(f"{BOXES}.map(box => box.textContent.slice(0, 80))") == []


@needs_chromium
def test_what_scrolls_on_a_phone_has_a_shadow_a_name_and_takes_the_focus(opened: Any, index: Path) -> None:
    page = opened(index, PHONE)
    about = "box => [box.tabIndex, box.getAttribute('role'), box.getAttribute('aria-label') || '', \
        getComputedStyle(box).backgroundImage.split('linear-gradient').length - 1]"
    boxes = page.evaluate(f"{BOXES}.map({about})")
    assert len(boxes) > 5
    for tab, role, name, shadows in boxes:
        assert (tab, role, shadows) == (0, "region", 4) and len(name) > 3


@needs_chromium
def test_the_skip_link_is_first_and_leads_past_the_navigation(opened: Any, index: Path) -> None:
    page = opened(index, DESK, unfold=False)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the results"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.tagName") == "MAIN"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('main') !== null")


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_figures_are_readable_text_on_a_phone_in_the_colours_of_the_page(opened: Any, index: Path, scheme: str) -> None:
    page = opened(index, PHONE, scheme)
    figures = page.evaluate("""[...document.querySelectorAll('.plate svg')].map(svg => ({
        words: [...svg.querySelectorAll('text')].map(text => parseFloat(getComputedStyle(text).fontSize)
            * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width),
        ink: getComputedStyle(svg.querySelector('text')).fill,
        paper: getComputedStyle(svg.querySelector('path')).fill,
        said: document.getElementById(svg.getAttribute('aria-describedby')).textContent,
    }))""")
    ink, paper = page.evaluate("['color', 'backgroundColor'].map(name => getComputedStyle(document.body)[name])")
    assert len(figures) > 8
    for figure in figures:
        assert len(figure["words"]) > 4 and min(figure["words"]) > 9, "pixels"
        assert (figure["ink"], figure["paper"]) == (ink, paper)
        assert re.search(r"\d", figure["said"]), "the main numbers"


def test_figures_as_files_are_for_white_paper(index: Path) -> None:
    for path in (index.parent / "figures").iterdir():
        text = path.read_text()
        assert "var(--" not in text and "fill: #ffffff" in text and "<text" in text and "<desc>" in text


@needs_chromium
def test_paper_shows_all_and_cuts_nothing(opened: Any, index: Path) -> None:
    page = opened(index, {"width": 700, "height": 1000}, "dark", unfold=False)  # A4 without margins, in pixels
    page.emulate_media(media="print", color_scheme="dark")
    hidden = "[...document.querySelectorAll('details td, details svg')].filter(part => !part.checkVisibility()).length"
    assert page.evaluate(hidden) == 0 and page.locator("details td").count() > 50
    assert page.evaluate(f"{BOXES}.length") == 0
    assert page.evaluate("document.documentElement.scrollWidth") <= 700
    cut = "box => box.scrollHeight > box.clientHeight + 1 && getComputedStyle(box).overflowY != 'visible'"
    assert page.evaluate(f"[...document.querySelectorAll('.wide, pre')].filter({cut}).length") == 0
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def many_classes(run: Path, out: Path, times: int) -> Path:
    """The report of a copy of the run in whose results each class stands ``times`` times."""
    copy = out / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("report", "logs", "benchmarks"))
    names = ("per_head", "class_subsets", "false_positives")
    paths = [copy / "pruning" / "heads" / f"{name}.parquet" for name in names]
    for path in (*paths, *copy.glob("steering/*-classes.parquet")):
        rows = tables.read(path)
        if path.stem == "per_head":
            rows = [row for row in rows if row["labels"] in ("none", "probe")]
        more = [{**row, "class_name": f"{row['class_name']}, kind {i}"} for i in range(times) for row in rows]
        tables.write(path, more)
    settings = json.loads((copy / "configuration.json").read_text())
    chains = [name for name, section in settings["saes"].items() if section["sites"]]
    metrics = sorted(copy.glob("saes/*/metrics.json"))
    inputs = {
        "images": copy / "images" / "manifest.parquet",
        "configuration": copy / "configuration.json",
        "backbones": sorted(copy.glob("backbones/*/config.json")),
        "saes": [path for path in metrics if path.parent.name.rpartition("-s")[0] not in chains],
        "chains": [path for path in metrics if path.parent.name.rpartition("-s")[0] in chains],
        "stabilities": sorted(copy.glob("saes/*-stability.json")),
        "stores": sorted(copy.glob("activations/*/test.json")),
        "steerings": sorted(copy.glob("steering/*-s?.parquet")),
        "transfers": sorted(copy.glob("steering/*/*.json")),
        "disentanglings": [],
        "localisations": [],
        "attributions": [copy / "attribution" / "topk.parquet"],
        "spurious": [],
        "policies": sorted(copy.glob("pruning/*/metrics.json")),
        "latents": sorted(copy.glob("saes/**/latents.parquet")),
        "head_latents": sorted(copy.glob("pruning/*/head_latents.safetensors")),
        "test_images": sorted(copy.glob("pruning/*/test_images.safetensors")),
    }
    report.write_page(config.Report(**settings["report"]), "many", inputs, torch.device("cpu"), out)
    return out / "index.html"


@needs_chromium
def test_the_page_stays_short_with_200_classes(opened: Any, index: Path, run_folder: Path, tmp_path: Path) -> None:
    assert opened(index, DESK, unfold=False).evaluate("document.documentElement.scrollHeight") < 8000
    path = many_classes(run_folder / TINY_RUN, tmp_path, 20)
    page = opened(path, DESK, unfold=False)
    assert page.evaluate("document.documentElement.scrollHeight") < 8000
    figure = (path.parent / "figures" / "heads-heads.svg").read_text()
    text = page.locator("#pruning ~ p").all_inner_texts()
    assert len(re.findall(r"kind \d+<", figure)) == CLASSES and f"Shown are the {CLASSES} of 200 classes" in figure
    assert [line.split(" accuracy")[0] for line in text if "these classes" in line] == [
        f"With class latents, these classes {end}" for end in ("gain most", "lose most")
    ]
    rows = page.locator("details table", has_text="Class latents by class").locator("tbody tr")
    assert rows.count() == 200, "the whole table is there, folded"


def test_a_choice_at_the_end_of_its_grid_is_named() -> None:
    assert [end_of_grid(value, [1.5, 2, 10, 10]) for value in (1.5, 2, 10)] == ["smallest", "", "largest"]
    assert end_of_grid(1, [1, 1]) == "", "there was nothing to choose"


def test_steering_is_pooled_over_seeds(run_folder: Path, tmp_path: Path) -> None:
    source = run_folder / TINY_RUN / "steering"
    paths = [tmp_path / f"two-s{seed}.parquet" for seed in (0, 1)]
    for path in paths:
        for suffix in (".parquet", "-classes.parquet", ".json"):
            shutil.copy(source / f"class-latents-s0{suffix}", path.with_name(f"{path.stem}{suffix}"))
    other = tables.read(paths[1])
    for row in other:
        row["accuracy"] /= 2 if row["split"] == "test" else 1
    tables.write(paths[1], other)
    assert steering.by_section(paths) == {"two": paths}
    chapter = steering.chapter("two", paths, [])
    first = {(row["method"], row["labels"]): row for row in tables.read(paths[0]) if row["split"] == "test"}
    against = json.loads(paths[0].with_suffix(".json").read_text())["against_controls"]
    assert list(chapter["figures"]) == ["steering-two"] and {row["sae"] for row in chapter["each"]} == {
        "two-s0",
        "two-s1",
    }
    grid = {row["strength"] for row in tables.read(paths[0]) if row["method"] == "class-latents"}
    for row in chapter["rows"]:
        one, metrics = first[row["method"], row["labels"]], row["metrics"]
        assert metrics["accuracy"]["mean"] == pytest.approx(0.75 * one["accuracy"]) and metrics["accuracy"]["n"] == 2
        assert metrics["accuracy"]["half"] > 0 and metrics["delta"]["half"] == 0
        ends = {max(grid): {"largest": 2}, min(grid): {"smallest": 2}}
        chosen = row["method"] not in ("none", "reconstruct")
        assert row["strengths"] == [one["strength"]] and row["at_end"] == (ends[one["strength"]] if chosen else {})
        compared = [line for line in against if (line["control"], line["labels"]) == (row["method"], row["labels"])]
        assert [line["delta"] for line in compared] == ([row["less"]["delta"]["mean"]] if row["less"] else [])
    assert any(row["less"] for row in chapter["rows"])
