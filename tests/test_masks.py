"""Masks: made-up shapes, folders of masks, faults in them, the way through resize and crop, and shares of patches."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from source_files import manifest

from sparsight import config
from sparsight.common.digests import digest
from sparsight.common.errors import SparsightError
from sparsight.images.manifest import Manifest, write_manifest
from sparsight.images.masks import MaskFolder, patch_shares, read_mask
from sparsight.images.preprocess import Preprocess
from sparsight.images.sources.base import IGNORED
from sparsight.images.sources.shapes import SHAPES, ColouredShapes
from sparsight.images.table import MASK

SIZE = (12, 10)  # width, height


def data_set(folder: Path, n: int = 6) -> dict[str, Any]:
    """Images with masks of two regions; returns the options of their manifest."""
    for i in range(n):
        for kind, mode in (("images", "RGB"), ("masks", "L")):
            path = folder / kind / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new(mode, SIZE, (i, 0, 0) if mode == "RGB" else i % 3).save(path)
    (folder / "masks" / "names.txt").write_text("sky\nsea\n")
    return {"path": folder / "images", "masks": str(folder / "masks")}


def made(folder: Path, options: dict[str, Any]) -> Manifest:
    return manifest("folder", out=folder / "m.parquet", **options)


def test_shapes_are_where_their_masks_say_and_the_largest_is_the_label() -> None:
    source = ColouredShapes()
    items = source.items()
    assert len(items) == 4000 and Counter(item.label_name for item in items) == dict.fromkeys(SHAPES, 1000)
    assert len(Counter((item.label_name, item.columns["colour"]) for item in items)) == 24, "all pairs occur"
    for item in items[:200]:
        mask, picture = source.mask(item.uri), source.decode(item.uri, source.read(item.uri)).astype(int)
        areas = np.bincount(mask.ravel(), minlength=5)[1:]
        assert SHAPES[areas.argmax()] == item.label_name, "no other kind covers more"
        assert picture.shape == (64, 64, 3) and mask.max() > 0
        spread = picture.max(axis=2) - picture.min(axis=2)  # shapes are of full colours, the background is greyish
        assert np.median(spread[mask > 0]) > 150 > 100 > spread[mask == 0].max()
    again = ColouredShapes()
    assert again.read(items[7].uri) == source.read(items[7].uri) and (again.mask(items[7].uri) == mask_of(7)).all()


def mask_of(number: int) -> np.ndarray:
    return ColouredShapes().mask(f"coloured-shapes:{number}")


def test_a_manifest_holds_the_digests_of_masks_and_is_as_before_without_them(tmp_path: Path) -> None:
    options = data_set(tmp_path)
    found = made(tmp_path, options)
    assert found.table.column_names[-1] == MASK and found.split("train").table.label_columns == ["label_name"]
    assert found.about["masks"] == {"path": options["masks"], "names": ["sky", "sea"]} and found.masks is not None
    uri = found.table["uri"][0].as_py()
    before = found.table[MASK].to_pylist()
    file = Path(uri.replace("/images/", "/masks/"))
    Image.new("L", SIZE, 2 if Image.open(file).getpixel((0, 0)) != 2 else 1).save(file)
    after = made(tmp_path, options).table[MASK].to_pylist()
    assert [a == b for a, b in zip(before, after, strict=True)] == [False] + [True] * 5

    plain = made(tmp_path, {"path": options["path"]})
    assert MASK not in plain.table.column_names and "masks" not in plain.about and plain.masks is None


def test_a_section_without_masks_keeps_its_digest() -> None:
    section = config.Images()
    fields = {name: getattr(section, name) for name in section.__dataclass_fields__ if name != "masks"}
    assert digest(section) == digest(fields)


def test_made_up_shapes_bring_their_own_masks(tmp_path: Path) -> None:
    write_manifest(config.Images(source="coloured-shapes", limit=40), 0, {}, 1, tmp_path / "m.parquet")
    found = Manifest(tmp_path / "m.parquet")
    assert found.masks is not None and found.masks.names() == list(SHAPES)
    uri = found.split("test").uris(slice(0, 1))[0]
    assert (read_mask(found.masks, uri)[1] == ColouredShapes().mask(uri)).all()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing", "masks/a/0.png: No such file or directory; put a mask there"),
        ("damaged", "masks/a/0.png: cannot identify the image's format from its 3 bytes"),
        ("size", r"masks/a/0.png: 5 x 5 pixels, but its image .*images/a/0.png has 12 x 10; make it as large"),
        ("colour", "masks/a/0.png: a picture of mode RGB; a mask has one channel"),
        ("number", "masks/a/0.png: has the number 3, but there are 2 names"),
        ("names", "names.txt: No such file or directory; write the names"),
        ("twice", "names.txt: holds 2 names; write 1 to 254 different ones"),
    ],
)
def test_faults_of_masks_name_the_file(fault: str, message: str, tmp_path: Path) -> None:
    options = data_set(tmp_path)
    file, names = tmp_path / "masks" / "a" / "0.png", tmp_path / "masks" / "names.txt"
    match fault:
        case "missing":
            file.unlink()
        case "damaged":
            file.write_bytes(b"png")
        case "size":
            Image.new("L", (5, 5)).save(file)
        case "colour":
            Image.new("RGB", SIZE).save(file)
        case "number":
            Image.new("L", SIZE, 3).save(file)
        case "names":
            names.unlink()
        case _:
            names.write_text("sky\nsky\n")
    with pytest.raises(SparsightError, match=message):
        made(tmp_path, options)
    if fault == "missing":  # as an image that cannot be read
        assert len(made(tmp_path, {**options, "on_error": "skip"})) == 5


def test_palettes_ignored_pixels_and_jpegs_are_understood(tmp_path: Path) -> None:
    values = np.array([[0, 1], [2, IGNORED]], np.uint8)
    image = Image.fromarray(values, "P")
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
    image.save(tmp_path / "a.png")
    (tmp_path / "names.txt").write_text("sky\n\nsea\n")
    masks = MaskFolder(tmp_path, Path("pictures"))
    assert masks.names() == ["sky", "sea"]
    assert (read_mask(masks, "pictures/a.jpeg", (2, 2))[1] == values).all()


def test_other_sources_refuse_masks(tmp_path: Path) -> None:
    with pytest.raises(SparsightError, match="masks: would be ignored, because only source: folder, imagenet, cub200"):
        config.Images(source="parquet", path=str(tmp_path), masks=str(tmp_path))
    with pytest.raises(SparsightError, match="masks: there is no folder 'nowhere'"):
        config.Images(source="folder", path=str(tmp_path), masks="nowhere")
    assert config.Images(source="coloured-shapes").has_masks and not config.Images().has_masks


@pytest.mark.parametrize("shape", [(64, 96), (96, 64), (40, 40), (31, 57)])
@pytest.mark.parametrize("options", [{}, {"crop_pct": 0.875}, {"squash": True}])
def test_a_mask_goes_through_resize_and_crop_as_its_image_does(shape: tuple[int, int], options: dict[str, Any]) -> None:
    """An image that shows its own mask shows it after resize and crop, too, but for pixels at the regions' borders."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    mask = ((y > shape[0] // 3) + 2 * (x > shape[1] // 2)).astype(np.uint8)
    preprocess = Preprocess((48, 32), 1, (0.5,), (0.5,), "bilinear", **options)
    shown = preprocess.pixels((80 * mask)[:, :, None])[:, :, 0]
    found = preprocess.mask(mask)
    assert found.shape == (48, 32) and set(np.unique(found)) == set(np.unique(mask))
    assert wrong_within_regions(shown, found) == 0
    assert wrong_within_regions(shown, np.roll(found, 3, axis=0)) > 0 < wrong_within_regions(shown, np.roll(found, 3))


