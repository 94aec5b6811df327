"""One training step of a TopK SAE: sparsight against its peers on PyPI and plain PyTorch, on the CPU.

    uv sync --group bench
    python benchmarks/sae_step.py [--cells 768x8192x32 ...] [--activations rows.npy] [--rounds 8] [--threads 2]

Each contestant has a process of its own and they take turns, step by step. Printed are wall and CPU milliseconds
(minimum and median), rows per second (of the minimum), peak memory of the process, the largest error of the
gradients against dense float64 relative to their largest entry (after fitting the scale of the loss, on the rows
whose top k is beyond the rounding of fp32), and whether two runs from the start ended with the same bits. All
share one environment and so one version of PyTorch: the pins of these peers do not clash.

Shapes: B batch, D width (d_in), F latents (d_sae).
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from contestants import CONTESTANTS
from torch import Tensor

from sparsight.common import machine
from sparsight.config import Compute
from sparsight.pipeline.stage import prepare_torch

_WARM_UP = 2


def main() -> None:
    """Print one table per cell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", default=["768x8192x32"], help="d_in x d_sae x k")
    parser.add_argument("--activations", type=Path, help="rows (N, d_in) as .npy, centred here; default: Gaussian")
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--contestants", nargs="+", default=list(CONTESTANTS), choices=CONTESTANTS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    prepare_torch(Compute(threads=arguments.threads))
    if arguments.worker:
        _work(arguments.worker, Path(arguments.cells[0]), arguments.batch)
        return
    print(f"{machine.describe()}, {arguments.threads} threads, torch {torch.__version__}")
    for cell in arguments.cells:
        d_in, d_sae, k = (int(number) for number in cell.split("x"))
        data = "Gaussian" if arguments.activations is None else arguments.activations.name
        print(f"\n{data}, batch {arguments.batch}, d_in {d_in}, d_sae {d_sae}, k {k}, {arguments.rounds} rounds")
        with tempfile.TemporaryDirectory() as folder:
            _race(Path(folder), d_in, d_sae, k, arguments)


def _race(folder: Path, d_in: int, d_sae: int, k: int, arguments: argparse.Namespace) -> None:
    x = _activations(arguments.activations, d_in, arguments.batch * (arguments.rounds + _WARM_UP))
    rows = torch.randn(d_sae, d_in, generator=torch.Generator().manual_seed(1))
    rows /= rows.norm(dim=1, keepdim=True)
    check, expected = _exact_gradients(x[: arguments.batch], rows, k)
    for name, tensor in (("x", x), ("rows", rows), ("check", check)):
        np.save(folder / f"{name}.npy", tensor.numpy())
    (folder / "k").write_text(str(k))
    workers = {name: _Worker(name, folder, arguments) for name in arguments.contestants}
    times: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
    for turn in range(arguments.rounds + _WARM_UP):
        for name, worker in workers.items():
            answer = worker.ask("step", turn)
            if turn >= _WARM_UP:
                times[name].append(answer)
    print(
        f"{'':20s}{'wall ms min / med':>20s}{'CPU ms min / med':>20s}"
        f"{'rows/s':>9s}{'peak MB':>9s}{'gradients':>11s}  bits"
    )
    for name, worker in workers.items():
        peak = worker.ask("peak", 0)["peak"]
        same = worker.ask("digest", 0) == worker.ask("digest", 0)
        worker.ask("gradients", 0)
        worker.close()
        wall, cpu = ([1000 * answer[key] for answer in times[name]] for key in ("wall", "cpu"))
        error = max(_error(np.load(folder / f"{name}-{i}.npy"), expected[i]) for i in range(2))
        print(
            f"{name:20s}{min(wall):10.1f} / {statistics.median(wall):7.1f}"
            f"{min(cpu):10.1f} / {statistics.median(cpu):7.1f}"
            f"{1000 * arguments.batch / min(wall):9.0f}{peak:9.0f}{error:11.1e}  {'same' if same else 'differ'}",
            flush=True,
        )
    if "sparsight" in times:
        own = min(answer["cpu"] for answer in times.pop("sparsight"))
        ratios = {name: own / min(answer["cpu"] for answer in answers) for name, answers in times.items()}
        print("our CPU ms over theirs: " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()))


