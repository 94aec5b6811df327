"""Images in folders: which layouts are read as what, and which are refused."""

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from source_files import counts, cub, litter, manifest, picture, put, table
from source_layouts import tiny

from sparsight.common.errors import SparsightError
from sparsight.images.sources import SOURCES, Item


def pictures(folder: Path, n: int = 2) -> Path:
    for i in range(n):
        put(folder / f"p{i}.jpg", i)
    return folder


def read(source: str, path: Path | str) -> list[Item]:
    return SOURCES[source](str(path)).items()


def labels(items: list[Item]) -> Counter[tuple[str | None, str | None]]:
    return Counter((item.split, item.label_name) for item in items)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("train", "validation"), {"train", "val"}),
        (("Training", "DEV", "Testing"), {"train", "val", "test"}),
        (("train", "valid", "test"), {"train", "val", "test"}),
    ],
)
def test_split_folders_by_all_usual_names_in_any_case(
    names: tuple[str, ...], expected: set[str], tmp_path: Path
) -> None:
    for name in names:
        pictures(tmp_path / name / "heron")
    assert labels(read("folder", tmp_path)) == {(split, "heron"): 2 for split in expected}


def test_a_validation_folder_is_the_val_split_of_the_manifest(tmp_path: Path) -> None:
    seed = 0
    for split in ("Train", "Validation"):
        for label in ("heron", "ibis"):
            for i in range(8):
                put(tmp_path / "f" / split / label / f"{i}.jpg", seed := seed + 1)
    found = manifest("folder", tmp_path / "f", tmp_path / "m.parquet")
    assert len(found.split("val")) == 16
    assert all("/Validation/" in uri for uri in found.split("val").uris(slice(None)))


@pytest.mark.parametrize(
    ("folders", "files", "message"),
    [
        (["train/a", "dev/a", "extra/a"], [], r"extra: no split .*beside the split folder 'dev'; move it away, or, if"),
        (["train/a", "test/a", "notes"], [], r"notes: no split"),
        (["train/a", "Valid/a", "validation/a"], [], "Valid and validation are both the val split; make one folder"),
        (["testing/a", "dev/a"], [], "has val, test but no train; add"),
        (["train/a"], ["alone.jpg"], r"alone.jpg: an image beside the split folder 'train'; move it"),
        (["heron", "ibis"], ["alone.jpg"], r"alone.jpg: an image beside the class folder 'heron'; move the image"),
        (["train/heron"], ["train/alone.jpg"], r"train/alone.jpg: an image beside the class folder 'heron'"),
    ],
)
def test_a_layout_that_can_be_read_in_two_ways_is_refused(
    folders: list[str], files: list[str], message: str, tmp_path: Path
) -> None:
    for folder in folders:
        pictures(tmp_path / folder)
    for file in files:
        put(tmp_path / file, 99)
    with pytest.raises(SparsightError, match=message) as caught:
        read("folder", tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("folders", "give"),
    [
        (["sketch/cat", "sketch/dog", "photo/cat", "photo/dog"], "give {}/photo as the path"),
        (["webcam/images/mug", "webcam/images/pen"], "give {}/webcam/images as the path"),
        (["ours/train/cat", "ours/test/cat"], "give {}/ours as the path"),
        (["train/sketch/cat", "train/sketch/dog"], "move them into {}/train"),
    ],
)
def test_class_folders_that_hold_only_folders_of_images_are_refused(
    folders: list[str], give: str, tmp_path: Path
) -> None:
    for folder in folders:
        pictures(tmp_path / folder)
    with pytest.raises(SparsightError) as caught:
        read("folder", tmp_path)
    message = str(caught.value)
    assert "no image, but 2 folders of images (e.g. " in message and give.format(tmp_path) in message
    assert "\n" not in message
    if give.endswith("as the path"):
        given = give.format(tmp_path).removeprefix("give ").removesuffix(" as the path")
        assert {label for _, label in labels(read("folder", given))} <= {"cat", "dog", "mug", "pen"}


