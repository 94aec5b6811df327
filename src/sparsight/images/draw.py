"""Draws the splits that a data set does not have."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np

from sparsight.common.errors import SparsightError
from sparsight.common.seeds import derive_seed
from sparsight.images.sources import SPLITS, Item


def draw_splits(
    items: Sequence[Item], content: np.ndarray, label: np.ndarray, classes: Sequence[str],
    fractions: Mapping[str, float], seed: int,
) -> np.ndarray:  # fmt: skip
    """The split of every image: the official one where there is one, else drawn from the train images.

    Each class gives its share, rounded, to every split that is missing. Images without a label are drawn as if they
    were a class. Images of equal bytes among those drawn from stay together, whatever their labels. A group that would
    exceed the share of one of its classes goes to the next split, in the end to train. Every member of a union is drawn
    by itself, so it is split as it is on its own.

    Args:
        items: the images.
        content: (n,), equal for images of equal bytes.
        label: int32 (n,), positions in ``classes``; -1 for an image without a label.
        classes: the class names.
        fractions: the share of each split that may be missing.
        seed: seed of the draw.

    Returns:
        Names of splits, an object array (n,).

    Raises:
        SparsightError: an empty split, or a class without train images in a set whose train images have labels.
    """
    split = np.array([item.split or "train" for item in items], dtype=object)
    member = np.array([item.member for item in items])
    for number in np.unique(member):
        existing = set(split[member == number])
        missing = [part for part in fractions if part not in existing]
        train = np.flatnonzero((member == number) & (split == "train"))
        share: dict[str, Counter[int]] = {part: Counter() for part in missing}
        """Images that a split still takes, by class."""
        drawn = [np.empty(0, np.int64)]
        for c in np.unique(label[train]).tolist():
            rows = train[label[train] == c]
            for part in missing:
                share[part][c] = round(fractions[part] * len(rows))
            purpose = ("images", "split", *([classes[c]] if c >= 0 else []))
            drawn.append(np.random.default_rng(derive_seed(seed, *purpose)).permutation(rows))
        for group in _equal(np.concatenate(drawn), content):
            wanted = Counter(label[group].tolist())
            part = next((part for part in missing if wanted <= share[part]), "train")
            split[group] = part
            if part in share:
                share[part] -= wanted
    _check(split, label, classes)
    return split


def _equal(rows: np.ndarray, content: np.ndarray) -> Iterator[np.ndarray]:
    """Groups of rows with equal content, in the order of their first rows."""
    _, first, number = np.unique(content[rows], return_index=True, return_inverse=True)
    order = np.argsort(first[number], kind="stable")
    bounds = np.flatnonzero(np.diff(first[number][order], prepend=-1, append=len(rows)))
    for start, stop in pairwise(bounds.tolist()):
        yield rows[order[start:stop]]


def _check(split: np.ndarray, label: np.ndarray, classes: Sequence[str]) -> None:
    for part in SPLITS:
        if not (split == part).any():
            raise SparsightError(f"images: the {part} split is empty; add images or change the fractions")
    in_train = label[split == "train"]
    missing = np.setdiff1d(np.arange(len(classes)), in_train)
    if len(missing) and (in_train >= 0).any():
        raise SparsightError(
            f"images: the train split has no image of {classes[missing[0]]!r}; add images or change the fractions"
        )
