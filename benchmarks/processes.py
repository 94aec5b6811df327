"""Peak memory of the processes that train one wide SAE: one process against several that hold a part each.

    python benchmarks/processes.py [--d-in 384] [--d-sae 262144] [--batch 1024] [--steps 4] [--processes 1 4]

The store holds random numbers. Each line is a run of the stage from start to end, saving included. The peaks are the
kernel's own (VmHWM), read while the processes run. The process that starts the others is not among them.
"""

import argparse
import dataclasses
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from sparsight.activations.writer import Plan, StoreWriter, finish_store
from sparsight.common import machine
from sparsight.common.files import write_json

_ROOT, _SITE = Path(__file__).parent.parent, "blocks.0.input"
_POLL_SECONDS = 0.05


def main() -> None:
    """Print a line per number of processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-in", type=int, default=384)
    parser.add_argument("--d-sae", type=int, default=2**18)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 4])
    arguments = parser.parse_args()
    print(f"{machine.describe()}; d_in {arguments.d_in}, d_sae {arguments.d_sae}, batch {arguments.batch}, k 32")
    with tempfile.TemporaryDirectory() as folder:
        store = _store(Path(folder), arguments.batch * arguments.steps, arguments.d_in)
        for n in arguments.processes:
            begin = time.monotonic()
            peaks = _run(Path(folder) / str(n), store, n, arguments)
            shown = ", ".join(f"{peak:,.0f}" for peak in peaks)
            print(f"{n} processes: peak {shown} MiB, {time.monotonic() - begin:.0f} s", flush=True)


def _store(folder: Path, n: int, width: int) -> Path:
    plan = Plan(n, {_SITE: (width,)}, "float16", 1024, {_SITE: "cls"})
    writer, generator, records = StoreWriter(folder / "train.zarr", plan, folder), np.random.default_rng(0), {}
    for shard, images in enumerate(plan.shards):
        rows = generator.standard_normal((images.stop - images.start, width)).astype("float16")
        records[shard] = writer.write(shard, {_SITE: rows}, [])
    about = {"split": "train", "token_positions": {"class": [0], "register": [1], "patches": [2, 2]}, "backbone": "vit"}
    part = folder / "train.part-0.json"
    write_json(part, {"plan": dataclasses.asdict(plan), "about": about, "shards": records})
    finish_store(folder / "train.zarr", [part], folder / "train.json")
    return folder / "train.json"


def _run(folder: Path, store: Path, n: int, arguments: argparse.Namespace) -> list[float]:
    """The peaks (MiB) of the training processes."""
    command = [
        sys.executable, str(_ROOT / "workflow" / "scripts" / "sae.py"), f"--from-images={store}",
        f"--from-store={store}", "--from-backbone", f"--out={folder / 'out'}", f"--work={folder / 'work'}",
        "--name=wide", f"--processes={n}", "--backbone=vit", f"--site={_SITE}", f"--d-sae={arguments.d_sae}", "--k=32",
        "--seeds", "0", "--epochs=1", f"--batch-size={arguments.batch}", f"--threads={arguments.threads}",
    ]  # fmt: skip
    stage = subprocess.Popen(command)
    peaks: dict[int, float] = {}
    while stage.poll() is None:
        for process in [stage.pid] if n == 1 else _children(stage.pid):
            peaks[process] = max(peaks.get(process, 0), _peak(process))
        time.sleep(_POLL_SECONDS)
    if stage.returncode:
        raise SystemExit(stage.returncode)
    return list(peaks.values())


def _children(process: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []


def _peak(process: int) -> float:
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    return int(status.split("VmHWM:")[1].split()[0]) / 1024 if "VmHWM:" in status else 0  # a process that ends has none


if __name__ == "__main__":
    main()
