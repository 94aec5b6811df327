"""Activations of a planted dictionary, and how evaluation ranks SAEs of it: python tests/planted.py prints the table.

x = z W + noise, with F unit rows W in fewer than F dimensions and sparse codes z. Each class has a latent that fires on
most of its images. Embeddings of images are the sum of a direction for every latent that fires; those of the judge have
other directions and other noise.

Shapes: N images, D width (d_in), F latents (d_sae), C classes.
"""

import tempfile
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from conftest import write_store

from sparsight import sae
from sparsight.activations.store import ActivationStore
from sparsight.common.intervals import mean_of_seeds
from sparsight.config.sae import Frozen
from sparsight.sae import SAE, Trainer
from sparsight.sae.metrics.measure import Measured, measure

D, F, C, K = 48, 96, 8, 5
SITE = "blocks.0.output"
N = {"train": 2048, "val": 512, "test": 1024}
LEARNERS: dict[str, Frozen] = {
    "planted": "decoder",
    "trained": "none",
    "soft-frozen": "soft-decoder",
    "frozen encoder": "encoder",
    "frozen decoder": "decoder",
}
"""What is frozen of each SAE. All but the planted one begin at random rows."""
METRICS = {
    "fvu": -1, "match": 1, "probing_1": 1, "probing_5": 1, "monosemanticity": 1, "monosemanticity_judge": 1,
    "bits per bit of PCA": -1, "bits": -1, "l0": -1,
}  # fmt: skip
"""By metric 1 if more is better, else -1."""


@dataclass(frozen=True)
class Planted:
    """Stores of images with known codes."""

    rows_FD: np.ndarray
    stores: dict[str, ActivationStore]
    labels: dict[str, np.ndarray]
    judge: ActivationStore


def plant(folder: Path, seed: int) -> Planted:
    """Draw the dictionary and the images."""
    generator = np.random.default_rng(seed)
    rows = generator.standard_normal((F, D))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    looks = [np.linalg.qr(generator.standard_normal((F, F)))[0] for _ in range(2)]
    stores, labels = {}, {}
    for name, n in N.items():
        y = generator.integers(C, size=n)
        chance = np.full((n, F), 0.03)
        chance[:, :C] = np.where(np.eye(C, dtype=bool)[y], 0.9, 0.01)
        fires = generator.random((n, F)) < chance
        z = fires * (1 + 0.3 * np.abs(generator.standard_normal((n, F))))
        x = z @ rows + 0.05 * generator.standard_normal((n, D)) + 0.5
        embeddings = [fires @ look + noise * generator.standard_normal((n, F)) for look, noise in
                      zip(looks, (0.1, 0.3), strict=True)]  # fmt: skip
        labels[name] = y
        stores[name] = _store(folder / "own" / name, {SITE: x, "embedding": embeddings[0]})
        if name == "test":
            judge = _store(folder / "judge" / name, {"embedding": embeddings[1]})
    return Planted(rows, stores, labels, judge)


def _store(folder: Path, arrays: dict[str, np.ndarray]) -> ActivationStore:
    n = len(next(iter(arrays.values())))
    path = write_store(folder, n, {site: x.shape[1:] for site, x in arrays.items()}, dtype="float32")
    group = zarr.open_group(path, mode="r+")
    for site, x in arrays.items():
        group[site][:] = x.reshape(group[site].shape).astype(np.float32)
    return ActivationStore.open(path)


def train(planted: Planted, name: str, seed: int, epochs: int = 60) -> SAE:
    """Train one of ``LEARNERS``: the planted dictionary gets its encoder as a frozen random one does."""
    x = torch.from_numpy(planted.stores["train"].rows(SITE)[:]).float()
    one = sae.create("topk", D, F, K, seed, aux_k=16)
    if name == "planted":
        with torch.no_grad():
            one.W_dec.copy_(torch.from_numpy(planted.rows_FD))
            one.W_enc.copy_(one.W_dec.T)
    one.start(float(x.var(dim=0, correction=0).sum()))
    one.set_center(x.mean(dim=0))
    trainer = Trainer([one], lr=3e-3, dead_after=len(x), frozen=LEARNERS[name])
    generator, steps = torch.Generator().manual_seed(seed), epochs * len(x) // 256
    for step in range(steps):
        if step % (len(x) // 256) == 0:
            order = torch.randperm(len(x), generator=generator).split(256)
        trainer.schedule(min(1, 5 * (1 - step / steps)))
        trainer.step(x[order[step % len(order)]])
    return one.requires_grad_(False)


def ranked(folder: Path, seed: int) -> dict[str, dict[str, float]]:
    """By method, the planted dictionary first and a random one last, its metrics."""
    planted = plant(folder, seed)
    saes = {name: train(planted, name, seed) for name in LEARNERS}
    measured = measure(list(saes.values()), SITE, planted.stores, planted.labels, C, seed, judge=planted.judge)
    found = {name: _of_sae(planted, saes[name], one) for name, one in zip(LEARNERS, measured, strict=True)}
    return found | {"random": _of_random(planted, measured[0], seed)}


def _of_sae(planted: Planted, one: SAE, found: Measured) -> dict[str, float]:
    metrics = found.metrics
    return {
        **{key: metrics[key] for key in ("fvu", "monosemanticity", "monosemanticity_judge", "bits", "l0")},
        **{f"probing_{n}": metrics[f"probing_sae_{n}"] for n in (1, 5)},
        "bits per bit of PCA": metrics["bits"] / metrics["bits_pca"],
        "match": match(planted, one.W_dec),
    }


def _of_random(planted: Planted, found: Measured, seed: int) -> dict[str, float]:
    """The metrics of the random dictionary; its bits are not compared with PCA's."""
    (row,) = (row for row in found.baselines if row["method"] == "random")
    metrics = {key: row[key] for key in ("fvu", "monosemanticity", "monosemanticity_judge", "bits", "l0")}
    metrics |= {f"probing_{n}": found.metrics[f"probing_random_{n}"] for n in (1, 5)}
    rows = sae.create("topk", D, F, K, seed + 1000).W_dec.detach()
    return {**metrics, "bits per bit of PCA": float("nan"), "match": match(planted, rows)}


def match(planted: Planted, rows_FD: torch.Tensor) -> float:
    """Mean over the planted rows of the largest cosine to a row of the decoder."""
    rows: Any = torch.nn.functional.normalize(rows_FD, dim=1).numpy()
    return float((planted.rows_FD @ rows.T).max(axis=1).mean())


ORDER = ("planted", "trained", "soft-frozen", "frozen decoder", "random")


def table(seeds: int) -> str:
    """The table of docs/evaluation.md; the last column counts, for each step of ORDER, the draws in which it holds."""
    runs = []
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            runs.append(ranked(Path(folder), seed))
    lines = [f"| | {' | '.join(runs[0])} | steps held |", "|---" * (len(runs[0]) + 2) + "|"]
    for key, sign in METRICS.items():
        cells = []
        for method in runs[0]:
            found = mean_of_seeds([run[method][key] for run in runs])
            cells.append("" if np.isnan(found["mean"]) else f"{found['mean']:.3f} &plusmn; {found['half']:.3f}")
        held = [sum(sign * (run[one][key] - run[other][key]) > 0 for run in runs) for one, other in pairwise(ORDER)]
        lines.append(f"| `{key}` | {' | '.join(cells)} | {', '.join(map(str, held))} |")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(table(5))
