"""Files that are not the configuration's are made again, whatever times and Snakemake's memory say."""

import copy
import dataclasses
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, shared_folder, snakemake, workspace
from runs import copy_of
from snakemake.utils import update_config

from sparsight.common.digests import file_digest
from sparsight.common.files import write_json
from sparsight.pipeline import records, staleness
from sparsight.pipeline.run import Run, load_run

PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())
SMALL = """
run: tiny
compute: {threads: 1}
backbones:
  vit: {architecture: {img_size: 28, patch_size: 7, in_chans: 1, embed_dim: 24, depth: 3, num_heads: 6}, epochs: 1}
  clip: null
activations: {sites: [blocks.2.input]}
saes:
  topk: {site: blocks.2.input, d_sae: 48, k: 4, seeds: [0], epochs: 1}
  switch: null
  resae: null
  plain: null
policies: {heads: null}
steering: {class-latents: {latents: 3, strengths: [2]}}
pruning: null
report: {latents: 2, images: 2}
"""


def make_run(**changes: Any) -> Run:
    config = copy.deepcopy(PARAMS)
    config["saes"]["topk"] |= changes.pop("topk", {})
    return load_run({**config, **changes})


def write_record(run: Run, stage: str, section: Any, inputs: list[Path], outputs: list[Path]) -> None:
    path = run.folder / "records" / f"{stage}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = records.settings(run.compute, section, run.seed)
    digests = {path: file_digest(path) for path in inputs}
    write_json(path, records.content(settings, digests, {path: path for path in outputs}, path))


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run of which the SAE section ``topk`` is there."""
    monkeypatch.chdir(tmp_path)
    run = make_run()
    for name in ("images/manifest.parquet", "saes/topk-s0/sae.safetensors"):
        (run.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (run.folder / name).write_text(name)
    manifest, weights = run.folder / "images" / "manifest.parquet", run.folder / "saes" / "topk-s0" / "sae.safetensors"
    write_record(run, "sae-topk", run.saes["topk"], [manifest], [weights])
    return run


def test_files_of_the_configuration_are_trusted_and_marks_are_older_than_they(made: Run) -> None:
    assert staleness.mark(made) == {} and staleness.mark(made) == {}
    marks = made.folder / ".trust"
    assert {path.name for path in marks.iterdir()} == {stage for stage, _ in staleness.stages(made)} | {"digests.json"}
    assert (marks / "sae-topk").stat().st_mtime == 0 and (marks / "sae-topk").read_text() == ""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"topk": {"d_sae": 100}}, "its section has changed"),
        ({"seed": 1}, "the seed has changed"),
        ({"compute": {"threads": 7}}, "compute has changed"),
    ],
)
def test_another_configuration_is_seen_every_time(made: Run, change: dict[str, Any], reason: str) -> None:
    run = make_run(**change)
    assert staleness.mark(run) == {"sae-topk": reason}
    first = (made.folder / ".trust" / "sae-topk").read_text()
    assert staleness.mark(run) == {"sae-topk": reason}, "until it is made again"
    assert (made.folder / ".trust" / "sae-topk").read_text() != first
    assert staleness.mark(make_run(topk={"seeds": [0, 1, 2]})) == {}, "what was, is trusted again"


def test_free_fields_change_nothing(made: Run) -> None:
    config = {**PARAMS["compute"], "workers": 3}
    assert staleness.mark(make_run(compute=config)) == {}


@pytest.mark.parametrize("name", ["images/manifest.parquet", "saes/topk-s0/sae.safetensors"])
def test_swapped_files_are_seen(made: Run, name: str) -> None:
    path = made.folder / name
    before = path.stat()
    path.write_text(name.upper())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    kind = "read" if "images" in name else "made"
    path.rename(path.with_suffix(".moved"))
    assert staleness.mark(made) == {}, "what is missing Snakemake makes"
    shutil.copy2(path.with_suffix(".moved"), path)
    assert staleness.mark(made) == {"sae-topk": f"{name} is not the file that it has {kind}"}


def test_a_damaged_record_is_not_believed(made: Run) -> None:
    (made.folder / "records" / "sae-topk.json").write_text("{")
    assert staleness.mark(made) == {"sae-topk": "its record cannot be read"}


def test_files_are_read_once_until_they_change(made: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    plain = file_digest

    def digest(path: Path) -> str:
        read.append(path)
        return plain(path)

    monkeypatch.setattr(staleness, "file_digest", digest)
    staleness.mark(made)
    assert len(read) == 2
    staleness.mark(made)
    assert len(read) == 2
    (made.folder / "images" / "manifest.parquet").touch()
    staleness.mark(made)
    assert len(read) == 3


def test_a_stage_that_gathers_results_is_made_again_when_they_are_others(made: Run) -> None:
    run = make_run(steering={"a.b": {**PARAMS["steering"]["class-latents"], "sae": "topk"}}, pruning=None, policies={})
    read = [f"backbones/{name}/config.json" for name in run.backbones]
    read += [f"saes/{name}/metrics.json" for name in (*run.sae_names, *run.chains)]
    read += [f"steering/{name}.parquet" for name in run.steering_names] + ["saes/topk-stability.json"]
    for name in read:
        (made.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (made.folder / name).touch()
    write_record(run, "summary", None, [made.folder / name for name in read], [])
    weights = [made.folder / "saes" / f"topk-s{seed}" / "sae.safetensors" for seed in run.saes["topk"].seeds]
    for path in weights:
        path.touch()
    write_record(run, "stability-topk", None, weights, [])
    assert staleness.mark(run) == {}
    seeds = run.saes["topk"].seeds
    more, fewer = make_run(topk={"seeds": [*seeds, 9]}), make_run(topk={"seeds": seeds[:-1]})
    missing, section = "it has not read saes/topk-s9", {"sae-topk": "its section has changed"}
    assert staleness.mark(more) == {"summary": missing, "stability-topk": missing} | section
    former = f"it has read saes/topk-s{seeds[-1]}, which the configuration does not have"
    assert staleness.mark(fewer) == {"summary": former, "stability-topk": former} | section


def test_the_configuration_s_own_file_is_compared_with_it(made: Run) -> None:
    path = made.folder / "configuration.json"
    write_json(path, dataclasses.asdict(made))
    assert staleness.mark(made) == {}
    other = make_run(images={"source": "mnist-5000", "val_fraction": 0.2})
    assert staleness.mark(other) == {"configuration": "it is another configuration's"}


def planned(folder: Path) -> set[str]:
    """The stages that Snakemake would run, by the names of their records."""
    done = snakemake(folder, "--dry-run", "--printshellcmds")
    assert done.returncode == 0, done.stderr
    return set(re.findall(r"--record \S*/records/(\S+)\.json", done.stdout + done.stderr))


@pytest.mark.slow
def test_every_rule_leaves_the_record_that_is_looked_for(tmp_path: Path) -> None:
    config = copy.deepcopy(PARAMS)
    overlay = yaml.safe_load((ROOT / "tests" / "tiny.yaml").read_text())
    overlay["other_images"] = {"more": {"source": "folder", "path": str(tmp_path)}}
    update_config(config, overlay)
    folder = workspace(tmp_path / "w")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(overlay))
    assert planned(folder) == {stage for stage, _ in staleness.stages(load_run(config))} - {"configuration"}


def write_overlay(folder: Path, **topk: Any) -> None:
    overlay = yaml.safe_load(SMALL)
    overlay["saes"]["topk"] |= topk
    (folder / "tiny.yaml").write_text(yaml.safe_dump(overlay))


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of SMALL, for reading."""

    def make(folder: Path) -> None:
        write_overlay(workspace(folder))
        done = snakemake(folder, "--cores", "2")
        assert done.returncode == 0, done.stderr[-3000:]

    return shared_folder(tmp_path_factory, "small", make)


