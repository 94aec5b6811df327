"""torchvision's data sets, on files in their real layouts."""

import hashlib
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from source_files import Expected, check, counts, litter, manifest, put

from sparsight.common.errors import SparsightError
from sparsight.images.sources import SOURCES


def cifar(root: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Expected:
    """CIFAR's own pickles, with the checksums of these files in place of the real ones."""
    from torchvision import datasets

    hundred = name == "cifar100"
    cls = datasets.CIFAR100 if hundred else datasets.CIFAR10
    folder, names = root / cls.base_folder, ["apple_pie", "boy"]
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    expected: Expected = {}
    lists: dict[str, list[list[str]]] = {}
    for split, files in (("train", cls.train_list), ("test", cls.test_list)):
        lists[split], start = [], 0
        for file, _ in files:
            data = generator.integers(0, 255, (20, 3072), dtype=np.uint8)
            labels = [i % 2 for i in range(20)]
            content = pickle.dumps({"data": data, "fine_labels" if hundred else "labels": labels})
            (folder / file).write_bytes(content)
            lists[split].append([file, hashlib.md5(content).hexdigest()])
            expected |= {
                f"{name}:{split}:{start + i}": (names[label].replace("_", " "), split) for i, label in enumerate(labels)
            }
            start += 20
    key = "fine_label_names" if hundred else "label_names"
    content = pickle.dumps({key: names})
    (folder / cls.meta["filename"]).write_bytes(content)
    monkeypatch.setattr(cls, "train_list", lists["train"])
    monkeypatch.setattr(cls, "test_list", lists["test"])
    monkeypatch.setattr(cls, "meta", {**cls.meta, "key": key, "md5": hashlib.md5(content).hexdigest()})
    return expected


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_pickles_through_torchvision_s_loader(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets

    expected = cifar(tmp_path / "d", name, monkeypatch)
    found = check(name, tmp_path / "d", tmp_path, expected)
    split = found.split("test")
    theirs = getattr(datasets, name.upper())(tmp_path / "d", train=False)
    image, label = theirs[int(split.uris(slice(4))[3].rpartition(":")[2])]
    assert np.array_equal(split.picture(3), np.asarray(image)) and split.labels[3] == label


def stl10(root: Path, monkeypatch: pytest.MonkeyPatch) -> Expected:
    from torchvision import datasets

    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    (folder / "class_names.txt").write_text("airplane\nbird\n")
    expected: Expected = {}
    for split, count in (("train", 16), ("test", 6)):
        pixels = np.random.default_rng(count).integers(0, 255, (count, 3, 96, 96), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 2
        (folder / f"{split}_X.bin").write_bytes(pixels.tobytes())
        (folder / f"{split}_y.bin").write_bytes((labels + 1).tobytes())
        expected |= {f"stl10:{split}:{i}": (["airplane", "bird"][labels[i]], split) for i in range(count)}
    monkeypatch.setattr(datasets.STL10, "_check_integrity", lambda self: True)
    return expected


def food101(root: Path, _: Any) -> Expected:
    listing: dict[str, dict[str, list[str]]] = {"train": {}, "test": {}}
    expected: Expected = {}
    for label in ("apple_pie", "ramen"):
        for split, count in (("train", 8), ("test", 3)):
            names = [f"{label}/{split}{i}" for i in range(count)]
            listing[split][label] = names
            for i, name in enumerate(names):
                uri = put(root / "food-101" / "images" / f"{name}.jpg", i)
                expected[uri] = (label.replace("_", " "), split)
    (root / "food-101" / "meta").mkdir()
    for split, value in listing.items():
        (root / "food-101" / "meta" / f"{split}.json").write_text(json.dumps(value))
    return expected


def flowers102(root: Path, monkeypatch: pytest.MonkeyPatch) -> Expected:
    from scipy.io import savemat
    from torchvision import datasets

    base = root / "flowers-102"
    expected: Expected = {}
    labels = np.arange(1, 307) % 102 + 1
    splits = {"train": range(1, 103), "val": range(103, 205), "test": range(205, 307)}
    for split, ids in splits.items():
        for i in ids:
            uri = put(base / "jpg" / f"image_{i:05d}.jpg", i)
            expected[uri] = (datasets.Flowers102.classes[labels[i - 1] - 1], split)
    savemat(base / "imagelabels.mat", {"labels": labels})
    savemat(base / "setid.mat", {"trnid": [*splits["train"]], "valid": [*splits["val"]], "tstid": [*splits["test"]]})
    monkeypatch.setattr(datasets.Flowers102, "_check_integrity", lambda self: True)
    return expected


def aircraft(root: Path, _: Any) -> Expected:
    data, names = root / "fgvc-aircraft-2013b" / "data", ["Boeing 707", "A300"]
    expected: Expected = {}
    for split in ("train", "val", "test"):
        lines = []
        for i in range(6):
            uri = put(data / "images" / f"{split}{i}.jpg", i)
            expected[uri] = (names[i % 2], split)
            lines.append(f"{split}{i} {names[i % 2]}")
        (data / f"images_variant_{split}.txt").write_text("\n".join(lines) + "\n")
    (data / "variants.txt").write_text("\n".join(names) + "\n")
    return expected


def dtd(root: Path, _: Any) -> Expected:
    data = root / "dtd" / "dtd"
    expected: Expected = {}
    (data / "labels").mkdir(parents=True)
    for split in ("train", "val", "test"):
        names = [f"{label}/{label}_{split}{i}.jpg" for label in ("banded", "dotted") for i in range(3)]
        for i, name in enumerate(names):
            expected[put(data / "images" / name, i)] = (name.partition("/")[0], split)
        (data / "labels" / f"{split}1.txt").write_text("\n".join(names) + "\n")
    return expected


def eurosat(root: Path, _: Any) -> Expected:
    files = [root / "eurosat" / "2750" / label / f"{label}_{i}.jpg" for label in ("Forest", "River") for i in range(9)]
    return {put(file, i): (file.parent.name, None) for i, file in enumerate(files)}


def sun397(root: Path, _: Any) -> Expected:
    names = ["/a/abbey", "/a/apartment_building/outdoor"]
    (root / "SUN397").mkdir(parents=True)
    (root / "SUN397" / "ClassName.txt").write_text("\n".join(names) + "\n")
    readable = ["abbey", "apartment building outdoor"]
    return {
        put(root / "SUN397" / name[1:] / f"sun_{i}.jpg", i): (label, None)
        for name, label in zip(names, readable, strict=True)
        for i in range(9)
    }


def caltech101(root: Path, _: Any) -> Expected:
    base = root / "caltech101" / "101_ObjectCategories"
    (root / "caltech101" / "Annotations").mkdir(parents=True)
    put(base / "BACKGROUND_Google" / "image_0001.jpg", 0)
    return {
        put(base / label / f"image_{i:04d}.jpg", i): (label.replace("_", " "), None)
        for label in ("accordion", "wild_cat")
        for i in range(1, 10)
    }


def name_of(make: Callable[[Path, Any], Expected]) -> str:
    return {"aircraft": "fgvc-aircraft"}.get(make.__name__, make.__name__)


@pytest.mark.parametrize("make", [stl10, food101, flowers102, aircraft, dtd, eurosat, sun397, caltech101])
def test_torchvision_layouts(
    make: Callable[[Path, Any], Expected], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = make(tmp_path / "d", monkeypatch)
    check(name_of(make), tmp_path / "d", tmp_path, expected)


@pytest.mark.parametrize("make", [stl10, food101, flowers102, aircraft, dtd, eurosat, sun397, caltech101])
def test_hidden_files_change_nothing_and_the_counts_add_up(
    make: Callable[[Path, Any], Expected],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = tmp_path / "d"
    make(root, monkeypatch)
    before, names = (source := SOURCES[name_of(make)](str(root))).items(), source.class_names()
    (plain,) = counts(capsys.readouterr().err)
    litter(root)
    after = SOURCES[name_of(make)](str(root))
    assert after.items() == before and after.class_names() == names
    (found,) = counts(log := capsys.readouterr().err)
    assert found["images"] == plain["images"] == len(before)
    if make is not stl10:  # arrays, of which rows are counted
        (folder,) = re.findall(r"^images: (.*): \d+ files", log, re.MULTILINE)
        assert found["files"] == sum(path.is_file() for path in Path(folder).rglob("*"))
        assert found["hidden"] > 0 and found["other"] == plain["other"]


@pytest.mark.parametrize("name", ["cifar10", "stl10", "food101", "eurosat", "caltech101", "fgvc-aircraft"])
def test_a_torchvision_set_that_is_not_there_says_how_to_get_it(name: str, tmp_path: Path) -> None:
    with pytest.raises(SparsightError, match=rf"no complete {name} here .* get it with torchvision.*download=True"):
        manifest(name, tmp_path, tmp_path / "m.parquet")
    assert list(tmp_path.iterdir()) == [], "looking leaves nothing behind"
