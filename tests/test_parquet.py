"""Images in Parquet tables."""

import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import data_folder
from source_files import RGB, Expected, check, count_reads, counts, manifest, picture, table

from sparsight import config
from sparsight.common.errors import SparsightError
from sparsight.images.sources import SOURCES, Item, open_source


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
    for wrong in (5, -2):
        table(tmp_path / "t.parquet", [(picture(0), 0), (picture(1), wrong)], ["a", "b"])
        with pytest.raises(SparsightError, match=rf"t.parquet row 1 has no class \({wrong}\); repair it"):
            manifest("parquet", tmp_path / "t.parquet", tmp_path / "m.parquet")
    (tmp_path / "t.parquet").write_bytes((tmp_path / "t.parquet").read_bytes()[:-20])
    with pytest.raises(SparsightError, match=r"t.parquet: not readable as Parquet"):
        manifest("parquet", tmp_path / "t.parquet", tmp_path / "m.parquet")


def write(path: Path, columns: dict[str, Any], features: dict[str, Any] | None = None) -> Path:
    """A table of pictures with these columns beside them."""
    n = len(next(iter(columns.values()), [0] * 4))
    images = {"image": [{"bytes": picture(i), "path": None} for i in range(n)]} if "image" not in columns else {}
    about = {"huggingface": json.dumps({"info": {"features": features}})} if features else None
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({**images, **columns}).replace_schema_metadata(about), path)
    return path


def classes(*names: str) -> dict[str, Any]:
    return {"_type": "ClassLabel", "names": list(names)}


