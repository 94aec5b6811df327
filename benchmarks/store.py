"""The activation store against what else holds a matrix on disk: writing, sequential and shuffled reading.

Every contender holds the same float16 rows. They take turns, round by round; minimum and median are printed.
Warm reads come from the page cache; before a cold read the files are dropped from it. Usage:

    python benchmarks/store.py [--megabytes 512] [--width 768] [--rounds 5] [--folder DIR]
    python benchmarks/store.py --memory      peak memory of shuffled reading at several budgets
    python benchmarks/store.py --dvc         a 1 GB store in DVC: add, push, one shard changed, push, pull
"""

import argparse
import dataclasses
import multiprocessing
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import zarr
from safetensors.numpy import load_file, save_file

from sparsight.activations.store import ActivationStore
from sparsight.activations.writer import Plan, StoreWriter, finish_store
from sparsight.common import machine
from sparsight.common.files import write_json
from sparsight.common.slices import row_slices
from sparsight.training.batches import StoreBatches

SITE, BATCH, SHARD = "blocks.5.input", 4096, 32768


class Reservoir:
    """A shuffle buffer in the manner of saev: rows go in and come out one at a time, at random places.

    As there, the rows are a tensor that processes share, guarded by a lock and counted by a semaphore.
    """

    def __init__(self, capacity: int, width: int) -> None:
        self.rows = torch.empty(capacity, width, dtype=torch.float16).share_memory_()
        self.size, self.random = 0, np.random.default_rng(0)
        self.lock, self.filled = multiprocessing.Lock(), multiprocessing.Semaphore(0)

    def put(self, rows: torch.Tensor) -> None:
        """Add rows at the end."""
        for row in rows:
            with self.lock:
                self.rows[self.size] = row
                self.size += 1
            self.filled.release()

    def get(self, count: int) -> torch.Tensor:
        """Take rows from random places; the last one fills each gap."""
        out = torch.empty(count, self.rows.shape[1], dtype=torch.float16)
        for i, draw in enumerate(self.random.random(count)):
            self.filled.acquire()
            with self.lock:
                place = int(draw * self.size)
                out[i] = self.rows[place]
                self.size -= 1
                self.rows[place] = self.rows[self.size]
        return out


