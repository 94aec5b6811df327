"""Files that are not the configuration's are made again, whatever times and Snakemake's memory say."""

import copy
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, shared_folder, snakemake, workspace
from runs import commands, copy_of

from sparsight.common.digests import file_digest
from sparsight.common.files import write_json
from sparsight.pipeline import records, staleness
from sparsight.pipeline.run import Run, load_run
from sparsight.pipeline.staleness import Marks

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
report: {images: 2}
"""


def make_run(**changes: Any) -> Run:
    config = copy.deepcopy(PARAMS)
    config["saes"]["topk"] |= changes.pop("topk", {})
    return load_run({**config, **changes})


def settings(run: Run, code: str = "code") -> dict[str, Any]:
    return records.settings(run.compute, run.saes["topk"], run.seed, code)


def write_record(run: Run, stage: str, inputs: list[Path], outputs: list[Path]) -> None:
    path = run.folder / "records" / f"{stage}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    digests = {path: file_digest(path) for path in inputs}
    write_json(path, records.content(settings(run), digests, {path: path for path in outputs}, path))


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run of which the SAE section ``topk`` is there."""
    monkeypatch.chdir(tmp_path)
    run = make_run()
    for name in ("images/manifest.parquet", "saes/topk-s0/sae.safetensors"):
        (run.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (run.folder / name).write_text(name)
    manifest, weights = run.folder / "images" / "manifest.parquet", run.folder / "saes" / "topk-s0" / "sae.safetensors"
    write_record(run, "sae-topk", [manifest], [weights])
    return run


FOLDER = Path("planned")
MARK = FOLDER / "marks" / "sae-topk" / "mark"


def renew(run: Run, code: str = "code", reads: list[Path] | None = None) -> str:
    """What one plan says of the stage sae-topk."""
    marks = Marks(run.folder, FOLDER)
    reason = marks.renew("sae-topk", settings(run, code), None if reads is None else map(str, reads))
    marks.save()
    return reason


def test_a_result_of_the_configuration_is_trusted_and_its_mark_is_older(made: Run) -> None:
    assert renew(made) == "" and renew(made) == ""
    assert MARK.stat().st_mtime == 0 and MARK.read_text() == ""
    assert Marks(made.folder, FOLDER).renew("sae-other", settings(made)) == "", "no result yet: Snakemake makes it"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"topk": {"d_sae": 100}}, "its section has changed"),
        ({"seed": 1}, "the seed has changed"),
        ({"compute": {"threads": 7}}, "compute has changed"),
    ],
)
def test_another_configuration_is_seen_every_time_and_its_mark_is_taken_back(
    made: Run, change: dict[str, Any], reason: str
) -> None:
    run = make_run(**change)
    assert renew(run) == reason
    first = MARK.read_text()
    assert renew(run) == reason, "until it is made again"
    assert MARK.read_text() != first
    assert renew(made) == "" and MARK.read_text() == "" and MARK.stat().st_mtime == 0


def test_other_code_is_seen(made: Run) -> None:
    assert renew(made, code="other") == "its code has changed"
    record = made.folder / "records" / "sae-topk.json"
    write_json(record, {key: value for key, value in json.loads(record.read_text()).items() if key != "code"})
    assert renew(made) == "its code has changed", "a record that does not know its code"


def test_free_fields_change_nothing(made: Run) -> None:
    config = {**PARAMS["compute"], "workers": 3}
    assert renew(make_run(compute=config)) == ""


def test_the_precision_changes_extraction_alone(made: Run, tmp_path: Path) -> None:
    run = make_run(compute={**PARAMS["compute"], "precision": "bf16"})
    assert renew(run) == ""
    of_stores = [records.settings(one.compute, one.activations, one.seed, "code")["compute"] for one in (made, run)]
    assert of_stores[0] != of_stores[1]
    folder = workspace(tmp_path / "work")
    (folder / "tiny.yaml").write_text(SMALL.replace("threads: 1", "threads: 1, precision: bf16"))
    plan = commands(folder)
    assert {"extract.py", "sae.py", "backbone.py"} <= {re.findall(r"\w+\.py", command)[0] for command in plan}
    for command in plan:  # Snakemake makes again what has other flags
        assert ("--precision=bf16" in command) == ("/extract.py" in command), command


