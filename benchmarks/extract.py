"""Extraction against the bare forward pass of the same model on the same decoded batches, in images/s.

The bare model gets batches that are normalised already; extraction normalises, taps, converts, checks, hashes
and writes. Both take turns; minimum and median of the rounds are printed. Usage:

    python benchmarks/extract.py [--rounds 5] [--precision bf16] [--model small|tiny]
    python benchmarks/extract.py --decode     the same from JPEG files: how long the model waits for pictures
    python benchmarks/extract.py --memory     peak memory for 1x and 8x as many images
"""

import argparse
import contextlib
import hashlib
import io
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from sparsight import backbones, config
from sparsight.activations.extract import extract, precision
from sparsight.backbones.backbone import Backbone
from sparsight.common import machine
from sparsight.common.slices import row_slices
from sparsight.common.work import Work
from sparsight.config import Compute
from sparsight.config.activations import StoredSite
from sparsight.images import table
from sparsight.images.manifest import Manifest, write_manifest
from sparsight.images.preprocess import Preprocess
from sparsight.images.sources.packaged import Mnist5000
from sparsight.images.split import Split
from sparsight.pipeline.stage import prepare_torch

MODELS: dict[str, tuple[str, dict[str, int], int, int]] = {
    # architecture, its options, images, batch size
    "small": ("timm/vit_small_patch16_224", {}, 256, 32),
    "tiny": ("timm/vit_tiny_patch16_224", {"img_size": 32, "patch_size": 4}, 1024, 128),
}


class Decoded(Split):
    """A split whose pictures are decoded already."""

    pixels: np.ndarray

    def __init__(self, pixels: np.ndarray) -> None:
        object.__setattr__(self, "pixels", pixels)

    def __len__(self) -> int:
        return len(self.pixels)

    def uris(self, rows: Any) -> list[str]:
        """Names of the images, for messages."""
        return [f"image {i}" for i in range(len(self))[rows]]

    def stream(self, windows: Sequence[Any], *_: Any) -> Iterator[np.ndarray]:
        """The batches, from memory."""
        return iter([self.pixels[rows] for rows in windows])


def run_extraction(backbone: Backbone, split: Split, compute: Compute, batch_size: int, tokens: Any) -> float:
    """Seconds that one extraction takes."""
    site = f"blocks.{backbone.n_blocks - 1}.output"  # so that it computes as much as the bare model
    section = config.Activations(sites=(StoredSite(site),), tokens=tokens, batch_size=batch_size)
    quiet = contextlib.redirect_stderr(io.StringIO())
    with tempfile.TemporaryDirectory() as folder, quiet, Work(Path(folder) / "work", "key") as work:
        begin = time.perf_counter()
        extract(backbone, split, section, compute, work, Path(folder) / "train.zarr", 0, {})
        return time.perf_counter() - begin


@torch.no_grad()
def run_bare(backbone: Backbone, batches: list[torch.Tensor], compute: Compute) -> float:
    """Seconds of the model alone."""
    begin = time.perf_counter()
    for x in batches:
        with precision(compute, backbone.device):
            backbone.model(x)
    if backbone.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def speed(name: str, compute: Compute, rounds: int) -> None:
    """Bare and extraction in turns."""
    device = prepare_torch(compute)
    architecture, options, n, batch_size = MODELS[name]
    backbone = backbones.load(architecture, None, **options).to(device)
    height, width = backbone.preprocess.size
    pixels = np.random.default_rng(0).integers(0, 255, (n, height, width, 3), dtype=np.uint8)
    split = Decoded(pixels)
    batches = [backbone.normalize(pixels[rows]) for rows in row_slices(n, batch_size)]
    print(f"{machine.describe()}, torch {torch.__version__}")
    print(f"{compute.threads} threads, {compute.device}, {compute.precision}")
    print(f"{architecture} at {height} px, {n} images in batches of {batch_size}")
    seconds: dict[str, list[float]] = {"bare": [], "cls": [], "all": []}
    for turn in range(rounds + 1):
        found = {
            "bare": run_bare(backbone, batches, compute),
            "cls": run_extraction(backbone, split, compute, batch_size, "cls"),
            "all": run_extraction(backbone, split, compute, batch_size, "all"),
        }
        if turn:  # the first round warms up
            for key, value in found.items():
                seconds[key].append(value)
    for key, values in seconds.items():
        best, middle = min(values), statistics.median(values)
        print(
            f"{key:5s} {n / best:8.1f} images/s best, {n / middle:8.1f} median; of the bare model's:"
            f" {min(seconds['bare']) / best:.3f} best, {statistics.median(seconds['bare']) / middle:.3f} median"
        )


