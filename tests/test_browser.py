"""The pages of latents and images in a browser, without a network."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browsers import needs_chromium
from made_up import HEADS, SIDE, made_up
from runs import TINY_RUN
from safetensors.numpy import load_file

from sparsight import config, sae
from sparsight.activations.store import ActivationStore
from sparsight.common import tables
from sparsight.images.manifest import Manifest
from sparsight.report.latents.atlas import plane
from sparsight.report.page import write_page

CPU = torch.device("cpu")
SAES = {"where-s0": ("patches", 48), "where-s1": ("patches", 48), "what-s0": ("cls", 40)}
N = 60


@pytest.fixture
def blank(chromium: Any) -> Iterator[Any]:
    """A page; a request to a network, and every complaint of the console, fails the test."""
    context = chromium.new_context()
    page, wrong = context.new_page(), []
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    local = ("file:", "data:", "blob:")
    page.on("request", lambda request: None if request.url.startswith(local) else wrong.append(request.url))
    yield page
    context.close()
    assert wrong == []


def visit(page: Any, path: Path, address: str = "") -> Any:
    """Open a report from disk."""
    page.goto("about:blank")
    page.goto(path.as_uri() + address)
    page.wait_for_selector("html[data-ready]", state="attached")
    return page


@pytest.fixture
def page(blank: Any, run_folder: Path) -> Any:
    return visit(blank, run_folder / TINY_RUN / "report" / "index.html")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of a made-up run, and the inputs of its page."""
    folder = tmp_path_factory.mktemp("made-up")
    inputs = made_up(folder, N, SAES, "what")
    write_page(config.Report(images=4), "made-up", inputs, CPU, folder)
    return folder, inputs


@pytest.fixture
def made(blank: Any, run: tuple[Path, dict[str, Any]]) -> Any:
    return visit(blank, run[0] / "index.html")


def codes_of(folder: Path, name: str) -> np.ndarray:
    """Codes of the test split, (N, T, F)."""
    rows = ActivationStore.open(folder / "activations" / SAES[name][0] / "test.zarr").rows("blocks.0.output")
    codes = sae.load(folder / "saes" / name).encode(torch.from_numpy(rows[:]).float()).dense()
    return codes.detach().numpy().reshape(N, rows.tokens_per_image, -1)


def listed(page: Any) -> list[list[str]]:
    """The rows of the list of latents."""
    return page.eval_on_selector_all(
        "#latents-list tr", "rows => rows.map(row => [...row.children].map(cell => cell.innerText))"
    )


def title(page: Any) -> str:
    return str(page.locator("#latents-detail h3").inner_text())


EACH = """async (addresses) => {
  const detail = document.getElementById("latents-detail"), shown = [];
  for (const address of addresses) {
    const changed = new Promise((resolve) => {
      new MutationObserver((_, self) => { self.disconnect(); resolve(); }).observe(detail, { childList: true });
    });
    location.hash = address;
    await changed;
    shown.push([detail.querySelector("h3").innerText, detail.textContent, detail.querySelectorAll("canvas").length]);
  }
  return shown;
}"""
"""Follow addresses within the page, each another than the one before; title, text and number of canvases of each."""


def go(page: Any, address: str) -> str:
    """Follow an address within the page; returns the title of what it shows."""
    ((heading, _, _),) = page.evaluate(EACH, [address])
    return str(heading)


@needs_chromium
def test_latents_are_searched_sorted_and_opened(page: Any, run_folder: Path) -> None:
    assert page.locator("#latents-sae").input_value() == "topk-s0", "the SAE that pruning steers with"
    everything = listed(page)
    rows = {row["latent"]: row for row in tables.read(run_folder / TINY_RUN / "saes" / "topk-s0" / "latents.parquet")}
    assert {int(row[0]) for row in everything} == rows.keys()
    frequent = [rows[int(row[0])] for row in everything if 1000 * rows[int(row[0])]["frequency"] > 3.5]
    assert len(frequent) > 2 and [int(row[0]) for row in everything[: len(frequent)]] == [r["latent"] for r in frequent]
    selectivity = [row["selectivity"] for row in frequent if not np.isnan(row["selectivity"])]
    assert selectivity == sorted(selectivity, reverse=True), "those that fire on fewer than 4 images come after them"
    page.locator("#latents-order").select_option("rarity")
    frequency = [rows[int(row[0])]["frequency"] for row in listed(page)]
    fires = [value for value in frequency if value > 0]
    assert len(fires) > 2 and frequency == [*sorted(fires), *[0] * (len(frequency) - len(fires))]

    class_name = everything[0][1]
    page.locator("#latents-search").fill(class_name)
    found = listed(page)
    wanted = [row[0] for row in everything if class_name in (row[0], row[1])]  # digits are classes and numbers
    assert found and sorted(row[0] for row in found) == sorted(wanted)
    assert page.locator("#latents-count").inner_text().startswith(f"{len(found)} of ")
    number = next(
        row[0] for row in reversed(everything) if int(row[0]) > 9 and row[-1] != "never"
    )  # no digit, no class
    page.locator("#latents-search").fill(number)
    assert [row[0] for row in listed(page)] == [number]

    page.locator("#latents-list a").first.press("Enter")
    detail = page.locator("#latents-detail")
    page.wait_for_selector("#latents-detail h3")
    assert title(page) == f"Latent {number} of topk-s0"
    assert page.evaluate("document.activeElement.tagName") == "H3", "a screen reader goes on there"
    assert 0 < detail.locator(".pictures > .latent canvas").count() <= 4
    assert detail.locator("svg[role=img] rect").count() == len(rows[0]["histogram"])


