"""The stage that trains the SAEs of a section on a stored site.

Shapes: B batch, N rows, D width (d_in), F latents (d_sae).
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsight import config, sae, training
from sparsight.batches import Batch, StoreBatches
from sparsight.errors import SparsightError
from sparsight.sae.base import SAE
from sparsight.sae.train import Trainer
from sparsight.seeds import derive_seed
from sparsight.store import ActivationStore
from sparsight.work import Work

_DECAY_FROM = 0.8  # the learning rate falls linearly to 0 over the last fifth


def fit(
    section: config.Sae, store: ActivationStore, name: str, seed: int, work: Work, device: torch.device,
    record: dict[str, Any],
) -> None:  # fmt: skip
    """Train the SAEs of a section, one per seed, on one reading of a store's site.

    Each becomes a folder ``<name>-s<seed>`` of ``sae.safetensors``, ``config.json``, ``training.jsonl``.
    They differ in their initial weights and see the same batches, so that each has the bytes that it has when
    trained alone. The activations are scaled to unit variance per dimension while training; the scale is
    folded into the saved weights.

    Raises:
        SparsightError: a site the store does not hold, no activations, such that are constant or not finite, or
            training that diverges.
    """
    rows = store.rows(section.site)
    mean, scale = _moments(store, section.site)
    order = derive_seed(seed, "sae", name)
    batches = StoreBatches(
        {section.site: rows}, section.batch_size, order, section.memory_mb * 2**20, device=device
    )  # fmt: skip
    saes = {f"{name}-s{number}": number for number in section.seeds}
    grid = {one: _create(section, rows.shape[1], derive_seed(seed, "sae", one, "init")).to(device) for one in saes}
    for one_name, one in grid.items():
        one.about["name"] = one_name  # what errors call it
        one.start(one.d_in)  # E||x - mean||^2 of the scaled activations
        one.set_center(mean / scale)
    log_path = work.state / "training.jsonl"  # of all; kept beside the checkpoint that it belongs to
    training.train(_Training(section, grid, scale), batches, section.epochs, order, work.state, log_path)
    _split_log(log_path, work.out, list(grid))
    for one_name, one in grid.items():
        one.fold_scale(scale)
        about = {
            "name": one_name,
            "backbone": section.backbone,
            "site": section.site,
            "tokens": store.tokens,
            "training": dataclasses.asdict(section),
            "store_digest": store.manifest["digest"],
            "record": record,
        }
        one.save(work.out / one_name, **about)


def _create(section: config.Sae, d_in: int, seed: int) -> SAE:
    return sae.create(section.kind, d_in, section.d_sae, section.k, seed, **section.options())


def _split_log(joint: Path, out: Path, names: Sequence[str]) -> None:
    """Give each SAE the lines about it: ``<name>/training.jsonl`` from the log of all."""
    lines = [json.loads(line) for line in joint.read_text().splitlines()]
    for name in names:
        (out / name).mkdir(exist_ok=True)
        own = [{key.removeprefix(f"{name}."): value for key, value in line.items() if key in training.POSITION
                or key.startswith(f"{name}.")} for line in lines]  # fmt: skip
        (out / name / "training.jsonl").write_text("".join(json.dumps(line) + "\n" for line in own))


def _moments(store: ActivationStore, site: str) -> tuple[np.ndarray, float]:
    """Mean per dimension, (D,), and standard deviation over all dimensions around it, from the manifest.

    Raises:
        SparsightError: no activations, or such that are constant or not finite.
    """
    if len(store.rows(site)) == 0:
        raise SparsightError(f"{store.path}: site {site!r} holds no activations; extract a split that has images")
    about = store.manifest["sites"][site]
    mean = np.array(about["mean"])
    variance = about["rms"] ** 2 - float(np.square(mean).mean())
    if not np.isfinite(variance) or variance <= 0:
        raise SparsightError(f"{store.path}: site {site!r} is constant or not finite; there is nothing to learn")
    return mean, float(np.sqrt(variance))


class _Training:
    """See :class:`sparsight.training.Trainable`."""

    def __init__(self, section: config.Sae, grid: Mapping[str, SAE], scale: float) -> None:
        self.section, self.grid, self.scale = section, grid, scale
        self.trainer = Trainer(list(grid.values()), section.lr, section.dead_after)

    def step(self, batch: Batch, progress: float, generator: torch.Generator) -> dict[str, Tensor]:
        self.trainer.schedule(min(1.0, (1 - progress) / (1 - _DECAY_FROM)))
        losses = self.trainer.step(batch.x[self.section.site].float() / self.scale)
        scalars: dict[str, Tensor] = {}
        for (name, one), loss in zip(self.grid.items(), losses, strict=True):
            scalars |= {
                f"{name}.fvu": loss.reconstruction,
                f"{name}.aux": loss.aux,
                f"{name}.l0": loss.codes.l0().float().mean(),
                f"{name}.dead": one.dead.float().sum(),
            }
        return scalars

    def epoch_end(self) -> dict[str, float]:
        return {}

    def state(self) -> dict[str, Tensor]:
        return self.trainer.state()

    def restore(self, state: dict[str, Tensor]) -> None:
        self.trainer.restore(state)
