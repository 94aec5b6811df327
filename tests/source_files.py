"""Picture files and the manifests of image sources, for the tests of both."""

import hashlib
import io
import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from sparsight import config
from sparsight.images.manifest import Manifest, write_manifest
from sparsight.images.preprocess import Preprocess
from sparsight.images.sources import SOURCES, Source

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


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The row groups that are read from now on."""
    reads: list[int] = []
    plain = pq.ParquetFile.read_row_group

    def counted(self: pq.ParquetFile, i: int, **options: Any) -> pa.Table:
        assert options["columns"] == ["image"], "nothing but the images is read"
        reads.append(i)
        return plain(self, i, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    monkeypatch.setattr("sparsight.images.sources.parquet._CACHE_BYTES", 1)
    return reads


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


JUNK = ("._{}", ".DS_Store", "Thumbs.db", "desktop.ini", "__MACOSX/{}", ".Trash-1000/files/{}")
"""What file managers and notebooks leave in folders; {} stands for the name of a file there."""


def litter(root: Path) -> int:
    """Leave hidden files, with images among them, in every folder under ``root``; their number."""
    count = 0
    for folder in [root, *(path for path in sorted(root.rglob("*")) if path.is_dir())]:
        file = next((path.name for path in sorted(folder.iterdir()) if path.is_file()), "image_0001.jpg")
        for name in JUNK:
            put(folder / name.format(file), 7000 + count)
            count += 1
    return count


def counts(log: str) -> list[dict[str, int]]:
    """What the lines of the log count: files or rows, and what they are. Checks that every line adds up."""
    found = []
    for total, unit, rest in re.findall(r"^images: .*: (\d+) (files|rows): (.*)$", log, re.MULTILINE):
        parts = {
            name: int(n) for n, name in re.findall(r"(\d+) (images|tables|shards|label files|hidden|other)\b", rest)
        }
        assert sum(parts.values()) == int(total)
        found.append({unit: int(total), **parts})
    return found