@pytest.mark.slow
def test_a_section_that_comes_or_goes_is_seen_in_copied_results(small: Path, tmp_path: Path) -> None:
    """As after git clone and dvc pull: no memory of Snakemake's."""
    folder = workspace(tmp_path / "w")
    shutil.copytree(small / "results", folder / "results")
    overlay = yaml.safe_load(SMALL)
    overlay["saes"]["more"] = {**overlay["saes"]["topk"], "kind": "topk", "backbone": "vit"}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(overlay))
    assert planned(folder) == {"sae-more", "evaluate-more", "summary", "report"}
    overlay["saes"].pop("more")
    overlay["steering"] = {"class-latents": None}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(overlay))
    assert planned(folder) == {"summary", "report"}


FOLLOWS_SAE = {"sae-topk", "evaluate-topk", "steering-class-latents-s0", "summary", "report"}


@pytest.mark.slow
def test_touch_does_not_make_results_those_of_another_configuration(small: Path, tmp_path: Path) -> None:
    folder = workspace(tmp_path / "w")
    shutil.copytree(small / "results", folder / "results")
    write_overlay(folder)
    assert snakemake(folder, "--touch", "--cores", "1").returncode == 0
    assert planned(folder) == set(), "copied results of this configuration"
    write_overlay(folder, d_sae=64)
    assert snakemake(folder, "--touch", "--cores", "1").returncode == 0
    assert planned(folder) == FOLLOWS_SAE
    done = snakemake(folder, "--cores", "2")
    assert done.returncode == 0 and "sae-topk is made again: its section has changed" in done.stderr
    about = json.loads((folder / "results" / "tiny" / "saes" / "topk-s0" / "config.json").read_text())
    assert about["d_sae"] == 64 and planned(folder) == set()


