"""The best feature of a method for each region: chosen on train, scored on test.

Shapes: N patches, P patches of an image, D width (d_in), F features.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sparsight.bench.localisation.candidates import Candidates
from sparsight.bench.localisation.moran import moran
from sparsight.bench.localisation.ranking import Ranking
from sparsight.bench.localisation.regions import UNKNOWN
from sparsight.sae.metrics.sparse_codes import Matrix

PURITY_K = 100
"""Patches that purity looks at."""


@dataclass(frozen=True)
class Part:
    """Patches of a split."""

    x: Tensor
    """Activations as stored, (N, D)."""
    regions: np.ndarray
    """Region of each patch, int (N,)."""
    grid: tuple[int, int]
    """Rows and columns of an image's patches."""

    @property
    def n_images(self) -> int:
        """Number of images."""
        return len(self.x) // (self.grid[0] * self.grid[1])

    def ranking(self, codes_NF: Matrix) -> Ranking:
        """The ranking of the patches that count."""
        known = self.regions != UNKNOWN
        return Ranking.of(codes_NF[known], self.regions[known])


@dataclass(frozen=True)
class Best:
    """The feature of largest average precision for a region on train."""

    region: int
    feature: int
    sign: int
    """-1 if its negative values are meant."""
    ap_train: float
    ap: float
    """Average precision on test."""
    purity: float
    """On test."""
    moran: float
    """Mean of Moran's I over the valid maps on test; NaN without one."""
    maps: int
    """Number of valid maps."""


@dataclass(frozen=True)
class Scored:
    """A method."""

    best: list[Best]
    """By region."""
    shuffled: list[Best]
    """The same with the features' values of test in random order over the patches: chance. Empty if not asked for."""
    moran: float
    """Mean of Moran's I over the features with enough valid maps; NaN without one."""


def score(
    candidates: Candidates, train: Part, test: Part, regions: Sequence[int], device: torch.device, least_maps: int,
    shuffle: int | None = None,
) -> Scored:  # fmt: skip
    """Choose on train and score on test.

    Args:
        candidates: the features of the method.
        train: patches on which features are chosen.
        test: patches on which they are scored.
        regions: numbers of the regions; each has patches in both.
        device: device of the encoders.
        least_maps: valid maps that a feature needs to count in the mean of Moran's I over features.
        shuffle: seed of the order for ``shuffled``; None leaves it out.
    """
    best: dict[int, tuple[float, int, int]] = {}
    for number, block in enumerate(candidates):
        ranking = train.ranking(block.encode(train.x, device))
        for region in regions:
            ap_F = ranking.average_precision(region)
            column = int(ap_F.argmax())
            if region not in best or ap_F[column] > best[region][0]:
                best[region] = float(ap_F[column]), number, column
    scored: dict[int, Best] = {}
    by_chance: dict[int, Best] = {}
    means = []
    for number, block in enumerate(candidates):
        codes = block.encode(test.x, device)
        maps = moran(codes, test.grid)
        means.append(maps.mean[maps.maps >= least_maps])
        chosen = {region: column for region, (_, place, column) in best.items() if place == number}
        if not chosen:
            continue
        names = {region: (*block.feature(column), best[region][0]) for region, column in chosen.items()}
        own = codes.tocsc()[:, list(chosen.values())].tocsr()
        scored |= _on_test(own, names, test)
        if shuffle is not None:
            by_chance |= _on_test(own[np.random.default_rng(shuffle).permutation(own.shape[0])], names, test)
    every = np.concatenate(means)
    return Scored(
        [scored[region] for region in regions],
        [by_chance[region] for region in regions if region in by_chance],
        float(every.mean()) if len(every) else float("nan"),
    )


def _on_test(codes_NR: Matrix, names: dict[int, tuple[int, int, float]], test: Part) -> dict[int, Best]:
    """Scores of a feature for each region, in the order of the columns."""
    ranking, maps = test.ranking(codes_NR), moran(codes_NR, test.grid)
    return {
        region: Best(
            region, feature, sign, ap_train, float(ranking.average_precision(region)[column]),
            float(ranking.purity(region, PURITY_K)[column]), float(maps.mean[column]), int(maps.maps[column]),
        )
        for column, (region, (feature, sign, ap_train)) in enumerate(names.items())
    }  # fmt: skip
