"""Attributes of images: label columns and their values."""

from dataclasses import dataclass

import numpy as np

from sparsight.common.errors import SparsightError
from sparsight.images.split import Split


@dataclass(frozen=True)
class Attribute:
    """A label column and its values."""

    name: str
    values: list[str]
    """The values that train has, sorted."""

    @classmethod
    def of(cls, name: str, train: Split) -> "Attribute":
        """The attribute of a label column.

        Raises:
            SparsightError: no such column, or fewer than two values on train.
        """
        values = sorted({value for value in train.column(name) if value is not None})
        if len(values) < 2:
            raise SparsightError(
                f"images: those of train have {len(values)} value of {name!r}; an attribute needs two or more"
            )
        return cls(name, values)

    def numbers(self, split: Split) -> np.ndarray:
        """The number of each image's value, int (n,); -1 for none, and for a value that train lacks."""
        number: dict[str | None, int] = {value: i for i, value in enumerate(self.values)}
        return np.array([number.get(value, -1) for value in split.column(self.name)], np.int64)