@pytest.mark.slow
def test_results_swapped_under_snakemake_s_memory_are_made_again(small: Path, tmp_path: Path) -> None:
    """Width 48, then 64, then the files of 48 come back while the configuration and the memory still say 64."""
    folder = workspace(tmp_path / "w")
    shutil.copytree(small / "results", folder / "results")
    shutil.copytree(small / ".snakemake", folder / ".snakemake")
    write_overlay(folder, d_sae=64)
    assert snakemake(folder, "--cores", "2").returncode == 0 and planned(folder) == set()
    shutil.rmtree(folder / "results" / "tiny" / "saes")
    shutil.copytree(
        small / "results" / "tiny" / "saes", folder / "results" / "tiny" / "saes", copy_function=shutil.copy
    )
    shutil.copy(small / "results" / "tiny" / "records" / "sae-topk.json", folder / "results" / "tiny" / "records")
    assert planned(folder) == FOLLOWS_SAE


@pytest.mark.slow
def test_a_touched_input_of_equal_content_reruns_nothing(small: Path, tmp_path: Path) -> None:
    folder = copy_of(small, tmp_path / "copy")
    results = folder / "results" / "tiny"
    for name in ("images/manifest.parquet", "backbones/vit/model.safetensors", "activations/vit/train.json"):
        (results / name).touch()
    assert planned(folder) == set()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "follow"),
    [
        ("report/figures/steering.py", {"report"}),
        ("report/captions/saes.rst", {"report"}),
        ("sae/variants/topk.py", FOLLOWS_SAE),
    ],
)
def test_a_changed_line_reruns_the_stages_that_use_it(small: Path, tmp_path: Path, file: str, follow: set[str]) -> None:
    folder = workspace(tmp_path / "w")
    shutil.copytree(small / "results", folder / "results")
    shutil.copytree(small / ".snakemake", folder / ".snakemake")
    write_overlay(folder)
    (folder / "src").unlink()
    shutil.copytree(ROOT / "src", folder / "src")
    assert planned(folder) == set()
    with (folder / "src" / "sparsight" / file).open("a") as changed:
        changed.write("# a comment\n")
    assert planned(folder) == follow
