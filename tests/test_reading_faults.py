"""Faults of reading: what the message says, and what the rest of the process notices."""

import copy
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_backbone, make_folder, make_manifest
from PIL import Image
from source_files import manifest, picture

from sparsight import sae
from sparsight.common.errors import SparsightError, reason
from sparsight.common.files import write_shared
from sparsight.images.sources import base
from sparsight.images.sources.folders import Folder


@pytest.mark.parametrize("message", ["", "\n", " \n second line"])
@pytest.mark.parametrize("kind", [OSError, ValueError, SyntaxError])
def test_a_decoder_s_error_without_a_message_is_told_by_its_kind(
    kind: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(self: Folder, uri: str, data: bytes) -> np.ndarray:
        raise kind(message)

    monkeypatch.setattr(Folder, "decode", decode)
    expected = message.strip() or kind.__name__
    with pytest.raises(SparsightError, match=rf"cannot be decoded \({expected}\); repair or remove it"):
        manifest("folder", make_folder(tmp_path / "f"), tmp_path / "m.parquet")


def test_an_error_of_reading_without_a_number_is_told_by_its_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = make_manifest(tmp_path, 12)

    def read(self: Folder, uri: str) -> bytes:
        raise OSError("the tape is torn")

    monkeypatch.setattr(Folder, "read", read)
    with pytest.raises(SparsightError, match=r"the tape is torn; put it back or run the images stage again"):
        found.split("train").picture(0)
    with pytest.raises(SparsightError, match=r"the tape is torn; put it back or take it off the list"):
        manifest("folder", tmp_path / "images", tmp_path / "again.parquet")


def test_an_error_of_the_system_is_its_text_alone() -> None:
    assert reason(FileNotFoundError(2, "No such file or directory", "x")) == "No such file or directory"
    assert reason(OSError()) == "OSError"


@pytest.mark.parametrize("limit", [7, None, 10**8])
def test_the_size_limit_of_pillow_stays_what_the_process_set(
    limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    assert base.decode_file(picture(0)).shape == (8, 8, 3), "64 pixels are decoded under any limit of Pillow's"
    with pytest.raises(OSError, match="cannot identify"):
        base.decode_file(b"no picture")
    assert limit == Image.MAX_IMAGE_PIXELS


def test_importing_the_sources_leaves_the_size_limit_of_pillow() -> None:
    assert Image.MAX_IMAGE_PIXELS is not None


def test_two_machines_with_one_process_number_write_a_shared_file_by_different_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second writer comes while the first has not yet renamed its file."""
    plain, places = os.replace, []

    def replace(source: Path, target: Path) -> None:
        places.append(source)
        if len(places) == 1:
            write_shared(tmp_path / "shared", "second")
        plain(source, target)

    monkeypatch.setattr(os, "replace", replace)
    write_shared(tmp_path / "shared", "first")
    assert (tmp_path / "shared").read_text() == "first" and list(tmp_path.iterdir()) == [tmp_path / "shared"]


def test_a_shallow_copy_shares_weights_and_can_be_given_buffers_of_its_own() -> None:
    backbone = make_backbone()
    copied = copy.copy(backbone)
    copied.prompts_CE = torch.ones(3, 48)
    assert backbone.prompts_CE is None and copied.n_classes == 3
    assert all(a is b for a, b in zip(backbone.parameters(), copied.parameters(), strict=True))
    one = sae.create("topk", 8, 16, 2)
    other = copy.copy(one)
    other.dead, other.b_dec = torch.ones(16, dtype=torch.bool), torch.nn.Parameter(torch.ones(8))
    assert not one.dead.any() and not one.b_dec.any() and other.W_dec is one.W_dec
