"""A day with a card, in 10 minutes: the tests on it, and what is claimed of it, in one table.

    uv sync --group bench
    python benchmarks/gpu.py [--rounds 10] [--runs] [--small]

Contestants take turns. A time is that of several calls in a row, by CUDA events, divided by their number: minimum and
median of the rounds, in milliseconds. The last column is the minimum over that of the part's first line. ``--runs``
also computes the default run twice with ``compute.device: cuda`` and compares the files. ``--small`` shrinks all sizes,
to see that all parts run.

Shapes: B batch, D width (d_in), F latents (d_sae), K active latents (k).
"""

import argparse
import contextlib
import importlib.util
import io
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from contestants import CONTESTANTS
from torch import Tensor

from sparsight import backbones, config, sae
from sparsight.activations.extract import extract, precision
from sparsight.common import machine
from sparsight.common.slices import row_slices
from sparsight.common.work import Work
from sparsight.config import Compute
from sparsight.config.activations import StoredSite
from sparsight.pipeline import stage
from sparsight.sae import Trainer

ROOT = Path(__file__).parent.parent
PEERS = {"eai-sparsify": "sparsify", "sae-lens": "sae_lens", "dense PyTorch": None}
"""Contestants, and the module that each needs."""
Way = Callable[[], object]


@dataclass(frozen=True)
class Sizes:
    """How large everything is."""

    batch: int = 8192
    d_in: int = 768
    d_sae: tuple[int, ...] = (8192, 65536)
    k: int = 32
    models: tuple[str, ...] = ("timm/vit_small_patch16_224", "timm/vit_base_patch16_224")
    architecture: Mapping[str, Any] = field(default_factory=dict)
    images: int = 4096
    image_batch: int = 256
    calls: int = 5
    """Calls in a row that are timed together."""


SMALL = Sizes(64, 24, (256,), 4, ("timm/vit_tiny_patch16_224",), {"img_size": 32, "depth": 2}, 8, 4, 1)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--runs", action="store_true", help="the default run twice")
    parser.add_argument("--small", action="store_true", help="small sizes, and no tests")
    arguments = parser.parse_args()
    device = stage.prepare_torch(Compute(device="cuda"))
    sizes = SMALL if arguments.small else Sizes()
    about = machine.describe()
    print(f"{', '.join(about['gpus']) or device}, torch {torch.__version__}, {about['cores']} x {about['processor']}")
    if not arguments.small:
        tests()
    print(f"{'':52s}{'min ms':>10s}{'median ms':>11s}{'of the first':>14s}")
    for part, calls in ((steps, sizes.calls), (extraction, 1), (heads, sizes.calls)):
        for title, ways in part(sizes, device):
            print(title)
            report(race(ways, arguments.rounds, calls))
    if arguments.runs:
        runs()


def race(ways: Mapping[str, Way], rounds: int, calls: int) -> dict[str, list[float]]:
    """Milliseconds of a call, by name and round; the first round warms up."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            begin.record()
            for _ in range(calls):
                way()
            end.record()
            end.synchronize()
            if turn:
                times[name].append(begin.elapsed_time(end) / calls)
    return times


def report(times: Mapping[str, list[float]]) -> None:
    """One line a contestant."""
    first = min(next(iter(times.values())))
    for name, values in times.items():
        ratio = min(values) / first
        print(f"  {name:50s}{min(values):10.3f}{statistics.median(values):11.3f}{ratio:14.2f}", flush=True)


def steps(sizes: Sizes, device: torch.device) -> Iterator[tuple[str, dict[str, Way]]]:
    """Training steps: of TopK beside its encoder product and its peers, and of all variants."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(sizes.batch, sizes.d_in, generator=generator).to(device)
    for d_sae in sizes.d_sae:
        rows = torch.randn(d_sae, sizes.d_in, generator=generator)
        rows = (rows / rows.norm(dim=1, keepdim=True)).to(device)
        title = f"TopK step, B {sizes.batch}, d_in {sizes.d_in}, d_sae {d_sae}, k {sizes.k}, fp32"
        ways: dict[str, Way] = {"its encoder product": partial(torch.matmul, x, rows.T)}
        ways["sparsight"] = partial(CONTESTANTS["sparsight"](rows, sizes.k).step, x)
        for name, module in PEERS.items():
            if module is not None and importlib.util.find_spec(module) is None:
                print(f"{name} is not installed (uv sync --group bench)")
                continue
            ways[name] = partial(CONTESTANTS[name](rows, sizes.k).step, x)
        yield title, ways
        low, low_rows = x.bfloat16(), rows.T.bfloat16()
        ways = {"its encoder product": partial(torch.matmul, low, low_rows)}
        ways["sparsight"] = partial(_trainer("topk", sizes, d_sae, device, "bf16").step, x)
        yield title.replace("fp32", "bf16"), ways
        variants = {kind: _trainer(kind, sizes, d_sae, device) for kind in ("topk", *sae.names())}
        ways = {kind: partial(trainer.step, x) for kind, trainer in variants.items()}
        yield title.replace("TopK step", "steps of all variants"), ways


