"""Writes and reads ``manifest.parquet``: every image of a source with its checksum, label and split."""

import hashlib
import json
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sparsight import config
from sparsight.common.digests import file_digest
from sparsight.common.errors import SparsightError, reason
from sparsight.common.progress import Progress, log
from sparsight.common.seeds import derive_seed
from sparsight.common.slices import row_slices
from sparsight.images.draw import draw_splits
from sparsight.images.sources import SOURCES, Item, open_source
from sparsight.images.split import Split, decode


def write_manifest(section: config.Images, seed: int, record: dict[str, Any], threads: int, path: Path) -> None:
    """Read every image once, check that it decodes, and write ``manifest.parquet``.

    Columns: image_id int64, uri, sha256, label int32, label_name, split; rows in a seeded random order. The
    Parquet metadata key ``sparsight`` holds the source, the class names (a name's position is its label), the
    entries of ``record``, the ``skipped`` images (uri, reason), and images with equal bytes: ``duplicates`` in more
    than one official split, ``label_conflicts`` with more than one label.

    Raises:
        SparsightError: no images, an empty split, a class without train images, or an image that cannot be read
            or decoded (with ``on_error: skip``, such an image is left out, logged and listed instead).
    """
    source = open_source(section)
    items = source.items()
    reader = source.reader(item.uri for item in items)

    def checksum(item: Item) -> str | SparsightError:
        try:
            data = reader.read(item.uri)
            decode(source, item.uri, data)
        except OSError as error:
            return SparsightError(f"image {item.uri}: {reason(error)}; put it back or take it off the list")
        except SparsightError as error:
            return error
        return hashlib.sha256(data).hexdigest()

    sha256: list[str] = []
    kept: list[Item] = []
    skipped: list[dict[str, str]] = []
    with ThreadPoolExecutor(threads) as pool, Progress(len(items), "images") as progress:
        for rows in row_slices(len(items), 1024):  # in windows: a future for every image takes much memory
            for item, result in zip(items[rows], pool.map(checksum, items[rows]), strict=True):
                progress(1)
                if isinstance(result, str):
                    sha256.append(result)
                    kept.append(item)
                elif section.on_error == "stop":
                    raise result
                else:
                    skipped.append({"uri": item.uri, "reason": str(result)})
                    log(f"skipped: {result}")
    classes = source.class_names()
    numbers = {name: number for number, name in enumerate(classes)}
    label = np.array([-1 if i.label_name is None else numbers[i.label_name] for i in kept], dtype=np.int32)
    fractions = {"val": section.val_fraction, "test": section.test_fraction}
    split = draw_splits(kept, sha256, label, classes, fractions, seed)
    duplicates = _equal_images(kept, sha256, split)
    if duplicates:
        log(f"images: {len(duplicates)} images are in more than one split, e.g. {', '.join(duplicates[0])}")
    conflicts = _equal_images(kept, sha256, np.array([item.label_name for item in kept], dtype=object))
    if conflicts:
        log(f"images: {len(conflicts)} images have more than one label, e.g. {', '.join(conflicts[0])}")
    order = np.random.default_rng(derive_seed(seed, "images", "order")).permutation(len(kept))
    table = pa.table(
        {
            "image_id": pa.array(order.astype(np.int64)),
            "uri": [kept[i].uri for i in order],
            "sha256": [sha256[i] for i in order],
            "label": pa.array(label[order], mask=label[order] < 0),
            "label_name": [kept[i].label_name for i in order],
            "split": split[order].tolist(),
        }
    )
    metadata = {
        "format_version": 1,
        "source": section.source,
        "path": section.path,
        "classes": classes,
        "skipped": skipped,
        "duplicates": duplicates,
        "label_conflicts": conflicts,
        **record,
    }
    pq.write_table(table.replace_schema_metadata({"sparsight": json.dumps(metadata, sort_keys=True)}), path)


def _equal_images(items: list[Item], sha256: list[str], of: np.ndarray) -> list[list[str]]:
    """Groups of images with equal bytes that differ in ``of``, (n,); per image its uri and the value that it has."""
    rows: dict[str, list[int]] = defaultdict(list)
    for row, digest in enumerate(sha256):
        rows[digest].append(row)
    return [[f"{items[i].uri} ({of[i]})" for i in group] for group in rows.values() if len(set(of[group])) > 1]


class Manifest:
    """The images of a run, as ``manifest.parquet`` lists them.

    Raises:
        SparsightError: the file is not an image manifest.
    """

    def __init__(self, path: Path) -> None:
        self.table = pq.read_table(path)
        metadata = (self.table.schema.metadata or {}).get(b"sparsight")
        if metadata is None:
            raise SparsightError(f"{path}: not an image manifest (no 'sparsight' metadata); run the images stage")
        self.about = json.loads(metadata)
        self.classes: list[str] = self.about["classes"]
        self.digest = file_digest(path)
        self._source = SOURCES[self.about["source"]](self.about["path"])

    def split(self, name: str) -> "Split":
        """The rows of one split, in manifest order."""
        table = self.table.filter(pc.equal(self.table["split"], name))
        return Split(
            self._source,
            table["uri"],
            table["sha256"],
            table["label"].fill_null(-1).to_numpy().copy(),
            self.classes,
        )
