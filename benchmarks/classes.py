"""Time and memory of the pruning stage as the classes grow: the first 20, 100 and 200 classes of Tiny-ImageNet.

    python benchmarks/classes.py [--path data/tiny-imagenet-200] [--classes 20 100 200] [--cores 2]

Each run has 100 training images of every class and their validation images, at 28 pixels, and all default strategies.
Images, classes and the probe's outputs grow together, so linear growth is in proportion to the classes. Processor
seconds are those that the stage itself prints.
"""

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from sparsight.common import machine
from sparsight.config import Images
from sparsight.images.sources import open_source

SETTINGS: dict[str, Any] = {
    "backbones": {
        "vit": {
            "architecture": {"img_size": 28, "patch_size": 7, "in_chans": 3},
            "epochs": 6, "rotate": 0, "flip": True,
        },
        "clip": None,
    },
    "activations": {"sites": ["blocks.5.input", "embedding"]},
    "saes": {"topk": {"epochs": 10}, "switch": None, "resae": None, "plain": None},
    "attribution": {"topk": None},
    "policies": {"heads": {"epochs": 3}},
}  # fmt: skip


def main() -> None:
    """Run, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", default="data/tiny-imagenet-200")
    parser.add_argument("--classes", type=int, nargs="+", default=[20, 100, 200])
    parser.add_argument("--cores", type=int, default=2)
    arguments = parser.parse_args()
    source = {"source": "tiny-imagenet", "path": arguments.path, "images_per_class": 100}
    names = open_source(Images(**source)).class_names()
    print(f"{machine.describe()}, {arguments.cores} cores\n")
    print("| classes | test images | s | CPU s | peak MB | CPU s per class |\n|---|---|---|---|---|---|")
    for n in arguments.classes:
        run = f"classes-{n}"
        Path("results").mkdir(exist_ok=True)
        overlay = Path("results", f"{run}.json")
        overlay.write_text(json.dumps({"run": run, "images": {**source, "classes": names[:n]}, **SETTINGS}))
        folder = Path("results", run)
        target = folder / "pruning" / "heads" / "metrics.json"
        command = [sys.executable, "-m", "snakemake", "--cores", str(arguments.cores), "--quiet", "all", "--configfile"]
        subprocess.run([*command, str(overlay), "--", str(target)], check=True, stdout=subprocess.DEVNULL)
        job = json.loads((folder / "benchmarks" / "pruning-heads.jsonl").read_text().splitlines()[-1])
        found = re.findall(r"processor time: ([\d.]+) s", (folder / "logs" / "pruning-heads.log").read_text())
        cpu, n_test = float(found[-1]), json.loads(target.read_text())["unpruned"]["n"]
        print(f"| {n} | {n_test:,} | {job['s']:.0f} | {cpu:.0f} | {job['max_rss']:.0f} | {cpu / n:.2f} |", flush=True)


if __name__ == "__main__":
    main()