@needs_chromium
def test_every_sae_is_listed_and_a_latent_has_an_address(page: Any) -> None:
    names = page.locator("#latents-sae option").evaluate_all("options => options.map(option => option.value)")
    singles = ["topk-s0", "switch-s0", "switch-s1", "final-s0"]
    assert sorted(names) == sorted([*singles, *(f"resae-s0/blocks.{i}.input" for i in (1, 2))])
    name = "resae-s0/blocks.2.input"
    page.locator("#latents-sae").select_option(name)
    page.locator(f"#latents-list a[href^='#latent={name}/']").first.click()
    page.wait_for_selector("#latents-detail h3")
    address = page.evaluate("location.hash")
    assert re.fullmatch(rf"#latent={name}/\d+", address)
    page.goto("about:blank")
    page.go_back()
    page.wait_for_selector("#latents-detail h3")
    assert title(page) == f"Latent {address.rpartition('/')[2]} of {name}"


@needs_chromium
@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (390, "dark"), (1280, "light")])
def test_the_page_fits_a_phone_and_a_desk(page: Any, width: int, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 844})
    for address in ("#latents", "#latent=topk-s0/3", "#image=5"):
        page.evaluate("address => { location.hash = address; }", address)
        page.wait_for_timeout(100)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, "only tables scroll sideways"
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")


@needs_chromium
def test_every_latent_opens_by_its_address_or_says_why_not(made: Any, run: tuple[Path, dict[str, Any]]) -> None:
    for name, (_, d_sae) in SAES.items():
        fires = [row["frequency"] > 0 for row in tables.read(run[0] / "saes" / name / "latents.parquet")]
        shown = made.evaluate(EACH, [f"#latent={name}/{latent}" for latent in range(d_sae)])
        assert [heading.partition(":")[0] for heading, _, _ in shown] == [f"Latent {i} of {name}" for i in range(d_sae)]
        assert ["It never fires on the test split" not in text for _, text, _ in shown] == fires
        assert [canvases > 0 for _, _, canvases in shown] == fires and 0 < sum(fires) < d_sae
    assert go(made, "#latent=what-s0/40") == "No latent 40 of what-s0"
    assert "The SAE has 40 latents, 0 to 39." in made.locator("#latents-detail").inner_text()
    assert go(made, "#latent=absent-s0/1") == "No SAE absent-s0"
    assert "what-s0" in made.locator("#latents-detail").inner_text()
    assert go(made, f"#image={N}") == f"No image {N}"


@needs_chromium
def test_from_an_image_to_a_patch_to_a_latent_to_an_image(made: Any, run: tuple[Path, dict[str, Any]]) -> None:
    codes = codes_of(run[0], "where-s0")
    labels = Manifest(run[1]["images"]).split("test").labels
    image = int(codes.max(axis=2)[:, 6].argmax())
    made.locator("#latents-sae").select_option("where-s0")
    assert go(made, f"#image={image}") == f"Image {image} of the test split: {['flat', 'round'][labels[image]]}"
    made.locator(".patches input").nth(6).click()
    strongest = np.argsort(-codes[image, 6])[: int((codes[image, 6] > 0).sum())]
    row = made.locator("[aria-live] tbody tr")
    row.first.wait_for()
    assert [int(text) for text in row.locator("th").all_inner_texts()] == strongest.tolist()
    shown = [float(text) for text in row.locator("td:nth-child(3)").all_inner_texts()]
    largest = codes.max(axis=(0, 1))[strongest]
    np.testing.assert_allclose(shown, codes[image, 6, strongest], atol=0.005 + largest.max() / 510)
    row.locator("a").first.click()
    heading = "document.querySelector('#latents-detail h3').textContent"
    made.wait_for_function(f"{heading}.startsWith('Latent {strongest[0]} ')")
    thumbnail = made.locator(f'#latents-detail .latent a[href="#image={image}"]').first
    thumbnail.click()
    made.wait_for_function(f"{heading}.startsWith('Image {image} ')")
    latents = made.locator("#latents-detail > .wide").first.locator("tbody th").all_inner_texts()
    per_image = codes[image].max(axis=0)
    assert [int(latent) for latent in latents] == np.argsort(-per_image)[: min(20, (per_image > 0).sum())].tolist()


