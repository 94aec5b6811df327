"""Time of the exact nearest-neighbour search of VS2++ over that of the bare matrix product in the same blocks.

    python benchmarks/retrieval.py [--bank 50000] [--queries 10000] [--width 384] [--n 50] [--rounds 5] [--threads 2]

Search and product take turns, on unrelated rows and on rows of 100 clusters that lie cluster by cluster, as a split
sorted by class does. Printed are seconds (minimum and median), the ratio of both, and the peak memory of a process
that did nothing but search.
"""

import argparse
import multiprocessing
import statistics
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from turns import take_turns

from sparsight.common import machine
from sparsight.common.slices import row_slices
from sparsight.config import Compute
from sparsight.pipeline.stage import prepare_torch
from sparsight.steering import nearest_neighbours

_CPU = torch.device("cpu")


def main() -> None:
    """Print one table for each kind of rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bank", type=int, default=50_000)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--n", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    prepare_torch(Compute(threads=arguments.threads))
    print(f"{machine.describe()}, {arguments.threads} threads, torch {torch.__version__}")
    print(f"{arguments.queries} queries, bank {arguments.bank} x {arguments.width}, n {arguments.n}")
    for clusters in (1, 100):
        queries, bank = rows(arguments.queries, arguments.bank, arguments.width, clusters)
        contestants: dict[str, Callable[[], object]] = {
            "bare product": partial(product, queries, bank),
            "search": partial(nearest_neighbours.nearest, queries, bank, arguments.n, _CPU),
        }
        seconds = take_turns(contestants, arguments.rounds, warm_up=0)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            before, after = pool.apply(memory, (arguments, clusters))
        print(f"{clusters} cluster{'s' * (clusters > 1)}: peak memory {after:.0f} MiB, {before:.0f} before the search")
        bare, ours = seconds.values()
        for name, times in seconds.items():
            print(f"  {name:12s} min {min(times):6.2f} s, median {statistics.median(times):6.2f} s")
        ratios = min(ours) / min(bare), statistics.median(ours) / statistics.median(bare)
        print(f"  ratio        min {ratios[0]:6.2f}  , median {ratios[1]:6.2f}")


def rows(n_queries: int, n_bank: int, width: int, clusters: int) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian rows, plus a Gaussian center of a cluster where there are several."""
    generator = np.random.default_rng(0)
    centers = generator.standard_normal((clusters, width), dtype=np.float32) * (clusters > 1)
    which = [np.sort(generator.integers(0, clusters, size)) for size in (n_queries, n_bank)]
    queries, bank = (generator.standard_normal((len(of), width), dtype=np.float32) + centers[of] for of in which)
    return queries, bank


def product(queries: np.ndarray, bank: np.ndarray) -> None:
    """All similarities, block by block as the search takes them, into the same memory."""
    q, b = torch.from_numpy(queries), torch.from_numpy(bank)
    for window in row_slices(len(b), nearest_neighbours._WINDOW):
        out = torch.empty(nearest_neighbours._QUERIES, window.stop - window.start)
        for block in row_slices(len(q), nearest_neighbours._QUERIES):
            torch.mm(q[block], b[window].T, out=out[: block.stop - block.start])


def memory(arguments: argparse.Namespace, clusters: int) -> tuple[float, float]:
    """Peak memory in MiB of this process before and after a search."""
    prepare_torch(Compute(threads=arguments.threads))
    queries, bank = rows(arguments.queries, arguments.bank, arguments.width, clusters)
    before = machine.peak_memory()
    nearest_neighbours.nearest(queries, bank, arguments.n, _CPU)
    return before, machine.peak_memory()


if __name__ == "__main__":
    main()
