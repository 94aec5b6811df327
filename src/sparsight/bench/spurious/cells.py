"""Cells: the images of a class with a value of the spurious feature ("groups" in the literature).

Shapes: n images, C classes, V values, G = C V cells.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sparsight.bench.attribute import Attribute
from sparsight.common.errors import SparsightError
from sparsight.images.split import Split


@dataclass(frozen=True)
class Cells:
    """The classes and the values of the spurious feature; cell number = class number x V + value number."""

    classes: list[str]
    attribute: Attribute

    @classmethod
    def of(cls, group: str, train: Split) -> "Cells":
        """The cells of the images of train.

        Raises:
            SparsightError: a column that the images lack or that has one value, or no class with two of them.
        """
        cells = cls(train.classes, Attribute.of(group, train))
        numbers = cells.numbers(train)
        several = np.bincount(numbers[numbers >= 0], minlength=np.prod(cells.shape)).reshape(cells.shape) > 0
        if not (several.sum(axis=1) > 1).any():
            raise SparsightError(
                f"spurious: no class has two values of {group!r} on train, so nothing tells the class from {group!r}; "
                "add images of such groups, or set the section to null"
            )
        return cells

    @property
    def shape(self) -> tuple[int, int]:
        """C, V."""
        return len(self.classes), len(self.attribute.values)

    def numbers(self, split: Split) -> np.ndarray:
        """Cell of every image, int (n,); -1 without a class or a value that train has."""
        values = self.attribute.numbers(split)
        return np.where((split.labels < 0) | (values < 0), -1, split.labels * self.shape[1] + values)

    def names(self, cell: int) -> tuple[str, str]:
        """Class and value."""
        label, value = divmod(cell, self.shape[1])
        return self.classes[label], self.attribute.values[value]

    def counts(self, numbers: Mapping[str, np.ndarray]) -> list[dict[str, str | int]]:
        """For every cell class, group and the number of images by split.

        Args:
            numbers: by split, the cell of every image.
        """
        return [
            dict(zip(("class", "group"), self.names(cell), strict=True))
            | {part: int((cells == cell).sum()) for part, cells in numbers.items()}
            for cell in range(self.shape[0] * self.shape[1])
        ]


def balanced(cells_n: np.ndarray, seed: int) -> np.ndarray:
    """Images, ascending: as many of every cell that has any, drawn at random; int.

    Args:
        cells_n: cell of every image; -1 for none.
        seed: seed of the draw.
    """
    generator = np.random.default_rng(seed)
    present, counts = np.unique(cells_n[cells_n >= 0], return_counts=True)
    drawn = [generator.permutation(np.flatnonzero(cells_n == cell))[: counts.min()] for cell in present]
    return np.sort(np.concatenate(drawn))
