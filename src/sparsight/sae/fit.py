"""The stage that trains the SAEs of a section: on one stored site, or as a ReSAE chain on several.

Shapes: B batch, D width (d_in), F latents (d_sae).
"""

import dataclasses
import itertools
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from sparsight import config
from sparsight.activations.store import ActivationStore, Rows
from sparsight.common.devices import log_slow_bf16
from sparsight.common.digests import is_free
from sparsight.common.errors import SparsightError
from sparsight.common.member import Member
from sparsight.common.progress import log
from sparsight.common.seeds import derive_seed
from sparsight.common.tokens import chosen
from sparsight.common.work import Work
from sparsight.config.checks import only_if
from sparsight.sae import resae
from sparsight.sae.base import SAE, create
from sparsight.sae.end_to_end import EndToEndLoss, EndToEndTrainer, RestOfModel, WholeImages
from sparsight.sae.inputs import SaeInputs
from sparsight.sae.metrics.baselines import cluster_centres
from sparsight.sae.moments import by_group, fit_moments
from sparsight.sae.resae import ReSAE
from sparsight.sae.sharded.trainer import ShardedTrainer
from sparsight.sae.sharded.trainer import create as create_part
from sparsight.sae.trainer import Trainer
from sparsight.sae.variants.archetypal import Archetypal
from sparsight.training import loop, schedules
from sparsight.training.batches import Batch, Source, StoreBatches
from sparsight.training.ranks import Ranks

if TYPE_CHECKING:
    from sparsight.backbones.backbone import Backbone

_Statistics = dict[str, tuple[np.ndarray, float]]
_CANDIDATE_ROWS = 65536  # that the candidates of archetypal SAEs are the centroids of


def fit(
    section: config.Sae, store: ActivationStore, labels: np.ndarray | None, name: str, seed: int, work: Work,
    device: torch.device, record: dict[str, Any], member: Member | None = None, backbone: "Backbone | None" = None,
) -> None:  # fmt: skip
    """Train the SAEs of a section together: one per seed, in a chain one per seed and site.

    Each SAE gets a folder with ``sae.safetensors``, ``config.json`` and ``training.jsonl``: ``<name>-s<seed>``, or
    ``<name>-s<seed>/<site>`` in a chain. A chain also has its maps (``<name>-s<seed>/affine.safetensors``).

    The SAEs of a site differ only in their initial weights and train on the same batches. Each ends with the same
    bytes as if trained alone, unless ``mutual`` makes them alike. For training, inputs are scaled so that their
    dimensions have unit variance on average. The scale is folded into the saved weights.

    Several processes deal the SAEs out among themselves, if there are enough of them. Otherwise each SAE is split over
    all processes (:mod:`sparsight.sae.sharded`).

    Args:
        labels: int (N,), the class of every stored image, for the PASS term; None without it.
        member: this process, if several train the section; each calls this function.
        backbone: the model on ``device``, for a loss other than ``local``.

    Raises:
        SparsightError: a setting that this kind of SAE does not have, a site or tokens that the store does not hold, no
            activations, activations that are constant or not finite, a site or model that does not have what the loss
            needs, or training that diverges.
    """
    tokens = chosen(section.tokens, {site: store.tokens_of(site) for site in section.places})
    rows = {site: _rows(section, store, site, tokens) for site in section.places}
    names = [f"{name}-s{number}" for number in section.seeds]
    if section.sites:
        chain, statistics = _chain(section, store, tokens, device)
    else:
        chain, statistics = None, _moments(store, section.places[0], tokens)
    member = member or Member()
    places = {f"{n}/{site}" if chain else n: (n, site) for n in names for site in section.places}
    ranks, state = None, work.state
    if section.split:
        ranks = Ranks(member.rank, member.size).join(member.meeting)
    elif member.size > 1:
        places = dict(list(places.items())[member.rank :: member.size])
        state = work.state / str(member.rank)
        state.mkdir(exist_ok=True)
    grid: dict[str, tuple[str, SAE]] = {}
    """Site and SAE by folder."""
    for folder, (_, site) in places.items():
        mean, scale = statistics[site]
        sae = _create(section, len(mean), derive_seed(seed, "sae", folder, "init"), ranks).to(device)
        sae.about["name"] = folder  # for error messages
        sae.start(sae.d_in)  # E||x - mean||^2 of the scaled activations
        sae.set_center(mean / scale)
        if isinstance(sae, Archetypal):
            seen = SaeInputs(store, site, device, chain, tokens)
            n_images = len(rows[site]) // seen.tokens
            candidates_seed = derive_seed(seed, "sae", folder, "candidates")
            sae.set_points(_candidates(sae, seen, n_images, mean, scale, candidates_seed))
        grid[folder] = site, sae
    order = derive_seed(seed, "sae", name)
    scales = {site: scale for site, (_, scale) in statistics.items()}
    sources: Mapping[str, Source] = rows
    inputs: _Inputs | _Images = _Inputs(store.token_groups(section.places[0], tokens), chain, scales, labels)
    rest, batch_size = None, section.batch_size
    if section.loss != "local":
        (site,) = section.places
        rest = _rest(section, store, tokens, scales[site], backbone)
        sources, inputs = {site: WholeImages(_rows(section, store, site))}, _Images(labels)
        batch_size = _images_of_batch(section.batch_size, rows[site].tokens_per_image)
    batches = StoreBatches(sources, batch_size, order, section.memory_mb * 2**20, device=device)
    if rest is not None:
        batches.unit = "images"
    log_path = state / "training.jsonl"  # joint log of all SAEs, beside the checkpoint that it belongs to
    loop.train(_Training(section, grid, inputs, rest), batches, section.epochs, order, state, log_path, ranks)
    if ranks is None or ranks.first:
        _split_log(log_path, work.out, grid)
    metadata = {
        "backbone": section.backbone,
        "tokens": tokens,
        "training": {f.name: getattr(section, f.name) for f in dataclasses.fields(section) if not is_free(f)},
        "store_digest": store.manifest["digest"],
        "record": record,
    }
    for site, sae in grid.values():
        sae.fold_scale(scales[site])
    for seed_name in dict.fromkeys(seed_name for seed_name, _ in places.values()):
        if chain is None:
            grid[seed_name][1].save(work.out / seed_name, **metadata, name=seed_name, site=section.site)
        else:
            saes = {site: grid[folder][1] for folder, (name, site) in places.items() if name == seed_name}
            ReSAE(chain.sites, saes, chain.maps).save(work.out / seed_name, **metadata, name=seed_name)
    if ranks is not None:
        ranks.leave()


