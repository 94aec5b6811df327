"""Data sets that Hugging Face's ``datasets`` has saved or cached."""

import json
import pickle
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value, load_dataset
from source_files import manifest, picture, put, table
from source_layouts import hugging_face

from sparsight.common.errors import SparsightError
from sparsight.images.sources import SOURCES, Source
from sparsight.images.sources.hf_datasets import HuggingFace


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: socket.socket, address: Any) -> None:
        raise AssertionError(f"a source connects to {address}")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def open_source(path: Path) -> Source:
    return SOURCES["hf-datasets"](str(path))


def rows(n: int, start: int = 0, /, **columns: list[Any]) -> dict[str, list[Any]]:
    cells = [{"bytes": picture(start + i), "path": None} for i in range(n)]
    return {"image": cells, "label": [i % 2 for i in range(n)], **columns}


FEATURES = Features({"image": Image(), "label": ClassLabel(names=["b", "a"])})


def save(folder: Path, **splits: dict[str, list[Any]]) -> Path:
    DatasetDict({name: Dataset.from_dict(split, features=FEATURES) for name, split in splits.items()}).save_to_disk(
        folder
    )
    return folder


def test_the_bytes_are_those_stored_and_not_those_of_a_decoded_image(tmp_path: Path) -> None:
    jpeg = picture(7, form="JPEG", quality=30)
    data = Dataset.from_dict(rows(3) | {"image": [{"bytes": jpeg, "path": "x.jpg"}] * 3}, features=FEATURES)
    data.set_format("numpy")
    data.save_to_disk(tmp_path / "one")
    source = open_source(tmp_path / "one")
    assert [source.read(item.uri) for item in source.items()] == [jpeg] * 3


def test_a_dataset_without_splits_has_none(tmp_path: Path) -> None:
    Dataset.from_dict(rows(12), features=FEATURES).save_to_disk(tmp_path / "one")
    found = manifest("hf-datasets", tmp_path / "one", tmp_path / "m.parquet")
    assert found.classes == ["b", "a"], "their order in the data set"
    assert [len(found.split(part)) for part in ("train", "val", "test")] == [4, 4, 4]


def test_minus_one_and_null_are_no_labels(tmp_path: Path) -> None:
    train, test = rows(12), rows(3, 50, label=[-1, None, 1])
    found = manifest("hf-datasets", save(tmp_path / "d", Training=train, DEV=rows(2, 40), testing=test), tmp_path / "m")
    of_test = {r["uri"]: r["label_name"] for r in found.table.to_pylist() if r["split"] == "test"}
    assert of_test == {"testing:0": None, "testing:1": None, "testing:2": "a"}
    assert len(found.split("train")) == 12 and len(found.split("val")) == 2


def test_a_data_set_without_labels_and_a_split_without_them(tmp_path: Path) -> None:
    Dataset.from_dict({"image": rows(3)["image"]}, features=Features({"image": Image()})).save_to_disk(tmp_path / "no")
    source = open_source(tmp_path / "no")
    assert [item.label_name for item in source.items()] == [None] * 3 and source.class_names() == []
    some = {"train": Dataset.from_dict(rows(2), features=FEATURES)}
    some["test"] = some["train"].remove_columns("label")
    DatasetDict(some).save_to_disk(tmp_path / "some")
    source = open_source(tmp_path / "some")
    assert [item.label_name for item in source.items()] == ["b", "a", None, None]


def test_labels_that_are_texts_or_numbers_without_names(tmp_path: Path) -> None:
    for labels, classes in ((["x", "y", "x"], ["x", "y"]), ([10, 9, 10], ["9", "10"])):
        data = Dataset.from_dict(rows(3, label=labels)).cast_column("image", Image())
        data.save_to_disk(tmp_path / str(labels[0]))
        source = open_source(tmp_path / str(labels[0]))
        assert source.class_names() == classes
        assert [item.label_name for item in source.items()] == [str(label) for label in labels]


