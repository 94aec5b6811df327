"""The list of images in a job that extracts one part of many: peak memory and seconds, as the list grows.

    python benchmarks/manifest.py [--rows 1000000 10000000 50000000] [--workdir DIR]

Writes manifests of made-up rows (76 bytes an image on disk) and, in a process of its own for each,
does what the extraction of part 3 of 64 does with its list: opens the manifest and streams the images of its shards, in
batches, each checked against its sha256. The pictures are single pixels that come from no file, so the memory measured
is that of the list. Each manifest is deleted before the next is written.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from sparsight.activations.writer import shard_size
from sparsight.common import machine
from sparsight.common.slices import row_slices
from sparsight.config import Activations
from sparsight.config.activations import StoredSite
from sparsight.images import table
from sparsight.images.manifest import Manifest
from sparsight.images.preprocess import Preprocess
from sparsight.images.sources import SOURCES, Item
from sparsight.images.sources.base import Reopening

PART, PARTS = 3, 64
SHARES = {"train": 0.7, "val": 0.1, "test": 0.2}


class Names(Reopening):
    """A source whose pictures are one pixel and whose bytes are the uri itself."""

    def __init__(self, path: str | None) -> None:
        self.path = path

    def items(self) -> list[Item]:
        """None: the manifest is made up."""
        return []

    def class_names(self) -> list[str]:
        """None."""
        return []

    def read(self, uri: str) -> bytes:
        """The uri."""
        return uri.encode()

    def decode(self, uri: str, data: bytes) -> np.ndarray:
        """A black pixel."""
        return np.zeros((1, 1, 1), np.uint8)


def made(n_rows: int) -> Iterator[pa.Table]:
    """Rows of 100 classes, with paths in the manner of ImageNet."""
    start = 0
    for split, share in SHARES.items():
        for window in row_slices(round(share * n_rows), table.ROW_GROUP):
            numbers = np.arange(start + window.start, start + window.stop)
            uris = [f"data/images/{split}/n{i % 100:08}/n{i % 100:08}_{i:010}.JPEG" for i in numbers.tolist()]
            yield pa.table(
                {
                    "image_id": numbers,
                    "uri": uris,
                    "sha256": [hashlib.sha256(uri.encode()).hexdigest() for uri in uris],
                    "label": (numbers % 100).astype(np.int32),
                    "label_name": pa.array([f"n{c:08}" for c in range(100)]).take(pa.array(numbers % 100)),
                    "split": [split] * len(uris),
                }
            )
        start += round(share * n_rows)


def measure(path: Path) -> None:
    """Stream one part's images, and print what that took."""
    SOURCES["mnist-5000"] = Names
    section, pixel = Activations(sites=(StoredSite("embedding"),)), Preprocess((1, 1), 1, (0.5,), (0.5,))
    before, begin = machine.peak_memory(), time.perf_counter()
    split = Manifest(path).split("train")
    opened, shards = time.perf_counter(), list(row_slices(len(split), shard_size(len(split), section.shard_images)))
    own = shards[len(shards) * PART // PARTS : len(shards) * (PART + 1) // PARTS]
    windows = [
        slice(shard.start + rows.start, shard.start + rows.stop)
        for shard in own
        for rows in row_slices(shard.stop - shard.start, section.batch_size)
    ]
    pixels, n_images = split.stream(windows, pixel), 0
    for shard in own:
        while n_images < shard.stop - own[0].start:
            n_images += len(next(pixels))
        split.uris(shard)  # for the messages of the store's writer
    end = time.perf_counter()
    peak = machine.peak_memory()
    print(
        f"{opened - begin:.2f} s to open, {end - opened:.1f} s to stream {n_images:,} images, "
        f"peak {peak:.0f} MiB, {peak - before:.0f} more than before"
    )


def main() -> None:
    """Print one line per size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 10_000_000, 50_000_000])
    parser.add_argument("--workdir", type=Path, help="folder for the manifests (the system's temporary folder)")
    arguments = parser.parse_args()
    print(f"{machine.describe()}; part {PART} of {PARTS} of the train split")
    about = {"source": "mnist-5000", "path": None, "classes": [f"n{c:08}" for c in range(100)]}
    for n_rows in arguments.rows:
        with tempfile.TemporaryDirectory(dir=arguments.workdir) as folder:
            path, begin = Path(folder) / "manifest.parquet", time.perf_counter()
            table.write(path, made(n_rows), [], about)
            size, seconds = path.stat().st_size, time.perf_counter() - begin
            code = "import sys, pathlib, manifest; manifest.measure(pathlib.Path(sys.argv[1]))"
            command = [sys.executable, "-c", code, str(path.resolve())]
            found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
            print(f"{n_rows:>11,} rows, {size / 1e6:,.0f} MB, written in {seconds:.0f} s: {found.stdout.strip()}")


if __name__ == "__main__":
    main()
