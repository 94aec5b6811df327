"""Digits whose colour goes with the class on train: a spurious feature that is known."""

from functools import cached_property

import numpy as np

from sparsight.common.seeds import derive_seed
from sparsight.images.sources.base import Item
from sparsight.images.sources.coloured import COLOURS, ColouredDigits
from sparsight.images.sources.listing import log_rows

_CLASSES = ("0 to 4", "5 to 9")
_OWN = ("red", "green")
"""The colour that goes with each class."""
_SHARES = {"train": 0.95, "val": 0.5, "test": 0.5}
"""Share of the images of each digit whose colour is that of their class."""
_ENDS = {"train": 0.7, "val": 0.8, "test": 1.0}
"""Share of each digit's images up to the end of each split."""


class BiasedDigits(ColouredDigits):
    """The digits of :class:`ColouredDigits` in two classes and two colours, with splits of its own.

    The label is whether the digit is below 5. On train 95 % of each digit have the colour of their class, on val and
    test half. The further label column is ``colour``. After Colored MNIST (Arjovsky et al. 2019, arXiv 1907.02893),
    without its wrong labels. Splits and colours are drawn with a seed of the source's own.
    """

    @cached_property
    def _drawn(self) -> tuple[np.ndarray, np.ndarray]:
        """Split of every image, str (n,), and the class whose colour it has, int (n,)."""
        generator = np.random.default_rng(derive_seed(0, "biased-digits"))
        digits = self._table[:, -1]
        splits, colours = np.empty(len(digits), object), np.empty(len(digits), np.int64)
        for digit in np.unique(digits):
            start, own = 0, int(digit >= 5)
            places = generator.permutation(np.flatnonzero(digits == digit))
            for split, end in _ENDS.items():
                some = places[start : (start := round(end * len(places)))]
                splits[some], colours[some] = split, 1 - own
                colours[some[: round(_SHARES[split] * len(some))]] = own
        return splits, colours

    @property
    def _colours(self) -> np.ndarray:
        names = list(COLOURS)
        return np.array([names.index(colour) for colour in _OWN])[self._drawn[1]]

    def class_names(self) -> list[str]:
        return list(_CLASSES)

    def items(self) -> list[Item]:
        log_rows("biased-digits", len(self._table))
        return [
            Item(f"biased-digits:{i}", _CLASSES[int(digit >= 5)], split, columns={"colour": _OWN[colour]})
            for i, (digit, split, colour) in enumerate(zip(self._table[:, -1], *self._drawn, strict=True))
        ]
