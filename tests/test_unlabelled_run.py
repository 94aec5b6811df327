"""A flat folder of images through the whole pipeline: the report says what is missing, and has nothing empty."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from conftest import ROOT, make_backbone, snakemake, workspace
from PIL import Image
from runs import ODD, TINY_RUN, run_in_one_process
from safetensors.torch import save_file

pytestmark = pytest.mark.slow
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SIZES = {"img_size": 16, "patch_size": 4, "in_chans": 1, "embed_dim": 48, "depth": 3, "num_heads": 6}
SAE = {"site": "blocks.2.output", "d_sae": 96, "k": 4, "seeds": [0], "epochs": 4, "batch_size": 64, "lr": 1e-3}


def overlay(folder: Path) -> dict[str, Any]:
    """A model of random weights with its classifier, and without; VS2 on both."""
    model = make_backbone(classes=7).model
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / "vit.safetensors")
    vit = {"model": "timm/vit_tiny_patch16_224", "weights": "vit.safetensors"}
    vs2 = {"kind": "vs2", "strengths": [0.5, 2, 8], "quantiles": [0.5, 0.9]}
    return {
        "run": "tiny",
        "images": {"source": "folder", "path": "images"},
        "backbones": {
            "vit": None, "clip": None, "knows": {**vit, "architecture": {**SIZES, "num_classes": 7}},
            "bare": {**vit, "architecture": SIZES, "training": "none"},
        },
        "activations": {"sites": ["blocks.1.input", "blocks.2.output", "embedding"]},
        "saes": {
            "of-knows": {"backbone": "knows", **SAE},
            "of-bare": {"backbone": "bare", **SAE},
            "chain": {**SAE, "backbone": "knows", "site": None, "sites": ["blocks.1.input", "blocks.2.output"]},
        },
        "steering": {"knowing": {"sae": "of-knows", **vs2}, "bare": {"sae": "of-bare", **vs2},
                     "near": {"sae": "of-knows", "kind": "vs2++", "neighbours": 5, "strengths": [0.5, 2]}},
        "policies": {},
        "pruning": None,
        "report": {"images": 4},
    }  # fmt: skip


def prepared(folder: Path, **changes: Any) -> Path:
    """A workspace with an overlay and sixty pictures of noise in one folder."""
    folder.mkdir(parents=True)
    settings = overlay(folder)
    for key, value in changes.items():
        settings[key] = {**settings[key], **value}
    (folder / "flat.yaml").write_text(yaml.safe_dump(settings))
    workspace(folder, folder / "flat.yaml")
    (folder / "images").mkdir()
    generator = np.random.default_rng(0)
    for i in range(60):
        pixels = generator.integers(0, 1 + 4 * i, (16, 16), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{i:03}.png")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run_in_one_process(prepared(tmp_path_factory.mktemp("flat") / ODD)) / TINY_RUN


def test_every_stage_writes_what_needs_no_labels(run: Path) -> None:
    manifest = pq.read_table(run / "images" / "manifest.parquet")
    assert len(manifest) == 60 and manifest["label"].null_count == manifest["label_name"].null_count == 60
    metrics = json.loads((run / "saes" / "of-knows-s0" / "metrics.json").read_text())
    assert {"fvu", "monosemanticity", "kl_spliced", "changed_spliced"} <= metrics.keys()
    assert not any(key.startswith(("probing", "accuracy")) for key in metrics)
    rows = {name: pq.read_table(run / "steering" / f"{name}-s0.parquet").to_pylist() for name in ("knowing", "bare")}
    for name, of_run in rows.items():
        assert len(of_run) == 14 and all(row["accuracy"] is None for row in of_run)
        assert all((row["kl"] is None, row["cosine"] is None) == (name == "bare", name != "bare") for row in of_run)
    flat = json.loads((run / "metrics.json").read_text())
    assert {"steering.knowing-s0.vs2.none.strength-2.changed", "steering.bare-s0.vs2.none.strength-8.cosine",
            "steering.knowing-s0.gate-0.5.steered", "sae.of-bare-s0.fvu"} <= flat.keys()  # fmt: skip
    assert not any("accuracy" in key or "probing" in key for key in flat)


def test_the_report_says_what_is_missing_and_has_no_empty_columns(run: Path) -> None:
    page = (run / "report" / "index.html").read_text().split('<h2 id="provenance">')[0]
    bare = re.sub(r"<(script|svg|style|title).*?</\1>|<[^>]+>", " ", page, flags=re.DOTALL)
    text = re.sub(r"\s+", " ", bare)
    assert "test images. They have no labels. What needs them (accuracy, probes, the classes of latents" in text
    assert text.count("The images have no labels, so no strength could be chosen on val") == 3
    rest = text.split("left out.", 1)[1]
    absent = (
        r"\bNaN\b|\bNone\b|(?<!Its )accurac|\bprobe|selectivity|precision %|\bclass(es)?\b(?! token)|prun(?!ed model)"
    )
    assert re.search(absent, rest) is None
    for table in re.findall(r"<table>.*?</table>", page, re.DOTALL):
        head = re.findall(r"<th[^>]*scope=\"col\">(.*?)</th>", table)
        rows = table.split("<tbody")[1].split("<tr>")[1:]
        body = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in rows]
        for name, column in zip(head, zip(*body, strict=True), strict=False):
            optional = ("between experts %", "redundancy", "transported", "random", "activation, map alone")
            assert any(column) or name in optional or "latents-list" in table, name


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium, which apt-get install chromium brings")
def test_the_browser_shows_latents_without_classes(run: Path) -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page, wrong = browser.new_page(), []
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto((run / "report" / "index.html").as_uri())
        page.wait_for_selector("html[data-ready]", state="attached")
        head = page.locator("#latents-head th").all_inner_texts()
        assert head == ["latent", "monosemanticity", "fires %"]
        cells = [row.locator("th, td").all_inner_texts() for row in page.locator("#latents-list tr").all()]
        fire = [row for row in cells if row[2] != "never"]
        assert len(fire) > 2 and {len(row) for row in cells} == {3} and all(map(all, fire[:3]))
        page.locator("#latents-search").fill(cells[1][0])
        assert page.locator("#latents-list tr").count() == 1
        page.locator("#latents-list a").first.click()
        page.wait_for_selector("#latents-detail h3")
        shown = page.locator("#latents-detail").inner_text()
        assert "monosemanticity" in shown and not re.search("undefined|null|NaN|most for|no label", shown)
        label = page.locator("#latents-detail .latent canvas[role=img]").first.get_attribute("aria-label")
        assert re.fullmatch(r"test image \d+", str(label))
        browser.close()
    assert wrong == []


def test_a_run_that_needs_labels_says_so_as_soon_as_the_images_are_listed(tmp_path: Path) -> None:
    steering = {"latents": {"sae": "of-knows", "latents": 3}}
    policies = {"heads": {"backbone": "knows"}}
    pruning = {"pruning": {**yaml.safe_load((ROOT / "params.yaml").read_text())["pruning"], "steering": "latents"}}
    folder = prepared(tmp_path / "w")
    settings = yaml.safe_load((folder / "tiny.yaml").read_text())
    settings["saes"]["of-knows"]["site"] = "blocks.2.input"
    settings["activations"]["sites"].append("blocks.2.input")
    settings |= {"steering": {**settings["steering"], **steering}, "policies": policies, **pruning}
    settings["pruning"]["latents"] = [1, 5]
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings))
    done = snakemake(folder, "--cores", "2", str(TINY_RUN / "configuration.json"))
    assert done.returncode == 1
    (line,) = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("error: ")]
    assert re.fullmatch(
        r"error: images: 42 of 42 images of train, 6 of 6 images of val, 12 of 12 images of test have no label, which "
        r"steering.latents, policies.heads, pruning need; set steering.latents to null; .*; or label the images",
        line,
    )
    assert not (folder / TINY_RUN / "backbones").exists()
