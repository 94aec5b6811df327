"""Every image source on files in its real layout, and every kind of picture file."""

import hashlib
import io
import json
import os
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sparsight import config
from sparsight.errors import SparsightError
from sparsight.images import Manifest, write_manifest
from sparsight.preprocess import Preprocess
from sparsight.sources import SOURCES, Source
from sparsight.sources.base import decode_file

Expected = dict[str, tuple[str, str | None]]
RGB = Preprocess((8, 8), 3, (0.5,) * 3, (0.5,) * 3)


def picture(seed: int, size: tuple[int, int] = (8, 8), form: str = "PNG", **options: Any) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer := io.BytesIO(), form, **options)
    return buffer.getvalue()


def is_picture(pixels: np.ndarray) -> bool:
    return pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] in (1, 3)


def put(path: Path, seed: int, form: str = "JPEG") -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture(seed, form=form))
    return path.as_posix()


def manifest(source: str, path: Path | str, out: Path, **options: Any) -> Manifest:
    section = config.Images(source=source, path=str(path), **{"val_fraction": 0.25, "test_fraction": 0.25, **options})  # type: ignore[arg-type]
    write_manifest(section, 0, {}, 2, out)
    return Manifest(out)


def check(source: str, path: Path, tmp_path: Path, expected: Expected) -> Manifest:
    """The manifest holds exactly these images: uri -> (label, official split or None), each readable again."""
    found = manifest(source, path, tmp_path / "m.parquet")
    rows = {row["uri"]: row for row in found.table.to_pylist()}
    assert rows.keys() == expected.keys()
    again: Source = pickle.loads(pickle.dumps(SOURCES[source](str(path))))
    for uri, (label, split) in expected.items():
        row = rows[uri]
        assert (row["label_name"], found.classes[row["label"]]) == (label, label)
        # A missing split is drawn from train; official ones are kept.
        assert split is None or row["split"] == split or (split == "train" and row["split"] == "val")
        data = again.read(uri)
        assert hashlib.sha256(data).hexdigest() == row["sha256"]
        assert is_picture(again.decode(uri, data))
    assert found.split("train").batch(slice(0, 2), RGB).shape == (2, 8, 8, 3)
    return found


def test_every_source_has_a_name_in_the_configuration() -> None:
    (names,) = (f.type.__args__ for f in config.Images.__dataclass_fields__.values() if f.name == "source")  # type: ignore[union-attr]
    assert set(names) == set(SOURCES)


# --- Parquet


def table(path: Path, rows: list[tuple[bytes, int]], names: list[str] | None, **columns: str) -> None:
    image, label = columns.get("image", "image"), columns.get("label", "label")
    data = pa.table(
        {
            image: pa.array([{"bytes": b, "path": f"{i}"} for i, (b, _) in enumerate(rows)]),
            label: pa.array([number for _, number in rows], pa.int64()),
        }
    )
    features = {image: {"_type": "Image"}, label: {"_type": "ClassLabel", "names": names}}
    about = {"huggingface": json.dumps({"info": {"features": features}})} if names else None
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(data.replace_schema_metadata(about), path, row_group_size=5)


@pytest.mark.parametrize("columns", [{}, {"image": "img", "label": "fine_label"}])
def test_parquet_with_official_splits_and_class_names_in_their_order(columns: dict[str, str], tmp_path: Path) -> None:
    names = ["zebra", "ant"]
    expected: Expected = {}
    files = {"data/train-00000-of-00002.parquet": "train", "data/train-00001-of-00002.parquet": "train",
             "data/validation-00000-of-00001.parquet": "val", "data/test-00000-of-00001.parquet": "test"}  # fmt: skip
    for number, (file, split) in enumerate(files.items()):
        table(tmp_path / "p" / file, [(picture(100 * number + i), i % 2) for i in range(12)], names, **columns)
        expected |= {f"{file}:{i}": (names[i % 2], split) for i in range(12)}
    found = check("parquet", tmp_path / "p", tmp_path, expected)
    assert found.classes == names and len(found.split("val")) == 12


