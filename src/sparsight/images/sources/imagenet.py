"""ImageNet-1k, unpacked as torchvision's ``ImageNet`` leaves it."""

from functools import cached_property
from pathlib import Path

from sparsight.common.errors import SparsightError
from sparsight.images.sources.base import Item, Reopening
from sparsight.images.sources.listing import Tree, log_files, read_tree

_SPLITS = {"train": "train", "val": "test"}
"""Folders and the splits that they are."""


class ImageNet(Reopening):
    """train/<WordNet id>/<image> and val/<WordNet id>/<image>, also of a part of the 1,000 classes.

    The labels of its test images are not public, so ``val`` is the test split, as in the literature. Classes are in the
    order of their WordNet ids, the usual one. Their names are CLIP's, which tell apart what WordNet calls the same
    (``construction crane``, ``crane bird``); they come with open_clip, so torchvision's ``meta.bin`` is not read.
    """

    def __init__(self, path: str | None) -> None:
        assert path is not None
        self.path = Path(path)

    def read(self, uri: str) -> bytes:
        return Path(uri).read_bytes()

    def items(self) -> list[Item]:
        items = [
            Item(file, self._names[folder.path.name], _SPLITS[name])
            for name, folders in self._folders.items()
            for folder in folders
            for part in folder.walk()
            for file in part.images
        ]
        log_files(self._tree, [item.uri for item in items])
        return items

    def class_names(self) -> list[str]:
        wnids = {folder.path.name for folders in self._folders.values() for folder in folders}
        return [name for wnid, name in self._names.items() if wnid in wnids]

    @cached_property
    def _tree(self) -> Tree:
        return read_tree(self.path)

    @cached_property
    def _folders(self) -> dict[str, list[Tree]]:
        """The class folders in ``train`` and in ``val``."""
        folders: dict[str, list[Tree]] = {}
        for name in _SPLITS:
            tree = next((tree for tree in self._tree.folders if tree.path.name == name), None)
            folders[name] = [folder for folder in tree.folders if folder.holds_images] if tree else []
            if tree is not None and tree.images:
                raise SparsightError(
                    f"{tree.path}: holds images outside of class folders, e.g. {Path(tree.images[0]).name}; sort them "
                    f"into {tree.path}/<WordNet id>/, as torchvision.datasets.ImageNet does when it unpacks an archive"
                )
            packed = [file for file in tree.other if file.endswith(".tar")] if tree else []
            if not folders[name]:
                packed += [file for file in self._tree.other if file.endswith(f"_img_{name}.tar")]
            if packed:
                raise SparsightError(
                    f"{packed[0]}: still packed; unpack it with torchvision.datasets.ImageNet({str(self.path)!r}, "
                    f"split={name!r}), which needs ILSVRC2012_devkit_t12.tar.gz beside it"
                )
            if not folders[name]:
                raise SparsightError(
                    f"{self.path}: no {name}/<WordNet id>/<image> here; give the folder that holds train and val"
                )
            for folder in folders[name]:
                if folder.path.name not in self._names:
                    raise SparsightError(f"{folder.path}: no WordNet id of ImageNet-1k; take it out of {name}")
        return folders

    @cached_property
    def _names(self) -> dict[str, str]:
        """WordNet id -> class name, in the usual order; equal names get their id appended."""
        from open_clip import IMAGENET_CLASSNAMES  # these imports take seconds
        from timm.data import ImageNetInfo

        wnids, names = ImageNetInfo("imagenet-1k").label_names(), list(IMAGENET_CLASSNAMES)
        return {
            wnid: f"{name} ({wnid})" if names.count(name) > 1 else name for wnid, name in zip(wnids, names, strict=True)
        }
