"""DVC keeps a store, whole shards at a time, and records runs: neither it nor Snakemake believes the other blindly."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import ROOT, shared_folder, write_store
from runs import copy_of
from snakemake.utils import update_config
from test_staleness import FOLLOWS_SAE, SMALL

from sparsight.activations.store import ActivationStore, verify
from sparsight.pipeline.records import VOLATILE

ENVIRONMENT = os.environ | {
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # dvc calls snakemake
    **{f"GIT_{who}_{what}": "x@x" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
}


def run(folder: Path, *words: str) -> str:
    command = [sys.executable, "-m", "dvc", *words[1:]] if words[0] == "dvc" else list(words)
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=ENVIRONMENT, check=False)
    assert done.returncode == 0, f"{words}: {done.stdout} {done.stderr}"
    return done.stdout + done.stderr


@pytest.mark.slow
def test_push_and_pull_move_only_the_shards_that_changed(tmp_path: Path) -> None:
    repository, remote, clone = (tmp_path / name for name in ("repository", "remote", "clone"))
    shapes = {"blocks.0.input": (8,), "embedding": (8,)}
    store = write_store(repository, 32, shapes)
    for words in (("git", "init", "-q"), ("dvc", "init", "-q"), ("dvc", "remote", "add", "-d", "here", str(remote))):
        run(repository, *words)
    run(repository, "dvc", "add", "-q", "train.zarr")
    run(repository, "dvc", "push", "-q")

    def objects() -> set[Path]:
        return {path for path in remote.rglob("*") if path.is_file()}

    first = objects()
    assert len(first) == len(list(store.rglob("*/c/*/0"))) + 3, "shards, group, two equal arrays, the list"
    shard = store / "embedding" / "c" / "3" / "0"
    changed = shard.read_bytes()[::-1]
    shard.unlink()
    shard.write_bytes(changed)
    run(repository, "dvc", "add", "-q", "train.zarr")
    run(repository, "dvc", "push", "-q")
    assert len(objects() - first) == 2, "the shard and the list"

    run(repository, "git", "add", ".")
    run(repository, "git", "commit", "-qm", "store")
    run(tmp_path, "git", "clone", "-q", str(repository), str(clone))
    run(clone, "dvc", "pull", "-q")
    assert verify(clone / "train.zarr") == ["embedding/c/3/0: content differs from the manifest"]
    assert len(ActivationStore.open(clone / "train.zarr").rows("blocks.0.input")[:]) == 32


def test_every_experiment_is_a_stage() -> None:
    stages = yaml.safe_load((ROOT / "experiments" / "dvc.yaml").read_text())["stages"]
    overlays = {path.stem for path in (ROOT / "experiments").glob("*.yaml")} - {"papers", "dvc"}
    assert stages.keys() == overlays
    for name, stage in stages.items():
        overlay = f"experiments/{name}.yaml"
        assert stage["cmd"] == f"snakemake --cores all --configfile {overlay}" and overlay in stage["deps"]
        assert stage["outs"] == [{f"results/{name}": {"persist": True}}]


def planned(folder: Path) -> set[str]:
    """What Snakemake would do, by the names of the stages' records."""
    found = run(folder, "snakemake", "--dry-run", "--printshellcmds", "--cores", "1")
    return set(re.findall(r"--record \S*/records/(\S+)\.json", found))


def clean(folder: Path) -> bool:
    """Whether neither tool has anything to do."""
    return planned(folder) == set() and "up to date" in run(folder, "dvc", "status", "dvc.yaml")


def locked(text: str) -> dict[str, str]:
    """Digest by path of what a dvc.lock records, without the files that hold times."""
    outs = yaml.safe_load(text)["stages"]["default"]["outs"]
    return {out["path"]: out["md5"] for out in outs if Path(out["path"]).name not in VOLATILE}


def width(folder: Path) -> int:
    about = json.loads((folder / "results" / "default" / "saes" / "topk-s0" / "config.json").read_text())
    assert isinstance(about["d_sae"], int)
    return about["d_sae"]


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository whose last commit is a run of width 48, made by Snakemake and recorded by DVC."""
    return shared_folder(tmp_path_factory, "dvc", lambda folder: make_repository(folder / "repository")) / "repository"


@pytest.fixture
def own_repository(recorded: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change; asking Snakemake or DVC about it writes into it, too."""
    return copy_of(recorded, tmp_path / "copy")


