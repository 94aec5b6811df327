"""ImageNet-1k in torchvision's folders."""

from pathlib import Path

import pytest
import torch
from source_files import manifest, put
from source_layouts import imagenet
from torchvision import datasets

from sparsight.backbones.prompts import templates_of
from sparsight.common.errors import SparsightError
from sparsight.images.sources import SOURCES


def test_images_and_labels_are_those_of_torchvision(tmp_path: Path) -> None:
    imagenet(tmp_path, None)
    (tmp_path / "train" / "n02012849" / "notes.txt").write_text("no image")
    wnids = ["n02012849", "n03126707", "n03773504"]
    torch.save(({wnid: (wnid,) for wnid in wnids}, []), tmp_path / "meta.bin")
    source = SOURCES["imagenet"](str(tmp_path))
    classes = source.class_names()
    assert classes == ["crane bird", "construction crane", "missile (n03773504)"]
    for split, ours in (("train", "train"), ("val", "test")):
        theirs = {(path, classes[label]) for path, label in datasets.ImageNet(tmp_path, split).samples}
        assert {(item.uri, item.label_name) for item in source.items() if item.split == ours} == theirs


def test_val_is_the_test_split_and_val_is_drawn_from_train(tmp_path: Path) -> None:
    expected = imagenet(tmp_path / "d", None)
    found = manifest("imagenet", tmp_path / "d", tmp_path / "m.parquet")
    assert set(found.split("test").uris(slice(None))) == {
        uri for uri, (_, split) in expected.items() if split == "test"
    }
    assert len(found.split("val")) == 6


def test_the_log_accounts_for_every_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    imagenet(tmp_path, None)
    put(tmp_path / "train" / "n02012849" / ".ipynb_checkpoints" / "a.JPEG", 0)
    put(tmp_path / "test" / "ILSVRC2012_test_1.JPEG", 0)
    (tmp_path / "meta.bin").write_bytes(b"a pickle that is never read")
    assert len(SOURCES["imagenet"](str(tmp_path)).items()) == 21
    assert f"{tmp_path}: 24 files: 21 images, 1 hidden, 2 other" in "".join(capsys.readouterr())


def test_mistakes_are_told_in_one_line(tmp_path: Path) -> None:
    def message() -> str:
        with pytest.raises(SparsightError) as caught:
            SOURCES["imagenet"](str(tmp_path)).items()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert f"{tmp_path}: no train/<WordNet id>/<image> here; give the folder that holds train and val" in message()
    (tmp_path / "ILSVRC2012_img_train.tar").write_bytes(b"")
    unpack = f"torchvision.datasets.ImageNet({str(tmp_path)!r}, split='train')"
    assert f"ILSVRC2012_img_train.tar: still packed; unpack it with {unpack}" in message()
    put(tmp_path / "train" / "n02012849" / "a.JPEG", 0)
    assert "no val/<WordNet id>/<image> here" in message()
    (tmp_path / "train" / "n03126707.tar").write_bytes(b"")
    assert "train/n03126707.tar: still packed" in message(), "a class that a first unpacking left"
    (tmp_path / "train" / "n03126707.tar").unlink()
    flat = Path(put(tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG", 1))
    assert "val: holds images outside of class folders, e.g. ILSVRC2012_val_00000001.JPEG" in message()
    flat.unlink()
    put(tmp_path / "val" / "goose" / "a.JPEG", 0)
    assert "val/goose: no WordNet id of ImageNet-1k; take it out of val" in message()


def test_published_prompts_are_the_ensemble_for_imagenet() -> None:
    assert len(templates_of("imagenet", ("published",))) == 80
