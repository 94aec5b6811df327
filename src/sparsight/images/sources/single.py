"""Image sources that are a single data set, by name."""

from collections.abc import Callable

from sparsight.images.sources.base import Source
from sparsight.images.sources.biased import BiasedDigits
from sparsight.images.sources.coloured import ColouredDigits
from sparsight.images.sources.folders import Cub200, Folder, TinyImageNet
from sparsight.images.sources.hf_datasets import HuggingFace
from sparsight.images.sources.imagenet import ImageNet
from sparsight.images.sources.packaged import TORCHVISION, Mnist5000
from sparsight.images.sources.parquet import ParquetTables
from sparsight.images.sources.shapes import ColouredShapes
from sparsight.images.sources.webdataset import WebDataset

SINGLE: dict[str, Callable[[str | None], Source]] = {
    "mnist-5000": Mnist5000,
    "coloured-digits": ColouredDigits,
    "biased-digits": BiasedDigits,
    "coloured-shapes": ColouredShapes,
    "folder": Folder,
    "parquet": ParquetTables,
    "hf-datasets": HuggingFace,
    "webdataset": WebDataset,
    "imagenet": ImageNet,
    "cub200": Cub200,
    "tiny-imagenet": TinyImageNet,
    **TORCHVISION,
}
