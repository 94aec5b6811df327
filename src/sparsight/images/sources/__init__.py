"""Image sources: where pictures and labels come from."""

from collections.abc import Callable

from sparsight.config import Images
from sparsight.images.sources.base import Item, Masks, Reader, Source
from sparsight.images.sources.single import SINGLE
from sparsight.images.sources.splits import SPLITS
from sparsight.images.sources.union import Union

__all__ = ["SOURCES", "SPLITS", "Item", "Masks", "Reader", "Source", "open_source"]

SOURCES: dict[str, Callable[..., Source]] = {**SINGLE, "union": Union}


def open_source(section: Images) -> Source:
    """The source that a section of the configuration describes."""
    options = {} if section.label_column is None else {"label_column": section.label_column}
    return SOURCES[section.source](section.path, **options)
