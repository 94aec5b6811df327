"""The report in a browser, without a network."""

import dataclasses
import hashlib
import html
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import write_store
from runs import TINY_RUN
from studies import SECTION, random_policy, random_sae, two_class_images, two_classes

from sparsight import sae
from sparsight.activations.store import ActivationStore
from sparsight.common import tables
from sparsight.common.intervals import mean_of_seeds
from sparsight.common.work import Work
from sparsight.pipeline.run import load_run
from sparsight.pruning import evaluate
from sparsight.report.chapters import pruning
from sparsight.report.chapters.latents import top_images
from sparsight.report.chapters.pruning import _verdicts
from sparsight.sae.inputs import SaeInputs
from sparsight.sae.moments import by_group, fit_moments
from sparsight.sae.resae import ReSAE

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium, which apt-get install chromium brings")


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(chromium: Any, run_folder: Path) -> Iterator[Any]:
    """The report, opened from disk; a request to a network, and every complaint of the console, fails the test."""
    context = chromium.new_context()
    page, wrong = context.new_page(), []
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on(
        "request", lambda request: None if request.url.startswith(("file:", "data:")) else wrong.append(request.url)
    )
    page.goto((run_folder / TINY_RUN / "report" / "index.html").as_uri())
    yield page
    context.close()
    assert wrong == []


def listed(page: Any) -> list[list[str]]:
    """The rows of the list of latents."""
    return [row.locator("th, td").all_inner_texts() for row in page.locator("#latents-list tr").all()]


@needs_chromium
def test_latents_are_searched_sorted_and_opened(page: Any, run_folder: Path) -> None:
    page.locator("#latents-sae").select_option("topk-s0")
    everything = listed(page)
    rows = tables.read(run_folder / TINY_RUN / "saes" / "topk-s0" / "latents.parquet")
    fires = {row["latent"]: row for row in rows if not np.isnan(row["selectivity"])}
    assert {int(row[0]) for row in everything} == fires.keys()
    frequent = [fires[int(row[0])] for row in everything if 1000 * fires[int(row[0])]["frequency"] > 3.5]
    assert len(frequent) > 2 and [int(row[0]) for row in everything[: len(frequent)]] == [r["latent"] for r in frequent]
    selectivity = [row["selectivity"] for row in frequent]
    assert selectivity == sorted(selectivity, reverse=True), (
        "and those that fire on fewer than 4 images come after them"
    )
    page.locator("#latents-order").select_option("rarity")
    frequency = [fires[int(row[0])]["frequency"] for row in listed(page)]
    assert len(frequency) > 2 and frequency == sorted(frequency)

    class_name = everything[0][1]
    page.locator("#latents-search").fill(class_name)
    found = listed(page)
    wanted = [row[0] for row in everything if class_name in (row[0], row[1])]  # digits are classes and numbers
    assert found and sorted(row[0] for row in found) == sorted(wanted)
    assert page.locator("#latents-count").inner_text().startswith(f"{len(found)} of ")
    number = next(row[0] for row in reversed(everything) if int(row[0]) > 9)  # no digit, so no class
    page.locator("#latents-search").fill(number)
    assert [row[0] for row in listed(page)] == [number]

    page.locator("#latents-list button").first.press("Enter")
    detail = page.locator("#latents-detail")
    assert detail.locator("h3").inner_text() == f"Latent {number} of topk-s0"
    assert page.evaluate("document.activeElement.tagName") == "H3", "a screen reader goes on there"
    assert 0 < detail.locator("img").count() <= 4
    for image in detail.locator("img").all():
        assert image.evaluate("image => image.complete && image.naturalWidth > 0")
    assert detail.locator("svg[role=img] rect").count() == len(rows[0]["histogram"])


@needs_chromium
def test_a_latent_has_an_address_and_every_sae_its_latents(page: Any) -> None:
    names = page.locator("#latents-sae option").evaluate_all("options => options.map(option => option.value)")
    singles, chain = ["final-s0", "switch-s0", "topk-s0"], [f"resae-s0/blocks.{i}.input" for i in (1, 2)]
    assert sorted(names) == sorted([*singles, *chain]), "the first seed of each"
    name = "resae-s0/blocks.2.input"
    page.locator("#latents-sae").select_option(name)
    page.locator("#latents-list button").first.click()
    address = page.evaluate("location.hash")
    title = page.locator("#latents-detail h3").inner_text()
    assert re.fullmatch(rf"#latent={name}/\d+", address)
    page.goto("about:blank")
    page.go_back()
    assert page.locator("#latents-detail h3").inner_text() == title