def make_repository(folder: Path) -> None:
    folder.mkdir(parents=True)
    for name in ("Snakefile", "uv.lock", ".gitignore", ".dvcignore"):
        shutil.copy(ROOT / name, folder)
    for name in ("workflow", "profiles", "src"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    config = copy.deepcopy(yaml.safe_load((ROOT / "params.yaml").read_text()))
    update_config(config, {**yaml.safe_load(SMALL), "run": "default"})
    (folder / "params.yaml").write_text(yaml.safe_dump(config))
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())
    outs = stages["stages"]["default"]["outs"]
    stages["stages"]["default"]["outs"] = [out for out in outs if "results/default/pruning" not in out]
    stages["plots"] = [plot for plot in stages["plots"] if not isinstance(plot, str)]  # no policy: no figure of it
    (folder / "dvc.yaml").write_text(yaml.safe_dump(stages))
    run(folder, "snakemake", "--cores", "2")
    run(folder, "git", "init", "-q")
    run(folder, "dvc", "init", "-q")
    run(folder, "dvc", "remote", "add", "-d", "here", str(folder.parent / "remote"))
    run(folder, "dvc", "commit", "-f", "dvc.yaml")
    run(folder, "git", "add", ".")
    run(folder, "git", "commit", "-qm", "width 48")
    run(folder, "dvc", "push", "-q")


@pytest.mark.slow
def test_a_run_of_snakemake_is_committed_and_a_clone_has_it(own_repository: Path, tmp_path: Path) -> None:
    assert clean(own_repository)
    clone = tmp_path / "clone"
    run(tmp_path, "git", "clone", "-q", str(own_repository), str(clone))
    run(clone, "dvc", "pull", "-q", "dvc.yaml")
    run(clone, "snakemake", "--touch", "--cores", "1")
    assert clean(clone)
    assert "fvu" in run(clone, "dvc", "plots", "show", "--show-vega", "results/default/curves.json")


@pytest.mark.slow
def test_no_artefact_of_one_configuration_is_taken_for_another_s(own_repository: Path) -> None:
    folder = own_repository
    assert clean(folder)
    results = folder / "results" / "default"
    before = {name: (results / name).stat().st_ino for name in ("images", "backbones/vit", "activations/vit")}
    weights = (results / "saes" / "topk-s0" / "sae.safetensors").read_bytes()
    run(folder, "dvc", "exp", "run", "-S", "saes.topk.d_sae=64")
    assert width(folder) == 64 and clean(folder)
    assert {name: (results / name).stat().st_ino for name in before} == before, "only the SAE and what follows was made"
    assert "sae.topk-s0.fvu" in run(folder, "dvc", "metrics", "diff", "--all")
    run(folder, "git", "add", ".")
    run(folder, "git", "commit", "-qm", "width 64")
    run(folder, "git", "checkout", "-q", "HEAD~1")
    assert planned(folder) == FOLLOWS_SAE | {"configuration"}, "configuration of 48, files of 64"
    run(folder, "dvc", "checkout", "-q")
    assert width(folder) == 48 and (results / "saes" / "topk-s0" / "sae.safetensors").read_bytes() == weights
    run(folder, "snakemake", "--touch", "--cores", "1")
    assert clean(folder)
    run(folder, "git", "checkout", "-q", "-")
    run(folder, "snakemake", "--touch", "--cores", "1")
    assert planned(folder) == FOLLOWS_SAE | {"configuration"}, "configuration of 64, files of 48, times made to agree"
    run(folder, "dvc", "repro", "-q", "dvc.yaml")
    assert width(folder) == 64 and clean(folder)
    again, first = locked((folder / "dvc.lock").read_text()), locked(run(folder, "git", "show", "HEAD:dvc.lock"))
    assert again == first and len(first) > 8, "the same bytes as when it was made first"


@pytest.mark.slow
def test_activations_kept_out_of_the_cache_are_made_again_in_a_clone(own_repository: Path, tmp_path: Path) -> None:
    folder, clone = own_repository, tmp_path / "clone"
    run(folder, "dvc", "remote", "add", "-df", "here", str(tmp_path / "remote"))
    about = yaml.safe_load((folder / "dvc.yaml").read_text())
    outs = {path: options for out in about["stages"]["default"]["outs"] for path, options in out.items()}
    outs["results/default/activations"]["cache"] = False
    (folder / "dvc.yaml").write_text(yaml.safe_dump(about))
    run(folder, "dvc", "commit", "-f", "dvc.yaml")
    run(folder, "git", "add", ".")
    run(folder, "git", "commit", "-qm", "activations are not cached")
    run(folder, "dvc", "push", "-q")
    assert clean(folder)
    run(tmp_path, "git", "clone", "-q", str(folder), str(clone))
    run(clone, "dvc", "pull", "-q", "dvc.yaml")
    assert not (clone / "results" / "default" / "activations").exists()
    run(clone, "snakemake", "--touch", "--cores", "1")
    said = run(clone, "snakemake", "--cores", "2", "--until", "activations")
    assert set(re.findall(r"^(?:local)?rule (\w+):", said, re.MULTILINE)) == {"extract", "activations"}
    run(clone, "snakemake", "--touch", "--cores", "1")
    assert clean(clone)
    assert verify(clone / "results" / "default" / "activations" / "vit" / "train.zarr") == []
