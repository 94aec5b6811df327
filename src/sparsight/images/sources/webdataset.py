"""Shards of WebDataset: tar archives in which the files of a sample share a key."""

import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path, PurePath
from typing import BinaryIO

from PIL import Image

from sparsight.common.errors import SparsightError, reason
from sparsight.common.progress import log
from sparsight.images.class_names import in_order
from sparsight.images.sources.base import Item, Reopening
from sparsight.images.sources.listing import is_hidden, log_files, read_tree
from sparsight.images.sources.splits import split_of, split_of_file

_LABELS = ("cls", "json", "txt")
"""Suffixes of label files; the first one that a sample has counts."""
_NAMES = "classnames.txt"
_TAIL = 2**20
"""Bytes that are checked after an archive's last file; tar fills up to 10 KiB with zeros."""

_Sample = dict[str, tarfile.TarInfo]
"""The files of a sample by suffix, in lower case."""


class WebDataset(Reopening):
    """A .tar file, or a folder of them; a uri is ``<shard>:<file>@<start>+<size>``, the bytes' place in the shard.

    The files of a shard whose names agree up to the first dot are a sample: an image, and a label in ``.cls``, in the
    field ``label`` of ``.json``, or in ``.txt``. A label is a name or a number; line n + 1 of ``classnames.txt`` beside
    the shards names the number n. An image without a label file, with an empty one or with -1 has no label. The name of
    a shard or of its folder gives the split.

    The library ``webdataset`` reads shards from front to back only, so the standard library lists each shard once. The
    place is part of the uri, because listing takes 60 us a file and every job would have to do it again.
    """

    def __init__(self, path: str | None) -> None:
        assert path is not None
        self.path = Path(path)
        self._root = self.path if self.path.is_dir() else self.path.parent

    def items(self) -> list[Item]:
        return self._items

    def class_names(self) -> list[str]:
        return self._names or in_order(item.label_name for item in self._items if item.label_name is not None)

    def read(self, uri: str) -> bytes:
        file, _, place = uri.rpartition("@")
        start, _, size = place.partition("+")
        with (self._root / f"{file.partition('.tar:')[0]}.tar").open("rb") as shard:
            return _bytes(shard, int(start), int(size))

    @cached_property
    def _shards(self) -> list[str]:
        """Paths of the shards below the folder, in order."""
        if self.path.is_file():
            return [self.path.name]
        tree = read_tree(self.path)
        files = [file for part in tree.walk() for file in part.other]
        packed = [file for file in files if re.search(r"\.(tar\.\w+|tgz)$", file)]
        if packed:
            raise SparsightError(
                f"{packed[0]}: images cannot be read from the middle of a packed archive; unpack it to .tar"
            )
        shards = [file for file in files if file.endswith(".tar")]
        if not shards:
            raise SparsightError(f"{self.path}: no .tar file here; give the folder of the shards")
        log_files(tree, [*shards, *(file for file in files if file == (self.path / _NAMES).as_posix())], "shards")
        return sorted(Path(file).relative_to(self.path).as_posix() for file in shards)

    @cached_property
    def _names(self) -> list[str]:
        """The names of the class numbers; equal ones get their number appended."""
        try:
            names = (self._root / _NAMES).read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as error:
            raise SparsightError(f"{self._root / _NAMES}: {reason(error)}; repair or remove it") from None
        return [f"{name} ({n})" if names.count(name) > 1 else name for n, name in enumerate(names)]

    @cached_property
    def _items(self) -> list[Item]:
        items: list[Item] = []
        counts: Counter[str] = Counter()
        for shard, split in _splits(self.path, self._shards).items():
            path = self._root / shard
            with path.open("rb") as file:
                for key, sample in _samples(path, file, counts).items():
                    image = _image(path, key, sample)
                    if image is None:
                        counts["other"] += len(sample)
                        continue
                    suffix = next((suffix for suffix in _LABELS if suffix in sample), None)
                    label = None if suffix is None else self._label(path, file, sample[suffix], suffix)
                    items.append(Item(f"{shard}:{image.name}@{image.offset_data}+{image.size}", label, split))
                    counts["label files"] += suffix is not None
                    counts["other"] += len(sample) - 1 - (suffix is not None)
        if not items:
            raise SparsightError(f"{self.path}: the shards hold no images")
        counts["images"] = len(items)
        unlabelled = sum(item.label_name is None for item in items)
        log(
            f"images: {self.path}, {len(self._shards)} shards: {counts.total()} files: "
            + ", ".join(f"{counts[kind]} {kind}" for kind in ("images", "label files", "hidden", "other"))
            + (f"; {unlabelled} of the images without a label" if unlabelled else "")
        )
        return items

    def _label(self, shard: Path, file: BinaryIO, member: tarfile.TarInfo, suffix: str) -> str | None:
        """The class name in a label file."""
        try:
            text: object = _bytes(file, member.offset_data, member.size).decode()
            label = json.loads(str(text)).get("label") if suffix == "json" else str(text).strip()
        except (OSError, ValueError, AttributeError) as error:
            raise SparsightError(f"{shard}: {member.name} is no label ({reason(error)}); repair it") from None
        if label is None or label in ("", "-1", -1):
            return None
        if isinstance(label, bool) or not isinstance(label, int | str):
            raise SparsightError(
                f"{shard}: the label in {member.name} is {label!r}, neither a number nor a text; repair it"
            )
        number = re.fullmatch(r"\d+", str(label))
        if number and int(label) < len(self._names):
            return self._names[int(label)]
        if self._names and label not in self._names:
            raise SparsightError(
                f"{shard}: the label in {member.name} is {label!r}, and {_NAMES} names {len(self._names)} classes; "
                "repair one of them"
            )
        return str(label)