@needs_chromium
@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (390, "dark"), (1280, "light")])
def test_the_page_fits_a_phone_and_a_desk(page: Any, width: int, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "only tables scroll sideways"
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")


def test_the_page_is_small_and_names_nothing_outside(run_folder: Path) -> None:
    path = run_folder / TINY_RUN / "report" / "index.html"
    assert path.stat().st_size < 15_000_000
    outside = set(re.findall(r"(?:src|href)=\"(?!data:|#)([^\"]*)\"", path.read_text()))
    assert not outside


def test_the_pipeline_is_drawn_with_what_every_part_read(run_folder: Path) -> None:
    page = (run_folder / TINY_RUN / "report" / "index.html").read_text()
    drawn = page.split('<h2 id="pipeline">')[1].split("<h2")[0]
    rows = re.findall(r"<li>(<a href=\"#(\w+)\">|<span>)(.+?)</\w+>\n<ul [^>]*>(.*?)</ul>", drawn)
    parts = {name: re.findall(r"<strong>(.*?)</strong>", boxes) for _, _, name, boxes in rows}
    assert parts == {
        "Images": ["mnist-5000"],
        "Backbones": ["vit", "clip"],
        "Activations": ["vit", "clip"],
        "SAEs": ["topk", "switch", "final", "resae"],
        "Steering": ["class-latents", "vs2", "neighbours"],
        "Head policies": ["heads"],
        "Report": ["this page"],
    }
    assert all(f'<h2 id="{section}">' in page for _, section, _, _ in rows if section)
    for text in (
        "<strong>mnist-5000</strong> 5,000 images, 10 classes",
        "<strong>switch</strong> switch, 48 latents, k 4, 2 seeds<small>reads vit: blocks.2.input<",
        "<strong>resae</strong> topk, 48 latents, k 4, 1 seed, chain, maps full<small>reads vit: blocks.1.input, ",
        "<strong>neighbours</strong> vs2++<small>reads final<",
        "<strong>heads</strong> decides in 2 blocks<small>reads vit, topk<",
    ):
        assert text in drawn


def test_the_page_names_its_settings_and_files(run_folder: Path) -> None:
    run = run_folder / TINY_RUN
    page = html.unescape((run / "report" / "index.html").read_text().split('<h2 id="provenance">')[1])
    settings = yaml.safe_load(page.split("<pre>")[1].split("</pre>")[0])
    assert settings == json.loads((run / "configuration.json").read_text())
    assert json.loads(json.dumps(dataclasses.asdict(load_run(settings)))) == settings
    files = dict(re.findall(r"<th scope=\"row\">(.*?)</th><td><code>(\w+)</code>", page))
    assert files.keys() >= {"images/manifest.parquet", "saes/topk-s0/metrics.json", "pruning/heads/metrics.json"}
    assert files == {name: hashlib.sha256((run / name).read_bytes()).hexdigest() for name in files}


def test_the_summary_says_what_the_intervals_say() -> None:
    ends = {"random-latents": (0.01, 0.02), "logit-bias": (-0.02, -0.01), "class-static": (-0.01, 0.01)}
    shared = {"labels": "probe", "usage": 0.6, "accuracy": 0.8}
    rows = [{"control": name, "delta_lo": lo, "delta_hi": hi, **shared} for name, (lo, hi) in ends.items()]
    found = _verdicts([*rows, {**rows[0], "labels": "oracle", "control": "not deployable"}])
    assert found is not None and found["controls"] == {
        "better than": ["random-latents"], "worse than": ["logit-bias"],
        "not significantly different from": ["class-static"],
    }  # fmt: skip
    assert _verdicts([]) is None


def test_a_mean_over_seeds_has_its_own_interval_not_the_mean_of_the_seeds_ends(tmp_path: Path) -> None:
    folder, saes = tmp_path / "heads", {f"sae-s{seed}": random_sae(seed) for seed in (0, 1)}
    with Work(tmp_path / "work", "key") as work:
        evaluate.evaluate(SECTION, two_classes(), random_policy(), saes, two_class_images(tmp_path), 0, work, 2, {})
        work.finish(folder)
    shown = {(row["strategy"], row["labels"]): row for row in pruning.chapter(folder)["rows"]}
    overall, frontier = (tables.read(folder / f"{name}.parquet") for name in ("overall", "frontier"))
    metrics = json.loads((folder / "metrics.json").read_text())
    of_points = {(row["strategy"], row["labels"]): row for row in metrics["against_none"]}
    chosen = {(row["strategy"], row["labels"]): row for row in frontier if row["split"] == "test" and row["chosen"]}
    assert {len(row["sae"]) > 0 for row in overall} == {True, False}
    for key, row in shown.items():
        own = [r for r in overall if (r["strategy"], r["labels"]) == key]
        if len(own) == 1:
            assert {name: row[name] for name in ("lo", "hi", "delta_lo", "delta_hi")}.items() <= own[0].items()
            continue
        assert (row["lo"], row["hi"]) == (chosen[key]["lo"], chosen[key]["hi"])
        assert (row["delta_lo"], row["delta_hi"]) == (of_points[key]["delta_lo"], of_points[key]["delta_hi"])
        assert row["accuracy"] == pytest.approx(chosen[key]["accuracy"])
        assert row["delta"] == pytest.approx(of_points[key]["delta"])


def test_spliced_accuracy_of_several_seeds_has_the_interval_over_seeds(run_folder: Path) -> None:
    run = run_folder / TINY_RUN
    (table,) = re.findall(r"<b>Use\.</b>.*?</table>", (run / "report" / "index.html").read_text(), re.DOTALL)
    column = re.findall(r"scope=\"col\">(.*?)</th>", table).index("spliced")
    rows = re.findall(r"scope=\"row\">(.*?)</th>(.*?)</tr>", table, re.DOTALL)
    cells = {name: re.findall(r"<td.*?>(.*?)</td>", body)[column - 1] for name, body in rows}
    seeds = [
        json.loads((run / "saes" / f"switch-s{seed}" / "metrics.json").read_text())["accuracy_spliced"]
        for seed in (0, 1)
    ]
    found = mean_of_seeds(seeds)
    expected = f"{100 * found['mean']:.1f}"
    if found["half"] > 1e-9:
        expected += f" &plusmn; {100 * found['half']:.1f}"
    assert cells["switch"] == expected
    single = json.loads((run / "saes" / "topk-s0" / "metrics.json").read_text())
    ends = [f"{100 * single[f'accuracy_spliced_{end}']:.1f}" for end in ("lo", "hi")]
    assert cells["topk"] == f"{100 * single['accuracy_spliced']:.1f} ({ends[0]} to {ends[1]})"


@pytest.mark.parametrize("tokens", ["cls", "all"])
@pytest.mark.parametrize("chained", [False, True])
def test_top_images_are_those_of_sorting_all_of_them(tmp_path: Path, tokens: str, chained: bool) -> None:
    shape, sites = (6,) if tokens == "cls" else (5, 6), ["blocks.0.input", "blocks.1.input"]
    store = ActivationStore.open(write_store(tmp_path, 700, dict.fromkeys(sites, shape), tokens))
    one, x = sae.create("topk", 6, 12, 3), torch.from_numpy(store.rows(sites[1])[:]).float()
    chain = None
    if chained:
        moments = fit_moments(by_group(store, sites, torch.device("cpu")), sites)
        chain = ReSAE.fit({sites[0]: sae.create("topk", 6, 12, 3), sites[1]: one}, moments)
        h = torch.from_numpy(store.rows(sites[0])[:]).float()
        before, out = h.unflatten(0, (700, -1)), x.unflatten(0, (700, -1))
        for group, at in store.token_groups(sites[0]).items():
            A, c = chain.maps[group][0]
            out[:, at] = out[:, at] - before[:, at] @ A.float().T - c.float()
        x = out.flatten(0, 1)
    values, images = top_images(one, SaeInputs(store, sites[1], torch.device("cpu"), chain), 700, 9)
    per_image = one.encode(x).dense().detach().numpy().reshape(700, -1, 12).max(axis=1)
    for latent in range(12):
        found = per_image[images[latent], latent]
        np.testing.assert_allclose(values[latent], found, atol=1e-5)
        np.testing.assert_allclose(found, np.sort(per_image[:, latent])[::-1][:9], atol=1e-5)
        assert chained or images[latent].tolist() == sorted(range(700), key=lambda i: (-per_image[i, latent], i))[:9]