def test_further_columns_are_kept_as_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = {"note": Value("string"), "split": Value("int32"), "weight": Value("float32"), "caption": Value("string")}
    domain = ClassLabel(names=["photo", "sketch"])
    features = Features({**FEATURES, "domain": domain, **kinds, "depth": Image()})
    further: dict[str, list[Any]] = {
        "domain": [1, -1],
        "note": ["x", None],
        "split": [-1, 2],
        "weight": [0.5, 1.0],
        "caption": ["a", "b" * 101],
    }
    data = Dataset.from_dict(rows(2, **further, depth=rows(2, 9)["image"]), features=features)
    data.save_to_disk(tmp_path / "d")
    first, second = open_source(tmp_path / "d").items()
    assert (first.label_name, first.columns) == ("b", {"domain": "sketch", "note": "x", "source_split": "-1"})
    log = "".join(capsys.readouterr())
    assert "not kept are the columns weight, caption, depth; kept are class labels, whole numbers, and text" in log
    assert (second.label_name, second.columns) == ("a", {"source_split": "2"})


def test_a_data_set_in_the_cache_by_its_folder_or_one_above(tmp_path: Path) -> None:
    for split, n in (("train", 12), ("validation", 4), ("test", 4)):
        table(
            tmp_path / "p" / f"{split}.parquet", [(picture(len(split) * 100 + i), i % 2) for i in range(n)], ["b", "a"]
        )
    load_dataset("parquet", data_dir=str(tmp_path / "p"), cache_dir=str(tmp_path / "cache"))
    (info,) = (tmp_path / "cache").rglob("dataset_info.json")
    for path in (info.parent, tmp_path / "cache" / "parquet"):
        found = manifest("hf-datasets", path, tmp_path / "m.parquet")
        assert found.classes == ["b", "a"] and len(found.split("val")) == len(found.split("test")) == 4
        assert {row["uri"] for row in found.table.to_pylist() if row["split"] == "train"} == {
            f"train:{i}" for i in range(12)
        }
    assert open_source(info.parent).read("test:2") == picture(402)
    about = json.loads(info.read_text())
    about["splits"]["test"]["num_examples"] = 5
    info.write_text(json.dumps(about))
    with pytest.raises(SparsightError, match=r"the split test has 4 of 5 rows; load it again"):
        open_source(info.parent).items()
    next(info.parent.glob("*-test.arrow")).unlink()
    with pytest.raises(SparsightError, match=r"not readable by datasets \(.*\); save it again"):
        open_source(info.parent).items()


def test_cached_rows_that_point_to_files(tmp_path: Path) -> None:
    files = [put(tmp_path / "f" / "train" / "ab"[i % 2] / f"{i}.jpg", i) for i in range(8)]
    load_dataset("imagefolder", data_dir=str(tmp_path / "f"), cache_dir=str(tmp_path / "cache"))
    source = open_source(tmp_path / "cache")
    assert {source.read(item.uri) for item in source.items()} == {Path(file).read_bytes() for file in files}
    assert source.class_names() == ["a", "b"]
    Path(files[0]).unlink()
    with pytest.raises(SparsightError, match=r"image train:0: the row holds a path but no bytes, and .*0.jpg: No such"):
        manifest("hf-datasets", tmp_path / "cache", tmp_path / "m.parquet")


def test_a_row_without_an_image_is_named_or_skipped(tmp_path: Path) -> None:
    folder = save(tmp_path / "d", train=rows(9) | {"image": [*rows(8)["image"], None]}, test=rows(2, 50))
    with pytest.raises(SparsightError, match=r"image train:8: the row holds neither the bytes of an image nor a path"):
        manifest("hf-datasets", folder, tmp_path / "m.parquet")
    found = manifest("hf-datasets", folder, tmp_path / "m.parquet", on_error="skip")
    assert len(found.table) == 10 and [entry["uri"] for entry in found.about["skipped"]] == ["train:8"]
    with pytest.raises(OSError, match="No such image in"):
        open_source(folder).read("train:9")


