"""Seconds and peak memory of all that is measured of an SAE on stored activations, without the model.

    python benchmarks/metrics.py [--train 60000] [--test 60000] [--width 384] [--d-sae 8192] [--k 32] [--threads 2]

Writes stores of random activations that lie near one of many random directions, and measures a random TopK SAE on them:
first all of docs/evaluation.md, with a judge; then what docs/localisation.md has, with the rows as patches of 10 x 10
an image and their classes as regions. Memory is of the whole process, and what it was before the SAE and the stores
were opened is printed beside it.
"""

import argparse
import dataclasses
import json
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # as the stages do

import numpy as np
import torch

from sparsight import sae
from sparsight.activations.store import ActivationStore
from sparsight.activations.writer import Plan, StoreWriter, finish_store
from sparsight.bench.localisation import candidates
from sparsight.bench.localisation.best import Part, score
from sparsight.common import machine
from sparsight.config import Compute
from sparsight.pipeline.stage import prepare_torch
from sparsight.sae.metrics.measure import measure

SITE = "blocks.1.input"
CLASSES = 100


def main() -> None:
    """Print seconds, processor seconds and memory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=60_000)
    parser.add_argument("--val", type=int, default=10_000)
    parser.add_argument("--test", type=int, default=60_000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--d-sae", type=int, default=8192)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    prepare_torch(Compute(threads=arguments.threads))
    print(f"{machine.describe()}, {arguments.threads} threads, torch {torch.__version__}")
    print(", ".join(f"{name} {value}" for name, value in vars(arguments).items()))
    with tempfile.TemporaryDirectory() as folder:
        centres = np.random.default_rng(0).standard_normal((CLASSES, arguments.width))
        labels = {
            name: _write(Path(folder, name), getattr(arguments, name), centres, seed)
            for seed, name in enumerate(("train", "val", "test"))
        }
        stores = {name: ActivationStore.open(Path(folder, name, "store.zarr")) for name in labels}
        one = sae.create("topk", arguments.width, arguments.d_sae, arguments.k).requires_grad_(False)
        before, start, cpu = machine.peak_memory(), time.perf_counter(), time.process_time()
        (found,) = measure([one], SITE, stores, labels, CLASSES, 0, judge=stores["test"])
        print(f"evaluation {time.perf_counter() - start:.1f} s, {time.process_time() - cpu:.1f} CPU s")
        train, test = (_part(stores[name], labels[name]) for name in ("train", "test"))
        start, cpu = time.perf_counter(), time.process_time()
        methods = {"sae": candidates.of_sae(one), "random": candidates.random(one, train.x, 0)}
        methods |= candidates.shared(train.x, one.d_sae, one.W_dec.device, 0)
        for name, method in methods.items():
            score(method, train, test, range(1, CLASSES), one.W_dec.device, 50, 0 if name == "sae" else None)
        print(f"localisation {time.perf_counter() - start:.1f} s, {time.process_time() - cpu:.1f} CPU s")
    print(f"peak memory {machine.peak_memory():.0f} MB, {before:.0f} before")
    print(f"{len(found.latents)} latents, {len(found.baselines)} methods, {len(found.probing)} probes")


def _part(store: ActivationStore, labels: np.ndarray) -> Part:
    """The rows of whole images of 10 x 10 patches."""
    n = len(labels) // 100 * 100
    return Part(torch.from_numpy(store.rows(SITE)[:n]), labels[:n], (10, 10))


def _write(folder: Path, n: int, centres: np.ndarray, seed: int) -> np.ndarray:
    """A store of n activations around the centres of their classes; returns the classes."""
    folder.mkdir()
    width = centres.shape[1]
    tokens = {SITE: "cls", "embedding": "embedding"}
    plan = Plan(n, {SITE: (width,), "embedding": (width,)}, "float16", 4096, tokens)
    writer, generator, labels, records = (
        StoreWriter(folder / "store.zarr", plan, folder),
        np.random.default_rng(seed),
        [],
        {},
    )
    for shard, images in enumerate(plan.shards):
        labels.append(generator.integers(len(centres), size=images.stop - images.start))
        noise = generator.standard_normal((2, len(labels[-1]), width))
        values = {
            site: (centres[labels[-1]] + own).astype(np.float16) for site, own in zip(plan.shapes, noise, strict=True)
        }
        records[shard] = writer.write(shard, values, [])
    about = {"split": "train", "token_positions": {"class": [0], "register": [], "patches": [1, 2]}}
    part = folder / "store.part-0.json"
    part.write_text(
        json.dumps({"plan": dataclasses.asdict(plan), "about": about | {"backbone": "vit"}, "shards": records})
    )
    finish_store(folder / "store.zarr", [part], folder / "store.json")
    return np.concatenate(labels)


if __name__ == "__main__":
    main()
