"""Effects of SAE latents on a head policy: of every latent on every head, and of the latents of a class.

Shapes: N images, D width (d_in), F latents (d_sae), H heads, C classes, P classes among the images' or some images, m
(M) latents amplified.
"""

import copy
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from sparsight.common.slices import row_slices
from sparsight.sae.base import SAE
from sparsight.steering.class_latents import ClassLatents
from sparsight.steering.edits import of_size

_ROWS = 4096


@dataclass(frozen=True)
class Edit:
    """An edit of what the policy reads of every image: a weighted sum of few decoder rows, mostly with weights 0."""

    weights_NM: Tensor
    latents_NM: Tensor
    W_dec: Tensor

    def times(self, factor: float) -> "Edit":
        """The edit with its size multiplied."""
        return replace(self, weights_NM=factor * self.weights_NM)

    @property
    def images(self) -> Tensor:
        """Bool (N,), the images that it changes."""
        return self.weights_NM.any(dim=1)

    def of(self, images: Tensor) -> Tensor:
        """The edits (P, D) of some images, int64 (P,)."""
        return torch.bmm(self.weights_NM[images][:, None], self.W_dec[self.latents_NM[images]]).squeeze(1)


class LatentEffects:
    """What strategies need from an SAE, the policy's last block and the train split.

    Args:
        sae: an SAE of what the policy reads at the last block's input.
        weight_HD: the policy's weights for the last block, W_head.
        found: the class latents on train, in the stream that the policy sees.
    """

    def __init__(self, sae: SAE, weight_HD: Tensor, found: ClassLatents) -> None:
        self.sae, self.found, self._weight_HD = sae, found, weight_HD
        self._encoded: tuple[Tensor, Tensor] | None = None
        self.push_HF = weight_HD @ sae.W_dec.detach().T
        """W_head W_dec: what each latent adds to each head's logit, per unit of its code."""
        self.alive = np.flatnonzero((found.mean_code > 0).cpu().numpy())
        """Latents that fire on train."""

    def encode(self, read_ND: Tensor) -> Tensor:
        """Codes (N, F). The latest result is cached, because many rows use the same activations."""
        if self._encoded is None or self._encoded[0] is not read_ND:
            parts = [self.sae.encode(read_ND[rows]).dense() for rows in row_slices(len(read_ND), _ROWS)]
            self._encoded = read_ND, torch.cat(parts)
        return self._encoded[1]

    def class_change(self, z_NF: Tensor, classes_N: Tensor, m: int) -> Tensor:
        """Change (N, H) of the head logits when the first m latents of each image's class are doubled."""
        latents_NM = self.found.latents[classes_N, :m]
        return (z_NF.gather(1, latents_NM)[:, :, None] * self.push_HF.T[latents_NM]).sum(dim=1)

    def class_edit(self, z_NF: Tensor, classes_N: Tensor, m: int) -> Edit:
        """The edit of what the policy reads that causes :meth:`class_change`, sum z_i d_i."""
        latents_NM = self.found.latents[classes_N, :m]
        return Edit(z_NF.gather(1, latents_NM), latents_NM, self.sae.W_dec.detach())

    def random_change(self, z_NF: Tensor, classes_N: Tensor, m: int) -> Tensor:
        """Change (N, H) of the head logits by m random latents of the class, with an edit of the same size.

        A random latent is seldom active on a given image, so amplifying its code would change almost nothing. The edit
        is therefore the latents' mean activation on train, scaled to the length of :meth:`class_edit`.
        """
        classes_P, place_N = classes_N.unique(return_inverse=True)
        random_PM = self.found.random_latents[classes_P, :m]
        direction_PD = (self.found.mean_code[random_PM][:, :, None] * self.sae.W_dec[random_PM]).sum(dim=1)
        unit_PD = of_size(direction_PD, torch.ones_like(direction_PD[:, 0]))
        return (unit_PD @ self._weight_HD.T)[place_N] * self.edit_size(z_NF, classes_N, m)[:, None]

    def edit_size(self, z_NF: Tensor, classes_N: Tensor, m: int) -> Tensor:
        """Length (N,) of the edit of :meth:`class_change`, || sum z_i d_i ||, by the Gram matrix of the d_i."""
        classes_P, place_N = classes_N.unique(return_inverse=True)
        rows_PMD = self.sae.W_dec[self.found.latents[classes_P, :m]]
        gram_PMM = rows_PMD @ rows_PMD.transpose(1, 2)
        z_NM = z_NF.gather(1, self.found.latents[classes_N, :m])
        square_N = (z_NM[:, None] @ gram_PMM[place_N] @ z_NM[:, :, None]).flatten()
        return square_N.clamp(min=0).sqrt()

    def mean_change(self, m: int) -> Tensor:
        """Mean of :meth:`class_change` over each class's train images, (C, H)."""
        latents_CM = self.found.latents[:, :m]
        return (self.found.mean_activation.gather(1, latents_CM)[:, :, None] * self.push_HF.T[latents_CM]).sum(dim=1)

    def against_head(self, head: int) -> Tensor:
        """Latents by push times mean activation, beginning with the one that lowers this head's logit most."""
        return (self.push_HF[head] * self.found.mean_code).argsort(stable=True)


@torch.no_grad()
def scramble(sae: SAE, seed: int) -> SAE:
    """The SAE with random weights: decoder rows uniform on the sphere, the encoder their transpose.

    It keeps b_dec and its variant's own parameters, such as thresholds. Without the centre, every code would be that of
    the activations' large constant part.
    """
    random = copy.deepcopy(sae)
    rows_FD = torch.randn(sae.d_sae, sae.d_in, generator=torch.Generator().manual_seed(seed))
    random.W_dec.copy_(rows_FD)
    random.normalize_decoder()
    random.W_enc.copy_(random.W_dec.T)
    if hasattr(random, "b_enc"):  # gated and switch SAEs have none
        random.b_enc.zero_()
    return random
