"""The stage that trains the SAEs of a section on a stored site, or as a ReSAE chain on several.

Shapes: B batch, D width (d_in), F latents (d_sae).
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from sparsight import config
from sparsight.activations.store import ActivationStore
from sparsight.common.errors import SparsightError
from sparsight.common.seeds import derive_seed
from sparsight.common.work import Work
from sparsight.sae import resae
from sparsight.sae.base import SAE, create
from sparsight.sae.moments import by_group, fit_moments
from sparsight.sae.resae import ReSAE
from sparsight.sae.trainer import Trainer
from sparsight.training import loop
from sparsight.training.batches import Batch, StoreBatches

_DECAY_FROM = 0.8  # the learning rate falls linearly to 0 over the last fifth
_Statistics = dict[str, tuple[np.ndarray, float]]


def fit(
    section: config.Sae, store: ActivationStore, labels: np.ndarray | None, name: str, seed: int, work: Work,
    device: torch.device, record: dict[str, Any],
) -> None:  # fmt: skip
    """Train the SAEs of a section, one per seed (and site of a chain), on one reading of a store.

    Each becomes a folder ``<name>-s<seed>``, in a chain ``<name>-s<seed>/<site>``, of ``sae.safetensors``,
    ``config.json``, ``training.jsonl``; a chain has its maps beside them (``affine.safetensors``). They differ in
    their initial weights and see the same batches, so that each has the bytes that it has when trained alone. What
    an SAE sees is scaled to unit variance per dimension while training; the scale is folded into the saved weights.

    Args:
        labels: int (N,), the class of every stored image, for the PASS term of a section that has one.

    Raises:
        SparsightError: a site the store does not hold, no activations, such that are constant or not finite, or
            training that diverges.
    """
    rows = {site: store.rows(site) for site in section.places}
    for site, own in rows.items():
        if len(own) == 0:
            raise SparsightError(f"{store.path}: site {site!r} holds no activations; extract a split that has images")
    names = [f"{name}-s{number}" for number in section.seeds]
    chain, seen = _chain(section, store, device) if section.sites else (None, _moments(store, section.places[0]))
    grid: dict[str, tuple[str, SAE]] = {}
    """By folder, the site and the SAE."""
    for one in names:
        for site in section.places:
            folder = f"{one}/{site}" if chain else one
            mean, scale = seen[site]
            one_sae = _create(section, len(mean), derive_seed(seed, "sae", folder, "init")).to(device)
            one_sae.about["name"] = folder  # what errors call it
            one_sae.start(one_sae.d_in)  # E||x - mean||^2 of the scaled activations
            one_sae.set_center(mean / scale)
            grid[folder] = site, one_sae
    order = derive_seed(seed, "sae", name)
    batches = StoreBatches(rows, section.batch_size, order, section.memory_mb * 2**20, device=device)
    scales = {site: scale for site, (_, scale) in seen.items()}
    inputs = _Inputs(store, chain, scales, labels)
    log_path = work.state / "training.jsonl"  # of all; kept beside the checkpoint that it belongs to
    loop.train(_Training(section, grid, inputs), batches, section.epochs, order, work.state, log_path)
    _split_log(log_path, work.out, grid)
    about = {
        "backbone": section.backbone,
        "tokens": store.tokens,
        "training": dataclasses.asdict(section),
        "store_digest": store.manifest["digest"],
        "record": record,
    }
    for site, one_sae in grid.values():
        one_sae.fold_scale(scales[site])
    for one in names:
        if chain is None:
            grid[one][1].save(work.out / one, **about, name=one, site=section.site)
        else:
            saes = {site: grid[f"{one}/{site}"][1] for site in section.places}
            ReSAE(chain.sites, saes, chain.maps).save(work.out / one, **about, name=one)


def _create(section: config.Sae, d_in: int, seed: int) -> SAE:
    return create(section.kind, d_in, section.d_sae, section.k, seed, **section.options())


def _chain(section: config.Sae, store: ActivationStore, device: torch.device) -> tuple[ReSAE, _Statistics]:
    """The maps of a chain, without SAEs yet, and what its SAEs will see."""
    moments = fit_moments(by_group(store, section.sites, device), section.sites)
    chain = ReSAE(list(section.sites), {}, resae.fit_maps(section.sites, moments, section.affine, section.ridge))
    return chain, {site: (mean.cpu().numpy(), scale) for site, (mean, scale) in chain.statistics(moments).items()}


def _moments(store: ActivationStore, site: str) -> _Statistics:
    """Mean per dimension, (D,), and standard deviation over all dimensions around it, from the manifest.

    Raises:
        SparsightError: activations that are constant or not finite.
    """
    about = store.manifest["sites"][site]
    mean = np.array(about["mean"])
    variance = about["rms"] ** 2 - float(np.square(mean).mean())
    if not np.isfinite(variance) or variance <= 1e-10 * about["rms"] ** 2:  # what is less is rounding
        raise SparsightError(f"{store.path}: site {site!r} is constant or not finite; there is nothing to learn")
    return {site: (mean, float(np.sqrt(variance)))}


def _split_log(joint: Path, out: Path, names: Iterable[str]) -> None:
    """Give each SAE the lines about it: ``<name>/training.jsonl`` from the log of all."""
    lines = [json.loads(line) for line in joint.read_text().splitlines()]
    for name in names:
        (out / name).mkdir(exist_ok=True, parents=True)
        own = [{key.removeprefix(f"{name}."): value for key, value in line.items() if key in loop.POSITION
                or key.startswith(f"{name}.")} for line in lines]  # fmt: skip
        (out / name / "training.jsonl").write_text("".join(json.dumps(line) + "\n" for line in own))


class _Inputs:
    """From a batch of the store to what the SAEs see: residuals where there is a chain, scaled; and labels."""

    def __init__(
        self, store: ActivationStore, chain: ReSAE | None, scales: Mapping[str, float], labels: np.ndarray | None
    ) -> None:
        self.chain, self.scales, self.labels = chain, scales, labels
        groups = store.token_groups(next(iter(scales)))
        self.groups = list(groups)
        self.group_of_token = np.zeros(sum(map(len, groups.values())), np.int64)
        for number, at in enumerate(groups.values()):
            self.group_of_token[at] = number

    def __call__(self, batch: Batch) -> tuple[dict[str, Tensor], np.ndarray | None]:
        """Rows (B, D) by site, and class numbers (B,) where they are wanted."""
        image, token = np.divmod(batch.rows, len(self.group_of_token))
        x = {site: value.float() for site, value in batch.x.items()}
        if self.chain is not None:
            x = self._residuals(x, self.group_of_token[token])
        labels = None if self.labels is None else self.labels[image]
        return {site: value / self.scales[site] for site, value in x.items()}, labels

    def _residuals(self, x: dict[str, Tensor], group_B: np.ndarray) -> dict[str, Tensor]:
        assert self.chain is not None
        if len(self.groups) == 1:
            return self.chain.residuals(x, self.groups[0])
        out = {site: torch.empty_like(value) for site, value in x.items()}
        for number, group in enumerate(self.groups):
            at = torch.from_numpy(np.flatnonzero(group_B == number)).to(next(iter(x.values())).device)
            for site, value in self.chain.residuals({site: x[site][at] for site in x}, group).items():
                out[site][at] = value
        return out


class _Training:
    """See :class:`sparsight.training.loop.Trainable`."""

    def __init__(self, section: config.Sae, grid: Mapping[str, tuple[str, SAE]], inputs: _Inputs) -> None:
        self.names, self.inputs = list(grid), inputs
        sites, saes = [site for site, _ in grid.values()], [one for _, one in grid.values()]
        precision: Literal["fp32", "bf16"] = "bf16" if section.bf16 else "fp32"
        self.trainer = Trainer(saes, section.lr, section.dead_after, sites, precision, section.prototype_weight)

    def step(self, batch: Batch, progress: float, generator: torch.Generator) -> dict[str, Tensor]:
        self.trainer.schedule(min(1.0, (1 - progress) / (1 - _DECAY_FROM)))
        losses = self.trainer.step(*self.inputs(batch))
        scalars: dict[str, Tensor] = {}
        for name, one, loss in zip(self.names, self.trainer.saes, losses, strict=True):
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