@needs_chromium
def test_the_hottest_cell_is_the_argmax_of_the_store_and_the_weaker_image_is_paler(
    made: Any, run: tuple[Path, dict[str, Any]]
) -> None:
    codes, opacity = codes_of(run[0], "where-s0"), "c => [...c.getContext('2d').getImageData(0, 0, 4, 4).data]"
    compared = 0
    for latent in np.flatnonzero((codes.max(axis=1) > 0).sum(axis=0) > 3)[:8]:
        go(made, f"#latent=where-s0/{latent}")
        strongest = []
        for frame in made.locator("#latents-detail .pictures > .latent .frame").all():
            image = int(frame.get_attribute("href").removeprefix("#image="))
            alpha = np.array(frame.locator(".heat").evaluate(opacity))[3::4]
            assert alpha.max() < 200 and len(alpha) == SIDE**2, "the picture stays visible"
            assert int(alpha.argmax()) == int(codes[image, :, latent].argmax())
            assert ((alpha > 0) == (codes[image, :, latent] > 0)).all()
            strongest.append((codes[image, :, latent].max(), alpha.max()))
        assert [alpha for _, alpha in strongest] == sorted((alpha for _, alpha in strongest), reverse=True)
        compared += strongest[0][0] > 1.1 * strongest[-1][0] and strongest[0][1] > strongest[-1][1]
    assert compared > 4
    heat, box = made.locator("#latents-detail .heat").first, made.get_by_role("checkbox", name="heat")
    assert heat.is_visible() and "one scale for all images" in made.locator(".legend").inner_text()
    box.uncheck()
    assert not heat.is_visible()


@needs_chromium
def test_the_keyboard_alone_opens_steps_and_goes_back(made: Any) -> None:
    made.locator("#latents-search").focus()
    order = [row[0] for row in listed(made)]
    for _ in range(3):  # past the order and the list's own stop
        made.keyboard.press("Tab")
    assert made.evaluate("document.activeElement.textContent") == order[0]
    made.keyboard.press("Enter")
    made.wait_for_selector("#latents-detail h3")
    assert title(made).startswith(f"Latent {order[0]} of what-s0")
    for key, place in (("ArrowRight", 1), ("ArrowRight", 2), ("ArrowLeft", 1)):
        made.keyboard.press(key)
        made.wait_for_function(f"location.hash === '#latent=what-s0/{order[place]}'")
        made.wait_for_function(f"document.activeElement.textContent.startsWith('Latent {order[place]} ')")
    made.keyboard.press("Tab")
    assert made.evaluate("document.activeElement.closest('#latents-detail') !== null"), "Tab goes on inside the page"
    made.go_back()
    made.wait_for_function(f"document.activeElement.textContent.startsWith('Latent {order[2]} ')")
    made.keyboard.press("Escape")
    made.wait_for_selector("#latents-detail", state="hidden")
    assert made.evaluate("[location.hash, document.activeElement.textContent]") == ["#latents", order[2]]
    made.keyboard.press("Enter")
    made.wait_for_selector("#latents-detail h3")
    made.locator("textarea").press("ArrowRight")
    assert made.evaluate("location.hash") == f"#latent=what-s0/{order[2]}", "in a text the arrows move the cursor"


@needs_chromium
def test_another_sae_clears_the_latent_and_its_address(made: Any) -> None:
    go(made, "#latent=what-s0/9")
    made.locator("#latents-sae").select_option("where-s1")
    made.wait_for_selector("#latents-detail", state="hidden")
    assert made.evaluate("location.hash") == "#latents"
    made.wait_for_selector("#latents-list a[href^='#latent=where-s1/']")
    made.go_back()
    made.wait_for_selector("#latents-detail h3")
    assert title(made).startswith("Latent 9 of what-s0") and made.locator("#latents-sae").input_value() == "what-s0"


