"""Every kind of picture file, whole and damaged."""

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from source_files import RGB, is_picture, manifest, picture, put

from sparsight.common.errors import SparsightError
from sparsight.images.sources.base import decode_file
from sparsight.report.summary import write_metrics


def folder(path: Path) -> Path:
    for number, label in enumerate(("\u00e9t\u00e9", "\u732b")):
        for i in range(8):
            put(path / label / f"same name {i}.jpg", 100 * number + i)
    return path


def test_non_ascii_paths_and_two_images_with_one_name(tmp_path: Path) -> None:
    root = folder(tmp_path / "\u00fcber")
    put(root / "\u732b" / "same name 0.png", 777, "PNG")
    found = manifest("folder", root, tmp_path / "m.parquet")
    assert len(found.table) == 17 and len(set(found.table["uri"].to_pylist())) == 17
    assert found.classes == ["\u00e9t\u00e9", "\u732b"]


BROKEN = {
    "cut.jpg": lambda: picture(1, (64, 64), "JPEG")[:600],
    "empty.png": lambda: b"",
    "text.png": lambda: b"this is not a picture",
    "huge.png": lambda: huge(20_000, 20_000),
}


def huge(width: int, height: int) -> bytes:
    Image.new("1", (width, height)).save(buffer := io.BytesIO(), "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_picture_stops_the_stage_or_is_left_out_and_listed(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = folder(tmp_path / "f")
    bad = root / "\u732b" / name
    bad.write_bytes(BROKEN[name]())
    with pytest.raises(SparsightError, match=rf"image .*{name}: cannot be decoded \(.*\); repair or remove it"):
        manifest("folder", root, tmp_path / "m.parquet")
    found = manifest("folder", root, tmp_path / "m.parquet", on_error="skip")
    assert len(found.table) == 16
    (skipped,) = found.about["skipped"]
    assert skipped["uri"] == bad.as_posix() and "cannot be decoded" in skipped["reason"]
    assert f"skipped: image {bad.as_posix()}" in capsys.readouterr().err


def test_files_that_are_no_pictures_are_named_in_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = folder(tmp_path / "f")
    (root / "\u732b" / "notes.txt").write_text("hello")
    (root / "stray.csv").write_text("a,b")
    manifest("folder", root, tmp_path / "m.parquet")
    assert "18 files: 16 images, 0 hidden, 2 other (e.g. stray.csv)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("note.jpeg", r"cannot identify the image's format from its 20 bytes"),
        ("cut.jfif", r"damaged header: .*"),
        ("cut.tiff", r"TIFF: .*"),
        ("wide.tif", r"TIFF: 32-bit pixels \(mode F\) have no known range; store 8 or 16 bits"),
    ],
)
def test_an_undecodable_picture_is_told_by_file_and_format(name: str, reason: str, tmp_path: Path) -> None:
    Image.fromarray(np.zeros((8, 8), np.float32)).save(wide := io.BytesIO(), "TIFF")
    contents = {
        "note.jpeg": b"this is a mere note.",
        "cut.jfif": picture(1, (64, 64), "JPEG")[:100],
        "cut.tiff": picture(1, (64, 64), "TIFF")[:-2000],
        "wide.tif": wide.getvalue(),
    }
    root = folder(tmp_path / "f")
    (root / "\u732b" / name).write_bytes(contents[name])
    with pytest.raises(SparsightError, match=rf"{name}: cannot be decoded \({reason}\); repair or remove it") as caught:
        manifest("folder", root, tmp_path / "m.parquet")
    assert " object at 0x" not in str(caught.value)


def test_duplicates_across_splits_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [(split, label, i) for split in ("train", "val", "test") for label in ("a", "b") for i in range(4)]
    for seed, (split, label, i) in enumerate(files):
        put(tmp_path / "f" / split / label / f"{i}.png", 100 + seed, "PNG")
    same = picture(3)
    (tmp_path / "f" / "train" / "a" / "0.png").write_bytes(same)
    (tmp_path / "f" / "test" / "b" / "1.png").write_bytes(same)
    (tmp_path / "f" / "train" / "a" / "1.png").write_bytes(b := picture(4))
    (tmp_path / "f" / "train" / "a" / "2.png").write_bytes(b)
    found = manifest("folder", tmp_path / "f", tmp_path / "m.parquet")
    root = (tmp_path / "f").as_posix()
    assert found.about["duplicates"] == [[f"{root}/train/a/0.png (train)", f"{root}/test/b/1.png (test)"]]
    assert found.about["label_conflicts"] == [[f"{root}/train/a/0.png (a)", f"{root}/test/b/1.png (b)"]]
    assert "1 images are in more than one split" in capsys.readouterr().err
    kinds = (
        "backbones", "saes", "chains", "stabilities", "steerings", "transfers", "disentanglings", "localisations",
        "attributions", "spurious", "policies",
    )  # fmt: skip
    write_metrics({"images": tmp_path / "m.parquet", **{kind: [] for kind in kinds}}, tmp_path / "metrics.json")
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics == {"images.duplicates": 1, "images.label_conflicts": 1}


