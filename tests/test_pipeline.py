"""The whole pipeline through Snakemake, on a model that trains in seconds."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
import zarr
from conftest import ROOT, TINY, make_folder, snakemake, workspace
from runs import ODD, contents, holder, start
from safetensors.numpy import load_file
from snakemake.utils import update_config

BACKBONES, SPLITS = ("vit", "clip"), ("train", "val", "test")
SAES = ("topk-s0", "switch-s0", "switch-s1", "final-s0")
BACKBONE_FILES = ("model.safetensors", "prompts.safetensors", "config.json", "training.jsonl")


def tiny() -> dict[str, Any]:
    """params.yaml with the overlay laid over it."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "params.yaml").read_text())
    update_config(config, yaml.safe_load(TINY.read_text()))
    return config


def jobs(folder: Path) -> list[str]:
    """The rules that a dry run wants to run."""
    done = snakemake(folder, "--dry-run")
    assert done.returncode == 0, done.stderr
    rules = re.findall(r"^rule (\w+):$", done.stdout + done.stderr, re.MULTILINE)
    return [name for name in rules if name != "all"]


@pytest.mark.slow
def test_run_that_was_killed_on_one_core_has_the_bytes_of_one_left_alone_on_two(both_runs: tuple[Path, Path]) -> None:
    undisturbed, killed = map(contents, both_runs)
    assert killed.keys() == undisturbed.keys()
    assert [name for name in killed if killed[name] != undisturbed[name]] == []


@pytest.mark.slow
def test_stages_in_one_process_make_the_bytes_of_stages_in_processes_of_their_own(
    snakemake_run: Path, run_folder: Path
) -> None:
    apart, together = contents(snakemake_run), contents(run_folder)
    assert apart.keys() == together.keys()
    assert [name for name in apart if apart[name] != together[name]] == []


def test_one_command_makes_every_promised_file_and_leaves_no_working_state(run_folder: Path) -> None:
    made = set(contents(run_folder))
    marks = run_folder / ".snakemake" / "sparsight" / "tiny" / "marks"  # one per stage, by the name of its record
    promised = {
        "images/manifest.parquet",
        *(f"backbones/{b}/{f}" for b in BACKBONES for f in BACKBONE_FILES),
        *(f"activations/{b}/{s}{f}" for b in BACKBONES for s in SPLITS for f in (".json", ".zarr/zarr.json")),
        *(
            f"saes/{name}/{f}"
            for name in (*SAES, "resae-s0/blocks.1.input", "resae-s0/blocks.2.input")
            for f in ("sae.safetensors", "config.json", "metrics.json", "training.jsonl")
        ),
        *(
            f"saes/{name}/{f}.parquet"
            for name in (*SAES, "resae-s0/blocks.1.input", "resae-s0/blocks.2.input")
            for f in ("latents", "baselines", "probing")
        ),
        "saes/switch-stability.json",
        *(f"saes/resae-s0/{f}" for f in ("affine.safetensors", "metrics.json")),
        *(
            f"steering/{name}-s0{f}"
            for name in ("class-latents", "vs2", "neighbours")
            for f in (".safetensors", ".parquet", "-classes.parquet", ".json")
        ),
        *(f"attribution/topk{f}" for f in (".parquet", "-latents.parquet", ".json")),
        *(f"pruning/heads/{t}.parquet" for t in ("overall", "per_class", "per_head", "validation", "targets")),
        *(f"pruning/heads/{t}.parquet" for t in ("frontier", "class_subsets", "false_positives")),
        *(f"pruning/heads/{f}" for f in ("policy.safetensors", "config.json", "training.jsonl", "metrics.json")),
        "pruning/heads/head_latents.safetensors",
        "pruning/heads/test_images.safetensors",
        "report/index.html",
        *(f"report/figures/{kind}-heads.svg" for kind in ("frontier", "heads", "latents")),
        *(f"report/figures/steering-{name}.svg" for name in ("class-latents", "vs2", "neighbours")),
        "report/figures/attribution-topk.svg",
        *(
            f"report/figures/{name}.svg"
            for name in (
                "saes",
                "chain-resae",
                "tradeoff-vit-blocks.2.input",
                "backbone-vit",
                "backbone-clip",
                "attribution-topk",
            )
        ),
        "metrics.json",
        "curves.json",
        "configuration.json",
        *(f"records/{mark.name}.json" for mark in marks.iterdir()),
    }
    stores = {name for name in made if ".zarr/" in name}
    assert made - stores | {name for name in stores if name.count("/") == 3 and "zarr.json" in name} == promised
    assert not any((run_folder / "results" / "tiny" / ".work").iterdir())


