"""Controls without an SAE, fitted on the train split by class.

Shapes: N images, H heads, C classes.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparsight.pruning.last_block import LastBlockInputs

THRESHOLD_SHARES = tuple(round(0.05 * k, 2) for k in range(21))
"""Strengths of ``class-threshold``: shares of the heads that a class keeps on train."""


def static_shares(n_heads: int) -> tuple[float, ...]:
    """Strengths of ``class-static``: the shares of the heads that a subset can keep."""
    return tuple(k / n_heads for k in range(n_heads + 1))


@dataclass(frozen=True)
class Controls:
    """Fitted controls per class; ``offsets`` and ``subsets`` by kind of label and strength.

    These two are fitted to a class on the train images that the kind of label assigns to it, so that every kind has
    its best control. A class without such images is fitted on all train images.
    """

    shift_CH: Tensor
    """``logit-bias``: mean head logits of the class minus the mean over classes. It amplifies in logit space what
    distinguishes the class; ``class-latents`` amplifies that in latent space."""
    offsets: dict[tuple[str, float], Tensor]
    """``class-threshold``: (C,), number to add to all head logits so that the class keeps that share of the heads."""
    subsets: dict[tuple[str, float], np.ndarray]
    """``class-static``: (C,) codes of the subset of that size that classifies most of the class's images correctly."""


def fit(train: LastBlockInputs, routes: dict[str, np.ndarray], n_classes: int) -> Controls:
    """Fit the controls.

    Args:
        train: inputs of the last block for the train split.
        routes: (N,) classes of the train images, by kind of label.
        n_classes: C.
    """
    logits_NH = train.logits_NH.double()
    mean_CH = torch.stack([logits_NH[_rows(train.labels, c)].mean(dim=0) for c in range(n_classes)])
    offsets = {}
    for labels, route in routes.items():
        values = [logits_NH[_rows(route, c)].flatten().sort(descending=True).values for c in range(n_classes)]
        for share in THRESHOLD_SHARES:
            offsets[labels, share] = torch.stack([_offset(class_logits, share) for class_logits in values]).float()
    return Controls((mean_CH - mean_CH.mean(dim=0)).float(), offsets, _subsets(train, routes, n_classes))


def _rows(route: np.ndarray, c: int) -> np.ndarray:
    """The images of a class; all images if it has none."""
    rows = np.flatnonzero(route == c)
    return rows if len(rows) else np.arange(len(route))


def _offset(values: Tensor, share: float) -> Tensor:
    """The offset that lifts this share of the values above 0. The values are sorted, largest first."""
    kept = round(share * len(values))
    above = values[kept - 1] if kept else values[0] + 2
    below = values[kept] if kept < len(values) else values[-1] - 2
    return -(above + below) / 2


def _subsets(
    train: LastBlockInputs, routes: dict[str, np.ndarray], n_classes: int
) -> dict[tuple[str, float], np.ndarray]:  # fmt: skip
    """The best subset of each size if masks are tabulated, else the heads with the largest mean logits."""
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
