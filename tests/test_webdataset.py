"""WebDataset's tar shards."""

import gzip
import io
import pickle
import re
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from source_files import counts, manifest, picture
from source_layouts import webdataset
from webdataset import TarWriter
from webdataset import WebDataset as TheirReader

from sparsight import config
from sparsight.common.errors import SparsightError
from sparsight.images.sources import SOURCES, Source


def open_source(path: Path) -> Source:
    return SOURCES["webdataset"](str(path))


def write(path: Path, *samples: dict[str, Any]) -> Path:
    """A shard whose sample i has the key i and the picture i, unless it says otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with TarWriter(str(path)) as writer:
        for i, sample in enumerate(samples):
            writer.write({"__key__": f"{i:03}", "png": picture(i), **sample})
    return path


def write_files(path: Path, files: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def labels(path: Path) -> list[str | None]:
    return [item.label_name for item in open_source(path).items()]


def message(path: Path) -> str:
    with pytest.raises(SparsightError) as caught:
        open_source(path).items()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.filterwarnings("ignore:.*unclosed:ResourceWarning")
def test_samples_are_those_that_the_library_reads(tmp_path: Path) -> None:
    webdataset(tmp_path / "d", None)
    source = open_source(tmp_path / "d")
    found = [(item.uri.partition("@")[0], item.label_name, source.read(item.uri)) for item in source.items()]
    shards = sorted(str(path) for path in (tmp_path / "d").glob("*.tar"))
    theirs = [
        (f"{Path(sample['__url__']).name}:{sample['__key__']}.jpg", sample["cls"].decode(), sample["jpg"])
        for sample in TheirReader(shards, shardshuffle=False, empty_check=False)
    ]
    assert found == theirs and len(found) == 24


def test_labels_in_cls_json_and_txt(tmp_path: Path) -> None:
    samples: list[dict[str, Any]] = [
        {"cls": "owl", "json": {"label": "jay"}, "txt": "tit"}, {"json": {"label": "jay"}, "txt": "tit"},
        {"txt": "tit\n"}, {"json": {"label": 12, "text": "a bird"}}, {"json": {"text": "a bird"}, "txt": "a bird"},
        {"cls": -1}, {"json": {"label": None}}, {"txt": ""}, {},
    ]  # fmt: skip
    shard = write(tmp_path / "a.tar", *samples)
    assert labels(shard) == ["owl", "jay", "tit", "12", None, None, None, None, None]
    assert open_source(shard).class_names() == ["12", "jay", "owl", "tit"]


def test_numbers_are_in_their_order_and_may_have_names(tmp_path: Path) -> None:
    write(tmp_path / "d" / "a.tar", {"cls": 10}, {"json": {"label": 9}})
    assert open_source(tmp_path / "d").class_names() == ["9", "10"]
    (tmp_path / "d" / "classnames.txt").write_text("".join(f"bird {i // 2}\n" for i in range(12)))
    assert labels(tmp_path / "d") == ["bird 5 (10)", "bird 4 (9)"]
    (tmp_path / "d" / "classnames.txt").write_text("owl\njay\n")
    assert "a.tar: the label in 000.cls is '10', and classnames.txt names 2 classes" in message(tmp_path / "d")


@pytest.mark.parametrize(
    ("shards", "splits"),
    [
        (["train-000.tar", "validation-000.tar", "test-000.tar"], ["test", "train", "val"]),
        (["birds1k-train-0000.tar", "birds1k-validation-00.tar"], ["train", "val"]),
        (["Training/0.tar", "dev/0.tar"], ["train", "val"]),
        (["0000.tar", "0001.tar"], [None, None]),
    ],
)
def test_splits_by_the_names_of_shards_and_folders(shards: list[str], splits: list[str | None], tmp_path: Path) -> None:
    for shard in shards:
        write(tmp_path / shard, {"cls": 0})
    assert [item.split for item in open_source(tmp_path).items()] == splits


def test_a_shard_of_no_split_beside_others_is_an_error(tmp_path: Path) -> None:
    for shard in ("train-0.tar", "extra-0.tar"):
        write(tmp_path / shard, {"cls": 0})
    assert "the shard extra-0.tar is of no split, unlike train-0.tar" in message(tmp_path)


def test_the_log_accounts_for_every_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [
        ("a/1.jpg", picture(1)), ("a/1.cls", b"0"), ("a/2.jpg", picture(2)), ("a/1.seg.npy", b"x"), ("b/9.cls", b"1"),
        ("a/._1.jpg", b"x"), ("__MACOSX/1.jpg", b"x"), ("README", b"x"), ("a/2.cls", b"1"), ("a/3.JPG", picture(3)),
    ]  # fmt: skip
    write_files(tmp_path / "x.tar", files)
    (tmp_path / ".x.tar").write_bytes(b"")
    (tmp_path / "index.json").write_text("{}")
    items = open_source(tmp_path).items()
    assert [(item.uri.partition("@")[0], item.label_name) for item in items] == [
        ("x.tar:a/1.jpg", "0"), ("x.tar:a/2.jpg", "1"), ("x.tar:a/3.JPG", None)
    ]  # fmt: skip
    output = "".join(capsys.readouterr())
    assert "3 files: 1 shards, 1 hidden, 1 other (e.g. index.json)" in output
    line = "1 shards: 10 files: 3 images, 2 label files, 2 hidden, 3 other; 1 of the images without a label"
    assert line in output and len(files) == 10
    assert [found["files"] for found in counts(output)] == [3, 10]


def test_images_are_read_at_their_places_in_any_order(tmp_path: Path) -> None:
    write(tmp_path / "d" / "train.tar", *({"cls": i % 2} for i in range(16)))
    write(tmp_path / "d" / "test.tar", *({"cls": i % 2, "png": picture(90 + i)} for i in range(4)))
    found = manifest("webdataset", tmp_path / "d", tmp_path / "m.parquet")
    split = pickle.loads(pickle.dumps(found.split("test")))
    numbers = [int(re.findall(r"(\d+)\.png", uri)[0]) for uri in split.uris(slice(None))]
    data = [split.source.read(uri) for uri in split.uris(slice(None))]
    assert sorted(numbers) == [0, 1, 2, 3] and data == [picture(90 + i) for i in numbers]
    write(tmp_path / "d" / "test.tar", {"cls": 0})
    with pytest.raises(
        SparsightError, match=r"the shard is shorter than when it was listed; put it back|changed since"
    ):
        split.picture(numbers.index(3))
    (tmp_path / "d" / "test.tar").unlink()
    with pytest.raises(SparsightError, match=r"image test.tar:003.png@\d+\+\d+: No such file or directory"):
        split.picture(numbers.index(3))


def cut_in_the_data(shard: bytes) -> bytes:
    return shard[:1000]


def cut_between_two_files(shard: bytes) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(shard)) as archive:
        return shard[: archive.getmembers()[2].offset]


def a_header_overwritten(shard: bytes) -> bytes:
    start = len(cut_between_two_files(shard))
    return shard[:start] + b"\xff" * 512 + shard[start + 512 :]


def a_second_archive_behind(shard: bytes) -> bytes:
    return shard + shard


def compressed(shard: bytes) -> bytes:
    return gzip.compress(shard)


def empty(shard: bytes) -> bytes:
    return b""


@pytest.mark.parametrize(
    "damage",
    [cut_in_the_data, cut_between_two_files, a_header_overwritten, a_second_archive_behind, compressed, empty],
)
def test_a_damaged_shard_is_an_error(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    shard = write(tmp_path / "a.tar", {"cls": 0}, {"cls": 1}, {"cls": 0})
    assert labels(shard) == ["0", "1", "0"]
    shard.write_bytes(damage(shard.read_bytes()))
    assert re.search(
        r"a.tar: not a whole tar archive \(.+\); unpack it if it is compressed, or get the shard", message(shard)
    )


def test_a_damaged_image_is_named_or_skipped(tmp_path: Path) -> None:
    bad: dict[str, Any] = {"cls": 0, "png": picture(0)[:60]}
    for split, n in (("train", 8), ("val", 2), ("test", 2)):
        write(
            tmp_path / "d" / f"{split}.tar", *({"cls": i % 2} for i in range(n)), *([bad] if split == "train" else [])
        )
    with pytest.raises(SparsightError, match=r"image train.tar:008.png@\d+\+60: cannot be decoded"):
        manifest("webdataset", tmp_path / "d", tmp_path / "m.parquet")
    found = manifest("webdataset", tmp_path / "d", tmp_path / "m.parquet", on_error="skip")
    assert len(found.table) == 12 and len(found.about["skipped"]) == 1


def test_mistakes_are_told_in_one_line(tmp_path: Path) -> None:
    assert "no .tar file here" in message(tmp_path)
    twice = [("1.jpg", picture(1)), ("1.cls", b"0"), ("1.jpg", picture(2))]
    assert "holds 1.jpg twice" in message(write_files(tmp_path / "a.tar", twice))
    assert "holds 1.JPG twice" in message(write_files(tmp_path / "a.tar", [("1.jpg", b"x"), ("1.JPG", b"x")]))
    two = [("1.left.jpg", picture(1)), ("1.right.jpg", picture(2))]
    assert "the sample 1 has 2 images (1.left.jpg, 1.right.jpg)" in message(write_files(tmp_path / "a.tar", two))
    assert "the shards hold no images" in message(write_files(tmp_path / "a.tar", [("1.cls", b"0")]))
    for label in ([1], 0.5, True):
        assert "000.json is" in message(write(tmp_path / "a.tar", {"json": {"label": label}}))
    for content in (b"[]", b"{", b"\xff"):
        files = [("1.jpg", picture(1)), ("1.json", content)]
        assert "1.json is no label" in message(write_files(tmp_path / "a.tar", files))
    (tmp_path / "b.tar.gz").write_bytes(b"")
    assert "b.tar.gz: images cannot be read from the middle of a packed archive" in message(tmp_path)


def test_the_configuration_takes_a_shard_or_a_folder(tmp_path: Path) -> None:
    shard = write(tmp_path / "a.tar", {"cls": 0})
    assert config.Images(source="webdataset", path=str(shard)).path == str(shard)
    with pytest.raises(SparsightError, match=r"path: there is no .*; give a .tar file or a folder of them"):
        config.Images(source="webdataset", path=str(tmp_path / "gone"))