def test_the_log_counts_the_rows_of_every_split(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    open_source(save(tmp_path / "d", train=rows(3), test=rows(2, 50, label=[-1, 0]))).items()
    log = capsys.readouterr()
    assert "d train: 3 rows: 3 images\n" in log.out + log.err
    assert "d test: 2 rows: 2 images, 1 of them without a label" in log.out + log.err


def test_mistakes_are_told_in_one_line(tmp_path: Path) -> None:
    def message(path: Path) -> str:
        with pytest.raises(SparsightError) as caught:
            open_source(path).class_names()
            open_source(path).items()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "the split 'unsupervised' is none of train, val and test" in message(
        save(tmp_path / "a", train=rows(2), unsupervised=rows(2))
    )
    assert "name one split twice; merge them" in message(save(tmp_path / "b", valid=rows(2), dev=rows(2)))
    (tmp_path / "c").mkdir()
    assert "not the folder of one data set of Hugging Face (has no dataset_info.json)" in message(tmp_path / "c")
    (tmp_path / "s").mkdir()
    for name in ("a", "b"):
        (tmp_path / "s" / name).mkdir()
        (tmp_path / "s" / name / "dataset_info.json").write_text("{}")
    assert "holds 2 of them" in message(tmp_path / "s")
    Dataset.from_dict({"text": ["x"], "label": [0]}).save_to_disk(tmp_path / "d")
    assert "no column of type Image in rows; there are: text (Value), label (Value)" in message(tmp_path / "d")
    two = {"left": rows(1)["image"], "right": rows(1)["image"]}
    Dataset.from_dict(two, features=Features(left=Image(), right=Image())).save_to_disk(tmp_path / "e")
    assert "left, right are all of type Image; name the one to use 'image'" in message(tmp_path / "e")
    Dataset.from_dict(rows(2, label=[0, 1])).cast(FEATURES).save_to_disk(tmp_path / "f")
    (arrow,) = (tmp_path / "f").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:600])
    assert "not readable by datasets" in message(tmp_path / "f")
    other = Features({"image": Image(), "label": ClassLabel(names=["a", "b"])})
    parts = DatasetDict(
        train=Dataset.from_dict(rows(2), features=FEATURES), test=Dataset.from_dict(rows(2), features=other)
    )
    parts.save_to_disk(tmp_path / "g")
    assert "the column 'label' of test is of another type" in message(tmp_path / "g")


def test_without_the_library_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hugging_face(tmp_path / "d", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SparsightError, match=r"package datasets is needed; install the extra sources: uv sync --extra"):
        open_source(tmp_path / "d").items()


def test_another_column_may_be_the_label(tmp_path: Path) -> None:
    features = Features({**FEATURES, "domain": ClassLabel(names=["photo", "sketch"]), "weight": Value("float32")})
    Dataset.from_dict(rows(2, domain=[1, 0], weight=[0.5, 1.0]), features=features).save_to_disk(tmp_path / "d")
    source = pickle.loads(pickle.dumps(HuggingFace(str(tmp_path / "d"), label_column="domain")))
    assert source.class_names() == ["photo", "sketch"]
    assert [(item.label_name, item.columns) for item in source.items()] == [
        ("sketch", {"source_label": "b"}), ("photo", {"source_label": "a"})
    ]  # fmt: skip
    for column in ("weight", "gone"):
        with pytest.raises(SparsightError, match=f"no column '{column}' of classes, .*; there are: label, domain"):
            HuggingFace(str(tmp_path / "d"), label_column=column).items()


def test_a_label_without_a_name_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "d"
    with_nine = Dataset.from_dict(rows(2, label=[0, 9]))
    with_nine.cast_column("image", Image()).save_to_disk(folder)
    info = json.loads((folder / "dataset_info.json").read_text())
    info["features"]["label"] = {"names": ["b", "a"], "_type": "ClassLabel"}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    with pytest.raises(SparsightError, match=r"column 'label' row 1 has no class \(9\); repair it"):
        open_source(folder).items()
