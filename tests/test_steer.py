"""The sliders of an image's page: masks and predictions against those of the pruning stage, image by image."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browsers import needs_chromium
from runs import TINY_RUN
from safetensors.numpy import load_file, save_file
from studies import Study, two_class_images

from sparsight.common import tables
from sparsight.images.manifest import Manifest
from sparsight.pruning import image_table
from sparsight.pruning.masks import unpack
from sparsight.pruning.outcomes import Outcome
from sparsight.pruning.strategies import NONE, Row
from sparsight.report import steer

SCRIPTS = Path(steer.__file__).parent / "scripts"
ACTIVE = 8  # latents of the study's SAEs on an image
# Of an image: the panel, in which every slider is set to its strength; what it says, and what it shows.
STEERED = """async ([image, sae, strengths]) => {
  const panel = await steerPanel(image);
  document.querySelector("main").replaceChildren(panel);
  const select = panel.querySelector("select"), first = panel.querySelector(".steered");
  select.value = [...select.options].findIndex((one) => one.textContent === sae);
  select.dispatchEvent(new Event("change"));
  while (panel.querySelector(".steered") === first) await new Promise((done) => setTimeout(done));
  const inputs = [...panel.querySelectorAll("input")].slice(strengths.length > 1 ? 1 : 0);
  strengths.forEach((strength, i) => {
    inputs[i].value = STRENGTHS.indexOf(strength);
    inputs[i].dispatchEvent(new Event("input"));
  });
  const { mask, predicted } = panel.querySelector(".steered").dataset;
  return [Number(mask), Number(predicted), panel.innerText];
}"""


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    return Study(two_class_images(tmp_path_factory.mktemp("study")))


@pytest.fixture(scope="module")
def written(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pruning stage leaves of the study's test images."""
    folder = tmp_path_factory.mktemp("pruning") / "heads"
    folder.mkdir()
    effects_by_sae = study.strategies.effects_by_sae
    image_table.write(study.test, effects_by_sae, folder / "test_images.safetensors")
    pushes = {name: effects.push_HF.contiguous().numpy() for name, effects in effects_by_sae.items()}
    save_file(pushes, folder / "head_latents.safetensors")
    return folder / "test_images.safetensors"


def amplified(arrays: dict[str, np.ndarray], push_HF: np.ndarray, sae: str, strengths_NK: np.ndarray) -> np.ndarray:
    """Codes of the masks, (N,), in double precision."""
    weights_NK = (strengths_NK - 1) * arrays[f"{sae}.codes"]  # 0 beyond the active latents
    change_NH = np.einsum("nk,hnk->nh", weights_NK, push_HF.astype(np.float64)[:, arrays[f"{sae}.latents"]])
    return ((arrays["head_logits"] + change_NH > 0) * 2 ** np.arange(len(push_HF))).sum(axis=1)


def of_strategy(study: Study, sae: str, strength: float) -> Outcome:
    row = Row("sample-top", strength, "none", sae, ACTIVE)
    return study.run([row])[row]


@pytest.mark.parametrize("sae", ["sae-s0", "sae-s1"])
def test_what_is_stored_of_an_image_gives_the_masks_and_predictions_of_the_strategies(
    study: Study, written: Path, sae: str
) -> None:
    arrays, push_HF = load_file(written), load_file(written.parent / "head_latents.safetensors")[sae]
    none, ones = study.run([NONE])[NONE], np.ones((len(study.test), ACTIVE))
    images, seen = np.arange(len(study.test)), []
    for strength, expected in ((1, none), *((s, of_strategy(study, sae, s)) for s in (1, 3, 100))):
        codes = amplified(arrays, push_HF, sae, strength * ones)
        assert (codes == expected.codes).all()
        assert (arrays["predictions"][images, codes] == expected.predicted).all()
        seen.append(codes)
    assert (seen[0] != seen[-1]).mean() > 0.3, "the strength matters"
    assert (np.diff(arrays[f"{sae}.codes"], axis=1) <= 0).all(), "the strongest first"