def items(path: Path, **options: str) -> list[Item]:
    return open_source(config.Images(source="parquet", path=str(path), **options)).items()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("columns", "features", "expected", "names"),
    [
        ({}, None, [None] * 4, []),
        ({"label": [1, -1, 0, None]}, {"label": classes("hen", "cow")}, ["cow", None, "hen", None], ["hen", "cow"]),
        ({"label": [-1, None, -1]}, {"label": classes("hen", "cow")}, [None] * 3, []),
        ({"label": [2, -1, None]}, None, ["2", None, None], ["0", "1", "2"]),
        ({"label": pa.nulls(3)}, None, [None] * 3, []),
        ({"label": ["cow", None, "ape"]}, None, ["cow", None, "ape"], ["ape", "cow"]),
        ({"label": pa.array(["cow", "ape", None]).dictionary_encode()}, None, ["cow", "ape", None], ["ape", "cow"]),
        ({"label": [True, False]}, None, ["1", "0"], ["0", "1"]),
        ({"breed": [1, 0]}, {"breed": classes("hen", "cow")}, ["cow", "hen"], ["hen", "cow"]),
    ],
)
def test_rows_may_have_no_label(
    columns: dict[str, Any],
    features: dict[str, Any] | None,
    expected: list[str | None],
    names: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = SOURCES["parquet"](str(write(tmp_path / "t.parquet", columns, features)))
    assert [item.label_name for item in source.items()] == expected and source.class_names() == names
    n = expected.count(None)
    tables, rows = counts(log := capsys.readouterr().err)
    assert tables["tables"] == 1 and rows == {"rows": len(expected), "images": len(expected)}
    pickle.loads(pickle.dumps(source)).read("t.parquet:0")
    assert not capsys.readouterr().err, "later stages, which read images, do not count them again"
    assert (f"images, {n} of them without a label" in log) == (n > 0)


def test_a_test_table_without_a_label_column_is_unlabelled_but_not_one_table_of_a_split(tmp_path: Path) -> None:
    write(tmp_path / "p" / "test-0.parquet", {})
    write(tmp_path / "p" / "train-0.parquet", {"label": ["cow", "hen"]})
    found = [(item.split, item.label_name) for item in items(tmp_path / "p")]
    assert found == [("test", None)] * 4 + [("train", "cow"), ("train", "hen")]
    write(tmp_path / "p" / "train-1.parquet", {"lable": ["cow", "hen"]})
    with pytest.raises(SparsightError, match=r"train-1.parquet has no column 'label', unlike train-0.parquet; repair"):
        items(tmp_path / "p")


def test_a_table_of_no_split_beside_tables_of_splits_is_refused(tmp_path: Path) -> None:
    for name in ("train", "testing", "unsupervised"):
        write(tmp_path / f"{name}.parquet", {"label": ["cow", "hen"]})
    with pytest.raises(SparsightError, match=r"unsupervised.parquet is of no split \(train, .*\), unlike other tables"):
        items(tmp_path)


def test_further_label_columns_are_kept_by_name_as_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    columns = {
        "label": [0, 1, 1], "colour": [1, -1, 0], "site": ["north", None, "south"], "year": [1999, 2004, -1],
        "caption": ["short", "x" * 101, None], "box": [[0.5, 0.5]] * 3, "score": [0.5] * 3, "image_id": [7, 8, 9],
    }  # fmt: skip
    features = {"label": classes("hen", "cow"), "colour": classes("red", "blue")}
    write(tmp_path / "train-0.parquet", columns, features)
    write(tmp_path / "train-1.parquet", {"label": [0], "site": ["east"]}, {"label": classes("hen", "cow")})
    found = items(tmp_path)
    assert [item.label_name for item in found] == ["hen", "cow", "cow", "hen"]
    assert [dict(item.columns) for item in found] == [
        {"colour": "blue", "site": "north", "year": "1999", "source_image_id": "7"},
        {"year": "2004", "source_image_id": "8"},
        {"colour": "red", "site": "south", "year": "-1", "source_image_id": "9"},
        {"site": "east"},
    ]
    assert "not kept are the columns caption, box, score; kept are class labels" in capsys.readouterr().err
    write(tmp_path / "train-0.parquet", {**columns, "source_image_id": [1, 2, 3]}, features)
    with pytest.raises(SparsightError, match="'image_id' is kept as 'source_image_id', which exists; rename one"):
        items(tmp_path)


def test_the_configuration_chooses_the_label_among_several(tmp_path: Path) -> None:
    features = {"style": classes("old", "new"), "genre": classes("portrait", "still life")}
    path = write(tmp_path / "t.parquet", {"style": [0, 1], "genre": [1, 0]}, features)
    with pytest.raises(SparsightError, match=r"several label columns \(style, genre\); choose one with images"):
        items(path)
    found = items(path, label_column="genre")
    assert [(item.label_name, item.columns) for item in found] == [
        ("still life", {"style": "old"}), ("portrait", {"style": "new"})
    ]  # fmt: skip
    source = open_source(config.Images(source="parquet", path=str(path), label_column="genre"))
    assert pickle.loads(pickle.dumps(source)).items() == found
    with pytest.raises(SparsightError, match=r"no label column 'epoch'; there are: style, genre"):
        items(path, label_column="epoch")
    with pytest.raises(SparsightError, match=r"label_column: would be ignored, because only source: parquet or"):
        config.Images(source="folder", path=str(tmp_path), label_column="genre")


@pytest.mark.parametrize("label", [[0.0, 1.0, None], [[0], [1], [0]]])
def test_a_label_column_of_another_type_is_refused(label: list[Any], tmp_path: Path) -> None:
    with pytest.raises(SparsightError, match=r"t.parquet: the label column 'label' is .*; store whole numbers or text"):
        items(write(tmp_path / "t.parquet", {"label": label}))


def test_tables_that_name_the_classes_in_another_order_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "test.parquet", {"label": [0]}, {"label": classes("hen", "cow")})
    write(tmp_path / "train.parquet", {"label": [0]}, {"label": classes("cow", "hen")})
    with pytest.raises(SparsightError, match=r"train.parquet has other class names in 'label'; repair it"):
        items(tmp_path)


@pytest.mark.parametrize("cell", [None, {"bytes": None, "path": None}])
def test_an_empty_image_cell_is_named_as_such(cell: dict[str, None] | None, tmp_path: Path) -> None:
    images = [{"bytes": picture(i), "path": None} for i in range(24)]
    write(tmp_path / "t.parquet", {"image": [*images, cell], "label": [0] * 25})
    with pytest.raises(SparsightError, match=r"t.parquet:24: the table's cell is empty: it holds neither bytes nor"):
        manifest("parquet", tmp_path / "t.parquet", tmp_path / "m.parquet")


def test_the_real_parquet_tables_are_read_by_the_documented_lines(tmp_path: Path) -> None:
    found = manifest("parquet", data_folder() / "groceries", tmp_path / "m.parquet")
    assert [len(found.split(part)) for part in ("train", "val")] == [675, 57]
    assert len(set(found.table["sha256"].to_pylist())) == 675 + 57 + 661, (
        "of the recorded test table each row stands twice"
    )
    assert found.classes[:2] == ["Anjou", "Cantaloupe"] and len(found.classes) == 14
    assert found.split("val").batch(slice(0, 4), RGB).shape == (4, 8, 8, 3)
