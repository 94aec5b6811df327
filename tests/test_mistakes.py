"""A mistake in the configuration and damaged files stop what reads them with one line that says what to do."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zarr
from conftest import ROOT, make_folder, snakemake, workspace


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """The error of a failed command: status 1, one line, no traceback."""
    usual = ("Using workflow specific profile", "Config file params.yaml is extended", "24/24 images", "images: ")
    lines = [line for line in done.stderr.splitlines() if not line.startswith(usual)]
    assert done.returncode == 1 and len(lines) == 1, done.stderr
    return lines[0]


@pytest.mark.parametrize(
    ("overlay", "message"),
    [
        ("saes: {topk: {d_seo: 48}}", "saes.topk: unknown key 'd_seo'; did you mean 'd_sae'?"),
        ("compute: {threads: two}", "compute.threads: expected int, got 'two'"),
        ("images: {source: folder, path: no/such}", "images.path: there is no folder 'no/such'; give the folder"),
        ("saes: {topk: {k: 49}}", "saes.topk.k: 49 active latents are more than d_sae = 48; lower k or raise d_sae"),
        ("saes: {topk: {kind: topkk}}", "saes.topk.kind: there is no SAE 'topkk'; known: archetypal, batchtopk"),
        ("saes: {topk: {k: 4,\n  k: 5}}", "bad.yaml, line 2: k: stands in line 1 of this section already; remove one"),
        ("activations: {sites: [blocks.3.input]}", "'blocks.3.input' does not exist; the blocks are numbered 0 to 2"),
    ],
)
def test_mistakes_in_the_configuration_stop_snakemake_with_one_line(tmp_path: Path, overlay: str, message: str) -> None:
    folder = workspace(tmp_path / "w")
    (folder / "bad.yaml").write_text(overlay)
    error = one_line(snakemake(folder, "bad.yaml", "--dry-run"))
    assert error.startswith("error in params.yaml or its overlay: ") and message in error


def test_an_experiment_file_that_is_missing_is_named_in_the_last_line(tmp_path: Path) -> None:
    """Snakemake stops before it reads any line of ours."""
    done = snakemake(workspace(tmp_path / "w"), "experiments/none.yaml", "--dry-run")
    assert done.returncode == 1 and not (tmp_path / "w" / "results").exists()
    assert done.stdout.rstrip().endswith("No such file or directory: 'experiments/none.yaml'")


@pytest.mark.parametrize("first", [True, False], ids=["first", "after two dashes"])
def test_a_target_stands_before_the_overlay_or_after_two_dashes(tmp_path: Path, first: bool) -> None:
    target, overlay = "results/tiny/images/manifest.parquet", ["--configfile", "tiny.yaml"]
    words = ["--cores", "1", "--dry-run", *([target, *overlay] if first else [*overlay, "--", target])]
    command = [sys.executable, "-m", "snakemake", *words]
    folder = workspace(tmp_path / "w")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and re.search(r"^total +1$", done.stdout + done.stderr, re.MULTILINE), done.stderr


def test_several_targets_are_planned_in_a_fresh_folder(tmp_path: Path) -> None:
    """Snakemake lists a folder once in a plan, when marks of the second target's stages are still to be made."""
    targets = [f"results/tiny/activations/vit/{split}.json" for split in ("train", "val", "test")]
    command = [sys.executable, "-m", "snakemake", "--cores", "1", "--dry-run", *targets, "--configfile", "tiny.yaml"]
    done = subprocess.run(command, cwd=workspace(tmp_path / "w"), capture_output=True, text=True, check=False)
    assert done.returncode == 0 and re.search(r"^extract +3$", done.stdout + done.stderr, re.MULTILINE), done.stderr


def test_results_that_cannot_be_written_stop_snakemake_with_one_line(tmp_path: Path) -> None:
    folder = workspace(tmp_path / "w")
    (folder / "results").write_text("a file is in the way")
    error = one_line(snakemake(folder, "--cores", "1"))
    assert "results: cannot write to 'results'" in error and "mend its permissions" in error


