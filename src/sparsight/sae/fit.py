"""The stage that trains an SAE on a stored site.

Shapes: B batch, N rows, D width (d_in), F latents (d_sae).
"""

import dataclasses
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
    """Train the SAE ``name`` on a store's site; ``sae.safetensors``, ``config.json``, ``training.jsonl``.

    The activations are scaled to unit variance per dimension while training; the scale is folded into the
    saved weights.

    Raises:
        SparsightError: a site the store does not hold, or activations that are not finite.
    """
    rows = store.rows(section.site)
    mean, scale = _moments(store, section.site)
    batches = StoreBatches(
        {section.site: rows}, section.batch_size, derive_seed(seed, "sae", name), section.memory_mb * 2**20,
        device=device,
    )  # fmt: skip
    one = sae.create(
        section.kind, rows.shape[1], section.d_sae, section.k, derive_seed(seed, "sae", name, "init"),
        **section.options(),
    ).to(device)  # fmt: skip
    one.start(one.d_in)  # E||x - mean||^2 of the scaled activations
    one.set_center(mean / scale)
    loop = _Training(section, one, scale)
    training.train(loop, batches, section.epochs, derive_seed(seed, "sae", name), work)
    one.fold_scale(scale)
    about = {
        "name": name,
        "backbone": section.backbone,
        "site": section.site,
        "tokens": store.tokens,
        "training": dataclasses.asdict(section),
        "store_digest": store.manifest["digest"],
        "record": record,
    }
    one.save(work.out, **about)


def _moments(store: ActivationStore, site: str) -> tuple[np.ndarray, float]:
    """Mean per dimension, (D,), and standard deviation over all dimensions around it, from the manifest.

    Raises:
        SparsightError: activations that are constant or not finite.
    """
    about = store.manifest["sites"][site]
    mean = np.array(about["mean"])
    variance = about["rms"] ** 2 - float(np.square(mean).mean())
    if not np.isfinite(variance) or variance <= 0:
        raise SparsightError(f"{store.path}: site {site!r} is constant or not finite; there is nothing to learn")
    return mean, float(np.sqrt(variance))


class _Training:
    """See :class:`sparsight.training.Trainable`."""

    def __init__(self, section: config.Sae, one: SAE, scale: float) -> None:
        self.section, self.sae, self.scale = section, one, scale
        self.trainer = Trainer([one], section.lr, section.dead_after)

    def step(self, batch: Batch, progress: float, generator: torch.Generator) -> dict[str, Tensor]:
        self.trainer.schedule(min(1.0, (1 - progress) / (1 - _DECAY_FROM)))
        (loss,) = self.trainer.step(batch.x[self.section.site].float() / self.scale)
        return {
            "fvu": loss.reconstruction,
            "aux": loss.aux,
            "l0": loss.codes.l0().float().mean(),
            "dead": self.sae.dead.float().sum(),
        }

    def epoch_end(self) -> dict[str, float]:
        return {}

    def state(self) -> dict[str, Tensor]:
        return self.trainer.state()

    def restore(self, state: dict[str, Tensor]) -> None:
        self.trainer.restore(state)
