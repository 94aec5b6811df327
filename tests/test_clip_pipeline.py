"""The whole pipeline on an open_clip model, which classifies by prompts."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
import zarr
from conftest import ROOT, make_folder, workspace
from runs import ODD, TINY_RUN, run_in_one_process

pytestmark = pytest.mark.slow


def finished(folder: Path, overlay: Path) -> Path:
    """The results of an overlay in a workspace of its own."""
    make_folder(workspace(folder, overlay) / "images", per_class=60)
    return run_in_one_process(folder) / TINY_RUN


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results of tiny-clip.yaml."""
    return finished(tmp_path_factory.mktemp("clip") / ODD, ROOT / "tests" / "tiny-clip.yaml")


def head_macs(d_in: int, head_dim: int, tokens: int) -> int:
    """Query, key, value and projection of one head, its scores and its sum over values."""
    return 4 * tokens * d_in * head_dim + 2 * tokens * tokens * head_dim


def test_every_stage_classifies_by_the_same_prompts(run: Path) -> None:
    about = json.loads((run / "backbones" / "clip" / "config.json").read_text())
    accuracy = about["accuracy"]["test"]["accuracy"]
    assert accuracy > 0.8 and about["templates"] == ["a photo of a {}.", "one {}."]
    assert set(about["accuracy"]) == {"val", "test", "test_held_out"}
    assert json.loads((run / "saes" / "topk-s0" / "metrics.json").read_text())["accuracy_untouched"] == accuracy
    assert json.loads((run / "pruning" / "heads" / "metrics.json").read_text())["unpruned"]["accuracy"] == accuracy
    steering = pq.read_table(run / "steering" / "class-latents-s0.parquet").to_pylist()
    (none,) = (row for row in steering if row["method"] == "none" and row["split"] == "test")
    assert none["accuracy"] == accuracy


def test_heads_of_the_image_tower_are_pruned_and_timed(run: Path) -> None:
    overall = pq.read_table(run / "pruning" / "heads" / "overall.parquet").to_pylist()
    assert {row["strategy"] for row in overall} >= {"none", "class-latents", "random-latents", "logit-bias"}
    alone = ("none", "all-heads", "zero-heads", "logit-bias", "class-threshold", "class-static")
    plain = [row for row in overall if row["strategy"] in alone and row["labels"] in ("none", "oracle")]
    assert {row["strategy"] for row in plain} == set(alone), "these need nothing beside the model"
    usage, macs = np.array([(row["usage_all"], row["macs"]) for row in plain]).T
    assert usage.min() < usage.max()
    np.testing.assert_allclose(macs - macs[0], (usage - usage[0]) * 18 * head_macs(24, 4, 17), atol=1)
    metrics = json.loads((run / "pruning" / "heads" / "metrics.json").read_text())
    assert metrics["gathered_against_masked"]["max_abs_logit_difference"] < 1e-3
    timings = json.loads((run / "timings.json").read_text())
    assert [row["kept"] for row in timings["heads"]["clip"]] == list(range(7))


def test_the_report_shows_the_model_and_its_saes(run: Path) -> None:
    assert zarr.open_group(run / "activations" / "clip" / "test.zarr", mode="r")["embedding"].shape == (24, 24)
    page = (run / "report" / "index.html").read_text()
    for name in ("open_clip/ViT-B-32", "topk-s0", "switch-s0", "bright", "dark"):
        assert name in page


def test_a_run_without_policies_has_a_report_without_pruning(tmp_path: Path) -> None:
    overlay = yaml.safe_load((ROOT / "tests" / "tiny-clip.yaml").read_text())
    overlay["activations"]["sites"] = ["blocks.2.output"]
    overlay["saes"] = {"topk": None, "switch": None, "patches": None, "final": {"site": "blocks.2.output", "epochs": 2}}
    overlay["steering"] = {"vs2": {"strengths": [0.5, 2]}, "neighbours": None}
    overlay |= {"pruning": None, "policies": {"heads": None}}
    (tmp_path / "steering-only.yaml").write_text(yaml.safe_dump(overlay))
    run = finished(tmp_path / "w", tmp_path / "steering-only.yaml")
    drawn = {path.stem.partition("-")[0] for path in (run / "report" / "figures").iterdir()}
    assert drawn == {"saes", "steering", "backbone"}
    page = (run / "report" / "index.html").read_text().split('<h2 id="provenance">')[0]  # every setting comes after it
    assert "<h3>vs2</h3>" in page and "pruning" not in page.lower() and not (run / "pruning").exists()
    keys = json.loads((run / "metrics.json").read_text())
    assert "steering.vs2-s0.vs2.none.accuracy" in keys and not any(key.startswith("pruning") for key in keys)
