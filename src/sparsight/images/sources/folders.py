"""Images as files in folders: class folders, CUB-200-2011, Tiny-ImageNet."""

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path

from PIL import Image

from sparsight.common.errors import SparsightError, reason
from sparsight.common.progress import log
from sparsight.images.sources.base import SPLITS, Item, Reopening


class _Files(Reopening):
    """Images that are files; the uri is the path."""

    def __init__(self, path: str | None) -> None:
        assert path is not None
        self.path = Path(path)

    def read(self, uri: str) -> bytes:
        return Path(uri).read_bytes()


class Folder(_Files):
    """path/<class>/<image>, or path/<split>/<class>/<image> with splits train, val, test."""

    def items(self) -> list[Item]:
        return self._items

    def class_names(self) -> list[str]:
        return sorted({item.label_name for item in self._items if item.label_name is not None})

    @cached_property
    def _items(self) -> list[Item]:
        splits = [name for name in SPLITS if (self.path / name).is_dir()]
        if splits and "train" not in splits:
            raise SparsightError(f"{self.path}: has {', '.join(splits)} but no train; add {self.path / 'train'}")
        roots: list[tuple[Path, str | None]] = [(self.path / name, name) for name in splits] or [(self.path, None)]
        suffixes = Image.registered_extensions()
        items: list[Item] = []
        stray: list[Path] = []
        for root, split in roots:
            for entry in sorted(root.iterdir()):
                files = sorted(entry.rglob("*")) if entry.is_dir() else [entry]
                for file in files:
                    if entry.is_dir() and file.suffix.lower() in suffixes:
                        items.append(Item(file.as_posix(), entry.name, split))
                    elif not file.is_dir():
                        stray.append(file)
        if splits:
            stray += sorted(entry for entry in self.path.iterdir() if entry.name not in splits)
        if stray:
            log(f"images: {len(stray)} entries of {self.path} are no images in a class folder, e.g. {stray[0].name}")
        if not items:
            raise SparsightError(f"{self.path}: no images found; expected {self.path}/<class>/<image>")
        return items


class Cub200(_Files):
    """CUB-200-2011 as published: images.txt, image_class_labels.txt, train_test_split.txt, classes.txt, images/."""

    def items(self) -> list[Item]:
        files, labels, in_train = (
            self._table(name) for name in ("images.txt", "image_class_labels.txt", "train_test_split.txt")
        )
        _same_keys(self.path, {"images.txt": files, "image_class_labels.txt": labels, "train_test_split.txt": in_train})
        return [
            Item(
                (self.path / "images" / file).as_posix(),
                _name(self._classes, labels[key], self.path / "classes.txt"),
                "train" if in_train[key] == "1" else "test",
            )
            for key, file in files.items()
        ]

    def class_names(self) -> list[str]:
        return list(self._classes.values())

    @cached_property
    def _classes(self) -> dict[str, str]:
        """Class number -> readable name: ``001.Black_footed_Albatross`` becomes ``Black footed Albatross``."""
        return {key: name.partition(".")[2].replace("_", " ") for key, name in self._table("classes.txt").items()}

    def _table(self, name: str) -> dict[str, str]:
        return dict(_split(line, self.path / name) for line in _lines(self.path / name))


class TinyImageNet(_Files):
    """Tiny-ImageNet-200 as published: train/<wnid>/images, val/images with val_annotations.txt, words.txt.

    Its test images have no labels, so ``val`` is the test split, as in the literature.
    """

    def items(self) -> list[Item]:
        names = dict(zip(self._wnids, self.class_names(), strict=True))
        items = [
            Item(file.as_posix(), name, "train")
            for wnid, name in names.items()
            for file in sorted((self.path / "train" / wnid / "images").glob("*.JPEG"))
        ]
        annotations = self.path / "val" / "val_annotations.txt"
        labels = dict(_split(line, annotations) for line in _lines(annotations))
        files = {file.name: file for file in sorted((self.path / "val" / "images").iterdir())}
        _same_keys(self.path / "val", {"images": files, "val_annotations.txt": labels})
        for name, file in files.items():
            wnid = labels[name].split()[0]
            items.append(Item(file.as_posix(), _name(names, wnid, self.path / "wnids.txt"), "test"))
        return items

    def class_names(self) -> list[str]:
        """First name of each synset; synsets that share a first name get their WordNet id appended."""
        words = dict(line.split("\t", 1) for line in _lines(self.path / "words.txt") if "\t" in line)
        names = [words.get(wnid, wnid).split(",")[0].strip() for wnid in self._wnids]
        return [
            f"{name} ({wnid})" if names.count(name) > 1 else name for wnid, name in zip(self._wnids, names, strict=True)
        ]

    @cached_property
    def _wnids(self) -> list[str]:
        return _lines(self.path / "wnids.txt")


def _lines(path: Path) -> list[str]:
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