@pytest.mark.slow
def test_a_second_run_has_nothing_to_do_and_a_deleted_report_is_all_that_is_made_again(own_run: Path) -> None:
    before = contents(own_run)
    again = snakemake(own_run, "--cores", "2")
    assert again.returncode == 0 and "Nothing to be done" in again.stdout + again.stderr
    shutil.rmtree(own_run / "results" / "tiny" / "report")
    assert sorted(jobs(own_run)) == ["provenance", "report"]
    assert snakemake(own_run, "--cores", "2").returncode == 0
    assert contents(own_run) == before


@pytest.mark.slow
def test_a_changed_section_reruns_its_stage_and_what_follows_only(own_run: Path) -> None:
    overlay = own_run / "tiny.yaml"
    original = overlay.read_text()
    overlay.write_text(original.replace("report: {images: 4", "report: {title: 'Another {one}', images: 4"))
    assert sorted(jobs(own_run)) == ["configuration", "provenance", "report"]
    overlay.write_text(original.replace("strengths: [2, 30]", "strengths: [2, 31]"))
    assert sorted(set(jobs(own_run))) == ["configuration", "provenance", "pruning", "report", "summary"]
    overlay.write_text(original.replace("seeds: [0]", "seeds: [0, 1]"))
    assert not {"images", "backbone", "activations", "policy"} & set(jobs(own_run))


@pytest.mark.slow
def test_provenance_says_what_was_run_where_and_what_every_job_took(snakemake_run: Path) -> None:
    run = snakemake_run / "results" / "tiny"
    about = json.loads((run / "provenance.json").read_text())
    configuration = (run / "configuration.json").read_bytes()
    assert json.loads(configuration)["saes"]["topk"]["d_sae"] == 48 and json.loads(configuration)["run"] == "tiny"
    assert about["configuration_digest"] == hashlib.sha256(configuration).hexdigest()
    assert about["versions"]["torch"] and about["machine"]["processor"] and about["machine"]["memory_gb"] > 0
    assert about["jobs"].keys() == {path.stem for path in (run / "logs").iterdir()} - {"provenance", "configuration"}
    took = about["jobs"]["backbone-vit"]
    assert took["seconds"] > 1 and took["cpu_seconds"] > 1 and took["peak_memory_mb"] > 100
    for name in about["jobs"]:
        last = (run / "logs" / f"{name}.log").read_text().splitlines()[-1]
        assert re.fullmatch(r"processor time: \d+\.\d s", last), name


@pytest.mark.slow
def test_snakemake_s_own_report_has_every_figure_with_its_caption(own_run: Path) -> None:
    assert snakemake(own_run, "--report", "out.html").returncode == 0
    page = (own_run / "out.html").read_text()
    drawn = set()
    for figure in (own_run / "results" / "tiny" / "report" / "figures").iterdir():
        assert f'"name": "{figure.name}"' in page, figure.name
        drawn.add(figure.stem.split("-")[0])
    captions = {path.stem: path for path in (ROOT / "src" / "sparsight" / "report" / "captions").iterdir()}
    assert captions.keys() - drawn == {"depth", "chains", "disentangling", "spurious"}, "not in this run"
    for kind in drawn:
        assert captions[kind].read_text().split("\n")[0][:50] in page, kind
    assert all(category in page for category in ("Head pruning", "SAEs", "Steering", "Backbones"))


