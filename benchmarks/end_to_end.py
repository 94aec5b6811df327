"""From a folder of photographs to a trained SAE: the whole way, beside the peers that vision users would pick.

    uv run --with saev==0.1.0 --with sae-lens==6.54.12 --with vit-prisma==0.1.4 --with wandb python
    benchmarks/end_to_end.py --images FOLDER --weights FILE      all contestants
    python benchmarks/end_to_end.py ... --peers-python PATH      peers from another environment than this one
    python benchmarks/end_to_end.py ... --only sparsight saev    some of the contestants

Same images, same weights (ViT-S/14 of DINOv2), the patches after block 8, one SAE, one pass. Every contestant is a
process of its own, with two threads; ours is Snakemake with an overlay. They take turns. The code of the peers is in
benchmarks/end_to_end_contestants.py.

- CPU: of the process and of all processes that it started and waited for (wait4).
- Memory: the largest sum over the process and its descendants of memory that cannot be dropped (Pss_Anon + Pss_Shmem
  of /proc/PID/smaps_rollup, twice a second); pages of files, such as libraries and memory maps, do not count.
- Disk: what the contestant wrote and left, in allocated blocks.
- FVU and L0: on patches of images that no contestant saw, computed once with timm in fp32, with the forward pass of the
  package that trained the SAE (benchmarks/end_to_end_scores.py).
- Lines: what a user writes, without blank lines; for ours, of the overlay.
"""

import argparse
import dataclasses
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import end_to_end_scores as scores
import torch
from end_to_end_contestants import PEERS, Task, overlay, user_lines

from sparsight.common import machine

ROOT = Path(__file__).resolve().parents[1]
OURS = {"sparsight": "fp32", "sparsight, bf16": "bf16"}
MODULES = {"sae-lens": "sae_lens", "saev": "saev", "vit-prisma": "vit_prisma"}
HELD_OUT = 500
RATES = {
    "sparsight": 6e-3, "sparsight, bf16": 6e-3, "timm and PyTorch": 6e-3, "sae-lens": 3e-3, "saev": 4e-4,
    "vit-prisma": 0.0,
}  # fmt: skip
"""Learning rates. Of TopK SAEs the best of 1e-3, 2e-3, 3e-3, 4e-3, 6e-3 and 8e-3 on the images of ``--seed 1``; saev's
default; ViT-Prisma trains no SAE."""
CANNOT = {
    "sparsight": "starts Snakemake, and a process for each stage",
    "sparsight, bf16": "the same; forward passes of the ViT in bf16",
    "timm and PyTorch": "no resume, no checks of the stored files, no provenance",
    "sae-lens": "no activations of ViTs (those of timm and PyTorch), so no resume before training, no checks",
    "saev": "no TopK: ReLU and L1; widths are multiples of d_in; no resume, no checks; scaling not saved with the SAE",
    "vit-prisma": "no SAE: activations alone; no DINOv2 (converted by hand), no resume, no checks",
}


@dataclasses.dataclass(frozen=True)
class Turn:
    """What one run of a contestant took, and how good its SAE is."""

    wall: float
    cpu: float
    memory_mb: float
    disk_mb: float
    d_sae: int | None = None
    l0: float | None = None
    fvu: float | None = None