@needs_chromium
def test_names_are_searched_sorted_and_shown_with_their_score(made: Any, run: tuple[Path, dict[str, Any]]) -> None:
    rows = tables.read(run[0] / "saes" / "what-s0" / "latents.parquet")
    named = {row["name"]: row for row in rows if row["name"]}
    made.locator("#latents-search").fill("word")
    made.locator("#latents-order").select_option("name")
    found = [row[1] for row in listed(made)]
    assert found == sorted(named, key=lambda name: -named[name]["name_auroc"])
    made.locator("#latents-search").fill(found[0])
    assert [row[1] for row in listed(made)] == found[:1]
    assert go(made, f"#latent=what-s0/{named[found[0]]['latent']}").endswith(f": {found[0]}")
    score = f"AUROC {named[found[0]]['name_auroc']:.2f} on held-out images, shuffled names 0.50"
    assert score in made.locator("#latents-detail").inner_text()
    made.locator("#latents-sae").select_option("where-s0")
    made.wait_for_function("!document.getElementById('latents-head').innerText.includes('name')")  # it has none


@needs_chromium
def test_neighbours_and_effects_on_heads_are_those_of_the_weights(made: Any, run: tuple[Path, dict[str, Any]]) -> None:
    rows = {name: sae.load(run[0] / "saes" / name).W_dec.detach().numpy() for name in SAES}
    cosines = rows["where-s0"] @ rows["where-s0"][9]
    nearest = [latent for latent in np.argsort(-cosines) if latent != 9][:5]
    match = int((rows["where-s1"] @ rows["where-s0"][9]).argmax())
    go(made, "#latent=where-s0/9")
    links = made.locator("#latents-detail ul a").evaluate_all("links => links.map(a => a.getAttribute('href'))")
    assert links == [*(f"#latent=where-s0/{latent}" for latent in nearest), f"#latent=where-s1/{match}"]
    pushes = load_file(run[1]["head_latents"][0])["what-s0"][:, 9]
    go(made, "#latent=what-s0/9")
    shown = made.locator("#latents-detail tbody td:nth-child(2)").all_inner_texts()
    assert len(shown) == HEADS
    np.testing.assert_allclose(list(map(float, shown)), pushes, atol=6e-4)


@needs_chromium
def test_attributions_of_a_latent_stand_on_its_page(page: Any, run_folder: Path) -> None:
    table = tables.read(run_folder / TINY_RUN / "attribution" / "topk-latents.parquet")
    latent = max(table, key=lambda row: row["attribution"])["latent"]
    largest = sorted((row for row in table if row["latent"] == latent), key=lambda row: -abs(row["attribution"]))[:6]
    expected = sorted(((row["attribution"], row["class_name"]) for row in largest), reverse=True)
    go(page, f"#latent=topk-s0/{latent}")
    title = 'h4:text-is("Attribution of the predicted class\'s logit")'
    shown = page.locator(f"#latents-detail div:has(> {title}) tbody tr")
    assert shown.locator("th").all_inner_texts() == [name for _, name in expected]
    values = list(map(float, shown.locator("td:nth-child(2)").all_inner_texts()))
    np.testing.assert_allclose(values, [value for value, _ in expected], atol=6e-4)
    go(page, "#latent=switch-s0/0")
    assert page.locator(title).count() == 0, "no section attributes to this SAE"


@needs_chromium
def test_notes_stay_in_the_browser_and_are_exported(made: Any, run: tuple[Path, dict[str, Any]]) -> None:
    go(made, "#latent=what-s0/9")
    made.locator("textarea").fill("a disc at the left")
    go(made, "#latent=where-s1/3")
    assert made.locator("textarea").input_value() == ""
    visit(made, run[0] / "index.html", "#latent=what-s0/9")
    assert made.locator("textarea").input_value() == "a disc at the left"
    made.keyboard.press("Escape")
    made.wait_for_selector("#latents-detail", state="hidden")
    with made.expect_download() as download:
        made.locator("#latents-notes").click()
    exported = json.loads(Path(download.value.path()).read_text())
    assert exported == {"run": "made-up", "notes": {"what-s0/9": "a disc at the left"}}


@needs_chromium
def test_the_pictures_of_an_opened_latent_are_drawn_without_scrolling(made: Any) -> None:
    made.set_viewport_size({"width": 600, "height": 200})
    go(made, "#latent=what-s0/9")
    blank = """async () => {
      await new Promise((done) => setTimeout(done, 500));
      const all = [...document.querySelectorAll("#latents-detail canvas[data-place]")];
      const pixels = (one) => one.getContext("2d").getImageData(0, 0, one.width, one.height).data;
      const shown = all.filter((one) => one.checkVisibility());
      return [shown.length, shown.filter((one) => pixels(one).every((value) => !value)).length];
    }"""
    shown, empty = made.evaluate(blank)
    assert shown >= 10 and empty == 0


