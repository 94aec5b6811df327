"""What SAEs and ReSAE chains are worth on held-out activations and inside the model, beside controls.

Shapes: N rows, D width (d_in), F latents (d_sae).
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsight import tables
from sparsight.backbones import Backbone
from sparsight.images import Split
from sparsight.progress import say
from sparsight.sae.base import SAE
from sparsight.sae.metrics.geometry import random_rows, redundancy
from sparsight.sae.metrics.measure import measure
from sparsight.sae.residual import Moments, ReSAE, by_group
from sparsight.sae.splice import Clean, Replacement, spliced
from sparsight.store import ActivationStore
from sparsight.work import Work, write_json


def evaluate(
    sae: SAE, backbone: Backbone, train: ActivationStore, test: ActivationStore, train_labels: np.ndarray, split: Split,
    seed: int, work: Work, record: dict[str, Any],
) -> None:  # fmt: skip
    """Write ``metrics.json``, ``latents.parquet``, ``baselines.parquet`` and ``probing.parquet`` (docs/evaluation.md).

    They are what :func:`measure` finds; the first has :func:`spliced` too. Its modes are ``spliced`` and, as the
    floor, ``mean_instead``: the train mean in the activation's place.

    Args:
        train: store of the train split, which all that is fitted is fitted on.
        test: store of the test split.
        train_labels: int (N,), the classes of the images of the train split.
        split: the images of the test split.
        seed: of the baselines.
    """
    site = sae.about["site"]
    labels = {"train": train_labels, "test": split.labels}
    found = measure(sae, site, train, test, labels, len(split.classes), seed)
    modes = {"spliced": lambda _: _decoded(sae), "mean_instead": lambda _: _means(train, [site])}
    metrics = {**found.metrics, **spliced(backbone, split, [site], _positions(test, site, backbone), modes)}
    write_json(work.out / "metrics.json", {**metrics, "record": record})
    for name in ("latents", "baselines", "probing"):
        tables.write(work.out / f"{name}.parquet", getattr(found, name))
    say(_line(metrics))


def evaluate_chain(
    chain: ReSAE, backbone: Backbone, train: ActivationStore, test: ActivationStore, split: Split,
    work: Work, record: dict[str, Any],
) -> None:  # fmt: skip
    """Write ``<site>/metrics.json`` of every site, :func:`chain_metrics`, and ``metrics.json`` of the whole chain.

    The latter has means over the sites, and :func:`spliced` at all sites at once, with modes ``forced`` (every SAE sees
    clean activations, the reconstructions go through the maps), ``unchained`` (the maps take the clean activation),
    ``online`` (one pass, each SAE sees what arrives) and ``mean_instead``.
    """
    by_site = chain_metrics(chain, train, test)
    for site, metrics in by_site.items():
        (work.out / site).mkdir(exist_ok=True)
        write_json(work.out / site / "metrics.json", {**metrics, "record": record})
        say(f"{site}: {_line(metrics)}")

    def forced(clean: Clean, chained: bool) -> Replacement:
        rebuilt = {
            group: chain.reconstruct({site: clean[m][group] for m, site in enumerate(chain.sites)}, group, chained)
            for group in clean[0]
        }
        return lambda m, group, h, before: rebuilt[group][chain.sites[m]]

    modes = {
        "forced": lambda clean: forced(clean, True),
        "unchained": lambda clean: forced(clean, False),
        "online": lambda _: lambda m, group, h, before: chain.replace(m, h, before, group),
        "mean_instead": lambda _: _means(train, chain.sites),
    }
    metrics = {"n": len(split)}
    averaged = ("fvu", "fvu_unchained", "fvu_residual", "fvu_affine", "redundancy", "redundancy_transported")
    for key in (*averaged, "redundancy_random"):
        if values := [one[key] for one in by_site.values() if key in one]:
            metrics[key] = float(np.mean(values))
    metrics |= spliced(backbone, split, chain.sites, _positions(test, chain.sites[0], backbone), modes)
    write_json(work.out / "metrics.json", {**metrics, "record": record})
    say(_line(metrics))


@torch.no_grad()
def chain_metrics(chain: ReSAE, train: ActivationStore, test: ActivationStore) -> dict[str, dict[str, float]]:
    """What a chain reconstructs on test, by site, and what each decoder has of the one before (:func:`redundancies`).

    ``fvu`` and ``fvu_unchained`` are of the activation, by the teacher-forced reconstruction through the maps and
    not; ``fvu_affine`` is what the map alone leaves. ``fvu_residual``, ``fvu_pca_k``, ``l0``, ``dead_test`` and
    ``dead_train`` are of the SAE on its own input, the residual.
    """
    tallies = {name: {site: _Tally(one) for site, one in chain.saes.items()} for name in ("train", "test")}
    activations = {site: Moments([site]) for site in chain.sites}
    errors = {site: dict.fromkeys(("fvu", "fvu_unchained", "fvu_affine"), 0.0) for site in chain.sites}
    for name, store in (("train", train), ("test", test)):
        for groups in by_group(store, chain.sites, next(iter(chain.saes.values())).W_dec.device):
            for group, rows in groups.items():
                seen = chain.residuals(rows, group)
                for site in chain.sites:
                    tallies[name][site].update(seen[site])
                if name == "train":
                    continue
                rebuilt = {
                    "fvu": chain.reconstruct(rows, group),
                    "fvu_unchained": chain.reconstruct(rows, group, chained=False),
                    "fvu_affine": {site: rows[site] - seen[site] for site in chain.sites},
                }
                for site in chain.sites:
                    activations[site].update({site: rows[site]})
                    for key, x_hat in rebuilt.items():
                        errors[site][key] += _squares(rows[site] - x_hat[site])
    metrics = {}
    for m, site in enumerate(chain.sites):
        own = _compare(tallies["train"][site], tallies["test"][site])
        own["fvu_residual"] = own.pop("fvu")
        variance = activations[site].n * float(activations[site].covariance(site, site)[0].trace())
        of_activations = {key: error / variance for key, error in errors[site].items() if m or key != "fvu_affine"}
        metrics[site] = {**own, **of_activations, **(redundancies(chain, m) if m else {})}
    return metrics


def redundancies(chain: ReSAE, m: int) -> dict[str, float]:
    """Decoder redundancy of sites m - 1 and m (:func:`redundancy`), of random rows of the same shape, and transported.

    The last is with the earlier rows taken along by the affine map, the mean over the token groups' maps; it is left
    out where there is no map to speak of (``affine: zero``).
    """
    later, earlier = (chain.saes[chain.sites[place]].W_dec for place in (m, m - 1))
    found = {"redundancy": redundancy(later, earlier)}
    found["redundancy_random"] = redundancy(*(random_rows(rows, place) for place, rows in enumerate((later, earlier))))
    maps = [pairs[m - 1][0] for pairs in chain.maps.values()]
    if any(A.any() for A in maps):
        each = [redundancy(later, earlier, A) for A in maps]
        found["redundancy_transported"] = {key: float(np.mean([one[key] for one in each])) for key in each[0]}
    return {name + (key != "mean") * f"_{key}": value for name, one in found.items() for key, value in one.items()}


class _Tally:
    """Sums over the rows of a split that an SAE sees."""

    def __init__(self, sae: SAE) -> None:
        self.sae, self.moments = sae, Moments(["x"])
        self.error, self.active = 0.0, 0
        self.fired = torch.zeros(sae.d_sae, dtype=torch.bool, device=sae.W_dec.device)

    def update(self, x_ND: Tensor) -> None:
        codes = self.sae.encode(x_ND)
        self.moments.update({"x": x_ND})
        self.error += _squares(x_ND - self.sae.decode(codes))
        self.active += int(codes.l0().sum())
        self.fired |= codes.fired()


def _compare(train: _Tally, test: _Tally) -> dict[str, float]:
    covariance, mean, _ = test.moments.covariance("x", "x")
    on_train, train_mean, _ = train.moments.covariance("x", "x")
    components = torch.linalg.eigh(on_train)[1][:, -test.sae.k :]
    about_train = covariance + torch.outer(mean - train_mean, mean - train_mean)
    left = about_train.trace() - (components * (about_train @ components)).sum()
    return {
        "n": test.moments.n,
        "fvu": test.error / test.moments.n / float(covariance.trace()),
        "fvu_pca_k": float(left / covariance.trace()),
        "l0": test.active / test.moments.n,
        "dead_test": int((~test.fired).sum()),
        "dead_train": int((~train.fired).sum()),
    }


def _line(metrics: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value if isinstance(value, str) else f'{value:.4g}'}" for name, value in metrics.items())


def _squares(error_ND: Tensor) -> float:
    return float(error_ND.double().square().sum())


def _positions(store: ActivationStore, site: str, backbone: Backbone) -> dict[str, list[int]]:
    """Where in the model the stored tokens stand, by group; nothing for ``mean`` and ``embedding``, no tokens."""
    patches = list(range(*backbone.patch_positions))
    kinds = {"cls": backbone.class_positions, "registers": backbone.register_positions, "patches": patches}
    groups = store.token_groups(site)
    return {group: kinds[group][: len(at)] for group, at in groups.items() if group in kinds}


def _decoded(sae: SAE) -> Replacement:
    return lambda m, group, h, before: sae(h)


def _means(store: ActivationStore, sites: list[str]) -> Replacement:
    """The mean of the stored activations in place of every one."""
    means = [torch.tensor(store.manifest["sites"][site]["mean"]) for site in sites]
    return lambda m, group, h, before: means[m].to(h).expand_as(h)
