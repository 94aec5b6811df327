"""Splits that are drawn: class by class, with equal images on one side."""

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from source_files import manifest, picture, table

from sparsight.common.errors import SparsightError
from sparsight.common.seeds import derive_seed
from sparsight.images.draw import draw_splits
from sparsight.images.manifest import Manifest
from sparsight.images.sources import SOURCES, Item

FRACTIONS = {"val": 0.1, "test": 0.2}


def draw(items: list[Item], sha256: list[str], seed: int) -> np.ndarray:
    classes = sorted({str(item.label_name) for item in items})
    label = np.array([classes.index(str(item.label_name)) for item in items], np.int32)
    return draw_splits(items, np.array(sha256), label, classes, FRACTIONS, seed)


def plain(items: list[Item], seed: int) -> list[str]:
    """The first images of a permutation of each class go to val, the next ones to test."""
    split = ["train"] * len(items)
    for name in {item.label_name for item in items}:
        rows = [row for row, item in enumerate(items) if item.label_name == name]
        order = np.random.default_rng(derive_seed(seed, "images", "split", name)).permutation(rows)
        n_val, n_test = (round(fraction * len(rows)) for fraction in FRACTIONS.values())
        for place, row in enumerate(order[: n_val + n_test]):
            split[row] = "val" if place < n_val else "test"
    return split


@pytest.mark.parametrize("seed", range(3))
def test_the_digits_are_all_different_and_split_by_a_permutation_of_each_class(seed: int) -> None:
    items = SOURCES["mnist-5000"](None).items()
    assert draw(items, [item.uri for item in items], seed).tolist() == plain(items, seed)


@pytest.mark.parametrize("seed", range(5))
def test_equal_images_are_on_one_side_and_every_class_gives_its_share(seed: int) -> None:
    """Three classes: 200 images of 60 contents, besides 60 of each class that are unlike all others."""
    generator = np.random.default_rng(seed)
    labels = [*generator.integers(3, size=200).tolist(), *[0, 1, 2] * 60]
    sha256 = [*map(str, generator.integers(60, size=200)), *(f"own {i}" for i in range(180))]
    split = draw([Item(str(i), f"class {label}", None) for i, label in enumerate(labels)], sha256, seed)
    sides = defaultdict(set)
    for part, content in zip(split, sha256, strict=True):
        sides[content].add(part)
    assert all(len(parts) == 1 for parts in sides.values())
    for label, size in Counter(labels).items():
        found = Counter(part for part, own in zip(split, labels, strict=True) if own == label)
        assert [found[part] for part in FRACTIONS] == [round(share * size) for share in FRACTIONS.values()]


def test_images_that_are_all_equal_stay_in_train() -> None:
    items = [Item(str(i), "a", None) for i in range(20)]
    with pytest.raises(SparsightError, match="the val split is empty; add images or change the fractions"):
        draw(items, ["same"] * 20, 0)


def test_official_splits_are_kept_also_against_equal_images() -> None:
    items = [Item(str(i), "a", "test" if i < 10 else "train") for i in range(60)]
    split = draw(items, [str(i % 50) for i in range(60)], 0)
    assert (split[:10] == "test").all() and Counter(split[10:]) == {"train": 45, "val": 5}


def twice(folder: Path) -> Manifest:
    """Two classes, every picture two times; one pair has two labels."""
    pictures = [picture(i // 2) for i in range(80)]
    table(folder / "all.parquet", [(data, int(i == 79 or 20 <= i < 59)) for i, data in enumerate(pictures)], ["a", "b"])
    return manifest("parquet", folder / "all.parquet", folder / "m.parquet")


def test_a_manifest_keeps_pairs_together_and_lists_those_of_two_labels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = twice(tmp_path)
    assert found.about["duplicates"] == []
    sides = Counter((row["sha256"], row["split"]) for row in found.table.to_pylist())
    assert set(sides.values()) == {2} and len(sides) == 40
    assert found.about["label_conflicts"] == [
        ["all.parquet:58 (b)", "all.parquet:59 (a)"],
        ["all.parquet:78 (a)", "all.parquet:79 (b)"],
    ]
    assert "2 images have more than one label, e.g. all.parquet:58 (b), all.parquet:59 (a)" in capsys.readouterr().err
