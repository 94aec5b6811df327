"""Image sources -> manifest; manifest -> decoded batches.

Shapes: B batch, H height, W width, C channels.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sparsight import config, schema
from sparsight.errors import SparsightError
from sparsight.preprocess import Preprocess
from sparsight.progress import Progress, say
from sparsight.seeds import derive_seed
from sparsight.sources import SOURCES, SPLITS, Item, Reader, Source
from sparsight.windows import in_order


def write_manifest(section: config.Images, seed: int, record: dict[str, Any], threads: int, path: Path) -> None:
    """Read every image once, check that it decodes, and write ``manifest.parquet``.

    Columns: image_id int64, uri, sha256, label int32, label_name, split; rows in a seeded random order. The
    Parquet metadata key ``sparsight`` holds source, class names (the position is the label), ``record``, what
    was ``skipped`` (uri, reason) and ``duplicates``: images of equal bytes that lie in more than one split.

    Raises:
        SparsightError: no images, an empty split, a class that is not in train, or an image that cannot be
            read or decoded (with ``on_error: skip`` it is left out, logged and listed instead).
    """
    source = SOURCES[section.source](section.path)
    items = source.items()
    reader = source.reader(item.uri for item in items)

    def checksum(item: Item) -> str | SparsightError:
        try:
            data = reader.read(item.uri)
            _decode(source, item.uri, data)
        except OSError as error:
            return SparsightError(f"image {item.uri}: {error.strerror}; put it back or take it off the list")
        except SparsightError as error:
            return error
        return hashlib.sha256(data).hexdigest()

    sha256: list[str] = []
    kept: list[Item] = []
    skipped: list[dict[str, str]] = []
    with ThreadPoolExecutor(threads) as pool, Progress(len(items), "images") as progress:
        for rows in in_order(len(items), 1024):  # a window at a time: a future per image of a large set is memory
            for item, found in zip(items[rows], pool.map(checksum, items[rows]), strict=True):
                progress(1)
                if isinstance(found, str):
                    sha256.append(found)
                    kept.append(item)
                elif section.on_error == "stop":
                    raise found
                else:
                    skipped.append({"uri": item.uri, "reason": str(found)})
                    say(f"skipped: {found}")
    classes = source.class_names()
    numbers = {name: number for number, name in enumerate(classes)}
    label = np.array([numbers[item.label_name] for item in kept], dtype=np.int32)
    split = _split(section, kept, label, classes, seed)
    duplicates = _duplicates(kept, sha256, split)
    if duplicates:
        say(f"images: {len(duplicates)} images are in more than one split, e.g. {', '.join(duplicates[0])}")
    order = np.random.default_rng(derive_seed(seed, "images", "order")).permutation(len(kept))
    table = pa.table(
        {
            "image_id": pa.array(order.astype(np.int64)),
            "uri": [kept[i].uri for i in order],
            "sha256": [sha256[i] for i in order],
            "label": pa.array(label[order]),
            "label_name": [kept[i].label_name for i in order],
            "split": split[order].tolist(),
        }
    )
    about = {
        "format_version": 1,
        "source": section.source,
        "path": section.path,
        "classes": classes,
        "skipped": skipped,
        "duplicates": duplicates,
        **record,
    }
    pq.write_table(table.replace_schema_metadata({"sparsight": json.dumps(about, sort_keys=True)}), path)


def _duplicates(items: list[Item], sha256: list[str], split: np.ndarray) -> list[list[str]]:
    """The uris, each with its split, of images whose bytes lie in more than one split."""
    rows: dict[str, list[int]] = defaultdict(list)
    for row, digest in enumerate(sha256):
        rows[digest].append(row)
    return [[f"{items[i].uri} ({split[i]})" for i in same] for same in rows.values() if len(set(split[same])) > 1]


def _split(section: config.Images, items: list[Item], label: np.ndarray, classes: list[str], seed: int) -> np.ndarray:
    """Keep each member's splits and draw the missing ones from what it calls train, class by class.

    The draw depends on the member's images alone: it is split in a union as it is by itself.
    """
    split = np.array([item.split or "train" for item in items], dtype=object)
    member = np.array([item.member for item in items])
    wanted = {"val": section.val_fraction, "test": section.test_fraction}
    for number in np.unique(member):
        given = set(split[member == number])
        train = np.flatnonzero((member == number) & (split == "train"))
        for c in np.unique(label[train]):
            rows = train[label[train] == c]
            rows = np.random.default_rng(derive_seed(seed, "images", "split", classes[c])).permutation(rows)
            start = 0
            for part, fraction in wanted.items():
                if part not in given:
                    count = round(fraction * len(rows))
                    split[rows[start : start + count]] = part
                    start += count
    for part in SPLITS:
        if not (split == part).any():
            raise SparsightError(f"images: the {part} split is empty; add images or change the fractions")
    for c, name in enumerate(classes):
        if not ((label == c) & (split == "train")).any():
            raise SparsightError(
                f"images: the train split has no image of {name!r}; add images or change the fractions"
            )
    return split


class Manifest:
    """The images of a run, as ``manifest.parquet`` lists them.

    Raises:
        SparsightError: not a manifest of ours.
    """

    def __init__(self, path: Path) -> None:
        self.table = pq.read_table(path)
        about = (self.table.schema.metadata or {}).get(b"sparsight")
        if about is None:
            raise SparsightError(f"{path}: not an image manifest (no 'sparsight' metadata); run the images stage")
        self.about = json.loads(about)
        self.classes: list[str] = self.about["classes"]
        self.digest = schema.file_digest(path)
        self._source = SOURCES[self.about["source"]](self.about["path"])

    def split(self, name: str) -> "Split":
        """The rows of one split, in manifest order."""
        table = self.table.filter(pc.equal(self.table["split"], name))
        return Split(
            self._source,
            table["uri"],
            table["sha256"],
            table["label"].to_numpy().copy(),
            self.classes,
        )


Rows = np.ndarray | slice
"""Numbers of images of a split."""


@dataclass(frozen=True)
class Split:
    """The images of one split; picklable, so that worker processes can read them."""

    source: Source
    _uris: pa.ChunkedArray
    _sha256: pa.ChunkedArray
    labels: np.ndarray
    """int32 (n,)."""
    classes: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def uris(self, rows: Rows) -> list[str]:
        """Where the images of ``rows`` come from."""
        return (self._uris[rows] if isinstance(rows, slice) else self._uris.take(rows)).to_pylist()

    def picture(self, row: int) -> np.ndarray:
        """Decode one image, checked against its sha256: uint8 (H, W, C), as large as it is.

        Raises:
            SparsightError: the image is gone, changed, or cannot be decoded.
        """
        return self._picture(row, self.source)

    def _picture(self, row: int, reader: Reader) -> np.ndarray:
        uri = self._uris[row].as_py()
        try:
            data = reader.read(uri)
        except OSError as error:
            raise SparsightError(f"image {uri}: {error.strerror}; put it back or run the images stage again") from None
        if hashlib.sha256(data).hexdigest() != self._sha256[row].as_py():
            raise SparsightError(f"image {uri}: changed since the manifest was made; run the images stage again")
        return _decode(self.source, uri, data)

    def batch(self, rows: Rows, preprocess: Preprocess, threads: int = 1) -> np.ndarray:
        """Decoded images of ``rows``: uint8 (B, H, W, C)."""
        return next(self.stream([rows], preprocess, threads))

    def stream(
        self, windows: Sequence[Rows], preprocess: Preprocess, threads: int = 1, workers: int = 0
    ) -> Iterator[np.ndarray]:
        """The images of each window, uint8 (B, H, W, C); the next ones are decoded meanwhile.

        Args:
            windows: rows of each batch.
            preprocess: how pictures become pixels.
            threads: that decode, where there are no workers.
            workers: processes that decode a batch each.
        """
        if workers:
            from sparsight.workers import stream  # torch is not needed, and slow, where images are only listed

            yield from stream(self, windows, preprocess, workers)
            return
        reader = self.source.reader(uri for rows in windows for uri in self.uris(rows))

        def put(row: int, place: np.ndarray) -> None:
            place[:] = preprocess.pixels(self._picture(row, reader))

        def begin(rows: Rows) -> tuple[np.ndarray, Iterator[None]]:
            numbers = range(len(self))[rows] if isinstance(rows, slice) else rows.tolist()
            pixels = np.empty((len(numbers), *preprocess.size, preprocess.channels), np.uint8)
            return pixels, pool.map(put, numbers, pixels)

        with ThreadPoolExecutor(threads) as pool:
            begun = map(begin, windows)
            ahead = next(begun, None)
            while ahead is not None:
                (pixels, done), ahead = ahead, next(begun, None)
                list(done)  # waits, and raises what an image raised
                yield pixels

    def batches(self, preprocess: Preprocess, batch_size: int, threads: int = 1) -> Iterator[np.ndarray]:
        """All images in order, uint8 (B, H, W, C) at a time."""
        return self.stream(list(in_order(len(self), batch_size)), preprocess, threads)


class Pixels:
    """Random access to the decoded images of a split, kept in memory if they fit into 1 GiB."""

    def __init__(self, split: Split, preprocess: Preprocess, threads: int) -> None:
        self.split, self._preprocess, self._threads = split, preprocess, threads
        n_bytes = len(split) * preprocess.size[0] * preprocess.size[1] * preprocess.channels
        self._all = split.batch(slice(None), preprocess, threads) if n_bytes <= 2**30 else None

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """uint8 (B, H, W, C)."""
        return self.split.batch(rows, self._preprocess, self._threads) if self._all is None else self._all[rows]


def _decode(source: Source, uri: str, data: bytes) -> np.ndarray:
    try:
        return source.decode(uri, data)
    except (OSError, SyntaxError, ValueError) as error:  # Pillow raises all three on broken files
        reason = str(error).splitlines()[0]
        raise SparsightError(f"image {uri}: cannot be decoded ({reason}); repair or remove it") from None