@pytest.mark.parametrize("name", ["images/manifest.parquet", "saes/topk-s0/sae.safetensors"])
def test_swapped_files_are_seen(made: Run, name: str) -> None:
    path = made.folder / name
    before = path.stat()
    path.write_text(name.upper())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    kind = "read" if "images" in name else "made"
    path.rename(path.with_suffix(".moved"))
    assert renew(made) == "", "what is missing Snakemake makes"
    shutil.copy2(path.with_suffix(".moved"), path)
    assert renew(made) == f"{name} is not the file that it has {kind}"


def test_a_damaged_record_is_not_believed(made: Run) -> None:
    (made.folder / "records" / "sae-topk.json").write_text("{")
    assert renew(made) == "its record cannot be read"


def test_files_are_read_once_until_they_change(made: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []
    plain = file_digest

    def digest(path: Path) -> str:
        read.append(path)
        return plain(path)

    monkeypatch.setattr(staleness, "file_digest", digest)
    renew(made)
    assert len(read) == 2
    renew(made)
    assert len(read) == 2
    (made.folder / "images" / "manifest.parquet").touch()
    renew(made)
    assert len(read) == 3


def test_a_stage_that_gathers_results_is_made_again_when_they_are_others(made: Run) -> None:
    manifest, other = made.folder / "images" / "manifest.parquet", made.folder / "saes" / "topk-s9" / "sae.safetensors"
    assert renew(made, reads=[manifest]) == ""
    assert renew(made, reads=[manifest, other]) == "it has not read saes/topk-s9/sae.safetensors"
    former = "it has read images/manifest.parquet, which the configuration does not have"
    assert renew(made, reads=[]) == former


def planned(folder: Path, *words: str) -> set[str]:
    """The stages that Snakemake would run, by the names of their records; ``configuration`` follows any section."""
    done = snakemake(folder, "--dry-run", "--printshellcmds", *words)
    assert done.returncode == 0, done.stderr
    return set(re.findall(r"--record \S*/records/(\S+)\.json", done.stdout + done.stderr)) - {"configuration"}


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


FOLLOWS_SAE = {
    "sae-topk", "evaluate-topk", "steering-class-latents", "attribution-topk", "summary", "report",
}  # fmt: skip


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


def snapshot(folder: Path) -> dict[str, tuple[str, int]]:
    """Digest and time of every file in the results, hidden ones too."""
    files = (path for path in (folder / "results").rglob("*") if path.is_file())
    return {str(path): (file_digest(path), path.stat().st_mtime_ns) for path in files}


def test_a_dry_run_changes_nothing_and_makes_nothing_stale(run_folder: Path, tmp_path: Path) -> None:
    folder = copy_of(run_folder, tmp_path / "copy")
    before = snapshot(folder)
    assert {"images", "backbone-vit", "sae-topk", "pruning-heads", "report"} <= planned(folder, "--config", "seed=1")
    assert planned(folder) == set(), "the marks of another seed are taken back"
    assert snapshot(folder) == before


@pytest.mark.slow
@pytest.mark.parametrize("words", [["--summary"], ["--dag"], ["--lint"], ["--report", "report.html"]], ids=str)
def test_what_runs_nothing_writes_nothing_into_results(small: Path, tmp_path: Path, words: list[str]) -> None:
    folder = copy_of(small, tmp_path / "copy")
    before = snapshot(folder)
    snakemake(folder, *words, "--config", "seed=1")
    assert snapshot(folder) == before and planned(folder) == set()


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
    changed = folder / "src" / "sparsight" / file
    text = changed.read_text()
    if changed.suffix == ".py":
        changed.write_text(f"# a comment\n{text}\n# another\n")
        assert planned(folder) == set()
    changed.write_text(f"{text}\n_X = 1\n")
    assert planned(folder) == follow
    changed.write_text(text)
    assert planned(folder) == set(), "changed back"
