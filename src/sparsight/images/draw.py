"""Draws the splits that a data set does not have."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from sparsight.common.errors import SparsightError
from sparsight.common.seeds import derive_seed
from sparsight.images.sources import SPLITS, Item


def draw_splits(
    items: Sequence[Item], sha256: Sequence[str], label: np.ndarray, classes: Sequence[str],
    fractions: Mapping[str, float], seed: int,
) -> np.ndarray:  # fmt: skip
    """The split of every image: the official one where there is one, else drawn from the train images.

    Each class gives its share, rounded, to every split that is missing. Images of equal bytes among those drawn from
    stay together, whatever their labels. A group that would exceed the share of one of its classes goes to the next
    split, in the end to train. Every member of a union is drawn by itself, so it is split as it is on its own.

    Args:
        items: the images.
        sha256: of the bytes of each image.
        label: int32 (n,), positions in ``classes``.
        classes: the class names.
        fractions: the share of each split that may be missing.
        seed: seed of the draw.

    Returns:
        Names of splits, an object array (n,).

    Raises:
        SparsightError: an empty split, or a class without train images.
    """
    split = np.array([item.split or "train" for item in items], dtype=object)
    member = np.array([item.member for item in items])
    for number in np.unique(member):
        existing = set(split[member == number])
        missing = [part for part in fractions if part not in existing]
        train = np.flatnonzero((member == number) & (split == "train"))
        equal: dict[str, list[int]] = defaultdict(list)
        share: dict[str, Counter[int]] = {part: Counter() for part in missing}
        """Images that a split still takes, by class."""
        for c in np.unique(label[train]):
            rows = train[label[train] == c]
            for part in missing:
                share[part][int(c)] = round(fractions[part] * len(rows))
            for row in np.random.default_rng(derive_seed(seed, "images", "split", classes[c])).permutation(rows):
                equal[sha256[row]].append(int(row))
        for group in equal.values():  # in the order of their first images
            wanted = Counter(label[group].tolist())
            part = next((part for part in missing if wanted <= share[part]), "train")
            split[group] = part
            if part in share:
                share[part] -= wanted
    _check(split, label, classes)
    return split


def _check(split: np.ndarray, label: np.ndarray, classes: Sequence[str]) -> None:
    for part in SPLITS:
        if not (split == part).any():
            raise SparsightError(f"images: the {part} split is empty; add images or change the fractions")
    for c, name in enumerate(classes):
        if not ((label == c) & (split == "train")).any():
            raise SparsightError(
                f"images: the train split has no image of {name!r}; add images or change the fractions"
            )