def decode(compute: Compute) -> None:
    """From JPEG files of 500 x 375 to ViT-S/16."""
    device = prepare_torch(compute)
    architecture, options, n, batch_size = MODELS["small"]
    backbone = backbones.load(architecture, None, **options).to(device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        noise = np.random.default_rng(0)
        for i in range(n):
            path = folder / "images" / "train" / str(i % 2) / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            small = Image.fromarray(noise.integers(0, 255, (24, 32, 3), dtype=np.uint8))
            small.resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)
        for part in ("val", "test"):
            (folder / "images" / part).symlink_to(folder / "images" / "train")
        section = config.Images(source="folder", path=str(folder / "images"))
        with contextlib.redirect_stderr(io.StringIO()):
            write_manifest(section, 0, {}, 2, folder / "m.parquet")
        split = Manifest(folder / "m.parquet").split("train")
        waits: list[float] = []
        stream = Split.stream

        def timed(self: Split, windows: Sequence[Any], preprocess: Preprocess, *rest: int) -> Iterator[np.ndarray]:
            batches = stream(self, windows, preprocess, *rest)
            while True:
                begin = time.perf_counter()
                pixels = next(batches, None)
                waits.append(time.perf_counter() - begin)
                if pixels is None:
                    return
                yield pixels

        for workers in (0, 1, 2):
            waits.clear()
            with_workers = Compute(workers=workers, precision=compute.precision)
            with mock.patch.object(Split, "stream", timed):
                total = run_extraction(backbone, split, with_workers, batch_size, "cls")
            print(
                f"JPEG 500 x 375, workers {workers}: {n / total:.1f} images/s, waited for pictures"
                f" {100 * sum(waits[1:]) / total:.1f} % of the time after the first batch ({waits[0]:.2f} s)"
            )


def memory() -> None:
    """Peak memory of extraction, each number of images in a process of its own."""
    for factor in (1, 8):
        code = f"import sys; sys.path.insert(0, sys.argv[1]); import extract as e\ne.measure({factor * 4096})"
        command = [sys.executable, "-c", code, str(Path(__file__).parent)]
        print(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())


def measure(n: int) -> None:
    """Extract ``n`` digits with a small model and print the peak memory."""
    prepare_torch(Compute())
    backbone = backbones.load(
        "timm/vit_tiny_patch16_224", None, img_size=28, patch_size=7, in_chans=1, embed_dim=96, depth=2, num_heads=6
    )
    source = Mnist5000()
    shas = pa.array([hashlib.sha256(source.read(f"mnist-5000:{i}")).hexdigest() for i in range(5000)])
    rows = np.arange(n) % 5000
    digits = pa.table(
        {
            "image_id": rows,
            "uri": [f"mnist-5000:{i}" for i in rows],
            "sha256": shas.take(pa.array(rows)),
            "label": np.zeros(n, np.int32),
            "label_name": ["only"] * n,
            "split": ["train"] * n,
        }
    )
    section = config.Activations(sites=(StoredSite("blocks.1.output"),), tokens="all", shard_images=512, batch_size=128)
    with tempfile.TemporaryDirectory() as folder, Work(Path(folder) / "work", "key") as work:
        path = Path(folder) / "manifest.parquet"
        table.write(path, [digits], [], {"source": "mnist-5000", "path": None, "classes": ["only"]})
        split = Manifest(path).split("train")
        before = machine.peak_memory()
        extract(backbone, split, section, Compute(), work, Path(folder) / "train.zarr", 0, {})
        after = machine.peak_memory()
        size = sum(p.stat().st_size for p in Path(folder).rglob("*") if p.is_file()) / 2**20
        print(f"{n:6d} images, store {size:6.1f} MiB: peak {after:.0f} MiB, {after - before:.0f} more than before")


def main() -> None:
    """Run one of the benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", choices=tuple(MODELS), default="small")
    parser.add_argument("--decode", action="store_true")
    parser.add_argument("--memory", action="store_true")
    arguments = parser.parse_args()
    compute = Compute(precision=arguments.precision, device=arguments.device)
    if arguments.memory:
        memory()
    elif arguments.decode:
        decode(compute)
    else:
        speed(arguments.model, compute, arguments.rounds)


if __name__ == "__main__":
    main()