def test_only_the_first_images_are_written_where_the_tables_are_large(
    study: Study, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, path = load_file(written), tmp_path / "test_images.safetensors"
    in_32_bits = {**whole, "predictions": whole["predictions"].astype(np.int32)}
    per_image = sum(array[0].nbytes for array in in_32_bits.values())
    monkeypatch.setattr(image_table, "_BYTES", 6 * per_image - 1)
    image_table.write(study.test, study.strategies.effects_by_sae, path)
    for name, array in load_file(path).items():
        assert np.array_equal(array, whole[name][:5]), name
    monkeypatch.setattr(image_table, "MASKS", 2**5)
    image_table.write(study.test, study.strategies.effects_by_sae, path)
    assert load_file(path).keys() == whole.keys() - {"predictions"}


def test_a_run_stores_what_its_tables_count(run_folder: Path) -> None:
    folder = run_folder / TINY_RUN / "pruning" / "heads"
    arrays, pushes = (load_file(folder / f"{name}.safetensors") for name in ("test_images", "head_latents"))
    labels = Manifest(run_folder / TINY_RUN / "images" / "manifest.parquet").split("test").labels
    n, n_heads = arrays["head_logits"].shape
    assert n == len(labels)
    found = 0
    for row in tables.read(folder / "overall.parquet"):
        if row["strategy"] not in ("none", "sample-top"):
            continue
        sae = row["sae"] or next(iter(pushes))
        strengths = np.ones_like(arrays[f"{sae}.codes"])
        strengths[:, : row["latents"]] = row["strength"]
        codes = amplified(arrays, pushes[sae], sae, strengths)
        assert unpack(codes, n_heads).mean() == pytest.approx(row["usage_last"], abs=1e-12)
        assert (arrays["predictions"][np.arange(n), codes] == labels).mean() == pytest.approx(
            row["accuracy"], abs=1e-12
        )
        found += 1
    assert found >= 2


def opened(browser: Any, panels: dict[str, Any], file: Path) -> tuple[Any, list[str]]:
    """A page of nothing but the sliders, and the complaints of its console."""
    texts = [f'<script id="pack-{name}" type="text/plain">{text}</script>' for name, text in panels["texts"].items()]
    data = {"steer-data": panels["data"], "latents-data": {"classes": ["dark", "bright"]}}
    texts += [
        f'<script id="{name}" type="application/json">{json.dumps(value)}</script>' for name, value in data.items()
    ]
    scripts = "".join((SCRIPTS / f"{name}.js").read_text() for name in ("dom", "data", "steer"))
    file.write_text(
        "".join(["<!doctype html><meta charset=utf-8><main></main>", *texts, f"<script>{scripts}</script>"])
    )
    page, wrong = browser.new_page(), []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.goto(file.as_uri())
    return page, wrong


@needs_chromium
def test_sliders_give_the_masks_and_predictions_of_the_strategies(
    study: Study, written: Path, chromium: Any, tmp_path: Path
) -> None:
    n = len(study.test)
    page, wrong = opened(chromium, steer.panels([written], np.arange(n)), tmp_path / "page.html")
    arrays, pushes = load_file(written), load_file(written.parent / "head_latents.safetensors")
    generator, images = np.random.default_rng(0), np.arange(n)
    none, every = study.run([NONE])[NONE], {}
    for sae in study.saes:
        for strength, expected in ((1, none), (100, of_strategy(study, sae, 100))):
            found = [page.evaluate(STEERED, [image, sae, [strength]])[:2] for image in range(n)]
            assert [code for code, _ in found] == expected.codes.tolist()
            assert [label for _, label in found] == expected.predicted.tolist()
        strengths_NK = generator.choice([0, 0.5, 1, 2, 10, 100], (n, ACTIVE))
        every[sae] = amplified(arrays, pushes[sae], sae, strengths_NK)
        found = [page.evaluate(STEERED, [image, sae, strengths_NK[image].tolist()])[:2] for image in range(n)]
        assert [code for code, _ in found] == every[sae].tolist()
        assert [label for _, label in found] == arrays["predictions"][images, every[sae]].tolist()
    text = page.evaluate(STEERED, [0, "sae-s0", [1]])[2]
    kept = int(np.bitwise_count(none.codes[0]))
    assert f"{kept} of 6 heads are kept. The class stays {['dark', 'bright'][none.predicted[0]]}." in text
    assert wrong == []
    page.close()


@needs_chromium
def test_an_image_without_room_says_so(
    study: Study, written: Path, chromium: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = np.arange(len(study.test))
    space = 3 * len(steer.panels([written], rows)["texts"]["steer-heads"]) // 4
    monkeypatch.setattr(steer, "_BYTES", space)
    panels = steer.panels([written], rows)
    assert len(panels["texts"]["steer-heads"]) <= space
    kept = panels["data"][0]["directory"]["rows"][2]
    assert 0 < kept < len(study.test)
    page, wrong = opened(chromium, panels, tmp_path / "page.html")
    says = "async (image) => (await steerPanel(image)).innerText"
    assert "No sliders for this image" not in page.evaluate(says, kept - 1)
    assert f"has room for those of {kept} test images" in page.evaluate(says, kept)
    page.evaluate("document.getElementById('steer-data').remove()")
    assert page.evaluate("async () => await steerPanel(0)") is None, "a run without a policy"
    assert wrong == []
    page.close()


@needs_chromium
def test_the_page_of_an_image_has_its_sliders(run_folder: Path, chromium: Any) -> None:
    run = run_folder / TINY_RUN
    arrays, pushes = (
        load_file(run / "pruning" / "heads" / f"{name}.safetensors") for name in ("test_images", "head_latents")
    )
    (sae,) = pushes
    page, wrong = chromium.new_page(), []
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    everywhere = {s: amplified(arrays, pushes[sae], sae, np.full_like(arrays[f"{sae}.codes"], s)) for s in (1, 100)}
    for image in (0, 7, 40):
        page.goto((run / "report" / "index.html").as_uri() + f"#image={image}")
        page.get_by_role("heading", name=re.compile(f"^Image {image} of the test split")).wait_for()
        panel = page.locator("section.steer")
        for strength, place in ((1, None), (100, "End")):
            every = panel.get_by_role("slider", name="All of them: strength")
            if place is not None:
                every.press(place)
            assert every.get_attribute("aria-valuetext") == f"{strength} times"
            code, output = everywhere[strength][image], panel.locator(".steered")
            assert output.get_attribute("data-mask") == str(code)
            assert output.get_attribute("data-predicted") == str(arrays["predictions"][image, code])
        assert panel.get_by_role("slider").count() == 1 + (arrays[f"{sae}.latents"][image] >= 0).sum()
    assert wrong == []
    page.close()