def test_planning_imports_no_heavy_library(tmp_path: Path) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "snakemake", "--configfile", "tiny.yaml", "--dry-run"]
    done = subprocess.run(command, cwd=workspace(tmp_path / "w"), capture_output=True, text=True, check=True)
    imported = set(re.findall(r"^import time:.*\| +([\w.]+)$", done.stderr, re.MULTILINE))
    assert "sparsight.pipeline.run" in imported and not {"torch", "timm", "zarr", "open_clip"} & imported


FVU_BY_HAND = """
import json, sys
from pathlib import Path
import numpy as np, zarr
from safetensors.numpy import load_file

run = Path(sys.argv[1])

def reconstruct(folder, x):
    config = json.loads((folder / "config.json").read_text())
    w = load_file(folder / "sae.safetensors")
    pre, weight = np.maximum((x - w["b_dec"]) @ w["W_enc"] + w.get("b_enc", 0), 0), 1
    if config["kind"] == "switch":
        p = np.exp((x - w["b_router"]) @ w["W_router"])
        expert = np.arange(pre.shape[1]) * p.shape[1] // pre.shape[1]
        pre = np.where(expert == p.argmax(axis=1, keepdims=True), pre, 0)
        weight = p.max(axis=1, keepdims=True) / p.sum(axis=1, keepdims=True)
    kth = np.partition(pre, -config["k"], axis=1)[:, [-config["k"]]]
    assert np.allclose(np.linalg.norm(w["W_dec"], axis=1), 1, atol=1e-5)
    return weight * np.where(pre >= kth, pre, 0) @ w["W_dec"] + w["b_dec"]

def stored(folder):
    config = json.loads((folder / "config.json").read_text())
    store = zarr.open_group(run / "activations" / config["backbone"] / "test.zarr", mode="r")
    return store[config["site"]][:].astype(np.float64)

def show(folder, x, x_hat):
    fvu = np.square(x - x_hat).sum() / np.square(x - x.mean(axis=0)).sum()
    print(folder.relative_to(run / "saes").as_posix(), fvu)

for folder in sorted(path for path in (run / "saes").iterdir() if path.is_dir()):
    if not (folder / "affine.safetensors").exists():
        x = stored(folder)
        show(folder, x, reconstruct(folder, x))
        continue
    maps = load_file(folder / "affine.safetensors")
    about = json.loads(next(folder.glob("*/config.json")).read_text())
    before, x_hat = None, None
    for m, site in enumerate(about["chain"]):
        x = stored(folder / site)
        if m == 0:
            x_hat = reconstruct(folder / site, x)
        else:
            A, c = maps[f"A.cls.{m - 1}"], maps[f"c.cls.{m - 1}"]
            x_hat = x_hat @ A.T + c + reconstruct(folder / site, x - before @ A.T - c)
        show(folder / site, x, x_hat)
        before = x
"""