def test_one_pixel_and_108_megapixels_are_pictures_like_others() -> None:
    assert RGB.pixels(decode_file(picture(0, (1, 1)))).shape == (8, 8, 3)
    assert RGB.pixels(decode_file(huge(12_000, 9_000))).shape == (8, 8, 3)


def encoded(image: Image.Image, form: str, **options: Any) -> np.ndarray:
    image.save(buffer := io.BytesIO(), form, **options)
    return decode_file(buffer.getvalue())


def test_every_mode_becomes_eight_bits_of_grey_or_rgb() -> None:
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8, 1) * 4
    assert np.array_equal(encoded(Image.fromarray(grey[:, :, 0]), "PNG"), grey)
    wide = Image.fromarray(grey[:, :, 0].astype(np.uint16) * 257)
    for form in ("PNG", "TIFF"):
        assert np.array_equal(encoded(wide, form), grey), "16 bits are scaled, not clipped"
    one = encoded(Image.fromarray(grey[:, :, 0]).point(lambda v: 255 * (v > 100), "1"), "PNG")
    assert one.shape == (8, 8, 1) and set(np.unique(one)) == {0, 255}
    color = np.concatenate([grey, grey[::-1], grey.transpose(1, 0, 2)], axis=-1)
    for options in ({"form": "PNG"}, {"form": "WEBP", "lossless": True}):
        assert np.array_equal(encoded(Image.fromarray(color), **options), color)
    rgba = np.dstack([color, np.full((8, 8), 255, np.uint8)])
    rgba[0, :, 3] = 0
    flat = encoded(Image.fromarray(rgba), "PNG")
    assert (flat[0] == 255).all() and np.array_equal(flat[1:], color[1:]), "transparent is white"
    la = np.concatenate([grey, rgba[:, :, 3:]], axis=-1)
    assert encoded(Image.fromarray(la, "LA"), "PNG").shape == (8, 8, 1)
    palette = Image.fromarray(color).quantize(64)
    assert encoded(palette, "PNG").tobytes() == palette.convert("RGB").tobytes()
    assert encoded(palette, "PNG", transparency=bytes(range(64))).shape == (8, 8, 3)
    cmyk = Image.fromarray(color).convert("CMYK")
    assert np.abs(encoded(cmyk, "TIFF").astype(int) - color).max() <= 1
    with pytest.raises(ValueError, match="32-bit pixels"):
        encoded(Image.fromarray(grey[:, :, 0].astype(np.float32)), "TIFF")


def test_exif_orientation_is_followed() -> None:
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, 8:] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned 90 degrees clockwise
    turned = encoded(Image.fromarray(pixels), "PNG", exif=exif)
    assert turned.shape == (16, 8, 3) and (turned[:8] == 0).all() and (turned[8:] == 255).all()


@settings(max_examples=150, deadline=None)
@given(
    form=st.sampled_from(["PNG", "JPEG", "WEBP", "GIF", "BMP", "PPM", "DDS"]),
    cut=st.integers(0, 400),
    edits=st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=5),
)
def test_damaged_files_raise_nothing_but_what_is_documented(form: str, cut: int, edits: list[tuple[int, int]]) -> None:
    data = bytearray(picture(0, form=form))
    for place, value in edits:
        data[place % len(data)] = value
    try:
        image = decode_file(bytes(data[: len(data) - cut] if cut else data))
    except (OSError, ValueError) as error:
        assert re.match(r"([A-Z]+|damaged header): |cannot identify the image's format", str(error))
        assert " object at 0x" not in str(error)
        return
    assert is_picture(image)
