"""The names that image sources give their splits; one rule for all of them."""

import re
from pathlib import PurePath

SPLITS = ("train", "val", "test")
_NAMES = {
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
NAMES = "train, training, val, valid, validation, dev, test, testing"
"""The known names, for messages."""


def split_of(name: str) -> str | None:
    """The split that a name stands for, in any case; None if it is no split's name."""
    return _NAMES.get(name.lower())


def split_of_file(file: PurePath) -> str | None:
    """The split of a file that holds many images: by its name, or else by that of the nearest folder; None if neither.

    The first word of a name counts, as in ``train-00000-of-00002.parquet``, ``Valid.parquet`` or ``testing/0.parquet``.
    """
    for name in (file.name, *(folder.name for folder in file.parents)):
        word = re.match(r"[a-z]*", name.lower())
        if word and (split := split_of(word[0])):
            return split
    return None
