"""Images as files in folders: class folders, CUB-200-2011, Tiny-ImageNet."""

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path

from sparsight.common.errors import SparsightError, reason
from sparsight.common.progress import log
from sparsight.images.sources.base import Item, Reopening
from sparsight.images.sources.listing import Tree, log_files, read_tree
from sparsight.images.sources.splits import NAMES, SPLITS, split_of


class Files(Reopening):
    """Images that are files; the uri is the path."""

    def __init__(self, path: str | None) -> None:
        assert path is not None
        self.path = Path(path)

    def read(self, uri: str) -> bytes:
        return Path(uri).read_bytes()


class Folder(Files):
    """path/<class>/<image>, or a flat folder of unlabelled images, path/<image>; either way also below split folders.

    A class folder has images of its own, at any depth, or a single folder that has them. Several folders of images in
    a class folder without images of its own are an error, because each of them could be a class.
    """

    def items(self) -> list[Item]:
        return self._items

    def class_names(self) -> list[str]:
        return sorted({item.label_name for item in self._items if item.label_name is not None})

    @cached_property
    def _items(self) -> list[Item]:
        tree = read_tree(self.path)
        parts = self._splits(tree) or {None: tree}
        items = [item for split, part in parts.items() for item in self._part(part, split)]
        log_files(tree, [item.uri for item in items])
        if not items:
            raise SparsightError(f"{self.path}: no images found; expected {self.path}/<class>/<image>")
        return items

    def _splits(self, tree: Tree) -> dict[str | None, Tree]:
        """The folder of each split; empty if there are no split folders."""
        splits: dict[str | None, Tree] = {}
        strangers = []
        for folder in tree.folders:
            split = split_of(folder.path.name)
            if split is None:
                strangers.append(folder.path)
            elif split in splits:
                raise SparsightError(
                    f"{self.path}: {splits[split].path.name} and {folder.path.name} are both the {split} split; "
                    "make one folder of them"
                )
            else:
                splits[split] = folder
        if not splits:
            return {}
        name = next(iter(splits.values())).path.name
        if strangers:
            raise SparsightError(
                f"{strangers[0]}: no split ({NAMES}), but beside the split folder {name!r}; move it away, or, if all "
                f"folders here are classes, move them into a new folder {self.path / 'train'}"
            )
        if tree.images:
            raise SparsightError(
                f"{tree.images[0]}: an image beside the split folder {name!r}; move it into a split folder, or away"
            )
        if "train" not in splits:
            raise SparsightError(f"{self.path}: has {', '.join(map(str, splits))} but no train; add {self.path}/train")
        return {split: splits[split] for split in SPLITS if split in splits}

    def _part(self, root: Tree, split: str | None) -> Iterator[Item]:
        """The images of the class folders in ``root``, or those of the flat folder ``root``."""
        folders = [folder for folder in root.folders if folder.holds_images]
        if empty := [folder.path.name for folder in root.folders if not folder.holds_images]:
            log(f"images: {root.path}: {len(empty)} folders hold no images (e.g. {empty[0]})")
        if folders and root.images:
            raise SparsightError(
                f"{root.images[0]}: an image beside the class folder {folders[0].path.name!r}; move the image into a "
                "class folder, or all class folders away (images in no class folder are unlabelled)"
            )
        deep = [folder.path.name for folder in folders if any(inner.holds_images for inner in folder.folders)]
        if deep:
            log(f"images: {root.path}: {len(deep)} class folders hold folders of images of the class (e.g. {deep[0]})")
        for folder in folders:
            self._check_one_class(folder, None if split is None else root.path)
            files = [file for tree in folder.walk() for file in tree.images]
            for file in sorted(files, key=lambda file: file.split("/")):
                yield Item(file, folder.path.name, split)
        for file in root.images:
            yield Item(file, None, split)

    def _check_one_class(self, folder: Tree, split_folder: Path | None) -> None:
        """Check that the folders in a class folder cannot be meant as classes."""
        inner = folder
        while not inner.images:
            inside = [tree for tree in inner.folders if tree.holds_images]
            if len(inside) > 1:
                remedy = f"give {inner.path} as the path" if split_folder is None else f"move them into {split_folder}"
                raise SparsightError(
                    f"{inner.path}: no image, but {len(inside)} folders of images (e.g. {inside[0].path.name!r}) where "
                    f"images of the class {folder.path.name!r} are expected; if these folders are the classes, {remedy}"
                    f"; if not, move their images into {inner.path}"
                )
            (inner,) = inside