def test_folders_within_a_class_belong_to_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures(pictures(tmp_path / "heron") / "close" / "wings")  # images of its own, and deeper ones
    pictures(tmp_path / "ibis" / "images")  # a single folder
    (tmp_path / "ibis" / "boxes").mkdir()
    (tmp_path / "empty").mkdir()
    assert labels(read("folder", tmp_path)) == {(None, "heron"): 4, (None, "ibis"): 2}
    log = capsys.readouterr().err
    assert "2 class folders hold folders of images of the class (e.g. heron)" in log
    assert "1 folders hold no images (e.g. empty)" in log


def test_a_flat_folder_is_unlabelled_also_below_splits(tmp_path: Path) -> None:
    pictures(tmp_path / "flat", 3)
    (tmp_path / "flat" / "licence.txt").write_text("free")
    source = SOURCES["folder"](str(tmp_path / "flat"))
    assert labels(source.items()) == {(None, None): 3} and source.class_names() == []
    pictures(tmp_path / "parts" / "train" / "heron")
    pictures(tmp_path / "parts" / "test")
    source = SOURCES["folder"](str(tmp_path / "parts"))
    assert labels(source.items()) == {("train", "heron"): 2, ("test", None): 2}
    assert source.class_names() == ["heron"]


def test_links_are_followed_but_not_in_a_circle(tmp_path: Path) -> None:
    pictures(tmp_path / "elsewhere" / "more")
    pictures(tmp_path / "f" / "heron")
    (tmp_path / "f" / "heron" / "linked").symlink_to(tmp_path / "elsewhere")
    assert labels(read("folder", tmp_path / "f")) == {(None, "heron"): 4}
    (tmp_path / "f" / "heron" / "round").symlink_to(tmp_path / "f")
    with pytest.raises(SparsightError, match=r"heron/round: links to a folder that holds the link; remove the link"):
        read("folder", tmp_path / "f")


def test_a_folder_that_cannot_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures(tmp_path / "heron")
    pictures(tmp_path / "ibis")
    plain = os.scandir

    def scandir(path: Path) -> object:
        if Path(path).name == "ibis":
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(SparsightError, match=r"ibis: cannot be listed \(Permission denied\); put the folder back"):
        read("folder", tmp_path)


def classes(root: Path) -> None:
    for label in ("heron", "ibis"):
        pictures(root / label / "close")
        pictures(root / label)
    (root / "heron" / "names.csv").write_text("p0,grey heron")


def tables(root: Path) -> None:
    for split in ("train", "test"):
        table(root / "data" / f"{split}.parquet", [(picture(i), i % 2) for i in range(6)], ["heron", "ibis"])
    (root / "README.md").write_text("tables")


@pytest.mark.parametrize(
    ("source", "make"), [("folder", classes), ("cub200", cub), ("tiny-imagenet", tiny), ("parquet", tables)]
)
def test_hidden_files_change_nothing_and_the_counts_add_up(
    source: str, make: Callable[[Path], object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "data"
    make(root)
    before, names = read(source, root), SOURCES[source](str(root)).class_names()
    n_files = sum(path.is_file() for path in root.rglob("*"))
    capsys.readouterr()
    hidden = litter(root)
    assert read(source, root) == before
    assert SOURCES[source](str(root)).class_names() == names
    files, *rows = counts(capsys.readouterr().err)
    assert (files["files"], files["hidden"]) == (n_files + hidden, hidden)
    assert (rows[0] if rows else files)["images"] == len(before)


def test_the_counts_of_a_union_are_those_of_its_members(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classes(tmp_path / "f")
    hidden = litter(tmp_path / "f")
    cub(tmp_path / "cub")
    items = read("union", f"folder:{tmp_path / 'f'} + cub200:{tmp_path / 'cub'} + mnist-5000")
    found = counts(capsys.readouterr().err)
    assert found == [
        {"files": 9 + hidden, "images": 8, "hidden": hidden, "other": 1},
        {"files": 20, "images": 16, "hidden": 0, "other": 4},
        {"rows": 5000, "images": 5000},
    ]
    assert sum(one["images"] for one in found) == len(items)


def test_an_image_that_a_list_has_and_the_folder_has_not_is_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(next(iter(cub(tmp_path)))).unlink()
    assert len(read("cub200", tmp_path)) == 16
    log = capsys.readouterr().err
    assert counts(log)[0]["images"] == 15 and "1 images are on the list but not here (e.g. bird_0.jpg)" in log