def test_fvu_is_reproduced_from_the_files_without_sparsight(run_folder: Path) -> None:
    run = run_folder / "results" / "tiny"
    command = [sys.executable, "-c", FVU_BY_HAND, str(run)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert len(lines) == 6
    for line in lines:
        name, fvu = line.split()
        metrics = json.loads((run / "saes" / name / "metrics.json").read_text())
        assert metrics["fvu"] == pytest.approx(float(fvu), abs=1e-3)


def test_files_agree_with_each_other(run_folder: Path) -> None:
    run = run_folder / "results" / "tiny"
    manifest = pq.read_table(run / "images" / "manifest.parquet").to_pydict()
    for split, n in (("train", 3500), ("val", 500), ("test", 1000)):
        group = zarr.open_group(run / "activations" / "vit" / f"{split}.zarr", mode="r")
        assert group["blocks.2.input"].shape == (n, 24) == (manifest["split"].count(split), 24)
    vectors = load_file(run / "steering" / "class-latents-s0.safetensors")
    assert vectors["latents"].shape == (10, 3) and vectors["vectors"].shape == (10, 3, 24)
    flat = json.loads((run / "metrics.json").read_text())
    assert all(isinstance(value, int | float) for value in flat.values())
    assert flat["images.duplicates"] == flat["images.label_conflicts"] == 0
    overall = pq.read_table(run / "pruning" / "heads" / "overall.parquet").to_pylist()
    assert flat["pruning.heads.none.none.accuracy"] == next(r["accuracy"] for r in overall if r["strategy"] == "none")
    timings = json.loads((run / "timings.json").read_text())
    assert [row["kept"] for row in timings["heads"]["vit"]] == list(range(7))
    page = (run / "report" / "index.html").read_text()
    assert "No image is in more than one split" in page
    assert not re.findall(r'(?:src|href)="(?!#|data:)[^"]*"', page), "the page asks for nothing outside itself"


@pytest.mark.slow
def test_a_stage_left_behind_by_a_killed_snakemake_keeps_a_second_one_out(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = workspace(tmp_path_factory.mktemp("orphan"))
    run, orphan = start(folder), None
    while orphan is None:
        assert run.poll() is None
        orphan = holder(folder, "images", "lock")
    os.kill(orphan, signal.SIGSTOP)
    run.kill()
    run.wait()
    target = "results/tiny/images/manifest.parquet"
    refused = snakemake(folder, "--cores", "1", target)
    assert refused.returncode == 1 and "--unlock" in refused.stdout + refused.stderr
    assert snakemake(folder, "--unlock").returncode == 0
    second = snakemake(folder, "--cores", "1", target)
    assert second.returncode == 1
    assert f"in use by process {orphan} on" in second.stdout + second.stderr
    os.kill(orphan, signal.SIGCONT)
    while Path("/proc", str(orphan)).exists():
        time.sleep(0.05)
    assert snakemake(folder, "--cores", "1", target).returncode == 0
    assert (folder / target).exists() and not list((folder / "results" / "tiny" / ".work").iterdir())


@pytest.mark.slow
def test_a_shard_deleted_between_rules_is_made_again_as_the_message_says(own_run: Path) -> None:
    before = contents(own_run)
    store = own_run / "results" / "tiny" / "activations" / "vit"
    (store / "val.zarr" / "blocks.1.input" / "c" / "2" / "0").unlink()
    (store / "val.json").unlink()
    assert snakemake(own_run, "--cores", "2").returncode == 0
    assert contents(own_run) == before


@pytest.mark.slow
def test_a_run_may_be_started_from_anywhere_with_images_anywhere(tmp_path: Path) -> None:
    here, data = tmp_path / ODD / "work", make_folder(tmp_path / ODD / "pictures {of} ones")
    here.mkdir()
    images, title = {"source": "folder", "path": str(data)}, "Ones {and} 'more'"
    overlay = {"run": "tiny", "images": images, "report": {"title": title}}
    (here / "tiny.yaml").write_text(yaml.safe_dump(overlay))
    words = ["--snakefile", str(ROOT / "Snakefile"), "--directory", str(here), "--configfile", str(here / "tiny.yaml")]
    command = [sys.executable, "-m", "snakemake", *words, "--cores", "1", "results/tiny/configuration.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    made = json.loads((here / "results" / "tiny" / "configuration.json").read_text())
    assert (made["images"]["path"], made["report"]["title"]) == (str(data), title)
    table = pq.read_table(here / "results" / "tiny" / "images" / "manifest.parquet")
    assert {Path(uri).parent.parent for uri in table["uri"].to_pylist()} == {data}


def test_linters_of_the_workflow_have_nothing_to_say() -> None:
    files = ["Snakefile", *map(str, (ROOT / "workflow" / "rules").glob("*.smk"))]
    assert subprocess.run([sys.executable, "-m", "snakefmt", "--check", *files], cwd=ROOT, check=False).returncode == 0
    command = [sys.executable, "-m", "snakemake", "--lint"]
    lint = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    complaints = re.findall(r"^    \* (.*?):?$", lint.stdout + lint.stderr, re.MULTILINE)
    # One environment (uv.lock) serves all rules, so none names a container or conda environment of its own. SCRIPTS is
    # where the code lies; what it says is an input of every rule (`code`).
    allowed = "Specify a conda environment or container for each rule.", "Shell command directly uses variable SCRIPTS"
    assert [c for c in complaints if not c.startswith(allowed)] == []