def _create(section: config.Sae, d_in: int, seed: int, ranks: Ranks | None) -> SAE:
    sizes = d_in, section.d_sae, section.k, seed
    if ranks is None:
        sae = create(section.kind, *sizes, **section.options())
    else:
        sae = create_part(section.kind, ranks, *sizes, **section.options())
    only_if(sae.has_auxk, "a kind with the AuxK loss", section, "aux_k", "aux_coefficient")
    return sae


def _rest(
    section: config.Sae, store: ActivationStore, tokens: str, scale: float, backbone: "Backbone | None"
) -> RestOfModel:
    """The model behind the site, for a loss other than ``local``.

    Raises:
        SparsightError: a site or model that does not have what the loss needs.
    """
    assert section.site is not None
    if backbone is None:
        raise SparsightError(f"loss: {section.loss} runs the rest of the model; give its folder (--from-backbone)")
    section.check_rest(store.tokens_of(section.site), backbone.n_blocks, bool(backbone.n_classes))
    groups = store.token_groups(section.site)
    if tokens == "all":
        positions = sorted(itertools.chain.from_iterable(groups.values()))
    else:
        positions = groups[tokens][: store.rows(section.site, tokens).tokens_per_image]  # one class token of several
    return RestOfModel(backbone, section.site, positions, scale, section.loss == "e2e-downstream")


def _images_of_batch(batch_size: int, n_tokens: int) -> int:
    """Whole images in a batch of activations."""
    if batch_size < n_tokens:
        raise SparsightError(
            f"batch_size: {batch_size} activations are less than the {n_tokens} of one image, which an end-to-end loss "
            f"needs; set at least {n_tokens}"
        )
    return batch_size // n_tokens


def _rows(section: config.Sae, store: ActivationStore, site: str, tokens: str | None = None) -> Rows:
    """The rows of a site on which the section is trained.

    Raises:
        SparsightError: no rows, or fewer images than the section asks for.
    """
    rows = store.rows(site, tokens)
    if len(rows) == 0:
        raise SparsightError(f"{store.path}: site {site!r} holds no activations; extract a split that has images")
    stored, wanted = len(rows) // rows.tokens_per_image, section.train_images
    if wanted is not None and wanted > stored:
        raise SparsightError(f"train_images: {wanted:,} are more than the {stored:,} images of {store.path}; lower it")
    return rows if wanted is None else rows.first(wanted)