def _activations(path: Path | None, d_in: int, n: int) -> Tensor:
    """(n, d_in), centred and of unit variance; stored rows are repeated if they are too few."""
    if path is None:
        return torch.randn(n, d_in, generator=torch.Generator().manual_seed(0))
    rows = torch.from_numpy(np.load(path)).float()
    if rows.shape[1:] != (d_in,):
        sys.exit(f"{path}: shape {tuple(rows.shape)}, the cell wants rows of {d_in}")
    rows = (rows - rows.mean(dim=0)) / rows.std()
    return rows[torch.arange(n) % len(rows)]


def _exact_gradients(x_BD: Tensor, rows_FD: Tensor, k: int) -> tuple[Tensor, list[np.ndarray]]:
    """The rows whose top k is not a matter of rounding, and the float64 gradients of the dense model on them."""
    x, W_enc, W_dec = x_BD.double(), rows_FD.double().requires_grad_(), rows_FD.double().requires_grad_()
    with torch.no_grad():
        best = (x @ W_enc.T).topk(k + 1, dim=1).values
    clear = best[:, k - 1] - best[:, k] > 1e-5 * best[:, 0]
    pre = x[clear] @ W_enc.T
    values, indices = pre.topk(k, dim=1)
    z = torch.zeros_like(pre).scatter(1, indices, values.relu())
    (x[clear] - z @ W_dec).square().sum(dim=1).mean().backward()
    assert W_enc.grad is not None
    assert W_dec.grad is not None
    return x_BD[clear], [W_enc.grad.numpy(), W_dec.grad.numpy()]


def _error(found: np.ndarray, exact: np.ndarray) -> float:
    found = found.astype(np.float64)
    scale = (found * exact).sum() / np.square(exact).sum()
    return float(np.abs(found / scale - exact).max() / np.abs(exact).max())


class _Worker:
    """A process that trains one contestant when asked."""

    def __init__(self, name: str, folder: Path, arguments: argparse.Namespace) -> None:
        options = ["--worker", name, "--cells", str(folder), "--batch", str(arguments.batch)]
        self.process = subprocess.Popen(
            [sys.executable, __file__, *options, "--threads", str(arguments.threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(arguments.threads)},
        )  # fmt: skip

    def ask(self, command: str, turn: int) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(command, turn, file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            sys.exit("a contestant died; its message is above")
        return dict(json.loads(line))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def _work(name: str, folder: Path, batch: int) -> None:
    """Answer commands, one JSON line each, on what was standard output; peers chatter on the error stream instead."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        torch.set_deterministic_debug_mode("default")  # not all peers could run otherwise
        x, rows, check = (torch.from_numpy(np.load(folder / f"{part}.npy")) for part in ("x", "rows", "check"))
        k = int((folder / "k").read_text())
        contestant = CONTESTANTS[name](rows, k)
        for line in sys.stdin:
            command, turn = line.split()
            answer: dict[str, Any] = {}
            if command == "step":
                own = x[int(turn) * batch : (int(turn) + 1) * batch]
                wall, cpu = time.perf_counter(), time.process_time()
                contestant.step(own)
                answer = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
            elif command == "peak":
                answer = {"peak": machine.peak_memory()}
            elif command == "digest":
                fresh = CONTESTANTS[name](rows, k)
                for i in range(_WARM_UP):
                    fresh.step(x[i * batch : (i + 1) * batch])
                answer = {"digest": _digest(fresh.weights())}
            else:
                for i, gradient in enumerate(CONTESTANTS[name](rows, k).gradients(check)):
                    np.save(folder / f"{name}-{i}.npy", gradient.numpy())
            _write(answers, answer)


def _digest(weights: list[Tensor]) -> str:
    return hashlib.sha256(b"".join(w.detach().contiguous().numpy().tobytes() for w in weights)).hexdigest()


def _write(stream: IO[str], answer: dict[str, Any]) -> None:
    print(json.dumps(answer), file=stream, flush=True)


if __name__ == "__main__":
    main()