def wrong_within_regions(shown: np.ndarray, mask: np.ndarray) -> int:
    """How many pixels show another region than the mask has there, without those beside a border."""
    around = np.lib.stride_tricks.sliding_window_view(mask, (3, 3))
    within = around.min(axis=(2, 3)) == around.max(axis=(2, 3))
    differs = np.abs(shown.astype(int) - 80 * mask)[1:-1, 1:-1] > 40
    return int((differs & within).sum())


def test_a_mask_of_the_right_size_is_left_as_it_is() -> None:
    mask = np.random.default_rng(0).integers(0, 3, (16, 16)).astype(np.uint8)
    assert (Preprocess((16, 16), 3, (0.5,) * 3, (0.5,) * 3).mask(mask) == mask).all()


def test_shares_of_patches_count_pixels() -> None:
    generator = np.random.default_rng(0)
    mask = generator.choice([0, 1, 2, IGNORED], (12, 8), p=[0.3, 0.3, 0.2, 0.2]).astype(np.uint8)
    mask[:4, :4] = IGNORED
    mask[0, 0] = 1
    shares = patch_shares(mask, (3, 2), 2)
    for number, share in enumerate(shares):
        row, column = divmod(number, 2)
        patch = mask[4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
        counts = [(patch == region).sum() for region in (0, 1, 2)]
        if sum(counts) <= 8:
            assert np.isnan(share).all()
        else:
            np.testing.assert_allclose(share, np.array(counts) / sum(counts))
    assert np.isnan(shares[0]).all(), "a patch of which nearly all is ignored"
    assert json.dumps(shares[1].sum()) == "1.0"
