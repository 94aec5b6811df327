"""Attribution of class logits to features, the features' ablation, and curves of deletion and insertion.

Shapes: B images at a time, n images, R rows of B images, D width (d_in), C classes, P pairs (a feature on an image),
S steps, A ablated features of an image.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsight import config
from sparsight.bench.at_site import Classifier
from sparsight.bench.attribution.features import Active, active, steps_of
from sparsight.common.progress import followed
from sparsight.common.slices import row_slices
from sparsight.sae.metrics.baselines import Method

SAE, CONTROLS = "sae", ("random", "pca", "neurons")
ORDERS = ("random_order", "activation_order")
METHODS = (SAE, *ORDERS, *CONTROLS)
"""Curves: the SAE's latents by attribution, in random order and by activation; a control's features by attribution."""
DIRECTIONS = ("deletion", "insertion")
_PASSES, _ROWS = 256, 4096  # at most so many images, and edited rows, in a pass


@dataclass
class Found:
    """What is found for one SAE, batch by batch."""

    curves: dict[tuple[str, str], list[np.ndarray]] = field(default_factory=dict)
    """By direction and method, the probability of the class after each step, as a share of that of the untouched
    image, (B, S + 1)."""
    gradient: list[np.ndarray] = field(default_factory=list)
    """First-order effect of each ablated latent, (pairs,)."""
    ablation: list[np.ndarray] = field(default_factory=list)
    """What the logit loses without it, (pairs,)."""
    ablated_images: list[np.ndarray] = field(default_factory=list)
    """Numbers of the images of these pairs."""
    effects: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)
    """Latent, class of the image, and first-order effect of all pairs."""
    counts: list[np.ndarray] = field(default_factory=list)
    """Latents that are active on each image."""


@dataclass(frozen=True)
class _Batch:
    """Images, and what the untouched model says of them."""

    model: Classifier
    numbers: np.ndarray
    stream: Tensor
    x_RD: Tensor
    classes_B: Tensor
    logit_B: Tensor
    probability_B: Tensor
    gradient_RD: np.ndarray

    def after(self, rows_RSD: np.ndarray) -> Tensor:
        """Logits (B, S, C) with each of S sets of rows."""
        steps, width = rows_RSD.shape[1:]
        rows = torch.from_numpy(rows_RSD).to(self.x_RD).unflatten(0, (len(self.numbers), -1))
        stream = self.stream.repeat_interleave(steps, dim=0)
        with torch.no_grad():
            logits = self.model.logits(stream, rows.transpose(1, 2).reshape(-1, width))
        return logits.double().unflatten(0, (-1, steps))

    def shares(self, rows_RSD: np.ndarray) -> np.ndarray:
        """Probability of the class with each of S sets of rows, as a share of the untouched one, (B, S)."""
        probability_BSC = self.after(rows_RSD).softmax(dim=2)
        picked = probability_BSC.gather(2, self.classes_B[:, None, None].expand(-1, rows_RSD.shape[1], 1))[..., 0]
        return (picked / self.probability_B[:, None]).cpu().numpy()


def centred(logits: Tensor, classes_B: Tensor) -> Tensor:
    """The logit of each image's class minus the mean over all classes; logits (B, S, C) give (B, S).

    A constant that is added to all logits changes no probability, and should get no attribution.
    """
    places = classes_B[:, None, None].expand(-1, logits.shape[1], 1)
    return logits.gather(2, places)[..., 0] - logits.mean(dim=2)


def measure(
    model: Classifier, n_images: int, saes: Mapping[str, Mapping[str, Method]], section: config.Attribution, seed: int
) -> tuple[dict[str, Found], np.ndarray, np.ndarray]:
    """Curves, ablations and effects for the first ``n_images`` images.

    Args:
        model: the model with the images.
        n_images: number of images, n.
        saes: for each SAE, ``sae`` and the controls as methods.
        section: the numbers of steps, ablated latents and random orders.
        seed: seed of the random orders.

    Returns:
        What is found for each SAE, the predicted classes (n,), and their probabilities (n,).
    """
    found: dict[str, Found] = {name: Found() for name in saes}
    classes, probabilities = [], []
    passes = max(section.steps + 1, section.ablated)
    at_once = max(1, min(_PASSES, _ROWS // model.rows_per_image) // passes)
    windows = list(row_slices(n_images, at_once))
    for window in followed(windows, len(windows), "batches of images"):
        batch = _clean(model, np.arange(window.start, window.stop))
        classes.append(batch.classes_B.cpu().numpy())
        probabilities.append(batch.probability_B.cpu().numpy())
        encoded: dict[int, Active] = {}  # PCA and neurons are the same for all SAEs
        for name, methods in saes.items():
            for method in methods.values():
                if id(method) not in encoded:
                    encoded[id(method)] = active(method, batch.x_RD, len(batch.numbers))
            _add(found[name], batch, {key: encoded[id(method)] for key, method in methods.items()}, section, seed)
    return found, np.concatenate(classes), np.concatenate(probabilities)


def _clean(model: Classifier, numbers: np.ndarray) -> _Batch:
    stream = model.stream(numbers)
    x_RD = model.rows(stream).detach().requires_grad_(True)
    logits = model.logits(stream, x_RD)
    classes_B = logits.argmax(dim=1)
    logit_B = centred(logits[:, None], classes_B)[:, 0]
    (gradient_RD,) = torch.autograd.grad(logit_B.sum(), x_RD)
    double = logits.detach().double()
    probability_B = double.softmax(dim=1).gather(1, classes_B[:, None])[:, 0]
    return _Batch(
        model, numbers, stream, x_RD.detach(), classes_B, centred(double[:, None], classes_B)[:, 0], probability_B,
        gradient_RD.cpu().numpy(),
    )  # fmt: skip


def _add(found: Found, batch: _Batch, methods: Mapping[str, Active], section: config.Attribution, seed: int) -> None:
    latents = methods[SAE]
    counts_B = latents.counts
    effects_P = latents.effects(batch.gradient_RD)
    found.counts.append(counts_B)
    found.effects.append((latents.features, batch.classes_B.cpu().numpy()[latents.images], effects_P))
    _ablate(found, batch, latents, effects_P, section.ablated)
    curves = {SAE: _curves(batch, latents, effects_P, counts_B, section.steps)}
    random = [
        _curves(batch, latents, _random_scores(latents, batch.numbers, draw, seed), counts_B, section.steps)
        for draw in range(section.draws)
    ]
    curves["random_order"] = {key: np.mean([one[key] for one in random], axis=0) for key in DIRECTIONS}
    curves["activation_order"] = _curves(batch, latents, latents.sizes, counts_B, section.steps)
    for name in CONTROLS:
        some = methods[name].largest(counts_B)
        curves[name] = _curves(batch, some, some.effects(batch.gradient_RD), counts_B, section.steps)
    for name, both in curves.items():
        for direction, values in both.items():
            found.curves.setdefault((direction, name), []).append(values)


def _curves(
    batch: _Batch, some: Active, scores_P: np.ndarray, counts_B: np.ndarray, n_steps: int
) -> dict[str, np.ndarray]:
    """Both curves, (B, S + 1) each; ``counts_B`` features are removed in all, whatever the method."""
    steps_P = steps_of(some.ranks(scores_P), counts_B[some.images], n_steps)
    sums_RSD = some.sums(steps_P, n_steps).cumsum(axis=1)
    sums_RSD = np.concatenate([np.zeros_like(sums_RSD[:, :1]), sums_RSD], axis=1)
    x_R1D = batch.x_RD.cpu().numpy()[:, None]
    return {
        "deletion": batch.shares(x_R1D - sums_RSD),
        "insertion": batch.shares(some.method.offset + sums_RSD),
    }


def _random_scores(some: Active, numbers: np.ndarray, draw: int, seed: int) -> np.ndarray:
    """Random numbers (P,), which do not depend on how images are batched."""
    parts = [
        np.random.default_rng((seed, draw, int(number))).random(count)
        for number, count in zip(numbers, some.counts, strict=True)
    ]
    return np.concatenate(parts)


def _ablate(found: Found, batch: _Batch, latents: Active, effects_P: np.ndarray, most: int) -> None:
    """Set each of the latents of the largest effects to zero, one at a time."""
    ranks_P = latents.ranks(np.abs(effects_P))
    chosen_P = ranks_P < most
    without_RAD = batch.x_RD.cpu().numpy()[:, None] - latents.sums(np.where(chosen_P, ranks_P, -1), most)
    logit_BA = centred(batch.after(without_RAD), batch.classes_B)
    lost_BA = (batch.logit_B[:, None] - logit_BA).cpu().numpy()
    images, ranks = latents.images[chosen_P], ranks_P[chosen_P]
    found.gradient.append(effects_P[chosen_P])
    found.ablation.append(lost_BA[images, ranks])
    found.ablated_images.append(batch.numbers[images])


def areas(curves_nS: np.ndarray) -> np.ndarray:
    """Area under each curve over the share of the features from 0 to 1, by the trapezoid rule, (n,)."""
    inner = curves_nS[:, 1:-1].sum(axis=1)
    return np.asarray((inner + (curves_nS[:, 0] + curves_nS[:, -1]) / 2) / (curves_nS.shape[1] - 1))


def joined(found: Found) -> dict[tuple[str, str], Any]:
    """All curves, (n, S + 1), by direction and method."""
    return {key: np.concatenate(parts) for key, parts in found.curves.items()}
