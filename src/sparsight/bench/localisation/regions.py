"""The region of every patch of a split, from the masks of its images.

Shapes: I images, P patches of an image.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from sparsight.common.errors import SparsightError
from sparsight.common.progress import followed
from sparsight.images.manifest import Manifest
from sparsight.images.masks import patch_shares, read_mask
from sparsight.images.preprocess import Preprocess
from sparsight.images.table import MASK

UNKNOWN = -1
"""Region of a patch of which at least half does not count."""
_MOST = 0.5
"""A patch is of the region that covers more than this share of it."""


def patch_grid(n_patches: int, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of patches of an image of this height and width."""
    rows = round((n_patches * size[0] / size[1]) ** 0.5)
    assert n_patches % rows == 0, f"{n_patches} patches of an image of {size} are no grid"
    return rows, n_patches // rows


def patch_regions(
    manifest: Manifest, split: str, n_images: int, preprocess: Preprocess, grid: tuple[int, int], threads: int
) -> np.ndarray:
    """Number of the region of each patch, int16 (I, P): that which covers more than half of it, 0 for none.

    Args:
        manifest: the images; they have masks.
        split: the split.
        n_images: how many of its images, the first ones.
        preprocess: how pictures become the model's input.
        grid: rows and columns of patches.
        threads: number of decoding threads.

    Raises:
        SparsightError: a mask that is missing, damaged, or changed since the manifest was made.
    """
    masks, images = manifest.masks, manifest.split(split)
    assert masks is not None
    n_regions = len(manifest.about["masks"]["names"])
    uris, sha256 = images.uris(slice(0, n_images)), images.table.column(MASK)[:n_images].to_pylist()

    def of_image(uri: str, digest: str) -> np.ndarray:
        data, mask = read_mask(masks, uri)
        if hashlib.sha256(data).hexdigest() != digest:
            raise SparsightError(f"mask of {uri}: changed since the manifest was made; run the images stage again")
        shares = patch_shares(preprocess.mask(mask), grid, n_regions)
        region = np.where(shares[:, 1:] > _MOST, np.arange(1, n_regions + 1), 0).max(axis=1)
        return np.where(np.isnan(shares[:, 0]), UNKNOWN, region).astype(np.int16)

    with ThreadPoolExecutor(threads) as pool:
        return np.stack(list(followed(pool.map(of_image, uris, sha256), n_images, f"masks of {split}")))
