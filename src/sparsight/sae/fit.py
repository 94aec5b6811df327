"""The stage that trains an SAE on a stored site.

Shapes: B batch, N rows, D width (d_in), F latents (d_sae).
"""

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsight import config, sae, training
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
    x = load_rows(store, section.site)
    mean = x.mean(axis=0, dtype=np.float64)
    scale = float(np.sqrt(np.square(x - mean).mean(dtype=np.float64)))
    if scale == 0:
        raise SparsightError(f"{store.path}: site {section.site!r} is constant; there is nothing to learn")
    one = sae.create(
        section.kind, x.shape[1], section.d_sae, section.k, derive_seed(seed, "sae", name, "init"),
        **section.options(),
    ).to(device)  # fmt: skip
    one.start(one.d_in)  # E||x - mean||^2 of the scaled activations
    one.set_center(mean / scale)
    loop = _Training(section, one, torch.from_numpy(x / np.float32(scale)).to(device))
    training.train(loop, len(x), section.batch_size, section.epochs, derive_seed(seed, "sae", name), work)
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


def load_rows(store: ActivationStore, site: str) -> np.ndarray:
    """All rows of a site, float32 (N, D).

    Raises:
        SparsightError: a row that is not finite, named by its number.
    """
    x = store.rows(site)[:].astype(np.float32)
    bad = ~np.isfinite(x).all(axis=1)
    if bad.any():
        raise SparsightError(
            f"{store.path}: NaN or infinite activation at site {site!r}, row {int(np.flatnonzero(bad)[0])}; "
            "make the store again from sound weights"
        )
    return x


class _Training:
    """See :class:`sparsight.training.Trainable`."""

    def __init__(self, section: config.Sae, one: SAE, x_ND: Tensor) -> None:
        self.section, self.sae, self.x_ND = section, one, x_ND
        self.trainer = Trainer([one], section.lr, section.dead_after)

    def step(self, rows: np.ndarray, progress: float, generator: torch.Generator) -> dict[str, Tensor]:
        self.trainer.schedule(min(1.0, (1 - progress) / (1 - _DECAY_FROM)))
        x = self.x_ND[torch.from_numpy(rows).to(self.x_ND.device)]
        (loss,) = self.trainer.step(x)
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
