"""Parts of a data set: some classes, some images of each, some images in all."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from source_files import manifest, picture, put, table

from sparsight import config
from sparsight.common.errors import SparsightError
from sparsight.config import schema
from sparsight.images.manifest import Manifest
from sparsight.images.part import draw_part
from sparsight.images.sources import SOURCES, Item
from sparsight.report.chapters import pipeline

NAMES = ["ant", "bee", "cat", "dog"]


def folder(root: Path) -> str:
    """40 images of each class, without splits."""
    for number, name in enumerate(NAMES):
        for i in range(40):
            put(root / name / f"{i}.png", 100 * number + i, "PNG")
    return str(root)


def tables(root: Path) -> str:
    """Of each class 40 images in train, 8 in val, 10 in test."""
    for part, count in (("train", 40), ("val", 8), ("test", 10)):
        rows = [(picture(1000 * count + i), i % 4) for i in range(4 * count)]
        table(root / f"{part}.parquet", rows, NAMES)
    return str(root)


MAKERS: dict[str, Callable[[Path], str]] = {"folder": folder, "parquet": tables}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {source: make(tmp_path_factory.mktemp(source)) for source, make in MAKERS.items()}


def part(source: str, path: str, seed: int = 0, **options: Any) -> list[Item]:
    from_all = SOURCES[source](path)
    section = config.Images(source=source, path=path, **options)  # type: ignore[arg-type]
    return draw_part(from_all.items(), from_all.class_names(), section, seed)[0]


def counts(found: Manifest) -> dict[str, Counter[str | None]]:
    return {name: Counter(found.split(name).column("label_name")) for name in ("train", "val", "test")}


@pytest.mark.parametrize("source", MAKERS)
def test_classes_are_kept_in_the_order_asked_for(source: str, paths: dict[str, str], tmp_path: Path) -> None:
    whole = manifest(source, paths[source], tmp_path / "whole")
    found = manifest(source, paths[source], tmp_path / "part", classes=("dog", "bee"))
    assert found.classes == ["dog", "bee"]
    of_both = {
        (row["uri"], row["sha256"], row["split"])
        for row in whole.table.to_pylist()
        if row["label_name"] in found.classes
    }
    rows = found.table.to_pylist()
    assert {(row["uri"], row["sha256"], row["split"]) for row in rows} == of_both, "split as in the whole set"
    assert all(found.classes[row["label"]] == row["label_name"] for row in rows)
    asked = {"classes": ["dog", "bee"], "images_per_class": None, "limit": None, "listed": len(whole)}
    assert found.about["part"] == asked


@pytest.mark.parametrize(
    ("source", "n", "expected"),
    [("folder", 20, (10, 5, 5)), ("parquet", 9, (9, 8, 9)), ("parquet", 40, (40, 8, 10))],
)
def test_so_many_images_of_each_class(
    source: str, n: int, expected: tuple[int, int, int], paths: dict[str, str], tmp_path: Path
) -> None:
    found = manifest(source, paths[source], tmp_path / "m.parquet", images_per_class=n)
    for split, count in zip(("train", "val", "test"), expected, strict=True):
        assert counts(found)[split] == dict.fromkeys(NAMES, count)


@pytest.mark.parametrize("source", MAKERS)
@pytest.mark.parametrize("limit", [13, 57, 100])
def test_a_limit_draws_the_same_share_of_each_class_and_split(source: str, limit: int, paths: dict[str, str]) -> None:
    everything = SOURCES[source](paths[source]).items()
    items = part(source, paths[source], limit=limit)
    assert len(items) == limit
    groups, drawn = (Counter((item.split, item.label_name) for item in some) for some in (everything, items))
    for group, size in groups.items():
        assert abs(drawn[group] - limit * size / len(everything)) < 2


def test_all_three_together(paths: dict[str, str], tmp_path: Path) -> None:
    options: dict[str, Any] = {"classes": ("cat", "ant"), "images_per_class": 30, "limit": 40}
    found = manifest("folder", paths["folder"], tmp_path / "m.parquet", **options)
    assert len(found) == 40
    assert sum(counts(found).values(), Counter()) == {"cat": 20, "ant": 20}
    kinds = (
        "backbones",
        "stores",
        "saes",
        "chains",
        "steerings",
        "disentanglings",
        "localisations",
        "attributions",
        "spurious",
        "policies",
    )
    nothing: dict[str, Any] = {key: [] for key in kinds}
    (images,) = pipeline.stages(found, nothing)[0].parts
    assert images.about == "40 of 160 images, 2 classes", "the report says that it is a part"


@pytest.mark.parametrize("options", [{"images_per_class": 7}, {"limit": 50}], ids=["images_per_class", "limit"])
def test_the_seed_draws_the_part(options: dict[str, int], paths: dict[str, str]) -> None:
    first, again, other = (part("folder", paths["folder"], seed, **options) for seed in (0, 0, 1))
    assert first == again != other
    order = [item.uri for item in part("folder", paths["folder"])]
    assert [item.uri for item in first] == sorted((item.uri for item in first), key=order.index)


def test_a_member_of_a_union_gives_what_it_gives_alone(paths: dict[str, str]) -> None:
    path = f"folder:{paths['folder']} + parquet:{paths['parquet']}"
    both = part("union", path, images_per_class=6)
    for number, (source, where) in enumerate(paths.items()):
        alone = [item.uri for item in part(source, where, images_per_class=6)]
        assert [item.uri.partition(":")[2] for item in both if item.member == number] == alone


def test_images_that_are_left_out_are_not_read(paths: dict[str, str], tmp_path: Path) -> None:
    root = Path(folder(tmp_path / "images"))
    for file in (root / "bee").iterdir():
        file.write_bytes(b"broken")
    found = manifest("folder", root, tmp_path / "m.parquet", classes=("ant", "dog"), on_error="stop")
    assert len(found) == 80


def test_images_without_a_label_go_when_classes_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    items = [Item(str(i), ["a", "b", None][i % 3], None) for i in range(90)]
    for options in ({"images_per_class": 10}, {"classes": ("b", "a")}):
        kept, _ = draw_part(items, ["a", "b"], config.Images(**options), 0)
        assert {item.label_name for item in kept} == {"a", "b"}
        assert "images: 30 images without a label are left out" in capsys.readouterr().err
    kept, _ = draw_part(items, ["a", "b"], config.Images(limit=30), 0)
    assert Counter(item.label_name for item in kept) == {"a": 10, "b": 10, None: 10}
    assert "30 of 90 images" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": ("ant", "bees")}, r"images.classes: the data set has no class 'bees'; did you mean 'bee'\?"),
        ({"classes": ("zebra",)}, "images.classes: the data set has no class 'zebra'; there are ant, bee, cat, dog"),
        ({"images_per_class": 41}, "images.images_per_class: the class 'ant' has 40 images; ask for 40 or fewer"),
        ({"limit": 161}, "images.limit: there are 160 images; ask for 160 or fewer"),
        ({"limit": 81, "classes": ("ant", "bee")}, "images.limit: there are 80 images; ask for 80 or fewer"),
    ],
)
def test_parts_that_cannot_be_drawn(options: dict[str, Any], message: str, paths: dict[str, str]) -> None:
    with pytest.raises(SparsightError, match=message):
        part("folder", paths["folder"], **options)


def test_a_class_with_too_few_train_images_is_named_with_its_split(paths: dict[str, str]) -> None:
    with pytest.raises(SparsightError, match="the class 'ant' has 40 train images; ask for 40 or fewer"):
        part("parquet", paths["parquet"], images_per_class=41)


def test_nothing_left() -> None:
    items = [Item(str(i), None, None) for i in range(9)]
    with pytest.raises(SparsightError, match=r"images.images_per_class: none of the 9 images has such a label; leave"):
        draw_part(items, [], config.Images(images_per_class=1), 0)
    with pytest.raises(SparsightError, match=r"images.classes: none of the 9 images has such a label; leave it out"):
        draw_part(items, ["a"], config.Images(classes=("a",)), 0)


def test_a_class_that_is_a_number_needs_quotes() -> None:
    with pytest.raises(SparsightError, match=r"images.classes\[1\]: expected str, got 5; put it in quotes"):
        schema.parse(config.Images, {"classes": ["3", 5]}, "images")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": ("a", "b", "a")}, "classes: 'a' is listed twice; list each class once"),
        ({"limit": 0}, "limit: must be 1 or more"),
        ({"images_per_class": -1}, "images_per_class: must be 1 or more"),
    ],
)
def test_settings_without_a_meaning(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SparsightError, match=message):
        config.Images(**options)
