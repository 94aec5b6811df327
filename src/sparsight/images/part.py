"""Draws a part of a data set, before any image is read."""

import difflib
from collections import defaultdict

import numpy as np

from sparsight import config
from sparsight.common.errors import SparsightError
from sparsight.common.progress import log
from sparsight.common.seeds import derive_seed
from sparsight.images.sources import Item


def draw_part(items: list[Item], classes: list[str], section: config.Images, seed: int) -> tuple[list[Item], list[str]]:
    """The images that ``classes``, ``images_per_class`` and ``limit`` of the section leave, and their classes.

    Images are drawn class by class, from each official split and each member of a union by itself. ``limit`` draws
    the same share of each of these groups, as nearly as whole images can.

    Args:
        items: all images.
        classes: all class names.
        section: the section ``images``.
        seed: seed of the draw.

    Returns:
        The images in their old order, and the class names, a name's position being its label.

    Raises:
        SparsightError: an unknown class, more images asked for than there are, or no images left.
    """
    part = items
    if section.classes or section.images_per_class:
        classes = _known(section.classes, classes) or classes
        wanted = set(classes)
        part = [item for item in items if item.label_name in wanted]
        unlabelled = sum(item.label_name is None for item in items)
        if unlabelled:
            log(f"images: {unlabelled} images without a label are left out, as classes were asked for")
        if not part:
            asked = "images.classes" if section.classes else "images.images_per_class"
            raise SparsightError(f"{asked}: none of the {len(items)} images has such a label; leave it out")
    if section.images_per_class or section.limit:
        part = _drawn(part, section, seed)
    if len(part) < len(items):
        log(f"images: a part of the data set, {len(part)} of {len(items)} images")
    return part, classes


def _known(asked: tuple[str, ...], classes: list[str]) -> list[str]:
    for name in asked:
        if name not in classes:
            near = difflib.get_close_matches(name, classes, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(classes[:10]) or 'none'}"
            raise SparsightError(f"images.classes: the data set has no class {name!r}; {hint}")
    return list(asked)


def _drawn(items: list[Item], section: config.Images, seed: int) -> list[Item]:
    groups: dict[tuple[int, str, str], list[int]] = defaultdict(list)
    for row, item in enumerate(items):
        groups[item.member, item.split or "", item.label_name or ""].append(row)
    place, size = np.empty(len(items), np.int64), np.empty(len(items), np.int64)
    """Of each image: its place in the drawn order of its group, and how many of the group are kept."""
    per_class = section.images_per_class
    for (_, split, name), rows in groups.items():
        if per_class and len(rows) < per_class and split in ("", "train"):
            where = f"{len(rows)} {split} images" if split else f"{len(rows)} images"
            raise SparsightError(
                f"images.images_per_class: the class {name!r} has {where}; ask for {len(rows)} or fewer"
            )
        place[rows] = np.random.default_rng(derive_seed(seed, "images", "part", split, name)).permutation(len(rows))
        size[rows] = min(len(rows), per_class or len(rows))
    kept = np.flatnonzero(place < size)
    if section.limit:
        if section.limit > len(kept):
            raise SparsightError(f"images.limit: there are {len(kept)} images; ask for {len(kept)} or fewer")
        # Each group's images lie evenly between 0 and 1, so the first images of all have as equal shares as can be.
        between = np.random.default_rng(derive_seed(seed, "images", "limit")).random(len(kept))
        kept = np.sort(kept[np.argsort((place[kept] + between) / size[kept])[: section.limit]])
    return [items[row] for row in kept]
