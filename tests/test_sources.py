"""Image sources in their published folder layouts."""

from pathlib import Path

import pytest
from source_files import check, cub, manifest
from source_layouts import tiny

from sparsight import config
from sparsight.common.errors import SparsightError
from sparsight.images.sources import SOURCES


def test_every_source_has_a_name_in_the_configuration() -> None:
    (names,) = (f.type.__args__ for f in config.Images.__dataclass_fields__.values() if f.name == "source")  # type: ignore[union-attr]
    assert set(names) == set(SOURCES)


def test_cub_200_as_published(tmp_path: Path) -> None:
    check("cub200", tmp_path / "CUB_200_2011", tmp_path, cub(tmp_path / "CUB_200_2011"))


@pytest.mark.parametrize("name", ["image_class_labels.txt", "train_test_split.txt"])
def test_a_label_file_shorter_than_the_images_is_an_error(name: str, tmp_path: Path) -> None:
    cub(tmp_path)
    lines = (tmp_path / name).read_text().splitlines()
    (tmp_path / name).write_text("\n".join(lines[:-1]))
    with pytest.raises(SparsightError, match=rf"images.txt lists 16 images, {name} 15; e.g. '16' is not in both"):
        manifest("cub200", tmp_path, tmp_path / "m.parquet")


def test_tiny_imagenet_as_published(tmp_path: Path) -> None:
    found = check("tiny-imagenet", tmp_path / "t", tmp_path, tiny(tmp_path / "t"))
    assert found.classes == ["crane (n02)", "crane (n01)", "Egyptian cat"], "the order of wnids.txt"
    annotations = tmp_path / "t" / "val" / "val_annotations.txt"
    annotations.write_text("\n".join(annotations.read_text().splitlines()[:-1]))
    with pytest.raises(SparsightError, match=r"images lists 3 images, val_annotations.txt 2; e.g. 'val_2.JPEG'"):
        manifest("tiny-imagenet", tmp_path / "t", tmp_path / "m.parquet")


def test_a_missing_file_of_a_list_is_named(tmp_path: Path) -> None:
    expected = cub(tmp_path)
    Path(next(iter(expected))).unlink()
    with pytest.raises(SparsightError, match=r"bird_0.jpg: No such file or directory; put it back"):
        manifest("cub200", tmp_path, tmp_path / "m.parquet")
    found = manifest("cub200", tmp_path, tmp_path / "m.parquet", on_error="skip")
    assert len(found.about["skipped"]) == 1 and len(found.table) == 15