def main() -> None:
    """Let the contestants take turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of class folders with JPEG or PNG files")
    parser.add_argument("--weights", type=Path, required=True, help="safetensors file of vit_small_patch14_dinov2")
    parser.add_argument("--n", type=int, default=5000, help="images; 500 of them, at most a tenth, are held out")
    parser.add_argument("--size", type=int, default=98, help="pixels")
    parser.add_argument("--d-sae", type=int, default=4096)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--lr", type=float, help="learning rate of all contestants; by default each has its own")
    parser.add_argument("--seed", type=int, default=0, help="of the draw of images")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=[*OURS, *PEERS], default=[*OURS, *PEERS])
    parser.add_argument("--peers-python", default=sys.executable, help="the peers' interpreter")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as name:
        folder, place = Path(name), Path(name, "out")
        n_train, n_held = link_images(arguments.images, arguments.n, folder / "images", arguments.seed)
        task = Task(
            images=str(folder / "images" / "train"), weights=str(arguments.weights.resolve()), out=str(place),
            size=arguments.size, block=8, d_sae=arguments.d_sae, k=arguments.k, lr=0.0, batch=1024,
            model_batch=64, workers=2,
        )  # fmt: skip
        print(machine.describe())
        print(f"{n_train} images at {task.size} px, {n_train * task.n_patches} patches, {n_held} images held out")
        held_out = scores.held_out(dataclasses.replace(task, images=str(folder / "images" / "test")))
        problems: dict[str, str] = {}
        for contestant in arguments.only:
            if contestant in MODULES and not installed(arguments.peers_python, MODULES[contestant]):
                problems[contestant] = "not installed"
        turns: dict[str, list[Turn]] = {contestant: [] for contestant in arguments.only}
        for number in range(arguments.rounds):
            for contestant in arguments.only:
                if contestant not in problems:
                    place.mkdir()
                    own = dataclasses.replace(task, lr=arguments.lr or RATES[contestant])
                    result = run(contestant, own, arguments.peers_python, held_out)
                    if isinstance(result, Turn):
                        turns[contestant].append(result)
                        print(f"round {number + 1}, {contestant}: {result}", flush=True)
                    else:
                        problems[contestant] = result
                    shutil.rmtree(place)
        print(f"\n{table(turns, problems, task)}")


def link_images(source: Path, n: int, folder: Path, seed: int) -> tuple[int, int]:
    """Link ``n`` images, chosen at random, into train, and test for those held out; val, which we need, is test.

    They are of one class: nobody here reads labels, and of many classes a draw may leave some without training images.

    Returns:
        Numbers of images to train on and held out.
    """
    files = sorted(p for p in source.rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    assert len(files) >= n, f"{source} has {len(files)} images, --n asks for {n}"
    chosen = random.Random(seed).sample(files, n)
    n_held = min(HELD_OUT, n // 10)
    for i, path in enumerate(chosen):
        link = folder / ("test" if i < n_held else "train") / "images" / f"{i:06d}{path.suffix}"
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path.resolve())
    (folder / "val").symlink_to(folder / "test")
    return n - n_held, n_held


def installed(python: str, module: str) -> bool:
    """Whether the interpreter finds the module."""
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    return subprocess.run([python, "-c", code], check=False).returncode == 0


def run(name: str, task: Task, python: str, held_out: torch.Tensor) -> Turn | str:
    """One turn of a contestant, or what went wrong."""
    if name in OURS:
        config = Path(task.out, "overlay.yaml")
        config.write_text(overlay(task, OURS[name]))
        command = [
            sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--directory", task.out,
            "--cores", "2", "results/run/saes/topk-s0/sae.safetensors", "--configfile", str(config),
        ]  # fmt: skip
    else:
        script = Path(__file__).with_name("end_to_end_contestants.py")
        command = [python, str(script), name, json.dumps(dataclasses.asdict(task))]
    with tempfile.TemporaryFile("w+") as log:
        turn = measured(command, Path(task.out), log)
        if turn is None:
            log.seek(0)
            lines = log.read().strip().splitlines()
            print(f"{name} failed:\n" + "\n".join(lines[-30:]), file=sys.stderr)
            return f"failed: {lines[-1] if lines else 'no message'}"
    score = scores.score(name, Path(task.out), task, held_out)
    return dataclasses.replace(turn, **score)


def measured(command: Sequence[str], folder: Path, log: Any) -> Turn | None:
    """Run a command in ``folder`` with two threads; None if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "MKL_NUM_THREADS": "2", "WANDB_MODE": "disabled"}
    begin = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
    peak, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.5):
            peak[0] = max(peak[0], memory_of_tree(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    done.set()
    watcher.join()
    if process.returncode:
        return None
    blocks = sum(p.lstat().st_blocks for p in folder.rglob("*") if not p.is_dir())
    return Turn(wall, usage.ru_utime + usage.ru_stime, peak[0] / 1024, blocks * 512 / 1e6)


def memory_of_tree(pid: int) -> float:
    """Memory of a process and its descendants that cannot be dropped, in kB; pages that they share count once."""
    total = 0.0
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith(("Pss_Anon:", "Pss_Shmem:")):
                total += int(line.split()[1])
        children = [
            int(child)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
    except (OSError, ValueError):  # it has just ended
        return total
    return total + sum(memory_of_tree(child) for child in children)


def table(turns: Mapping[str, Sequence[Turn]], problems: Mapping[str, str], task: Task) -> str:
    """The results as Markdown; ratios to the fastest peer that ends with an SAE."""
    peers = [name for name in turns if name in PEERS and turns[name] and turns[name][0].fvu is not None]
    fastest = {key: min((least(turns[name], key) for name in peers), default=None) for key in ("wall", "cpu")}
    lines = [
        "| | wall s, min / median | of the fastest peer | CPU s, min / median | of the fastest peer | peak MB | disk MB"
        " | latents | L0 | FVU | lines | what it lacks |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, of_name in turns.items():
        if name in problems or not of_name:
            lines.append(f"| {name} | {problems.get(name, '')} |" + " |" * 10)
            continue
        times = [
            f"{least(of_name, key):.1f} / {middle(of_name, key):.1f} | "
            + ratio(least(of_name, key), fastest[key], of_name)
            for key in ("wall", "cpu")
        ]
        sae = [" ", " ", "no SAE"]
        if of_name[0].fvu is not None:
            sae = [str(of_name[0].d_sae), f"{middle(of_name, 'l0'):.1f}", f"{middle(of_name, 'fvu'):.4f}"]
        n_lines = user_lines(name) if name in PEERS else sum(map(bool, map(str.strip, overlay(task, "").splitlines())))
        peak, disk = max(turn.memory_mb for turn in of_name), middle(of_name, "disk_mb")
        lines.append(
            " | ".join([f"| {name}", *times, f"{peak:.0f} | {disk:.0f}", *sae, f"{n_lines}", f"{CANNOT[name]} |"])
        )
    return "\n".join(lines)


def least(turns: Sequence[Turn], key: str) -> float:
    """Minimum over the rounds."""
    return min(getattr(turn, key) for turn in turns)


def middle(turns: Sequence[Turn], key: str) -> float:
    """Median over the rounds."""
    return statistics.median(getattr(turn, key) for turn in turns)


def ratio(value: float, fastest: float | None, turns: Sequence[Turn]) -> str:
    """A ratio, for contestants that end with an SAE."""
    return f"{value / fastest:.2f}" if fastest and turns[0].fvu is not None else ""


if __name__ == "__main__":
    main()
