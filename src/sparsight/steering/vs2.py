"""VS2 (arXiv 2506.01247): amplify an image's own active latents. Controls show what the SAE adds.

With codes c = encode(x), v = decode(gamma c) - decode(c) = (gamma - 1) W_dec c, and x' = x + lambda v, scaled back to
the length of x. Only alpha = lambda (gamma - 1) matters, so there is one strength, alpha. Since W_dec c = x - b_dec +
eps with the SAE's error eps = x_hat - x, VS2 is x + alpha (x - b_dec) + alpha eps (Prop. 3.1). The first part
extrapolates away from the mean, the second is the SAE's error. The control ``mean-extrapolation`` is the first part
alone.

Shapes: R edited rows, D width (d_in), F latents (d_sae), K components, B images of S edited tokens each, n images of a
split.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sparsight.activations.store import Rows
from sparsight.common.seeds import derive_seed
from sparsight.sae.base import SAE
from sparsight.sae.moments import Moments
from sparsight.steering import stored, vectors
from sparsight.steering.edits import Edit, Edits, keep_norm, of_size
from sparsight.steering.intervention import Place

_ROWS = 8192


def direction(sae: SAE, x_RD: Tensor) -> Tensor:
    """W_dec c of each activation, (R, D): VS2's v for gamma = 2."""
    return sae.encode(x_RD).combine(sae.W_dec)


def sample_fvu(sae: SAE, x_BSD: Tensor, mean_D: Tensor) -> Tensor:
    """||x_hat - x||^2 / ||x - mean||^2 of every image, (B,) (section 4.3 of the paper).

    Of several tokens, both sums are over the image's tokens.
    """
    error_RD = (sae(x_BSD.flatten(0, 1)) - x_BSD.flatten(0, 1)).square()
    spread_RD = (x_BSD.flatten(0, 1) - mean_D).square()
    error_B, spread_B = (part.sum(dim=1).unflatten(0, x_BSD.shape[:2]).sum(dim=1) for part in (error_RD, spread_RD))
    return error_B / spread_B


@dataclass(frozen=True)
class Calibration:
    """What VS2 and its controls take from the train split, without its labels."""

    mean: Tensor
    """(D,): mean activation over the edited tokens of the train images."""
    components: Tensor
    """(K, D): the K = k principal components, as unit rows."""
    fvu: Tensor
    """(n,): FVU of every train image, sorted in rising order."""
    permutation: Tensor
    """int64 (F,): the latents in a random order."""

    @classmethod
    @torch.no_grad()
    def of(cls, sae: SAE, rows: Rows, seed: int) -> "Calibration":
        """Compute from the stored rows of the train split, in two passes."""
        site, device = sae.about["site"], sae.W_dec.device
        moments = Moments([site])
        for _, x_BSD in stored.images(rows, device, _ROWS):
            moments.update({site: x_BSD.float().flatten(0, 1)})
        covariance, mean, _ = moments.covariance(site, site)
        mean_D = mean.float()
        blocks = [sample_fvu(sae, x_BSD.float(), mean_D) for _, x_BSD in stored.images(rows, device, _ROWS)]
        generator = np.random.default_rng(derive_seed(seed, "permutation"))
        return cls(
            mean=mean_D,
            components=torch.linalg.eigh(covariance)[1][:, -sae.k :].T.float(),
            fvu=torch.cat(blocks).sort().values,
            permutation=torch.from_numpy(generator.permutation(sae.d_sae)).to(device),
        )

    @classmethod
    def load(cls, path: Path, device: torch.device, further: str | None = None) -> "Calibration":
        """Read the vectors of a section's first site, or of a further one, that the steering stage wrote."""
        return cls(**vectors.load(path, device, further))

    def threshold(self, quantile: float) -> float:
        """The FVU that the share ``quantile`` of the train images does not exceed."""
        return float(self.fvu[math.ceil(quantile * len(self.fvu)) - 1])


def edits(sae: SAE, found: Calibration) -> dict[str, Edit]:
    """VS2 (``vs2-pass`` if the SAE was trained with the PASS term) and its controls, by name.

    ``mean-extrapolation`` is x + alpha (x - mean). ``pca-extrapolation`` is the same along the K principal components,
    a reconstruction as sparse as the SAE's. ``random-latents`` puts a token's codes on randomly permuted latents, at
    the length of VS2's edit. All keep the length of x, as VS2 does.
    """

    def random(x_RD: Tensor) -> Tensor:
        shuffled_RD = sae.encode(x_RD).combine(sae.W_dec[found.permutation])
        return of_size(shuffled_RD, direction(sae, x_RD).norm(dim=1))

    def pca(x_RD: Tensor) -> Tensor:
        return (x_RD - found.mean) @ found.components.T @ found.components

    directions: dict[str, Callable[[Tensor], Tensor]] = {
        "vs2-pass" if sae.about["training"]["prototype_weight"] else "vs2": lambda x: direction(sae, x),
        "mean-extrapolation": lambda x: x - found.mean,
        "pca-extrapolation": pca,
        "random-latents": random,
    }

    def along(unit: Callable[[Tensor], Tensor]) -> Edit:
        return Edit(lambda batch, alpha: keep_norm(batch.x, alpha * unit(batch.x)))

    return {name: along(unit) for name, unit in directions.items()}


def edits_by_site(places: Sequence[Place], found: Sequence[Calibration]) -> Edits:
    """The edits at every site, under the names of the first: an SAE with PASS may steer beside one without."""
    by_site = [edits(at.sae, own) for at, own in zip(places, found, strict=True)]
    return [dict(zip(by_site[0], own.values(), strict=True)) for own in by_site]
