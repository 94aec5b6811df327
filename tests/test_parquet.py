"""Images in Parquet tables."""

import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import data_folder
from source_files import RGB, Expected, check, count_reads, manifest, picture, table

from sparsight.common.errors import SparsightError
from sparsight.images.sources import SOURCES


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


def test_splits_by_the_usual_names_of_files_and_folders_in_any_case(tmp_path: Path) -> None:
    files = {
        "Training.parquet": "train", "default/TRAIN/0000.parquet": "train", "Valid-0.parquet": "val",
        "default/validation/0000.parquet": "val", "testing_1.parquet": "test", "Test/part.parquet": "test",
    }  # fmt: skip
    expected: Expected = {}
    for number, (file, split) in enumerate(files.items()):
        table(tmp_path / "p" / file, [(picture(100 * number + i), i % 2) for i in range(4)], ["a", "b"])
        expected |= {f"{file}:{i}": ("ab"[i % 2], split) for i in range(4)}
    check("parquet", tmp_path / "p", tmp_path, expected)


def test_one_parquet_file_without_metadata_or_splits(tmp_path: Path) -> None:
    table(tmp_path / "all.parquet", [(picture(i), i % 3) for i in range(30)], None)
    expected: Expected = {f"all.parquet:{i}": (str(i % 3), None) for i in range(30)}
    check("parquet", tmp_path / "all.parquet", tmp_path, expected)


@pytest.mark.parametrize("n_windows", [1, 4])
def test_parquet_reads_each_row_group_once_per_window_of_a_random_order(
    n_windows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table(tmp_path / "all.parquet", [(picture(i), 0) for i in range(200)], ["a"])
    metadata = pq.ParquetFile(tmp_path / "all.parquet").metadata
    n_bytes = sum(metadata.row_group(i).total_byte_size for i in range(40))
    monkeypatch.setattr("sparsight.images.sources.parquet._WINDOW_BYTES", n_bytes // n_windows + 1)
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


def test_the_real_parquet_tables_are_read_by_the_documented_lines(tmp_path: Path) -> None:
    found = manifest("parquet", data_folder() / "groceries", tmp_path / "m.parquet")
    assert [len(found.split(part)) for part in ("train", "val")] == [675, 57]
    assert len(set(found.table["sha256"].to_pylist())) == 675 + 57 + 661, (
        "of the recorded test table each row stands twice"
    )
    assert found.classes[:2] == ["Anjou", "Cantaloupe"] and len(found.classes) == 14
    assert found.split("val").batch(slice(0, 4), RGB).shape == (4, 8, 8, 3)