class Bench:
    """All contenders on one matrix."""

    def __init__(self, folder: Path, megabytes: int, width: int) -> None:
        self.folder, self.width = folder, width
        self.n = megabytes * 10**6 // (2 * width) // SHARD * SHARD
        self.bytes = self.n * width * 2
        self.x = np.random.default_rng(0).standard_normal((self.n, width), np.float32).astype(np.float16)
        self.shards = list(row_slices(self.n, SHARD))

    def write_store(self) -> None:
        """Ours, with checksums, digests and manifest."""
        shutil.rmtree(self.folder / "store", ignore_errors=True)
        plan = Plan(self.n, {SITE: (self.width,)}, "float16", SHARD, {SITE: "cls"})
        writer = StoreWriter(self.folder / "store" / "train.zarr", plan, self.folder)
        records = {number: writer.write(number, {SITE: self.x[s]}, []) for number, s in enumerate(self.shards)}
        about = {"token_positions": {"class": [0], "register": [], "patches": [1, 1]}}
        content = {"plan": dataclasses.asdict(plan), "about": about, "shards": records}
        write_json(self.folder / "part.json", content)
        finish_store(writer.path, [self.folder / "part.json"], self.folder / "store" / "train.json")

    def write_memmap(self) -> None:
        """A plain file."""
        m = np.memmap(self.folder / "x.bin", np.float16, "w+", shape=self.x.shape)
        for s in self.shards:
            m[s] = self.x[s]
        m.flush()

    def _zarr(self, name: str, **options: object) -> None:
        shutil.rmtree(self.folder / name, ignore_errors=True)
        array = zarr.create_array(
            self.folder / name, shape=self.x.shape, dtype="float16", chunks=(1024, self.width), **options
        )
        for s in self.shards:
            array[s] = self.x[s]

    def write_chunks(self) -> None:
        """Plain Zarr: one file per 1,024 rows, no compressor."""
        self._zarr("chunks.zarr", compressors=None)

    def write_sharded(self) -> None:
        """The store's own layout through zarr-python."""
        self._zarr("sharded.zarr", shards=(SHARD, self.width), compressors=[zarr.codecs.Crc32cCodec()])

    def write_safetensors(self) -> None:
        """One file per shard."""
        for number, s in enumerate(self.shards):
            save_file({"x": self.x[s]}, self.folder / f"x{number}.safetensors")

    def write_parquet(self) -> None:
        """Fixed-size lists, one row group per shard."""
        kind = pa.list_(pa.float16(), self.width)
        with pq.ParquetWriter(self.folder / "x.parquet", pa.schema([("x", kind)]), compression="none") as writer:
            for s in self.shards:
                values = pa.FixedSizeListArray.from_arrays(pa.array(self.x[s].reshape(-1)), self.width)
                writer.write_table(pa.table({"x": values}))

    def read_store(self) -> Iterator[np.ndarray]:
        """Ours: every checksum is verified, every value is checked."""
        yield from ActivationStore.open(self.folder / "store" / "train.zarr").rows(SITE).windows(BATCH)

    def read_memmap(self) -> Iterator[np.ndarray]:
        """Copies of slices."""
        m = np.memmap(self.folder / "x.bin", np.float16, "r", shape=self.x.shape)
        for s in row_slices(self.n, BATCH):
            yield np.array(m[s])

    def read_zarr(self, name: str) -> Iterator[np.ndarray]:
        """Slices through zarr-python."""
        array = zarr.open_array(self.folder / name, mode="r")
        for s in row_slices(self.n, BATCH):
            yield np.asarray(array[s])

    def read_safetensors(self) -> Iterator[np.ndarray]:
        """Whole shards."""
        for number in range(len(self.shards)):
            yield load_file(self.folder / f"x{number}.safetensors")["x"]

    def read_parquet(self) -> Iterator[np.ndarray]:
        """Row groups."""
        file = pq.ParquetFile(self.folder / "x.parquet")
        for number in range(file.num_row_groups):
            column = file.read_row_group(number)["x"].combine_chunks()
            yield column.values.to_numpy().reshape(-1, self.width)

    def batches(self, memory: int) -> StoreBatches:
        """Our shuffled batches."""
        rows = ActivationStore.open(self.folder / "store" / "train.zarr").rows(SITE)
        return StoreBatches({SITE: rows}, BATCH, 0, memory)

    def take(self) -> Iterator[np.ndarray]:
        """np.take of the same batches from the array in memory: the bar."""
        order = np.random.default_rng(0).permutation(self.n)
        for s in row_slices(self.n, BATCH):
            yield np.take(self.x, order[s], axis=0)

    def memmap_rows(self) -> Iterator[np.ndarray]:
        """Random rows of the plain file."""
        m = np.memmap(self.folder / "x.bin", np.float16, "r", shape=self.x.shape)
        order = np.random.default_rng(0).permutation(self.n)
        for s in row_slices(self.n, BATCH):
            yield m[order[s]]

    def reservoir(self) -> Iterator[torch.Tensor]:
        """16 batches long, fed in order from the array in memory."""
        buffer = Reservoir(16 * BATCH, self.width)
        windows = row_slices(self.n, BATCH)
        for s in windows:
            buffer.put(torch.from_numpy(self.x[s]))
            if buffer.size == len(buffer.rows):
                yield buffer.get(BATCH)
        while buffer.size:
            yield buffer.get(min(BATCH, buffer.size))

    def drop(self) -> None:
        """Drop the contenders' files from the page cache."""
        for path in self.folder.rglob("*"):
            if path.is_file():
                descriptor = os.open(path, os.O_RDONLY)
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)

    def race(self, title: str, contenders: dict[str, Callable[[], object]], rounds: int, cold: bool = False) -> None:
        """Time all contenders in turns; an iterator is used up."""
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for turn in range(rounds + (not cold)):
            for name, run in contenders.items():
                if cold:
                    self.drop()
                begin = time.perf_counter()
                result = run()
                if isinstance(result, Iterator):
                    for _ in result:
                        pass
                if cold or turn:  # the first round warms up
                    seconds[name].append(time.perf_counter() - begin)
        print(f"\n{title}\n{'':34s}{'MB/s max':>10s}{'median':>10s}{'rows/s max':>14s}{'of first':>10s}")
        first = min(next(iter(seconds.values())))
        for name, values in seconds.items():
            best, middle = min(values), statistics.median(values)
            print(
                f"{name:34s}{self.bytes / best / 1e6:10.0f}{self.bytes / middle / 1e6:10.0f}"
                f"{self.n / best:14,.0f}{first / best:10.2f}"
            )


