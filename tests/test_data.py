"""docs/data.md and experiments/get_data.py: where the files come from that overlays read."""

import copy
import hashlib
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torchvision
import yaml
from conftest import ROOT, data_folder, script, workspace
from snakemake.utils import update_config
from source_files import manifest, picture

from sparsight.config.images import members

PAGE = (ROOT / "docs" / "data.md").read_text()
OVERLAYS = [path for path in sorted((ROOT / "experiments").glob("*.yaml")) if path.stem not in ("papers", "dvc")]


@pytest.fixture(scope="module")
def get_data() -> ModuleType:
    return script("experiments/get_data.py")


def read_by(overlay: Path) -> tuple[set[str], set[str]]:
    """Folders (or tables) of images and files of weights that an overlay reads."""
    config: dict[str, Any] = copy.deepcopy(yaml.safe_load((ROOT / "params.yaml").read_text()))
    update_config(config, yaml.safe_load(overlay.read_text()))
    images = set()
    for section in (config["images"], *config["other_images"].values()):
        source, path = section["source"], section.get("path")
        images |= {folder for _, folder in (members(path) if source == "union" else [(source, path)]) if folder}
    backbones = filter(None, config["backbones"].values())
    return images, {b["weights"] for b in backbones if b.get("weights") not in (None, "pretrained")}


def named(path: str) -> bool:
    """Whether a row of the page names the path; braces there hold several names."""
    for text in re.findall(r"`(data/[^`]*)`", PAGE):
        match = re.fullmatch(r"(.*)\{(.*)\}(.*)", text)
        every = [f"{match[1]}{name}{match[3]}" for name in match[2].split(",")] if match else [text]
        if any(path in (name, str(Path(name).parent)) for name in every):
            return True
    return False


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
def test_the_page_says_how_to_get_what_an_overlay_reads(overlay: Path) -> None:
    images, weights = read_by(overlay)
    assert all(path.startswith("data/") and named(path) for path in images | weights), (images, weights)
    if images | weights:
        pattern = re.sub(r"-[bl]\d+$", "-*", overlay.stem)
        assert f"`{overlay.stem}`" in PAGE or f"`{pattern}`" in PAGE


@pytest.mark.slow
@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
def test_every_overlay_plans_from_a_folder_called_data(overlay: Path, tmp_path: Path) -> None:
    folder = workspace(tmp_path / "work")
    (folder / "experiments").symlink_to(ROOT / "experiments")
    images, weights = read_by(overlay)
    for path in images | weights:
        place = folder / path
        if place.suffix:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.touch()
        else:
            place.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "snakemake", "--dry-run", "--configfile", f"experiments/{overlay.name}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and re.search(r"^total +[1-9]", done.stdout + done.stderr, re.MULTILINE), done.stderr


def test_photographs_of_the_chosen_kinds_become_tables(get_data: ModuleType, tmp_path: Path) -> None:
    clone = tmp_path / "clone" / "dataset"
    for split in ("train", "val", "test"):
        kinds = ("Avocado", *get_data.GROCERIES)
        files = [f"{split}/Fruit/{kind}/{kind}_{i}.jpg" for kind in kinds for i in range(2)]
        for seed, file in enumerate(files):
            (clone / file).parent.mkdir(parents=True, exist_ok=True)
            (clone / file).write_bytes(picture(len(split) * 100 + seed, (300, 240), "JPEG"))
        (clone / f"{split}.txt").write_text("".join(f"{file}, 0, 0\n" for file in files))
    get_data.groceries(clone.parent, tmp_path)
    found = manifest("parquet", tmp_path / "groceries", tmp_path / "m.parquet")
    assert [len(found.split(part)) for part in ("train", "val", "test")] == [28, 28, 28]
    assert found.split("val").picture(0).shape == (240, 192, 3)
    assert "Avocado" not in found.classes


def test_the_first_fifty_species_are_copied_by_split(get_data: ModuleType, tmp_path: Path) -> None:
    source, lines = tmp_path / "CUB_200_2011", {"images.txt": "", "train_test_split.txt": ""}
    for number, species in enumerate(("001.Crow", "050.Wren", "051.Owl"), 1):
        for i in range(20):
            file = source / "images" / species / f"{species[4:]}_{i}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(picture(100 * number + i, (30, 20), "JPEG"))
            lines["images.txt"] += f"{100 * number + i} {species}/{file.name}\n"
            lines["train_test_split.txt"] += f"{100 * number + i} {i % 2}\n"
    lines["train_test_split.txt"] += "99 1"  # lists a photograph that is not there, and ends without a line's end
    for name, text in lines.items():
        (source / name).write_text(text)
    get_data.cub50(source, tmp_path)
    assert {path.relative_to(tmp_path / "cub50").as_posix() for path in (tmp_path / "cub50").rglob("*.jpg")} == {
        f"{'train' if i % 2 else 'test'}/{name}/{name}_{i}.jpg" for name in ("Crow", "Wren") for i in range(20)
    }
    found = manifest("folder", tmp_path / "cub50", tmp_path / "m.parquet")
    assert sorted(found.classes) == ["Crow", "Wren"] and len(found.split("test")) == 20


def test_cifar10_tables_have_the_pixels_of_torchvision(
    get_data: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)
    data = SimpleNamespace(data=pixels, targets=[i % 3 for i in range(30)], classes=["a", "b", "c"])
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", lambda root, train, download: data)
    monkeypatch.setattr(get_data, "CIFAR_ROWS", {"train-1": slice(0, 10), "train-2": slice(10, 20)})
    get_data.cifar10(tmp_path, tmp_path)
    found = manifest("parquet", tmp_path / "cifar10", tmp_path / "m.parquet").split("test")
    row = found.uris(slice(None)).index("test.parquet:7")
    assert np.array_equal(found.picture(row), pixels[7]) and found.labels[row] == 1 and len(found) == 30


def test_the_weights_are_those_that_the_page_names() -> None:
    path = data_folder() / "weights" / "vit_small_patch14_dinov2_focus.safetensors"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert f"sha256 begins with `{digest[:16]}`" in PAGE