@needs_chromium
def test_what_does_not_fit_is_said_where_it_is_missed(
    blank: Any, run: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    write_page(config.Report(images=4, megabytes=0.02), "made-up", run[1], CPU, tmp_path)
    page = visit(blank, tmp_path / "index.html", "#latent=what-s0/9")
    data = json.loads(page.locator("#latents-data").text_content())
    assert data["images"]["count"] < N
    fits = {one["name"]: one["parts"].keys() for one in data["saes"]}
    assert "facts" in fits["what-s0"] and not all("top" in parts for parts in fits.values()), "the main SAE first"
    for name, parts in fits.items():
        go(page, f"#latent={name}/9")
        assert ("report.megabytes" in page.locator("#latents-detail").inner_text()) == ("samples" not in parts)
        option = page.locator(f"#latents-sae option[value={name}]")
        assert (", not in this page" in option.inner_text()) == ("facts" not in parts)
    images = page.evaluate(EACH, [f"#image={image}" for image in range(N)])
    assert sum(" of the test split" in heading for heading, _, _ in images) == data["images"]["count"]


def test_equal_runs_give_equal_pages(run: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    write_page(config.Report(images=4), "made-up", run[1], CPU, tmp_path)
    assert (tmp_path / "index.html").read_bytes() == (run[0] / "index.html").read_bytes()


@pytest.mark.slow
@needs_chromium
def test_20000_latents_and_2000_images_fit_into_25_megabytes(blank: Any, tmp_path: Path) -> None:
    saes = {"where-s0": ("patches", 8_000), "what-s0": ("cls", 12_000)}
    inputs = made_up(tmp_path, 2_000, saes, "what", pixels=64)
    write_page(config.Report(), "large", inputs, CPU, tmp_path)
    path = tmp_path / "index.html"
    assert path.stat().st_size < 25_000_000
    visit(blank, path, "#latent=where-s0/700")
    assert title(blank) == "Latent 700 of where-s0"
    data = json.loads(re.search(r"<script id=\"latents-data\"[^>]*>(.*?)</script>", path.read_text())[1])  # type: ignore[index]
    assert data["images"]["count"] == 2_000 and not any(one["missing"] for one in data["saes"])


@needs_chromium
def test_a_click_in_the_atlas_opens_its_latent_and_back_returns(made: Any, run: tuple[Path, dict[str, Any]]) -> None:
    made.locator("#latents-sae").select_option("where-s1")
    made.locator("#latents-atlas").click()
    made.wait_for_selector("svg.atlas")
    rows = tables.read(run[0] / "saes" / "where-s1" / "latents.parquet")
    points = made.locator("svg.atlas a")
    addresses = points.evaluate_all("points => points.map(point => point.getAttribute('href'))")
    assert addresses == [f"#latent=where-s1/{row['latent']}" for row in rows if row["frequency"] > 0]
    one = sae.load(run[0] / "saes" / "where-s1")
    places_F2 = plane(one.W_dec).places_F2
    drawn = points.evaluate_all(
        "points => points.map(point => [...['cx', 'cy']].map(at => +point.firstChild.getAttribute(at)))"
    )
    latents = [int(address.rpartition("/")[2]) for address in addresses]
    for axis, sign in ((0, 1), (1, -1)):
        correlation = np.corrcoef(np.array(drawn)[:, axis], places_F2[latents, axis])[0, 1]
        assert correlation * sign > 0.9999
    points.nth(3).click()
    made.wait_for_function("document.querySelector('#latents-detail h3').textContent.startsWith('Latent')")
    assert made.locator("#latents-detail h3").inner_text().startswith(f"Latent {latents[3]} of where-s1")
    made.go_back()
    made.wait_for_selector("svg.atlas")


@needs_chromium
def test_an_image_says_what_the_models_predict(page: Any, run_folder: Path) -> None:
    """On 200 images they are as often right as the backbone stage measured on all of them."""
    run = run_folder / TINY_RUN
    classes = Manifest(run / "images" / "manifest.parquet").classes
    shown = page.evaluate(EACH, [f"#image={image}" for image in range(200)])
    found = [
        re.search(rf"label({'|'.join(classes)})vit predicts({'|'.join(classes)})clip", text) for _, text, _ in shown
    ]
    hits = np.mean([match is not None and match[1] == match[2] for match in found])
    accuracy = json.loads((run / "backbones" / "vit" / "config.json").read_text())["accuracy"]["test"]["accuracy"]
    assert abs(hits - accuracy) < 4 * (accuracy * (1 - accuracy) / 200) ** 0.5 and all(found)
