"""The manifest as a file: its order, its row groups, what is read of it, and images without labels."""

import dataclasses
import json
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from source_files import RGB, manifest, put

from sparsight import config
from sparsight.common.errors import SparsightError
from sparsight.common.seeds import derive_seed
from sparsight.images import table
from sparsight.images.manifest import Manifest, write_manifest
from sparsight.images.sources import SOURCES, SPLITS, Item
from sparsight.images.sources.folders import Folder
from sparsight.images.split import Pixels
from sparsight.images.workers import stream

N = 48


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i in range(N):
        put(tmp_path / "images" / "ab"[i % 2] / f"{i}.png", i, "PNG")
    return tmp_path / "images"


class Some(Folder):
    """A folder of which some images have no label, and some have further ones."""

    def items(self) -> list[Item]:
        return [
            dataclasses.replace(
                item, label_name=None if i % 3 == 0 else item.label_name, columns={"colour": "red"} if i % 2 else {}
            )
            for i, item in enumerate(super().items())
        ]


@pytest.fixture
def partly(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    monkeypatch.setitem(SOURCES, "folder", Some)
    return manifest("folder", folder, tmp_path / "m.parquet")


def groups(path: Path) -> list[list[str]]:
    file = pq.ParquetFile(path)
    return [file.read_row_group(i)["split"].to_pylist() for i in range(file.num_row_groups)]


@pytest.mark.parametrize("size", [2**16, 7])
def test_rows_of_a_split_are_those_of_one_seeded_permutation(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "ROW_GROUP", size)
    write_manifest(config.Images(), 3, {}, 2, tmp_path / "m.parquet")
    found = Manifest(tmp_path / "m.parquet")
    items = SOURCES["mnist-5000"](None).items()
    split_of = {row["image_id"]: row["split"] for row in found.table.to_pylist()}
    order = np.random.default_rng(derive_seed(3, "images", "order")).permutation(len(items))
    for name in SPLITS:
        expected = [i for i in order if split_of[i] == name]
        split = found.split(name)
        assert split.uris(slice(None)) == [items[i].uri for i in expected]
        assert split.labels.tolist() == [int(str(items[i].label_name)) for i in expected]
        assert found.table.filter(pc.equal(found.table["split"], name))["image_id"].to_pylist() == expected


def test_a_row_group_is_small_and_holds_one_split(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "ROW_GROUP", 8)
    manifest("folder", folder, tmp_path / "m.parquet")
    found = groups(tmp_path / "m.parquet")
    assert all(len(set(group)) == 1 and len(group) <= 8 for group in found)
    assert [group[0] for group in found] == ["train"] * 3 + ["val"] * 2 + ["test"] * 2
    monkeypatch.setattr(table, "ROW_GROUP", 2**16)
    manifest("folder", folder, tmp_path / "m.parquet")
    assert [group[0] for group in groups(tmp_path / "m.parquet")] == ["train", "val", "test"]


@pytest.fixture
def small_groups(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Manifest:
    """A manifest with three row groups of train."""
    monkeypatch.setattr(table, "ROW_GROUP", 8)
    return manifest("folder", folder, tmp_path / "m.parquet")


@pytest.mark.parametrize(
    "rows",
    [slice(None), slice(5, 19), slice(20, 3, -2), slice(4, 4), np.array([23, 0, 8, 7, 8, 16]), np.array([], np.int64)],
    ids=str,
)
def test_any_rows_are_those_of_the_whole_table(rows: Any, small_groups: Manifest) -> None:
    whole = small_groups.table.filter(pc.equal(small_groups.table["split"], "train"))["uri"].to_pylist()
    assert small_groups.split("train").uris(rows) == np.array(whole)[rows].tolist()


def test_rows_that_are_not_there(small_groups: Manifest) -> None:
    train = small_groups.split("train")
    for row in (-1, len(train)):
        with pytest.raises(IndexError, match=f"images from {row} to {row}; there are 24 in train"):
            train.uris(np.array([row]))


def test_a_part_s_job_reads_its_own_row_groups_only(small_groups: Manifest, tmp_path: Path) -> None:
    """All other bytes of the rows are destroyed; the footer and one row group are enough."""
    expected = list(small_groups.split("train").stream([slice(8, 12), slice(12, 16)], RGB))
    path = tmp_path / "m.parquet"
    file = pq.ParquetFile(path)
    data, own = bytearray(path.read_bytes()), file.metadata.row_group(1)
    starts = [own.column(i).dictionary_page_offset or own.column(i).data_page_offset for i in range(own.num_columns)]
    first, last = min(starts), min(starts) + sum(own.column(i).total_compressed_size for i in range(own.num_columns))
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    data[4:first], data[last:footer] = bytes(first - 4), bytes(footer - last)
    path.write_bytes(data)
    train = Manifest(path).split("train")
    assert len(train) == 24
    for found, before in zip(train.stream([slice(8, 12), slice(12, 16)], RGB), expected, strict=True):
        assert np.array_equal(found, before)
    with pytest.raises((OSError, pa.ArrowException)):
        train.uris(slice(16, 17))


def count(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The row groups that are read from now on."""
    reads: list[int] = []
    plain = pq.ParquetFile.read_row_groups

    def counted(self: pq.ParquetFile, some: Iterable[int], **options: Any) -> pa.Table:
        reads.extend(some)
        return plain(self, some, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", counted)
    return reads


def test_reading_in_order_reads_each_row_group_once_and_few_stay_in_memory(
    small_groups: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, reads = small_groups.split("train"), count(monkeypatch)
    kept = table.SplitTable(tmp_path / "m.parquet", "train", keep=2)
    assert sum(map(len, dataclasses.replace(train, table=kept).batches(RGB, 5, threads=2))) == 24
    assert reads == [0, 1, 2]
    assert list(kept._read) == [1, 2]


def test_pictures_in_random_order_read_each_row_group_once(
    small_groups: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsight.images.split._IN_MEMORY", 0)
    train = small_groups.split("train")
    pictures, orders = (
        train.batch(slice(None), RGB),
        np.random.default_rng(0).permuted(np.tile(np.arange(24), (3, 1)), axis=1),
    )
    few = dataclasses.replace(train, table=table.SplitTable(tmp_path / "m.parquet", "train", keep=1))
    reads, pixels = count(monkeypatch), Pixels(few, RGB, 1)
    for rows in orders:
        assert np.array_equal(pixels[rows], pictures[rows])
    assert reads == [0, 1, 2]


def test_a_split_pickles_as_a_path_and_workers_read_the_file_themselves(small_groups: Manifest) -> None:
    train = small_groups.split("train")
    empty = len(pickle.dumps(train))
    assert len(train.labels) == 24 and train.uris(slice(None))
    assert len(pickle.dumps(train)) == empty < 1000
    again = pickle.loads(pickle.dumps(train))
    assert again.uris(slice(None)) == train.uris(slice(None)) and again.labels.tolist() == train.labels.tolist()
    windows = [slice(0, 15), slice(15, 24)]
    for own, theirs in zip(train.stream(windows, RGB), stream(train, windows, RGB, threads=1, workers=2), strict=True):
        assert np.array_equal(own, theirs)


def test_a_table_of_mixed_row_groups_is_refused(small_groups: Manifest, tmp_path: Path) -> None:
    pq.write_table(small_groups.table, tmp_path / "mixed.parquet")
    with pytest.raises(SparsightError, match=r"mixed.parquet: a row group holds images of several splits; run the im"):
        Manifest(tmp_path / "mixed.parquet").split("train")


def test_images_without_a_label_have_null_in_the_table_and_are_split_like_a_class(
    partly: Manifest, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = partly.table.to_pylist()
    assert {(row["label"], row["label_name"]) for row in rows} == {(0, "a"), (1, "b"), (None, None)}
    assert partly.classes == ["a", "b"]
    assert partly.about["unlabelled"] == {"train": 8, "val": 4, "test": 4}
    for name in SPLITS:
        split = partly.split(name)
        assert (split.labels < 0).sum() == partly.about["unlabelled"][name]
        names = [None if label < 0 else partly.classes[label] for label in split.labels]
        assert split.column("label_name") == names


def test_the_draw_of_classes_does_not_depend_on_images_without_a_label(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def split_of(found: Manifest) -> dict[str, str]:
        return {row["uri"]: row["split"] for row in found.table.to_pylist() if row["label_name"] == "b"}

    plain = split_of(manifest("folder", folder, tmp_path / "m.parquet"))

    class OnlyB(Folder):
        def items(self) -> list[Item]:
            return [dataclasses.replace(i, label_name="b" if i.label_name == "b" else None) for i in super().items()]

        def class_names(self) -> list[str]:
            return ["b"]

    monkeypatch.setitem(SOURCES, "folder", OnlyB)
    assert split_of(manifest("folder", folder, tmp_path / "n.parquet")) == plain


def test_a_set_without_labels_has_no_classes(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class NoLabels(Folder):
        def items(self) -> list[Item]:
            return [dataclasses.replace(item, label_name=None) for item in super().items()]

    monkeypatch.setitem(SOURCES, "folder", NoLabels)
    found = manifest("folder", folder, tmp_path / "m.parquet")
    assert found.classes == [] and {name: len(found.split(name)) for name in SPLITS} == found.about["unlabelled"]
    assert found.about["unlabelled"] == {"train": 24, "val": 12, "test": 12}
    assert found.about["label_conflicts"] == []
    types = {field.name: str(field.type) for field in pq.read_schema(tmp_path / "m.parquet")}
    assert types["label"] == "int32" and types["label_name"] == "string"


def test_equal_images_conflict_only_if_both_have_a_label(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unlabelled, labelled, other = (sorted((folder / "a").iterdir())[i] for i in (0, 1, 2))
    for file in (labelled, other):
        file.write_bytes(unlabelled.read_bytes())
    twin = sorted((folder / "b").iterdir())[1]
    monkeypatch.setitem(SOURCES, "folder", Some)
    assert manifest("folder", folder, tmp_path / "m.parquet").about["label_conflicts"] == []
    twin.write_bytes(unlabelled.read_bytes())
    (group,) = manifest("folder", folder, tmp_path / "m.parquet").about["label_conflicts"]
    assert group == [f"{labelled.as_posix()} (a)", f"{other.as_posix()} (a)", f"{twin.as_posix()} (b)"]


def test_further_label_columns_are_kept_by_name(partly: Manifest) -> None:
    test = partly.split("test")
    by_uri = {item.uri: item.columns.get("colour") for item in Some(partly.about["path"]).items()}
    assert test.column("colour") == [by_uri[uri] for uri in test.uris(slice(None))]
    assert {"red", None} == set(test.column("colour"))
    with pytest.raises(SparsightError, match="images has no label column 'color'; use label_name, colour"):
        test.column("color")


def test_a_label_column_cannot_take_a_name_of_the_manifest(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Taken(Folder):
        def items(self) -> list[Item]:
            return [dataclasses.replace(item, columns={"split": "x"}) for item in super().items()]

    monkeypatch.setitem(SOURCES, "folder", Taken)
    with pytest.raises(SparsightError, match="the source has a label column 'split', a name that the manifest needs"):
        manifest("folder", folder, tmp_path / "m.parquet")


def test_the_metadata_are_those_of_the_file(small_groups: Manifest, tmp_path: Path) -> None:
    about = json.loads(pq.read_schema(tmp_path / "m.parquet").metadata[b"sparsight"])
    assert about == small_groups.about and len(small_groups) == N