def _trainer(
    kind: str, sizes: Sizes, d_sae: int, device: torch.device, products: Literal["fp32", "bf16"] = "fp32"
) -> Trainer:
    return Trainer([sae.create(kind, sizes.d_in, d_sae, sizes.k).to(device)], precision=products)


def extraction(sizes: Sizes, device: torch.device) -> Iterator[tuple[str, dict[str, Way]]]:
    """Extraction from decoded images beside the bare model, in bf16."""
    from extract import Decoded

    compute = Compute(device="cuda", precision="bf16")
    for name in sizes.models:
        backbone = backbones.load(name, **sizes.architecture).to(device).requires_grad_(False)
        shape = (sizes.images, *backbone.preprocess.size, 3)
        split = Decoded(np.random.default_rng(0).integers(0, 255, shape, dtype=np.uint8))
        batches = [backbone.normalize(split.pixels[rows]) for rows in row_slices(sizes.images, sizes.image_batch)]
        site = StoredSite(f"blocks.{backbone.n_blocks - 1}.output")

        def bare(backbone: Any = backbone, batches: Any = batches) -> None:
            with torch.no_grad(), precision(compute, device):
                for x in batches:
                    backbone.model(x)

        def whole(tokens: Any, backbone: Any = backbone, site: Any = site, split: Any = split) -> None:
            section = config.Activations(sites=(site,), tokens=tokens, batch_size=sizes.image_batch)
            quiet = contextlib.redirect_stderr(io.StringIO())
            with tempfile.TemporaryDirectory() as folder, quiet, Work(Path(folder) / "work", "key") as work:
                extract(backbone, split, section, compute, work, Path(folder) / "train.zarr", 0, {})

        title = f"extraction, {name}, {sizes.images} images in batches of {sizes.image_batch}, bf16"
        yield title, {"bare model": bare, "class token stored": partial(whole, "cls"), "all": partial(whole, "all")}


def heads(sizes: Sizes, device: torch.device) -> Iterator[tuple[str, dict[str, Way]]]:
    """The whole model with a third of its heads, another third for each image, masked and gathered."""
    generator = torch.Generator().manual_seed(0)
    for name in sizes.models:
        backbone = backbones.load(name, **sizes.architecture).to(device).requires_grad_(False)
        images = torch.randn(sizes.image_batch, 3, *backbone.preprocess.size, generator=generator).to(device)
        L, H = backbone.n_blocks, backbone.n_heads
        order = torch.rand(sizes.image_batch, L, H, generator=generator).argsort(dim=2)
        mask = (order < max(1, H // 3)).to(device)

        def run(mode: Any, backbone: Any = backbone, images: Tensor = images, mask: Tensor = mask) -> None:
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
                backbone(images, head_mask=mask, heads=mode)

        yield (
            f"heads, {name}, batch {sizes.image_batch}, usage 0.33, bf16",
            {mode: partial(run, mode) for mode in ("masked", "gathered")},
        )


def tests() -> None:
    """The tests that use the card if there is one, with compiled kernels."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "tests/test_card.py"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "0"}, check=False)
    print(f"tests on the card: {'passed' if done.returncode == 0 else 'FAILED'}")


def runs() -> None:
    """Compute the default run twice and compare every file that has no times."""
    folders = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("first", "second"):
            overlay = Path(folder) / f"{name}.yaml"
            overlay.write_text(f"run: gpu-{name}\ncompute: {{device: cuda}}\n")
            command = [sys.executable, "-m", "snakemake", "--cores", str(os.cpu_count()), "--configfile", str(overlay)]
            subprocess.run(command, cwd=ROOT, check=True)
            folders.append(ROOT / "results" / f"gpu-{name}")
    varying = ("timings.json", "provenance.json", "configuration.json", "logs/", "benchmarks/", "records/", "report/")
    found = [
        {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()} for root in folders
    ]
    differ = [
        name for name in found[0].keys() | found[1].keys()
        if not name.startswith(varying) and found[0].get(name) != found[1].get(name)
    ]  # fmt: skip
    print(f"default run twice: {len(found[0])} files, {len(differ)} differ {sorted(differ)[:10]}")


if __name__ == "__main__":
    main()
