"""torchvision's data sets, on files in their real layouts."""

from pathlib import Path

import numpy as np
import pytest
from source_files import check, manifest
from source_layouts import cifar

from sparsight.common.errors import SparsightError


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_pickles_through_torchvision_s_loader(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets

    expected = cifar(tmp_path / "d", name, monkeypatch)
    found = check(name, tmp_path / "d", tmp_path, expected)
    split = found.split("test")
    theirs = getattr(datasets, name.upper())(tmp_path / "d", train=False)
    image, label = theirs[int(split.uris(slice(4))[3].rpartition(":")[2])]
    assert np.array_equal(split.picture(3), np.asarray(image)) and split.labels[3] == label


@pytest.mark.parametrize("name", ["cifar10", "stl10", "food101", "eurosat", "caltech101", "fgvc-aircraft"])
def test_a_torchvision_set_that_is_not_there_says_how_to_get_it(name: str, tmp_path: Path) -> None:
    with pytest.raises(SparsightError, match=rf"no complete {name} here .* get it with torchvision.*download=True"):
        manifest(name, tmp_path, tmp_path / "m.parquet")
    assert list(tmp_path.iterdir()) == [], "looking leaves nothing behind"
