"""Image sources: where pictures and labels come from."""

from collections.abc import Callable

from sparsight.images.sources.base import Item, Reader, Source
from sparsight.images.sources.single import SINGLE
from sparsight.images.sources.splits import SPLITS
from sparsight.images.sources.union import Union

__all__ = ["SOURCES", "SPLITS", "Item", "Reader", "Source"]

SOURCES: dict[str, Callable[[str | None], Source]] = {**SINGLE, "union": Union}