def _candidates(sae: Archetypal, inputs: SaeInputs, n_images: int, mean: np.ndarray, scale: float, seed: int) -> Tensor:
    """Centroids of the first activations, which are of random images, (N, D), as the SAE is trained on them.

    Raises:
        SparsightError: fewer activations than candidates.
    """
    x = inputs.images(slice(0, min(n_images, max(1, _CANDIDATE_ROWS // inputs.tokens))))
    if len(x) < sae.candidates:
        raise SparsightError(f"candidates: {sae.candidates} are more than the {len(x)} activations; lower it")
    log(f"{sae.about['name']}: {sae.candidates} centroids of {len(x):,} activations as candidates")
    return (cluster_centres(x, sae.candidates, seed) - torch.as_tensor(mean, device=x.device)) / scale


def _chain(section: config.Sae, store: ActivationStore, tokens: str, device: torch.device) -> tuple[ReSAE, _Statistics]:
    """A chain with its maps, without SAEs yet, and the statistics of its SAEs' inputs."""
    moments = fit_moments(by_group(store, section.sites, device, tokens=tokens), section.sites)
    chain = ReSAE(list(section.sites), {}, resae.fit_maps(section.sites, moments, section.affine, section.ridge))
    return chain, {site: (mean.cpu().numpy(), scale) for site, (mean, scale) in chain.statistics(moments).items()}


def _moments(store: ActivationStore, site: str, tokens: str) -> _Statistics:
    """The mean (D,) of a site and the standard deviation around it over all dimensions.

    Raises:
        SparsightError: activations that are constant or not finite.
    """
    mean, rms = store.statistics(site, tokens)
    variance = rms**2 - float(np.square(mean).mean())
    if not np.isfinite(variance) or variance <= 1e-10 * rms**2:  # less is rounding error
        raise SparsightError(f"{store.path}: site {site!r} is constant or not finite; there is nothing to learn")
    return {site: (mean, float(np.sqrt(variance)))}


def _split_log(joint: Path, out: Path, names: Iterable[str]) -> None:
    """Write ``<name>/training.jsonl`` for each SAE: its part of the joint log."""
    lines = [json.loads(line) for line in joint.read_text().splitlines()]
    for name in names:
        (out / name).mkdir(exist_ok=True, parents=True)
        sae_lines = [{key.removeprefix(f"{name}."): value for key, value in line.items() if key in loop.POSITION
                or key.startswith(f"{name}.")} for line in lines]  # fmt: skip
        (out / name / "training.jsonl").write_text("".join(json.dumps(line) + "\n" for line in sae_lines))


class _Inputs:
    """Turns a batch of the store into the SAEs' inputs: scaled activations or, in a chain, scaled residuals."""

    def __init__(
        self, groups: Mapping[str, list[int]], chain: ReSAE | None, scales: Mapping[str, float],
        labels: np.ndarray | None,
    ) -> None:  # fmt: skip
        self.chain, self.scales, self.labels = chain, scales, labels
        self.groups = list(groups)
        self.group_of_token = np.zeros(sum(map(len, groups.values())), np.int64)
        for number, tokens in enumerate(groups.values()):
            self.group_of_token[tokens] = number

    def __call__(self, batch: Batch) -> tuple[dict[str, Tensor], np.ndarray | None]:
        """Inputs (B, D) by site, and classes (B,), or None without labels."""
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
            rows = torch.from_numpy(np.flatnonzero(group_B == number)).to(next(iter(x.values())).device)
            for site, value in self.chain.residuals({site: x[site][rows] for site in x}, group).items():
                out[site][rows] = value
        return out


class _Images:
    """Turns a batch of whole images into what :class:`EndToEndTrainer` takes."""

    def __init__(self, labels: np.ndarray | None) -> None:
        self.labels = labels

    def __call__(self, batch: Batch) -> tuple[dict[str, Tensor], np.ndarray | None]:
        """Activations (B, T D) by site, and classes (B,), or None without labels."""
        labels = None if self.labels is None else self.labels[batch.rows]
        return {site: value.float() for site, value in batch.x.items()}, labels


class _Training:
    """See :class:`sparsight.training.loop.Trainable`."""

    def __init__(
        self, section: config.Sae, grid: Mapping[str, tuple[str, SAE]], inputs: "_Inputs | _Images",
        rest: RestOfModel | None,
    ) -> None:  # fmt: skip
        self.names, self.inputs = list(grid), inputs
        sites, saes = [site for site, _ in grid.values()], [sae for _, sae in grid.values()]
        precision: Literal["fp32", "bf16"] = "bf16" if section.bf16 else "fp32"
        if section.bf16:
            log_slow_bf16(saes[0].W_dec.device, "bf16: true")
        weights = section.prototype_weight, section.mutual
        options = saes, section.lr, section.dead_after, sites, precision, *weights, section.frozen
        trainer = ShardedTrainer if section.split else Trainer
        self.trainer = trainer(*options) if rest is None else EndToEndTrainer(rest, *options)

    def step(self, batch: Batch, number: int, total: int, generator: torch.Generator) -> dict[str, Tensor]:
        self.trainer.schedule(schedules.linear_decay(number, total))
        losses = self.trainer.step(*self.inputs(batch))
        scalars: dict[str, Tensor] = {}
        for name, sae, loss in zip(self.names, self.trainer.saes, losses, strict=True):
            scalars |= {
                f"{name}.fvu": loss.reconstruction,
                f"{name}.aux": loss.aux,
                f"{name}.l0": loss.codes.l0().float().mean(),
                f"{name}.dead": sae.dead.float().sum(),
            }
            if isinstance(loss, EndToEndLoss):
                scalars[f"{name}.kl"] = loss.kl
                if loss.downstream is not None:
                    scalars[f"{name}.downstream"] = loss.downstream
        pulled = self.trainer.unlikeness
        return scalars | {f"{self.names[i]}.mutual": value for i, value in pulled.items()}

    def check(self) -> None:
        self.trainer.check()

    def epoch_end(self) -> dict[str, float]:
        return {}

    def state(self) -> dict[str, Tensor]:
        return self.trainer.state()

    def restore(self, state: dict[str, Tensor]) -> None:
        self.trainer.restore(state)
