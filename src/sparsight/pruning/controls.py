"""Controls without an SAE: what they take from the train split, class by class.

Shapes: N images, H heads, C classes.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparsight.pruning.last_block import LastBlockInputs

THRESHOLD_SHARES = tuple(round(0.05 * k, 2) for k in range(21))
"""Strengths of ``class-threshold``: shares of heads that a class keeps on train."""


def static_shares(n_heads: int) -> tuple[float, ...]:
    """Strengths of ``class-static``: the shares of heads that a subset can keep."""
    return tuple(k / n_heads for k in range(n_heads + 1))


@dataclass(frozen=True)
class Controls:
    """Per class and, where there is a choice, per kind of label and strength.

    A class is fitted on the train images that the kind of label takes for it, so that every kind has the control
    that suits it best; on all of them if there are none.
    """

    shift_CH: Tensor
    """``logit-bias``: mean head logits of the class minus the mean over classes. What sets the class apart,
    amplified in logit space, where ``class-latents`` amplifies it in latent space."""
    offsets: dict[tuple[str, float], Tensor]
    """``class-threshold``: (C,), one number for all heads, with which the class keeps that share of them."""
    subsets: dict[tuple[str, float], np.ndarray]
    """``class-static``: (C,) codes, the subset of that size with which most of the class's images are right."""


def fit(train: LastBlockInputs, routes: dict[str, np.ndarray], n_classes: int) -> Controls:
    """Fit the controls.

    Args:
        train: the train split.
        routes: (N,) classes of its images, by kind of label.
        n_classes: C.
    """
    logits_NH = train.logits_NH.double()
    mean_CH = torch.stack([logits_NH[_rows(train.labels, c)].mean(dim=0) for c in range(n_classes)])
    offsets = {}
    for labels, route in routes.items():
        values = [logits_NH[_rows(route, c)].flatten().sort(descending=True).values for c in range(n_classes)]
        for share in THRESHOLD_SHARES:
            offsets[labels, share] = torch.stack([_offset(own, share) for own in values]).float()
    return Controls((mean_CH - mean_CH.mean(dim=0)).float(), offsets, _subsets(train, routes, n_classes))


def _rows(route: np.ndarray, c: int) -> np.ndarray:
    """The images of a class; all images where it has none."""
    rows = np.flatnonzero(route == c)
    return rows if len(rows) else np.arange(len(route))


def _offset(values: Tensor, share: float) -> Tensor:
    """The offset that lifts this share of the values, sorted from the largest down, above 0."""
    kept = round(share * len(values))
    above = values[kept - 1] if kept else values[0] + 2
    below = values[kept] if kept < len(values) else values[-1] - 2
    return -(above + below) / 2


def _subsets(
    train: LastBlockInputs, routes: dict[str, np.ndarray], n_classes: int
) -> dict[tuple[str, float], np.ndarray]:  # fmt: skip
    """Where masks are tabulated the best of all subsets of a size, else the heads with the largest mean logits."""
    H, subsets = train.n_heads, {}
    codes = np.arange(2**H, dtype=np.int32)
    for kept, share in enumerate(static_shares(H)):
        choices = codes[np.bitwise_count(codes) == kept]
        if train.tabulated:
            hits_MN = train.predict(np.repeat(choices[:, None], len(train), axis=1)) == train.labels
        for labels, route in routes.items():
            best = []
            for c in range(n_classes):
                rows = _rows(route, c)
                if train.tabulated:
                    best.append(choices[hits_MN[:, rows].sum(axis=1).argmax()])
                else:
                    order = train.logits_NH[rows].double().mean(dim=0).argsort(descending=True, stable=True)
                    best.append(sum(2 ** int(h) for h in order[:kept]))
            subsets[labels, share] = np.array(best, np.int32)
    return subsets
