"""Makes and opens ``manifest.parquet``: every image of a source with its checksum, label and split."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sparsight import config
from sparsight.common.digests import file_digest
from sparsight.common.errors import SparsightError, reason
from sparsight.common.progress import Progress, log
from sparsight.common.seeds import derive_seed
from sparsight.common.slices import row_slices
from sparsight.images import table
from sparsight.images.draw import draw_splits
from sparsight.images.masks import open_masks, read_mask
from sparsight.images.part import draw_part
from sparsight.images.sources import SOURCES, SPLITS, Item, Masks, Source, open_source
from sparsight.images.split import Split, decode


def write_manifest(section: config.Images, seed: int, record: dict[str, Any], threads: int, path: Path) -> None:
    """List the images of a source, read each once, check that it decodes, and write ``manifest.parquet``.

    Columns: image_id int64, uri, sha256, label int32 and label_name (null without a label), split, the source's further
    label columns, and ``mask_sha256`` if the images have masks. The rows of train come first, then those of val and
    test; within a split they are in a seeded random order. A row group holds at most ``table.ROW_GROUP`` rows, of one
    split. The Parquet metadata key ``sparsight`` holds the source, the class names (a name's position is its label),
    the ``part`` of the source that was asked for, the number of ``unlabelled`` images of each split, the entries of
    ``record``, the ``skipped`` images (uri, reason), the ``masks`` (path, names) if there are any, and images with
    equal bytes: ``duplicates`` in more than one official split, ``label_conflicts`` with more than one label.

    Raises:
        SparsightError: no images, an empty split, a class without train images, a part that cannot be drawn, or an
            image or a mask that cannot be read or decoded (with ``on_error: skip``, such an image is left out, logged
            and listed instead).
    """
    source = open_source(section)
    masks = open_masks(source, section.masks, section.path)
    listed = source.items()
    items, classes = draw_part(listed, source.class_names(), section, seed)
    part = {
        "classes": section.classes, "images_per_class": section.images_per_class, "limit": section.limit,
        "listed": len(listed),
    }  # fmt: skip
    del listed
    sha256, mask_sha256, skipped = _checksums(source, masks, items, section.on_error == "skip", threads)
    if skipped:
        left_out = set(skipped)
        items = [item for item in items if item.uri not in left_out]
    numbers = {name: number for number, name in enumerate(classes)}
    label = np.array([-1 if i.label_name is None else numbers[i.label_name] for i in items], dtype=np.int32)
    if not (label >= 0).any():
        classes = []
    content = np.unique(sha256, return_inverse=True)[1]
    fractions = {"val": section.val_fraction, "test": section.test_fraction}
    split = draw_splits(items, content, label, classes, fractions, seed)
    duplicates = _equal_images(items, content, split)
    if duplicates:
        log(f"images: {len(duplicates)} images are in more than one split, e.g. {', '.join(duplicates[0])}")
    conflicts = _equal_images(items, content, np.array([item.label_name for item in items], dtype=object))
    if conflicts:
        log(f"images: {len(conflicts)} images have more than one label, e.g. {', '.join(conflicts[0])}")
    unlabelled = {name: int(((label < 0) & (split == name)).sum()) for name in SPLITS}
    if any(unlabelled.values()):
        log(f"images: without a label: {', '.join(f'{n} of {name}' for name, n in unlabelled.items())}")
    about = {
        "format_version": 2,
        "source": section.source,
        "path": section.path,
        "classes": classes,
        "part": part,
        "unlabelled": unlabelled,
        "skipped": [{"uri": uri, "reason": why} for uri, why in skipped.items()],
        "duplicates": duplicates,
        "label_conflicts": conflicts,
        **({} if masks is None else {"masks": {"path": section.masks, "names": masks.names()}}),
        **record,
    }
    columns = _further_columns(items)
    order = np.random.default_rng(derive_seed(seed, "images", "order")).permutation(len(items))

    def rows() -> Iterator[pa.Table]:
        for name in SPLITS:
            of_split = order[split[order] == name]
            for window in row_slices(len(of_split), table.ROW_GROUP):
                chosen = of_split[window]
                some = [items[i] for i in chosen]
                values = {
                    "image_id": chosen.astype(np.int64),
                    "uri": [item.uri for item in some],
                    "sha256": pa.array(sha256[chosen]).cast(pa.string()),
                    "label": pa.array(label[chosen], mask=label[chosen] < 0),
                    "label_name": pa.array([item.label_name for item in some], pa.string()),
                    "split": [name] * len(some),
                }
                further = {key: pa.array([item.columns.get(key) for item in some], pa.string()) for key in columns}
                if masks is not None:
                    further[table.MASK] = pa.array(mask_sha256[chosen]).cast(pa.string())
                yield pa.table(values | further)

    table.write(path, rows(), columns if masks is None else [*columns, table.MASK], about)


def _checksums(
    source: Source, masks: Masks | None, items: list[Item], skip: bool, threads: int
) -> tuple[np.ndarray, np.ndarray, dict[str, str]]:
    """sha256 of every image that can be read and of its mask, S64 (n,); and the reason for each other one, by uri."""
    reader = source.reader(item.uri for item in items)

    def checksum(item: Item) -> tuple[str, str] | SparsightError:
        mask_sha256 = ""
        try:
            data = reader.read(item.uri)
            height, width, _ = decode(source, item.uri, data).shape
            if masks is not None:
                mask_sha256 = hashlib.sha256(read_mask(masks, item.uri, (height, width))[0]).hexdigest()
        except OSError as error:
            return SparsightError(f"image {item.uri}: {reason(error)}; put it back or take it off the list")
        except SparsightError as error:
            return error
        return hashlib.sha256(data).hexdigest(), mask_sha256

    sha256, mask_sha256, n_read = np.empty(len(items), "S64"), np.empty(len(items), "S64"), 0
    skipped: dict[str, str] = {}
    with ThreadPoolExecutor(threads) as pool, Progress(len(items), "images") as progress:
        for rows in row_slices(len(items), 1024):  # in windows: a future for every image takes much memory
            for item, result in zip(items[rows], pool.map(checksum, items[rows]), strict=True):
                progress(1)
                if isinstance(result, tuple):
                    sha256[n_read], mask_sha256[n_read] = result
                    n_read += 1
                elif skip:
                    skipped[item.uri] = str(result)
                    log(f"skipped: {result}")
                else:
                    raise result
    return sha256[:n_read], mask_sha256[:n_read], skipped


def _equal_images(items: list[Item], content: np.ndarray, of: np.ndarray) -> list[list[str]]:
    """Groups of images with equal bytes that differ in ``of``, (n,); per image its uri and the value that it has.

    Images without a value (None) are in no group.
    """
    groups: dict[int, list[int]] = defaultdict(list)
    has_value = np.array([value is not None for value in of], bool)
    for row in np.flatnonzero((np.bincount(content)[content] > 1) & has_value).tolist():
        groups[content[row]].append(row)
    return [[f"{items[i].uri} ({of[i]})" for i in group] for group in groups.values() if len(set(of[group])) > 1]


def _further_columns(items: list[Item]) -> list[str]:
    """Names of the items' further label columns, in the order in which they first occur."""
    columns = list(dict.fromkeys(name for item in items for name in item.columns))
    taken = [name for name in columns if name in table.RESERVED]
    if taken:
        raise SparsightError(
            f"images: the source has a label column {taken[0]!r}, a name that the manifest needs; rename the column"
        )
    return columns


class Manifest:
    """The images of a run, as ``manifest.parquet`` lists them. Opening it reads the file's footer only.

    Raises:
        SparsightError: the file is not an image manifest.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        footer = pq.read_metadata(path)
        metadata = (footer.metadata or {}).get(b"sparsight")
        if metadata is None:
            raise SparsightError(f"{path}: not an image manifest (no 'sparsight' metadata); run the images stage")
        self._n_images = footer.num_rows
        self.about: dict[str, Any] = json.loads(metadata)
        self.classes: list[str] = self.about["classes"]
        self._source = SOURCES[self.about["source"]](self.about["path"])
        masks = self.about.get("masks")
        self.masks = None if masks is None else open_masks(self._source, masks["path"], self.about["path"])
        """Where the masks of the images are, if they have any."""

    def __len__(self) -> int:
        """The number of images, of all splits."""
        return self._n_images

    @cached_property
    def digest(self) -> str:
        """sha256 of the file."""
        return file_digest(self._path)

    @property
    def table(self) -> pa.Table:
        """All rows and columns, read into memory."""
        return pq.read_table(self._path)

    def split(self, name: str) -> Split:
        """The images of one split, in manifest order."""
        return Split(self._source, table.SplitTable(self._path, name), self.classes)
