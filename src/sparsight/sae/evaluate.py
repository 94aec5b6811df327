"""Evaluation of SAEs and ReSAE chains on held-out activations and inside the model, beside controls.

Shapes: N rows, D width (d_in), F latents (d_sae).
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from sparsight.activations.store import ActivationStore
from sparsight.backbones.backbone import Backbone
from sparsight.common import tables
from sparsight.common.files import write_json
from sparsight.common.progress import log
from sparsight.common.seeds import derive_seed
from sparsight.common.work import Work
from sparsight.images.labels import unlabelled
from sparsight.images.split import Split
from sparsight.sae.base import SAE
from sparsight.sae.metrics.geometry import random_rows, redundancy
from sparsight.sae.metrics.measure import Measured, measure
from sparsight.sae.metrics.names import COLUMNS as NAMES
from sparsight.sae.metrics.names import Words, name_latents
from sparsight.sae.metrics.reconstruction_only import measure_reconstruction
from sparsight.sae.metrics.splice import Clean, Replacement, spliced
from sparsight.sae.moments import Moments, by_group
from sparsight.sae.resae import ReSAE

_IN_MODEL = 5000  # images of test that a chain is run on at most, if only its reconstruction is measured
_AVERAGED = (
    "fvu", "fvu_unchained", "fvu_residual", "fvu_affine", "l0", "bits", "probing_sae_1", "probing_sae_5",
    "redundancy", "redundancy_transported", "redundancy_random",
)  # fmt: skip
# Types of columns, which nothing but these would tell without labels.
_OF_CLASSES = {"best_class": pa.int64(), "class_precision": pa.float64(), "selectivity": pa.float64()}
_OF_PROBES = {
    "features": pa.int64(), "method": pa.string(), "n": pa.int64(),
    "accuracy": pa.float64(), "lo": pa.float64(), "hi": pa.float64(),
}  # fmt: skip


def evaluate(
    saes: Mapping[str, SAE], backbone: Backbone, stores: Mapping[str, ActivationStore], images: Mapping[str, Split],
    seed: int, work: Work, record: dict[str, Any], words: Words | None = None, judge: ActivationStore | None = None,
    reconstruction_only: bool = False,
) -> None:  # fmt: skip
    """Write ``metrics.json``, ``latents.parquet``, ``baselines.parquet`` and ``probing.parquet`` (docs/evaluation.md).

    They hold the results of :func:`measure`. ``metrics.json`` also holds those of :func:`spliced` in two modes:
    ``spliced`` and, as the floor, ``mean_instead``, in which the train mean replaces every activation. ``kl_recovered``
    is the share of the floor's KL that the reconstruction recovers.

    Args:
        saes: SAEs of one site and one shape, by the name of the folder that receives their files.
        stores: stores of the splits ``train``, ``val`` and ``test``.
        images: the same splits' images.
        seed: the run's seed, from which those of the baselines are derived.
        words: words that may name latents; without them no latent has a name.
        judge: see :func:`measure`.
        reconstruction_only: measure what :func:`measure_reconstruction` does, and nothing in the model.
    """
    _log_missing(images)
    ((site, tokens),) = {(sae.about["site"], sae.about["tokens"]) for sae in saes.values()}
    labels, test = {name: split.labels for name, split in images.items()}, images["test"]
    if reconstruction_only:
        results = measure_reconstruction(list(saes.values()), site, stores, labels, tokens=tokens)
        for name, result in zip(saes, _named(results, [], site, stores, None, seed), strict=True):
            _write(work.out, name, result, result.metrics, record)
        return
    results = measure(list(saes.values()), site, stores, labels, len(test.classes), seed, tokens=tokens, judge=judge)
    results = _named(results, list(saes.values()), site, stores, words, seed, tokens=tokens)
    modes = {name: partial(_decoded, sae) for name, sae in saes.items()}
    means = _means(stores["train"], [site], tokens)
    positions = _positions(stores["test"], site, tokens, backbone)
    in_model = spliced(backbone, test, [site], positions, {**modes, "mean_instead": lambda _: means})
    for name, result in zip(saes, results, strict=True):
        metrics = {**result.metrics, **in_model.metrics({name: "spliced", "mean_instead": "mean_instead"})}
        if metrics.get("kl_mean_instead"):
            metrics["kl_recovered"] = 1 - metrics["kl_spliced"] / metrics["kl_mean_instead"]
        _write(work.out, name, result, metrics, record)


def evaluate_chains(
    chains: Mapping[str, ReSAE], backbone: Backbone, stores: Mapping[str, ActivationStore],
    images: Mapping[str, Split], seed: int, work: Work, record: dict[str, Any], words: Words | None = None,
    judge: ActivationStore | None = None, reconstruction_only: bool = False,
) -> None:  # fmt: skip
    """Write ``<site>/`` with the files of :func:`evaluate` for every SAE, and ``metrics.json`` for each whole chain.

    ``stores``, ``images``, ``words`` and ``judge`` are those of :func:`evaluate`. With ``reconstruction_only`` a site
    has the results of :func:`measure_reconstruction`; those of the whole chain are the same.

    A site's metrics are about the inputs of its SAE, the residuals; their FVU is called ``fvu_residual``. The results
    of :func:`chain_errors` and :func:`redundancies` are added. The chain's metrics are means over the sites, and the
    results of :func:`spliced` at all sites at once in four modes:

    * ``forced``: every SAE encodes the clean residual, and the reconstructions go through the maps;
    * ``unchained``: the same, but the clean activations go through the maps;
    * ``online``: one forward pass, in which every SAE encodes what arrives at its site;
    * ``mean_instead``: the train mean replaces every activation.

    Args:
        chains: chains with the same maps and SAEs of the same shapes, by the name of the folder that receives their
            files. So baselines and the model without replacements are computed once.
    """
    _log_missing(images)
    labels, test = {name: split.labels for name, split in images.items()}, images["test"]
    one = next(iter(chains.values()))
    assert all(_maps_alike(one, chain) for chain in chains.values()), "chains of one section have one fit"
    (tokens,) = {sae.about["tokens"] for chain in chains.values() for sae in chain.saes.values()}
    by_site: dict[str, dict[str, dict[str, Any]]] = {name: {} for name in chains}
    errors = {name: chain_errors(chain, stores["test"], tokens) for name, chain in chains.items()}
    for m, site in enumerate(one.sites):
        saes = [chain.saes[site] for chain in chains.values()]
        if reconstruction_only:
            results, words = measure_reconstruction(saes, site, stores, labels, one, tokens), None
        else:
            results = measure(saes, site, stores, labels, len(test.classes), seed, one, tokens, judge)
        results = _named(results, saes, site, stores, words, seed, one, tokens)
        for (name, chain), result in zip(chains.items(), results, strict=True):
            site_metrics = {("fvu_residual" if key == "fvu" else key): value for key, value in result.metrics.items()}
            added = errors[name][site] | (redundancies(chain, m, seed) if m else {})
            by_site[name][site] = site_metrics | added
            _write(work.out, f"{name}/{site}", result, by_site[name][site], record)
    means = _means(stores["train"], one.sites, tokens)
    modes: dict[str, Callable[[Clean], Replacement]] = {"mean_instead": lambda _: means}
    for name, chain in chains.items():
        modes[f"{name} forced"] = partial(_forced, chain, chained=True)
        modes[f"{name} unchained"] = partial(_forced, chain, chained=False)
        modes[f"{name} online"] = partial(_online, chain)
    n_images = min(_IN_MODEL, len(test)) if reconstruction_only else len(test)
    positions = _positions(stores["test"], one.sites[0], tokens, backbone)
    fixed = [mode for mode in modes if not mode.endswith(" online")]
    in_model = spliced(backbone, test, one.sites, positions, modes, n_images, fixed)
    for name in chains:
        metrics: dict[str, float] = {"n": n_images}
        for key in _AVERAGED:
            if values := [row[key] for row in by_site[name].values() if key in row]:
                metrics[key] = float(np.mean(values))
        own = {f"{name} {mode}": mode for mode in ("forced", "unchained", "online")}
        metrics |= in_model.metrics({**own, "mean_instead": "mean_instead"})
        write_json(work.out / name / "metrics.json", {**metrics, "record": record})
        log(f"{name}: {_line(metrics)}")


@torch.no_grad()
def chain_errors(chain: ReSAE, store: ActivationStore, tokens: str | None = None) -> dict[str, dict[str, float]]:
    """Reconstruction errors of a chain on the activations of a store, by site; ``tokens`` None takes what is stored.

    ``fvu`` is the FVU of the teacher-forced reconstruction, with earlier reconstructions sent through the maps.
    ``fvu_unchained`` is the same with clean activations sent through the maps. ``fvu_affine`` is the FVU of the map's
    prediction alone, from the second site on.
    """
    activations = {site: Moments([site]) for site in chain.sites}
    errors = {site: dict.fromkeys(("fvu", "fvu_unchained", "fvu_affine"), 0.0) for site in chain.sites}
    device = next(iter(chain.saes.values())).W_dec.device
    for groups in by_group(store, chain.sites, device, tokens=tokens):
        for group, rows in groups.items():
            residuals = chain.residuals(rows, group)
            rebuilt = {
                "fvu": chain.reconstruct(rows, group),
                "fvu_unchained": chain.reconstruct(rows, group, chained=False),
                "fvu_affine": {site: rows[site] - residuals[site] for site in chain.sites},
            }
            for site in chain.sites:
                activations[site].update({site: rows[site]})
                for key, x_hat in rebuilt.items():
                    errors[site][key] += float((rows[site] - x_hat[site]).double().square().sum())
    by_site = {}
    for m, site in enumerate(chain.sites):
        variance = activations[site].n * float(activations[site].covariance(site, site)[0].trace())
        by_site[site] = {key: error / variance for key, error in errors[site].items() if m or key != "fvu_affine"}
    return by_site


def redundancies(chain: ReSAE, m: int, seed: int) -> dict[str, float]:
    """Decoder redundancy of sites m - 1 and m (:func:`redundancy`), of random rows of the same shape, and transported.

    Transported means that the affine map is applied to the earlier rows; it is a mean over the maps of the token
    groups. It is left out if all maps are zero (``affine: zero``).
    """
    later, earlier = (chain.saes[site].W_dec for site in (chain.sites[m], chain.sites[m - 1]))
    random_later, random_earlier = (
        random_rows(rows, derive_seed(seed, "redundancy", place)) for place, rows in ((m, later), (m - 1, earlier))
    )
    by_kind = {
        "redundancy": redundancy(later, earlier),
        "redundancy_random": redundancy(random_later, random_earlier),
    }
    maps = [pairs[m - 1][0] for pairs in chain.maps.values()]
    if any(A.any() for A in maps):
        by_map = [redundancy(later, earlier, A) for A in maps]
        by_kind["redundancy_transported"] = {
            key: float(np.mean([result[key] for result in by_map])) for key in by_map[0]
        }
    return {
        name + (key != "mean") * f"_{key}": value for name, numbers in by_kind.items() for key, value in numbers.items()
    }


def _named(
    results: list[Measured], saes: list[SAE], site: str, stores: Mapping[str, ActivationStore], words: Words | None,
    seed: int, chain: ReSAE | None = None, tokens: str | None = None,
) -> list[Measured]:  # fmt: skip
    """The results with the columns of :func:`name_latents`, and with their number of names."""
    if words is None:
        nothing = dict.fromkeys(NAMES)
        return [replace(found, latents=[{**row, **nothing} for row in found.latents]) for found in results]
    drawn = derive_seed(seed, "metrics", "names")
    named = []
    for found, columns in zip(results, name_latents(saes, site, stores, words, drawn, chain, tokens), strict=True):
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        latents = [{**row, **names} for row, names in zip(found.latents, rows, strict=True)]
        n_named = sum(names["name"] is not None for names in rows)
        named.append(replace(found, metrics={**found.metrics, "named": n_named}, latents=latents))
    return named


def _line(metrics: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value if isinstance(value, str) else f'{value:.4g}'}" for name, value in metrics.items())


def _write(out: Path, name: str, found: Measured, metrics: dict[str, Any], record: dict[str, Any]) -> None:
    """Write the files of an SAE into the folder of its name."""
    folder = out / name
    folder.mkdir(exist_ok=True, parents=True)
    write_json(folder / "metrics.json", {**metrics, "record": record})
    tables.write(folder / "latents.parquet", found.latents, _OF_CLASSES | NAMES)
    tables.write(folder / "baselines.parquet", found.baselines)
    tables.write(folder / "probing.parquet", found.probing, _OF_PROBES)
    log(f"{name}: {_line(metrics)}")


def _log_missing(images: Mapping[str, Split]) -> None:
    """Say what is left out, or measured on fewer images, for want of labels."""
    if missing := unlabelled(images):
        left_out = "probes, classes of latents and accuracies are of labelled images alone, or left out without any"
        log(f"{missing} have no label: {left_out}")


def _positions(store: ActivationStore, site: str, tokens: str, backbone: Backbone) -> dict[str, list[int]]:
    """Positions of the tokens in the model, by group. ``mean`` and ``embedding`` are no tokens and have none."""
    patches = list(range(*backbone.patch_positions))
    kinds = {"cls": backbone.class_positions, "registers": backbone.register_positions, "patches": patches}
    groups = store.token_groups(site, tokens)
    return {group: kinds[group][: len(rows)] for group, rows in groups.items() if group in kinds}


def _decoded(sae: SAE, clean: Clean) -> Replacement:
    return lambda m, group, h, before: sae(h)


def _maps_alike(a: ReSAE, b: ReSAE) -> bool:
    """Whether two chains have the same maps."""
    tensors = ([t for pairs in chain.maps.values() for pair in pairs for t in pair] for chain in (a, b))
    return all(torch.equal(one, other) for one, other in zip(*tensors, strict=True))


def _forced(chain: ReSAE, clean: Clean, chained: bool) -> Replacement:
    """See :func:`evaluate_chains`."""
    rebuilt = {
        group: chain.reconstruct({site: clean[m][group] for m, site in enumerate(chain.sites)}, group, chained)
        for group in clean[0]
    }
    return lambda m, group, h, before: rebuilt[group][chain.sites[m]]


def _online(chain: ReSAE, clean: Clean) -> Replacement:
    return lambda m, group, h, before: chain.replace(m, h, before, group)


def _means(store: ActivationStore, sites: list[str], tokens: str) -> Replacement:
    """Replace every activation by the mean of the stored ones."""
    means = [torch.from_numpy(store.statistics(site, tokens).mean).float() for site in sites]
    return lambda m, group, h, before: means[m].to(h).expand_as(h)