def test_one_parquet_file_without_metadata_or_splits(tmp_path: Path) -> None:
    table(tmp_path / "all.parquet", [(picture(i), i % 3) for i in range(30)], None)
    expected: Expected = {f"all.parquet:{i}": (str(i % 3), None) for i in range(30)}
    check("parquet", tmp_path / "all.parquet", tmp_path, expected)


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The row groups that are read from now on."""
    reads: list[int] = []
    plain = pq.ParquetFile.read_row_group

    def counted(self: pq.ParquetFile, i: int, **options: Any) -> pa.Table:
        assert options["columns"] == ["image"], "nothing but the images is read"
        reads.append(i)
        return plain(self, i, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    monkeypatch.setattr("sparsight.sources.parquet._CACHE_BYTES", 1)
    return reads


@pytest.mark.parametrize("n_windows", [1, 4])
def test_parquet_reads_each_row_group_once_per_window_of_a_random_order(
    n_windows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table(tmp_path / "all.parquet", [(picture(i), 0) for i in range(200)], ["a"])
    metadata = pq.ParquetFile(tmp_path / "all.parquet").metadata
    n_bytes = sum(metadata.row_group(i).total_byte_size for i in range(40))
    monkeypatch.setattr("sparsight.sources.parquet._WINDOW_BYTES", n_bytes // n_windows + 1)
    reads = count_reads(monkeypatch)
    order = np.random.default_rng(0).permutation(200)
    uris = [f"all.parquet:{i}" for i in order]
    reader = SOURCES["parquet"](str(tmp_path / "all.parquet")).reader(uris)
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(reader.read, uris)) == [picture(i) for i in order]
    assert len(reads) <= 40 * n_windows and set(reads) == set(range(40))
    ends = [i for i in range(1, len(reads)) if reads[i] <= reads[i - 1]]
    assert len(ends) == n_windows - 1, "in a window the row groups come in their order, each once"


def test_a_manifest_of_parquet_tables_reads_each_row_group_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table(tmp_path / "all.parquet", [(picture(i), i % 2) for i in range(40)], ["a", "b"])
    reads = count_reads(monkeypatch)
    found = manifest("parquet", tmp_path / "all.parquet", tmp_path / "m.parquet")
    assert reads == list(range(8))
    del reads[:]
    train = found.split("train")
    pixels = np.concatenate(list(train.batches(RGB, 4)))
    assert reads == list(range(8)), "batches share a window"
    assert np.array_equal(pixels, np.stack([RGB.pixels(train.picture(i)) for i in range(len(train))]))
    twice = train.batch(np.array([3, 3, 0]), RGB)
    assert np.array_equal(twice, pixels[[3, 3, 0]])


def test_an_image_that_a_table_lacks_is_named(tmp_path: Path) -> None:
    images = [{"bytes": picture(i), "path": None} for i in range(24)] + [{"bytes": None, "path": "far/away.png"}]
    pq.write_table(pa.table({"image": images, "label": [0] * 25}), tmp_path / "t.parquet")
    with pytest.raises(SparsightError, match=r"image t.parquet:24: the table holds a path but no bytes"):
        manifest("parquet", tmp_path / "t.parquet", tmp_path / "m.parquet")
    train = manifest("parquet", tmp_path / "t.parquet", tmp_path / "m.parquet", on_error="skip").split("train")
    pq.write_table(pa.table({"image": images[:1], "label": [0]}), tmp_path / "t.parquet")
    with pytest.raises(SparsightError, match=r"image t.parquet:\d+: No such image in .*t.parquet; put it back"):
        pickle.loads(pickle.dumps(train)).batch(slice(0, 3), RGB)


def test_tables_of_another_layout_are_refused_and_damaged_ones_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [b"x"], "label": [0]}), tmp_path / "flat.parquet")
    with pytest.raises(SparsightError, match=r"column 'image' is binary, not a struct"):
        manifest("parquet", tmp_path / "flat.parquet", tmp_path / "m.parquet")
    pq.write_table(pa.table({"picture": [b"x"], "label": [0]}), tmp_path / "flat.parquet")
    with pytest.raises(SparsightError, match="no column 'image'; there are: picture, label"):
        manifest("parquet", tmp_path / "flat.parquet", tmp_path / "m.parquet")
    table(tmp_path / "t.parquet", [(picture(0), 0), (picture(1), 5)], ["a", "b"])
    with pytest.raises(SparsightError, match=r"t.parquet row 1 has no class \(5\); repair it"):
        manifest("parquet", tmp_path / "t.parquet", tmp_path / "m.parquet")
    (tmp_path / "t.parquet").write_bytes((tmp_path / "t.parquet").read_bytes()[:-20])
    with pytest.raises(SparsightError, match=r"t.parquet: not readable as Parquet"):
        manifest("parquet", tmp_path / "t.parquet", tmp_path / "m.parquet")


# --- torchvision


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


@pytest.mark.parametrize("make", [stl10, food101, flowers102, aircraft, dtd, eurosat, sun397, caltech101])
def test_torchvision_layouts(
    make: Callable[[Path, Any], Expected], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = make(tmp_path / "d", monkeypatch)
    name = {"aircraft": "fgvc-aircraft"}.get(make.__name__, make.__name__)
    check(name, tmp_path / "d", tmp_path, expected)


@pytest.mark.parametrize("name", ["cifar10", "stl10", "food101", "eurosat", "caltech101", "fgvc-aircraft"])
def test_a_torchvision_set_that_is_not_there_says_how_to_get_it(name: str, tmp_path: Path) -> None:
    with pytest.raises(SparsightError, match=rf"no complete {name} here .* get it with torchvision.*download=True"):
        manifest(name, tmp_path, tmp_path / "m.parquet")
    assert list(tmp_path.iterdir()) == [], "looking leaves nothing behind"


# --- published folder layouts


def cub(root: Path, count: int = 16) -> Expected:
    classes = ["001.Black_footed_Albatross", "002.Laysan_Albatross"]
    names = {c: c[4:].replace("_", " ") for c in classes}
    files = [f"{classes[i % 2]}/bird_{i}.jpg" for i in range(count)]
    expected: Expected = {}
    for i, file in enumerate(files):
        expected[put(root / "images" / file, i)] = (names[classes[i % 2]], "train" if i < count - 4 else "test")
    rows = {
        "classes.txt": [f"{i + 1} {name}" for i, name in enumerate(classes)],
        "images.txt": [f"{i + 1} {file}" for i, file in enumerate(files)],
        "image_class_labels.txt": [f"{i + 1} {i % 2 + 1}" for i in range(count)],
        "train_test_split.txt": [f"{i + 1} {int(i < count - 4)}" for i in range(count)],
    }
    for name, lines in rows.items():
        (root / name).write_text("\n".join(lines) + "\n")
    return expected


def test_cub_200_as_published(tmp_path: Path) -> None:
    check("cub200", tmp_path / "CUB_200_2011", tmp_path, cub(tmp_path / "CUB_200_2011"))


@pytest.mark.parametrize("name", ["image_class_labels.txt", "train_test_split.txt"])
def test_a_label_file_shorter_than_the_images_is_an_error(name: str, tmp_path: Path) -> None:
    cub(tmp_path)
    lines = (tmp_path / name).read_text().splitlines()
    (tmp_path / name).write_text("\n".join(lines[:-1]))
    with pytest.raises(SparsightError, match=rf"images.txt lists 16 images, {name} 15; e.g. '16' is not in both"):
        manifest("cub200", tmp_path, tmp_path / "m.parquet")


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


def test_tiny_imagenet_as_published(tmp_path: Path) -> None:
    found = check("tiny-imagenet", tmp_path / "t", tmp_path, tiny(tmp_path / "t"))
    assert found.classes == ["crane (n02)", "crane (n01)", "Egyptian cat"], "the order of wnids.txt"
    annotations = tmp_path / "t" / "val" / "val_annotations.txt"
    annotations.write_text("\n".join(annotations.read_text().splitlines()[:-1]))
    with pytest.raises(SparsightError, match=r"images lists 3 images, val_annotations.txt 2; e.g. 'val_2.JPEG'"):
        manifest("tiny-imagenet", tmp_path / "t", tmp_path / "m.parquet")


# --- pictures of every kind


def folder(path: Path) -> Path:
    for number, label in enumerate(("\u00e9t\u00e9", "\u732b")):
        for i in range(8):
            put(path / label / f"same name {i}.jpg", 100 * number + i)
    return path


def test_non_ascii_paths_and_two_images_with_one_name(tmp_path: Path) -> None:
    root = folder(tmp_path / "\u00fcber")
    put(root / "\u732b" / "same name 0.png", 777, "PNG")
    found = manifest("folder", root, tmp_path / "m.parquet")
    assert len(found.table) == 17 and len(set(found.table["uri"].to_pylist())) == 17
    assert found.classes == ["\u00e9t\u00e9", "\u732b"]


BROKEN = {
    "cut.jpg": lambda: picture(1, (64, 64), "JPEG")[:600],
    "empty.png": lambda: b"",
    "text.png": lambda: b"this is not a picture",
    "huge.png": lambda: huge(20_000, 20_000),
}


def huge(width: int, height: int) -> bytes:
    Image.new("1", (width, height)).save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_picture_stops_the_stage_or_is_left_out_and_listed(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = folder(tmp_path / "f")
    bad = root / "\u732b" / name
    bad.write_bytes(BROKEN[name]())
    with pytest.raises(SparsightError, match=rf"image .*{name}: cannot be decoded \(.*\); repair or remove it"):
        manifest("folder", root, tmp_path / "m.parquet")
    found = manifest("folder", root, tmp_path / "m.parquet", on_error="skip")
    assert len(found.table) == 16
    (skipped,) = found.about["skipped"]
    assert skipped["uri"] == bad.as_posix() and "cannot be decoded" in skipped["reason"]
    assert f"skipped: image {bad.as_posix()}" in capsys.readouterr().err


def test_files_that_are_no_pictures_are_named_in_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder(tmp_path / "f")
    (root / "\u732b" / "notes.txt").write_text("hello")
    (root / "stray.png").write_bytes(picture(0))
    manifest("folder", root, tmp_path / "m.parquet")
    assert "2 entries of" in capsys.readouterr().err


def test_a_missing_file_of_a_list_is_named(tmp_path: Path) -> None:
    expected = cub(tmp_path)
    Path(next(iter(expected))).unlink()
    with pytest.raises(SparsightError, match=r"bird_0.jpg: No such file or directory; put it back"):
        manifest("cub200", tmp_path, tmp_path / "m.parquet")
    found = manifest("cub200", tmp_path, tmp_path / "m.parquet", on_error="skip")
    assert len(found.about["skipped"]) == 1 and len(found.table) == 15


def test_duplicates_across_splits_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [(split, label, i) for split in ("train", "val", "test") for label in ("a", "b") for i in range(4)]
    for seed, (split, label, i) in enumerate(files):
        put(tmp_path / "f" / split / label / f"{i}.png", 100 + seed, "PNG")
    same = picture(3)
    (tmp_path / "f" / "train" / "a" / "0.png").write_bytes(same)
    (tmp_path / "f" / "test" / "b" / "1.png").write_bytes(same)
    (tmp_path / "f" / "train" / "a" / "1.png").write_bytes(b := picture(4))
    (tmp_path / "f" / "train" / "a" / "2.png").write_bytes(b)
    found = manifest("folder", tmp_path / "f", tmp_path / "m.parquet")
    root = (tmp_path / "f").as_posix()
    assert found.about["duplicates"] == [[f"{root}/train/a/0.png (train)", f"{root}/test/b/1.png (test)"]]
    assert "1 images are in more than one split" in capsys.readouterr().err


def test_one_pixel_and_108_megapixels_are_pictures_like_others() -> None:
    assert RGB.pixels(decode_file(picture(0, (1, 1)))).shape == (8, 8, 3)
    assert RGB.pixels(decode_file(huge(12_000, 9_000))).shape == (8, 8, 3)


def encoded(image: Image.Image, form: str, **options: Any) -> np.ndarray:
    image.save(buffer := io.BytesIO(), form, **options)
    return decode_file(buffer.getvalue())


def test_every_mode_becomes_eight_bits_of_grey_or_rgb() -> None:
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8, 1) * 4
    assert np.array_equal(encoded(Image.fromarray(grey[:, :, 0]), "PNG"), grey)
    wide = Image.fromarray(grey[:, :, 0].astype(np.uint16) * 257)
    for form in ("PNG", "TIFF"):
        assert np.array_equal(encoded(wide, form), grey), "16 bits are scaled, not clipped"
    one = encoded(Image.fromarray(grey[:, :, 0]).point(lambda v: 255 * (v > 100), "1"), "PNG")
    assert one.shape == (8, 8, 1) and set(np.unique(one)) == {0, 255}
    color = np.concatenate([grey, grey[::-1], grey.transpose(1, 0, 2)], axis=-1)
    for options in ({"form": "PNG"}, {"form": "WEBP", "lossless": True}):
        assert np.array_equal(encoded(Image.fromarray(color), **options), color)
    rgba = np.dstack([color, np.full((8, 8), 255, np.uint8)])
    rgba[0, :, 3] = 0
    flat = encoded(Image.fromarray(rgba), "PNG")
    assert (flat[0] == 255).all() and np.array_equal(flat[1:], color[1:]), "transparent is white"
    la = np.concatenate([grey, rgba[:, :, 3:]], axis=-1)
    assert encoded(Image.fromarray(la, "LA"), "PNG").shape == (8, 8, 1)
    palette = Image.fromarray(color).quantize(64)
    assert encoded(palette, "PNG").tobytes() == palette.convert("RGB").tobytes()
    assert encoded(palette, "PNG", transparency=bytes(range(64))).shape == (8, 8, 3)
    cmyk = Image.fromarray(color).convert("CMYK")
    assert np.abs(encoded(cmyk, "TIFF").astype(int) - color).max() <= 1
    with pytest.raises(ValueError, match="32-bit pixels"):
        encoded(Image.fromarray(grey[:, :, 0].astype(np.float32)), "TIFF")


def test_exif_orientation_is_followed() -> None:
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, 8:] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned 90 degrees clockwise
    turned = encoded(Image.fromarray(pixels), "PNG", exif=exif)
    assert turned.shape == (16, 8, 3) and (turned[:8] == 0).all() and (turned[8:] == 255).all()


@settings(max_examples=150, deadline=None)
@given(
    form=st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "PPM", "DDS"]),
    cut=st.integers(0, 400),
    edits=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=5),
)
def test_damaged_files_raise_nothing_but_what_is_documented(form: str, cut: int, edits: list[tuple[int, int]]) -> None:
    data = bytearray(picture(0, form=form))
    for place, value in edits:
        data[place % len(data)] = value
    try:
        image = decode_file(bytes(data[: len(data) - cut] if cut else data))
    except (OSError, ValueError):
        return
    assert is_picture(image)


# --- the data at hand


def test_the_real_parquet_tables_are_read_by_the_documented_lines(tmp_path: Path) -> None:
    root = Path(os.environ.get("SPARSIGHT_DATA", "/nowhere"))
    if not root.is_dir():
        pytest.skip("needs the real tables; set SPARSIGHT_DATA to the folder that holds groceries/")
    found = manifest("parquet", root / "groceries", tmp_path / "m.parquet")
    assert [len(found.split(part)) for part in ("train", "val", "test")] == [675, 57, 1322]
    assert found.classes[:2] == ["Anjou", "Cantaloupe"] and len(found.classes) == 14
    assert found.split("val").batch(slice(0, 4), RGB).shape == (4, 8, 8, 3)