class Cub200(Files):
    """CUB-200-2011 as published: images.txt, image_class_labels.txt, train_test_split.txt, classes.txt, images/."""

    def items(self) -> list[Item]:
        files, labels, in_train = (
            self._table(name) for name in ("images.txt", "image_class_labels.txt", "train_test_split.txt")
        )
        _same_keys(self.path, {"images.txt": files, "image_class_labels.txt": labels, "train_test_split.txt": in_train})
        items = [
            Item(
                (self.path / "images" / file).as_posix(),
                _name(self._classes, labels[key], self.path / "classes.txt"),
                "train" if in_train[key] == "1" else "test",
            )
            for key, file in files.items()
        ]
        log_files(read_tree(self.path), [item.uri for item in items])
        return items

    def class_names(self) -> list[str]:
        return list(self._classes.values())

    @cached_property
    def _classes(self) -> dict[str, str]:
        """Class number -> readable name: ``001.Black_footed_Albatross`` becomes ``Black footed Albatross``."""
        return {key: name.partition(".")[2].replace("_", " ") for key, name in self._table("classes.txt").items()}

    def _table(self, name: str) -> dict[str, str]:
        return dict(_split(line, self.path / name) for line in read_lines(self.path / name))


class TinyImageNet(Files):
    """Tiny-ImageNet-200 as published: train/<wnid>/images, val/images with val_annotations.txt, words.txt.

    Its test images have no labels, so ``val`` is the test split, as in the literature.
    """

    def items(self) -> list[Item]:
        names = dict(zip(self._wnids, self.class_names(), strict=True))
        tree = read_tree(self.path)
        images = {part.path: part.images for part in tree.walk()}
        items = [
            Item(file, name, "train")
            for wnid, name in names.items()
            for file in images.get(self.path / "train" / wnid / "images", [])
        ]
        annotations = self.path / "val" / "val_annotations.txt"
        labels = dict(_split(line, annotations) for line in read_lines(annotations))
        files = {Path(file).name: file for file in images.get(self.path / "val" / "images", [])}
        _same_keys(self.path / "val", {"images": files, "val_annotations.txt": labels})
        for name, file in files.items():
            wnid = labels[name].split()[0]
            items.append(Item(file, _name(names, wnid, self.path / "wnids.txt"), "test"))
        log_files(tree, [item.uri for item in items])
        return items

    def class_names(self) -> list[str]:
        """First name of each synset; synsets that share a first name get their WordNet id appended."""
        words = dict(line.split("\t", 1) for line in read_lines(self.path / "words.txt") if "\t" in line)
        names = [words.get(wnid, wnid).split(",")[0].strip() for wnid in self._wnids]
        return [
            f"{name} ({wnid})" if names.count(name) > 1 else name for wnid, name in zip(self._wnids, names, strict=True)
        ]

    @cached_property
    def _wnids(self) -> list[str]:
        return read_lines(self.path / "wnids.txt")


def read_lines(path: Path) -> list[str]:
    """The lines of a data set's list that are not empty."""
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except OSError as error:
        raise SparsightError(f"{path}: {reason(error)}; give the folder as it was published") from None


def _split(line: str, path: Path) -> tuple[str, str]:
    key, _, value = line.strip().replace("\t", " ").partition(" ")
    if not value:
        raise SparsightError(f"{path}: the line {line!r} has no second column")
    return key, value


def _name(names: dict[str, str], key: str, path: Path) -> str:
    if key not in names:
        raise SparsightError(f"{path}: does not list the class {key!r}, which an image has")
    return names[key]


def _same_keys(path: Path, tables: Mapping[str, Mapping[str, object]]) -> None:
    """Check that every table lists the same images."""
    (first, keys), *rest = tables.items()
    for name, table in rest:
        missing: Iterable[str] = keys.keys() ^ table.keys()
        if missing:
            raise SparsightError(
                f"{path}: {first} lists {len(keys)} images, {name} {len(table)}; "
                f"e.g. {min(missing)!r} is not in both; repair the file"
            )
