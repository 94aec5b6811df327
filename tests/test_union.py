"""Several data sets as one image source."""

import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from source_files import RGB, count_reads, cub, manifest, picture, put, table

from sparsight import config
from sparsight.backbones.prompts import templates_of
from sparsight.common.errors import SparsightError
from sparsight.config import schema
from sparsight.images.manifest import Manifest
from sparsight.images.sources import SOURCES
from sparsight.images.workers import stream


def folder(root: Path, classes: tuple[str, ...], per_class: int = 8) -> Path:
    for number, label in enumerate(classes):
        for i in range(per_class):
            put(root / label / f"{i}.png", 100 * number + i, "PNG")
    return root


def rows(found: Manifest, member: int) -> dict[str, tuple[str, str]]:
    """Label and split of a member's images, by the member's uri."""
    prefix = f"{member}:"
    return {
        row["uri"].removeprefix(prefix): (row["label_name"], row["split"])
        for row in found.table.to_pylist()
        if row["uri"].startswith(prefix)
    }


@pytest.fixture
def members(tmp_path: Path) -> dict[str, Path]:
    """A folder without splits, CUB-200 with train and test, a table with all three; two of them know a crow."""
    names = ["owl", "crow"]
    for number, split in enumerate(("train", "val", "test")):
        table(tmp_path / "p" / f"{split}.parquet", [(picture(1000 * number + i), i % 2) for i in range(12)], names)
    cub(tmp_path / "cub")
    return {"folder": folder(tmp_path / "f", ("crow", "jay")), "cub200": tmp_path / "cub", "parquet": tmp_path / "p"}


def path_of(members: dict[str, Path]) -> str:
    return " + ".join(f"{source}:{path}" for source, path in members.items())


def test_each_member_has_the_classes_splits_and_pictures_that_it_has_alone(
    members: dict[str, Path], tmp_path: Path
) -> None:
    found = manifest("union", path_of(members), tmp_path / "union")
    assert found.classes == ["crow", "jay", "Black footed Albatross", "Laysan Albatross", "owl"]
    alone = {source: manifest(source, path, tmp_path / source) for source, path in members.items()}
    for number, one in enumerate(alone.values()):
        expected = {row["uri"]: (row["label_name"], row["split"]) for row in one.table.to_pylist()}
        assert rows(found, number) == expected
    assert Counter(split for _, split in rows(found, 1).values()) == {"train": 8, "val": 4, "test": 4}, "val drawn"
    train = found.split("train")
    pictures = {uri: train.picture(row) for row, uri in enumerate(train.uris(slice(None)))}
    for number, one in enumerate(alone.values()):
        split = one.split("train")
        for row, uri in enumerate(split.uris(slice(None))):
            assert np.array_equal(pictures[f"{number}:{uri}"], split.picture(row))


def test_pixels_that_only_their_own_member_can_decode(tmp_path: Path) -> None:
    source = SOURCES["union"](f"mnist-5000 + folder:{folder(tmp_path / 'f', ('9', 'owl'))}")
    assert source.class_names() == [*map(str, range(10)), "owl"]
    shapes = {uri: source.decode(uri, source.read(uri)).shape for uri in ("0:mnist-5000:7", source.items()[-1].uri)}
    assert list(shapes.values()) == [(28, 28, 1), (8, 8, 3)]


def test_workers_open_their_own_members(members: dict[str, Path], tmp_path: Path) -> None:
    found = manifest("union", path_of(members), tmp_path / "union").split("test")
    again = pickle.loads(pickle.dumps(found.source))
    assert [item.uri for item in again.items()] == [item.uri for item in found.source.items()]
    windows = [slice(0, 4), slice(4, len(found))]
    for own, theirs in zip(found.stream(windows, RGB), stream(found, windows, RGB, threads=1, workers=1), strict=True):
        assert np.array_equal(own, theirs)


def test_a_table_in_a_union_is_still_read_a_window_at_a_time(
    members: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = manifest("union", path_of(members), tmp_path / "union").split("train")
    reads = count_reads(monkeypatch)
    assert sum(map(len, train.batches(RGB, 3))) == len(train)
    groups = pq.ParquetFile(members["parquet"] / "train.parquet").num_row_groups
    assert len(reads) == groups, "each row group once, however mixed the images are"


def test_a_missing_image_is_named_with_its_member(members: dict[str, Path], tmp_path: Path) -> None:
    found = manifest("union", path_of(members), tmp_path / "union").split("train")
    row, uri = next((row, uri) for row, uri in enumerate(found.uris(slice(None))) if uri.startswith("1:"))
    Path(uri.partition(":")[2]).unlink()
    with pytest.raises(SparsightError, match=rf"image {uri}: No such file or directory; put it back"):
        found.picture(row)


def test_prompts_of_a_union_are_the_plain_ones() -> None:
    assert templates_of("union") == templates_of("tiny-imagenet") == ("a photo of a {}.",)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (None, "images.path: source 'union' needs path"),
        ("folder:here", "a union takes '<source>:<path> + <source>:<path>', with spaces around the +, not 'folder"),
        ("folder:here+folder:here", "with spaces around the +"),
        ("folder:here + ", "with spaces around the +"),
        ("folder:here + :here", "with spaces around the +"),
        ("folder:here, folder:here", "with spaces around the +"),
        ("foldre:here + folder:here", "images.path: the member foldre.source: 'foldre' is not one of mnist-5000, colo"),
        ("folder:here + cub200:gone", "images.path: the member cub200.path: there is no folder 'gone'; give the"),
        ("folder:here + parquet:gone", "images.path: the member parquet.path: there is no 'gone'; give a .parquet"),
        ("folder:here + cub200", "images.path: the member cub200.path: source 'cub200' needs path"),
        ("folder:here + mnist-5000:here", "the member mnist-5000.path: source 'mnist-5000' takes no path"),
        ("folder:here + union:folder:here", "a union is no member of a union; list the members of both in one"),
    ],
)
def test_mistakes_are_found_before_any_work(
    path: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    with pytest.raises(SparsightError) as caught:
        schema.parse(config.Images, {"source": "union", "path": path}, "images")
    assert message in str(caught.value) and "\n" not in str(caught.value)