def stage(script: str, folder: Path, **inputs: Path | str) -> subprocess.CompletedProcess[str]:
    words = [f"--{name.replace('_', '-')}={value}" for name, value in inputs.items()]
    command = [sys.executable, str(ROOT / "workflow" / "scripts" / script), *words]
    command += [f"--out={folder / 'out'}", f"--work={folder / 'work'}"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_corrupt_image_stops_the_images_stage_with_one_line(tmp_path: Path) -> None:
    images = make_folder(tmp_path / "images")
    (images / "dark" / "004.png").write_bytes(b"\x89PNG broken")
    error = one_line(stage("images.py", tmp_path, source="folder", path=images))
    assert re.fullmatch(r"error: image .*/dark/004.png: cannot be decoded \(.*\); repair or remove it", error)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_stage_that_does_not_use_the_precision_says_so(tmp_path: Path, precision: str) -> None:
    done = stage("images.py", tmp_path, source="folder", path=make_folder(tmp_path / "images"), precision=precision)
    assert done.returncode == 0
    said = "compute.precision: bf16 is for the activation store alone; this stage does not use it" in done.stderr
    assert said == (precision == "bf16")


def not_a_number(path: Path) -> None:
    """A store that is sound but for its values, as another program might have written it."""
    zarr.open_group(path, mode="a")["blocks.2.input"][17, 3] = np.nan
    manifest = json.loads(path.with_suffix(".json").read_text())
    del manifest["checksum"]
    path.with_suffix(".json").write_text(json.dumps(manifest))


def truncate(path: Path) -> None:
    shard = path / "blocks.2.input" / "c" / "0" / "0"
    shard.write_bytes(shard.read_bytes()[:-1])


def lose(path: Path) -> None:
    (path / "blocks.2.input" / "c" / "0" / "0").unlink()


def no_manifest(path: Path) -> None:
    path.with_suffix(".json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (not_a_number, r"train.zarr/blocks.2.input: NaN or infinite activation, image 17; make the store again"),
        (truncate, r"blocks.2.input/c/0/0: \d+ bytes instead of \d+; delete train.json beside the store"),
        (lose, r"blocks.2.input/c/0/0: missing from the store; delete train.json beside the store"),
        (no_manifest, r"train.json: not JSON .*; delete train.json beside the store"),
    ],
)
def test_damaged_store_stops_training_with_one_line(
    run_folder: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    shutil.copytree(run_folder / "results" / "tiny" / "activations" / "vit", tmp_path / "store")
    damage(tmp_path / "store" / "train.zarr")
    inputs = {
        "from_images": run_folder / "results/tiny/images/manifest.parquet",
        "from_store": tmp_path / "store/train.json",
        "from_backbone": run_folder / "results/tiny/backbones/vit/model.safetensors",
    }
    error = one_line(stage("sae.py", tmp_path, **inputs, backbone="vit", site="blocks.2.input", k="4"))
    assert re.search(message, error)
    assert not (tmp_path / "out").exists()


def test_missing_input_of_a_stage_is_one_line(tmp_path: Path) -> None:
    inputs = {"from_images": __file__, "from_store": "nowhere.json", "from_backbone": __file__}
    error = one_line(stage("sae.py", tmp_path, **inputs, backbone="vit", site="embedding"))
    assert error == "error: there is no nowhere.json; run the stage that makes it first"


def test_verify_command_names_the_damaged_file(run_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(run_folder / "results" / "tiny" / "activations" / "vit", tmp_path / "store")
    command = [sys.executable, "-m", "sparsight.store", "verify", str(tmp_path / "store" / "val.zarr")]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    shard = tmp_path / "store" / "val.zarr" / "blocks.1.input" / "c" / "2" / "0"
    shard.write_bytes(bytes(len(shard.read_bytes())))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stderr == "blocks.1.input/c/2/0: content differs from the manifest\n"
