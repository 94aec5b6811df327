"""Random rows of Parquet tables: one image at a time, and through the reader that fetches windows.

Row groups and bytes read, and images a second, of a made table of incompressible images in random order. Usage:

    python benchmarks/parquet.py [--images 20000] [--kilobytes 50] [--group 100]
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sparsight.common import machine
from sparsight.images.sources import SOURCES


def make(path: Path, images: int, n_bytes: int, group: int) -> None:
    """A table of random bytes."""
    generator = np.random.default_rng(0)
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    with pq.ParquetWriter(path, pa.schema([("image", kind), ("label", pa.int64())])) as writer:
        for start in range(0, images, group):
            count = min(group, images - start)
            values = [{"bytes": generator.bytes(n_bytes), "path": None} for _ in range(count)]
            writer.write_table(pa.table({"image": pa.array(values, kind), "label": [0] * count}), row_group_size=group)


def measure(name: str, read: Callable[[str], bytes], uris: list[str], seconds: float) -> None:
    """Read until time is up, and print what it cost."""
    groups, n_bytes = 0, 0
    plain = pq.ParquetFile.read_row_group

    def counted(self: pq.ParquetFile, i: int, **options: Any) -> pa.Table:
        nonlocal groups, n_bytes
        groups, n_bytes = groups + 1, n_bytes + self.metadata.row_group(i).total_byte_size
        return plain(self, i, **options)

    pq.ParquetFile.read_row_group = counted
    begin, wanted, done = time.perf_counter(), 0, 0
    for uri in uris:
        wanted, done = wanted + len(read(uri)), done + 1
        if time.perf_counter() - begin > seconds:
            break
    took = time.perf_counter() - begin
    pq.ParquetFile.read_row_group = plain
    print(
        f"{name:20s} {done:6d} images, {groups:6d} row groups, {n_bytes / 1e9:7.2f} GB read for {wanted / 1e9:5.2f} GB"
        f" ({n_bytes / wanted:.1f} times), {done / took:8.0f} images/s"
    )


def main() -> None:
    """Print one line per way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--kilobytes", type=int, default=50)
    parser.add_argument("--group", type=int, default=100)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "all.parquet"
        make(path, arguments.images, 1000 * arguments.kilobytes, arguments.group)
        print(f"{machine.describe()}; {path.stat().st_size / 1e9:.2f} GB in row groups of {arguments.group} images")
        uris = [f"all.parquet:{i}" for i in np.random.default_rng(1).permutation(arguments.images)]
        measure("one at a time", SOURCES["parquet"](str(path)).read, uris, 20)
        measure("in windows", SOURCES["parquet"](str(path)).reader(uris).read, uris, float("inf"))


if __name__ == "__main__":
    main()
