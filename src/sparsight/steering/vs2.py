"""VS2 (arXiv 2506.01247): amplify an image's own active latents. Controls show what the SAE adds.

With codes c = encode(x), v = decode(gamma c) - decode(c) = (gamma - 1) W_dec c, and x' = x + lambda v, scaled back to
the length of x. Only alpha = lambda (gamma - 1) matters, so there is one strength, alpha. Since W_dec c = x - b_dec +
eps with the SAE's error eps = x_hat - x, VS2 is x + alpha (x - b_dec) + alpha eps (Prop. 3.1). The first part
extrapolates away from the mean, the second is the SAE's error. The control ``mean-extrapolation`` is the first part
alone.

Shapes: B batch, D width (d_in), F latents (d_sae), K components, n images.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsight.activations.store import ActivationStore
from sparsight.common.seeds import derive_seed
from sparsight.sae.base import SAE
from sparsight.sae.moments import Moments, by_group
from sparsight.steering.edits import Edit, keep_norm, of_size


def direction(sae: SAE, x_BD: Tensor) -> Tensor:
    """W_dec c of each activation, (B, D): VS2's v for gamma = 2."""
    return sae.encode(x_BD).combine(sae.W_dec)


def sample_fvu(sae: SAE, x_BD: Tensor, mean_D: Tensor) -> Tensor:
    """||x_hat - x||^2 / ||x - mean||^2 of every activation, (B,) (section 4.3 of the paper)."""
    return (sae(x_BD) - x_BD).square().sum(dim=1) / (x_BD - mean_D).square().sum(dim=1)


@dataclass(frozen=True)
class Calibration:
    """What VS2 and its controls take from the train split, without its labels."""

    mean: Tensor
    """(D,): mean activation of the train images."""
    components: Tensor
    """(K, D): the K = k principal components, as unit rows."""
    fvu: Tensor
    """(n,): FVU of every train image, sorted in rising order."""
    permutation: Tensor
    """int64 (F,): the latents in a random order."""

    @classmethod
    @torch.no_grad()
    def of(cls, sae: SAE, store: ActivationStore, seed: int) -> "Calibration":
        """Compute from the stored train split, in two passes."""
        site, tokens, device = sae.about["site"], sae.about["tokens"], sae.W_dec.device
        moments = Moments([site])
        for groups in by_group(store, [site], device, tokens=tokens):
            moments.update(groups["cls"])
        covariance, mean, _ = moments.covariance(site, site)
        mean_D = mean.float()
        rows = by_group(store, [site], device, tokens=tokens)
        blocks = [sample_fvu(sae, groups["cls"][site], mean_D) for groups in rows]
        generator = np.random.default_rng(derive_seed(seed, "permutation"))
        return cls(
            mean=mean_D,
            components=torch.linalg.eigh(covariance)[1][:, -sae.k :].T.float(),
            fvu=torch.cat(blocks).sort().values,
            permutation=torch.from_numpy(generator.permutation(sae.d_sae)).to(device),
        )

    def save(self, path: Path) -> None:
        """Write a safetensors file with these fields."""
        save_file({name: value.contiguous() for name, value in vars(self).items()}, path)

    @classmethod
    def load(cls, path: Path, device: torch.device) -> "Calibration":
        """Read what :meth:`save` wrote."""
        return cls(**load_file(path, device=str(device)))

    def threshold(self, quantile: float) -> float:
        """The FVU that the share ``quantile`` of the train images does not exceed."""
        return float(self.fvu[math.ceil(quantile * len(self.fvu)) - 1])


def edits(sae: SAE, found: Calibration) -> dict[str, Edit]:
    """VS2 (``vs2-pass`` if the SAE was trained with the PASS term) and its controls, by name.

    ``mean-extrapolation`` is x + alpha (x - mean). ``pca-extrapolation`` is the same along the K principal components,
    a reconstruction as sparse as the SAE's. ``random-latents`` puts the image's codes on randomly permuted latents, at
    the length of VS2's edit. All keep the length of x, as VS2 does.
    """

    def random(x_BD: Tensor) -> Tensor:
        shuffled_BD = sae.encode(x_BD).combine(sae.W_dec[found.permutation])
        return of_size(shuffled_BD, direction(sae, x_BD).norm(dim=1))

    def pca(x_BD: Tensor) -> Tensor:
        return (x_BD - found.mean) @ found.components.T @ found.components

    directions: dict[str, Callable[[Tensor], Tensor]] = {
        "vs2-pass" if sae.about["training"]["prototype_weight"] else "vs2": lambda x: direction(sae, x),
        "mean-extrapolation": lambda x: x - found.mean,
        "pca-extrapolation": pca,
        "random-latents": random,
    }

    def along(unit: Callable[[Tensor], Tensor]) -> Edit:
        return Edit(lambda batch, alpha: keep_norm(batch.x, alpha * unit(batch.x)))

    return {name: along(unit) for name, unit in directions.items()}
