"""A whole run with an SAE of another tool: one trained here, exported and imported again, with the same numbers."""

import json
import re
from pathlib import Path

import pytest
import yaml
from conftest import snakemake
from runs import TINY_RUN, copy_of

from sparsight import sae
from sparsight.common import tables
from sparsight.sae import saelens

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def foreign_run(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run, in which an SAE of SAELens steers and prunes."""
    folder = copy_of(run_folder, tmp_path_factory.mktemp("foreign") / "run")
    saelens.export(sae.load(folder / TINY_RUN / "saes" / "topk-s0"), folder / "their files")
    settings = yaml.safe_load((folder / "tiny.yaml").read_text())
    weights = "their files/sae_weights.safetensors"
    settings["saes"]["theirs"] = {"backbone": "vit", "site": "blocks.2.input", "weights": weights, "format": "saelens"}
    settings["steering"]["class-latents"]["sae"] = "theirs"
    (folder / "tiny.yaml").write_text(yaml.safe_dump(settings))
    done = snakemake(folder, "--cores", "2")
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


def test_evaluation_steering_pruning_and_report_follow(foreign_run: Path) -> None:
    results = foreign_run / TINY_RUN
    own, theirs = (
        json.loads((results / "saes" / name / "metrics.json").read_text()) for name in ("topk-s0", "theirs-s0")
    )
    for key in ("fvu", "l0", "fvu_pca_k"):
        assert theirs[key] == pytest.approx(own[key], rel=1e-5)
    assert tables.read(results / "steering" / "class-latents-s0.parquet")
    assert json.loads((results / "steering" / "class-latents-s0.json").read_text())["sae"] == "theirs"
    pruned = json.loads((results / "pruning" / "heads" / "metrics.json").read_text())
    assert set(pruned["fvu_on_pruned_stream"]) == {"theirs-s0"}
    page = (results / "report" / "index.html").read_text()
    assert re.search(r"theirs<small>blocks\.2\.input: topk, of saelens, 48 latents, k 4, 1 seed", page)
    assert json.loads((results / "metrics.json").read_text())


def test_only_a_change_of_the_files_imports_again(foreign_run: Path) -> None:
    plan = snakemake(foreign_run, "--dry-run", "--cores", "1")
    assert "Nothing to be done" in plan.stdout + plan.stderr
    settings = foreign_run / "their files" / "cfg.json"
    settings.write_text(settings.read_text() + "\n")
    plan = snakemake(foreign_run, "--dry-run", "--cores", "1", "--rerun-triggers", "input")
    assert "sae-theirs" in plan.stdout + plan.stderr and "sae-topk" not in plan.stdout + plan.stderr