def speed(arguments: argparse.Namespace, folder: Path) -> None:
    """Write, then read in order and shuffled, warm and cold."""
    bench = Bench(folder, arguments.megabytes, arguments.width)
    print(f"{machine.describe()}; zarr {zarr.__version__}; {bench.n:,} rows of {bench.width} float16")
    write = {
        "np.memmap": bench.write_memmap,
        "sparsight (digests, manifest)": bench.write_store,
        "plain Zarr chunks": bench.write_chunks,
        "sharded Zarr (zarr-python)": bench.write_sharded,
        "safetensors": bench.write_safetensors,
        "Parquet": bench.write_parquet,
    }
    bench.race("Writing", dict(write), arguments.rounds)
    read: dict[str, Callable[[], object]] = {
        "np.memmap": bench.read_memmap,
        "sparsight": bench.read_store,
        "plain Zarr chunks": lambda: bench.read_zarr("chunks.zarr"),
        "sharded Zarr (zarr-python)": lambda: bench.read_zarr("sharded.zarr"),
        "safetensors": bench.read_safetensors,
        "Parquet": bench.read_parquet,
    }
    bench.race(f"Reading in order, {BATCH} rows at a time, warm", read, arguments.rounds)
    batches = {"fits": bench.batches(2 * bench.bytes), "pools": bench.batches(bench.bytes // 16)}
    shuffled: dict[str, Callable[[], object]] = {
        "np.take from an array in memory": bench.take,
        "sparsight, store fits in memory": lambda: batches["fits"].epoch(0),
        "sparsight, memory for a sixteenth": lambda: batches["pools"].epoch(0),
        "memmap, random rows": bench.memmap_rows,
        "reservoir, in the manner of saev": bench.reservoir,
    }
    bench.race(f"Shuffled batches of {BATCH}, warm", shuffled, arguments.rounds)
    batches.clear()  # what is mapped into memory cannot be dropped from the page cache
    cold: dict[str, Callable[[], object]] = {
        "sparsight, in order": bench.read_store,
        "sparsight, shuffled, a sixteenth": lambda: bench.batches(bench.bytes // 16).epoch(0),
        "np.memmap, in order": bench.read_memmap,
    }
    bench.race("Cold", cold, arguments.rounds, cold=True)


MEMORY = """
import sys
from sparsight.activations.store import ActivationStore
from sparsight.common import machine
from sparsight.training.batches import StoreBatches

rows = ActivationStore.open(sys.argv[1]).rows("{site}")
for batch in StoreBatches({{"x": rows}}, {batch}, 0, 2 * rows.chunk_images * 2 * rows.shape[1]).epoch(0):
    break  # what torch takes for itself when it first gathers
before = machine.peak_memory()
batches = StoreBatches({{"x": rows}}, {batch}, 0, {budget} * 2**20)
for epoch in range(2):
    for batch in batches.epoch(epoch):
        pass
print(machine.peak_memory() - before)
"""


def memory(arguments: argparse.Namespace, folder: Path) -> None:
    """Peak memory of shuffled reading, each budget in a process of its own."""
    bench = Bench(folder, arguments.megabytes, arguments.width)
    bench.write_store()
    print(f"{machine.describe()}; store of {bench.bytes / 1e6:.0f} MB")
    for budget in (32, 64, 128, 256):
        code = MEMORY.format(site=SITE, batch=BATCH, budget=budget)
        command = [sys.executable, "-c", code, str(folder / "store" / "train.zarr")]
        grown = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        print(f"budget {budget:4d} MiB: peak grew by {grown:6.1f} MiB, {grown / budget:.2f} of the budget")


def dvc(folder: Path) -> None:
    """Add, push, change one shard, push again, pull into another clone."""
    bench = Bench(folder, 1000, 768)
    bench.write_store()
    repository, remote = folder / "repository", folder / "remote"
    shutil.copytree(folder / "store", repository)

    def run(*words: str, where: Path = repository) -> str:
        begin = time.perf_counter()
        done = subprocess.run(words, cwd=where, capture_output=True, text=True, check=True)
        if words[1] in ("add", "push", "pull"):
            print(
                f"{' '.join(words):40s} {time.perf_counter() - begin:6.1f} s  {done.stdout.strip().splitlines()[-1:]}"
            )
        return done.stdout

    run("git", "init", "-q")
    run("dvc", "init", "-q")
    run("dvc", "remote", "add", "-d", "here", str(remote))
    run("dvc", "add", "train.zarr")
    run("dvc", "push")
    shard = repository / "train.zarr" / SITE / "c" / "3" / "0"
    other = shard.read_bytes()[::-1]
    shard.unlink()
    shard.write_bytes(other)
    run("dvc", "add", "train.zarr")
    run("dvc", "push")
    run("git", "add", ".")
    run("git", "-c", "user.name=x", "-c", "user.email=x", "commit", "-qm", "x")
    run("git", "clone", "-q", str(repository), str(folder / "clone"))
    run("dvc", "pull", where=folder / "clone")


def main() -> None:
    """Run one of the benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where to write")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--dvc", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        if arguments.dvc:
            dvc(Path(name))
        elif arguments.memory:
            memory(arguments, Path(name))
        else:
            speed(arguments, Path(name))
    print(f"\npeak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")


if __name__ == "__main__":
    main()
