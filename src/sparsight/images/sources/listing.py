"""The files under a folder, and the log lines that count them: no file is lost or invented in silence."""

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from PIL import Image

from sparsight.common.errors import SparsightError, reason
from sparsight.common.progress import log

_HIDDEN = {"__macosx", "thumbs.db", "desktop.ini"}


def is_hidden(name: str) -> bool:
    """Whether a file or folder is no part of a data set: a leading dot, or a name that macOS or Windows leaves behind.

    Examples: ``.ipynb_checkpoints``, ``._a.png``, ``.DS_Store``, ``__MACOSX``, ``Thumbs.db``, ``desktop.ini``.
    """
    return name.startswith(".") or name.lower() in _HIDDEN


@cache
def _suffixes() -> frozenset[str]:
    return frozenset(Image.registered_extensions())


@dataclass
class Tree:
    """What a folder holds; entries in the order of their names."""

    path: Path
    images: list[str] = field(default_factory=list)
    """Paths of the files with the suffix of an image format."""
    other: list[str] = field(default_factory=list)
    """Paths of the other files."""
    folders: list["Tree"] = field(default_factory=list)
    hidden: int = 0
    """Number of files with a hidden name, and of all files in folders with a hidden name."""

    def walk(self) -> Iterator["Tree"]:
        """The folder itself and every folder below it, without hidden ones."""
        yield self
        for folder in self.folders:
            yield from folder.walk()

    @property
    def holds_images(self) -> bool:
        """Whether there is an image, at any depth."""
        return any(tree.images for tree in self.walk())


def read_tree(path: Path) -> Tree:
    """List a folder at any depth, following links.

    Raises:
        SparsightError: a folder that cannot be read, or a link to a folder that holds the link.
    """
    tree = Tree(path)
    try:
        entries = sorted(os.scandir(path), key=lambda entry: entry.name)
    except OSError as error:
        raise SparsightError(
            f"{path}: cannot be listed ({reason(error)}); put the folder back, or make it readable"
        ) from None
    for entry in entries:
        place = path / entry.name
        if is_hidden(entry.name):
            tree.hidden += sum(len(files) for _, _, files in os.walk(place)) if entry.is_dir() else 1
        elif entry.is_dir():
            if entry.is_symlink() and path.resolve().is_relative_to(place.resolve()):
                raise SparsightError(f"{place}: links to a folder that holds the link; remove the link")
            tree.folders.append(read_tree(place))
        else:
            (tree.images if place.suffix.lower() in _suffixes() else tree.other).append(place.as_posix())
    return tree


def log_files(tree: Tree, listed: Collection[str], noun: str = "images") -> None:
    """Log the number of files under a folder, and how many of them the source lists, are hidden, or are neither.

    Args:
        tree: the folder.
        listed: paths of the files that the source lists.
        noun: what these files are.
    """
    wanted = set(listed)
    found = [file for part in tree.walk() for file in (*part.images, *part.other)]
    other = [file for file in found if file not in wanted]
    hidden = sum(part.hidden for part in tree.walk())
    counts = f"{len(found) - len(other)} {noun}, {hidden} hidden, {len(other)} other{_example(other)}"
    log(f"images: {tree.path}: {len(found) + hidden} files: {counts}")
    if missing := sorted(wanted.difference(found)):
        log(f"images: {tree.path}: {len(missing)} {noun} are on the list but not here{_example(missing)}")


def log_rows(where: str | Path, n: int, unlabelled: int = 0) -> None:
    """Log the number of rows of a table or array, each of which is an image."""
    log(f"images: {where}: {n} rows: {n} images" + (f", {unlabelled} of them without a label" if unlabelled else ""))


def _example(files: list[str]) -> str:
    return f" (e.g. {Path(files[0]).name})" if files else ""