def _splits(path: Path, shards: list[str]) -> dict[str, str | None]:
    """The split of every shard: by the rule for files, or else by any word of its name (``imagenet1k-train-0.tar``)."""

    def by_any_word(shard: str) -> str | None:
        words = re.findall(r"[a-z]+", PurePath(shard).name.lower())
        return next((split for word in words if (split := split_of(word))), None)

    splits = {shard: split_of_file(PurePath(shard)) or by_any_word(shard) for shard in shards}
    of_none = [shard for shard, split in splits.items() if split is None]
    if of_none and len(of_none) < len(shards):
        other = next(shard for shard, split in splits.items() if split)
        raise SparsightError(
            f"{path}: the shard {of_none[0]} is of no split, unlike {other}; name its split, or move it away"
        )
    return splits


def _samples(path: Path, file: BinaryIO, counts: Counter[str]) -> dict[str, _Sample]:
    """The samples of a shard by key; counts the files that are in no sample."""
    samples: dict[str, _Sample] = {}
    for member in _members(path, file):
        key = re.match(r"((?:.*/)?[^.]+)[.]([^/]*)$", member.name)  # as the library splits names
        if any(is_hidden(part) for part in PurePath(member.name).parts):
            counts["hidden"] += 1
        elif key is None or not member.isreg() or member.issparse():
            counts["other"] += 1
        else:
            sample = samples.setdefault(key[1], {})
            if key[2].lower() in sample:
                raise SparsightError(f"{path}: holds {member.name} twice; write the shard again")
            sample[key[2].lower()] = member
    return samples


def _members(path: Path, file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Every entry of an archive but its folders; an error if the archive does not end as archives do."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as archive:
            yield from (member for member in archive if not member.isdir())
            file.seek(archive.offset)
            tail = file.read(_TAIL)  # tarfile takes a damaged entry, or the file's end, for the end of the archive
            if len(tail) < tarfile.BLOCKSIZE or tail.strip(b"\0"):
                raise tarfile.ReadError(f"cut short or damaged at byte {archive.offset:,}")
    except (tarfile.TarError, OSError) as error:
        raise SparsightError(
            f"{path}: not a whole tar archive ({reason(error)}); unpack it if it is compressed, or get the shard again"
        ) from None


def _image(path: Path, key: str, sample: _Sample) -> tarfile.TarInfo | None:
    """The image of a sample; None if it has none."""
    suffixes = Image.registered_extensions()
    images = [member for name, member in sample.items() if f".{name.rpartition('.')[2]}" in suffixes]
    if len(images) > 1:
        names = ", ".join(member.name for member in images)
        raise SparsightError(f"{path}: the sample {key} has {len(images)} images ({names}); keep one image a sample")
    return images[0] if images else None


def _bytes(file: BinaryIO, start: int, size: int) -> bytes:
    file.seek(start)
    data = file.read(size)
    if len(data) < size:
        raise OSError(None, "the shard is shorter than when it was listed")
    return data
