"""Digits in colour: images with two attributes that are known and independent."""

from functools import cached_property

import numpy as np

from sparsight.common.seeds import derive_seed
from sparsight.images.sources.base import Item
from sparsight.images.sources.listing import log_rows
from sparsight.images.sources.packaged import Mnist5000

COLOURS = {
    "red": (255, 0, 0), "yellow": (255, 255, 0), "green": (0, 255, 0),
    "cyan": (0, 255, 255), "blue": (0, 0, 255), "magenta": (255, 0, 255),
}  # fmt: skip
"""The colour of a full stroke, RGB."""


class ColouredDigits(Mnist5000):
    """The digits of :class:`Mnist5000`, each in one colour on black, 28 x 28 RGB: the label is the digit.

    The further label column ``colour`` holds the name of the colour. Colours are drawn with a seed of the source's own,
    the same number of each for every digit (but for a remainder), so that the digit says nothing about the colour.
    """

    @cached_property
    def _colours(self) -> np.ndarray:
        """Number of the colour of every image, int (n,)."""
        generator = np.random.default_rng(derive_seed(0, "coloured-digits"))
        digits = self._table[:, -1]
        colours = np.empty(len(digits), np.int64)
        for digit in np.unique(digits):
            places = generator.permutation(np.flatnonzero(digits == digit))
            colours[places] = np.arange(len(places)) % len(COLOURS)
        return colours

    def items(self) -> list[Item]:
        log_rows("coloured-digits", len(self._table))
        names = list(COLOURS)
        return [
            Item(f"coloured-digits:{i}", str(digit), None, columns={"colour": names[colour]})
            for i, (digit, colour) in enumerate(zip(self._table[:, -1], self._colours, strict=True))
        ]

    def read(self, uri: str) -> bytes:
        grey = np.frombuffer(super().read(uri), np.uint8)
        rgb = np.array(list(COLOURS.values()))[self._colours[int(uri.partition(":")[2])]]
        return (grey[:, None] * (rgb // 255)).astype(np.uint8).tobytes()

    def decode(self, uri: str, data: bytes) -> np.ndarray:
        return np.frombuffer(data, np.uint8).reshape(28, 28, 3)
