"""An SAE as a head policy sees it: what every latent does to every head, and which latents stand for a class.

Shapes: N images, D width (d_in), F latents (d_sae), H heads, C classes, m latents amplified.
"""

import copy

import numpy as np
import torch
from torch import Tensor

from sparsight.common.slices import row_slices
from sparsight.sae.base import SAE
from sparsight.steering.edits import of_size

_ROWS = 4096


class LatentEffects:
    """An SAE, the policy's last block and the train split, reduced to what strategies need.

    Args:
        sae: reads the class token at the last block's input.
        weight_HD: the policy's weights of the last block, W_head.
        mean_CF: mean code of each class's train images.
        count_C: number of train images of each class.
        n_latents: the most that will be amplified.
        seed: of the random latents.
    """

    def __init__(
        self, sae: SAE, weight_HD: Tensor, mean_CF: Tensor, count_C: Tensor, n_latents: int, seed: int
    ) -> None:
        self.sae, self.mean_CF, self._weight_HD = sae, mean_CF, weight_HD
        self._encoded: tuple[Tensor, Tensor] | None = None
        self.push_HF = weight_HD @ sae.W_dec.T
        """W_head W_dec: what one unit of a latent adds to the logit of a head."""
        total_CF, count_C1 = mean_CF.double() * count_C[:, None], count_C[:, None]
        elsewhere_CF = (total_CF.sum(dim=0) - total_CF) / (count_C.sum() - count_C1).clamp(min=1)
        difference_CF = mean_CF.double() - elsewhere_CF
        self.ranked_CM = difference_CF.argsort(dim=1, descending=True, stable=True)[:, :n_latents]
        """Latents of each class: by mean activation in the class minus mean activation elsewhere."""
        self.alive = np.flatnonzero((mean_CF > 0).any(dim=0).cpu().numpy())
        """Latents that fire on train."""
        self.mean_F = (total_CF.sum(dim=0) / count_C.sum()).float()
        self.random_CM = torch.from_numpy(self._draw(n_latents, seed)).to(mean_CF.device)

    def _draw(self, n_latents: int, seed: int) -> np.ndarray:
        """(C, M) latents drawn outside the class's own, among those that fire if there are enough."""
        generator, drawn = np.random.default_rng(seed), []
        for own in self.ranked_CM.cpu().numpy():
            others = np.setdiff1d(self.alive, own)
            pool = others if len(others) >= n_latents else np.setdiff1d(np.arange(self.sae.d_sae), own)
            drawn.append(generator.choice(pool, n_latents, replace=False))
        return np.stack(drawn)

    def encode(self, cls_ND: Tensor) -> Tensor:
        """Codes (N, F); those of the last activations asked for are kept, because many rows ask for the same."""
        if self._encoded is None or self._encoded[0] is not cls_ND:
            parts = [self.sae.encode(cls_ND[rows]).dense() for rows in row_slices(len(cls_ND), _ROWS)]
            self._encoded = cls_ND, torch.cat(parts)
        return self._encoded[1]

    def class_change(self, z_NF: Tensor, classes_N: Tensor, m: int) -> Tensor:
        """Change (N, H) of the head logits when the first m latents of each image's class count double."""
        latents_NM = self.ranked_CM[classes_N, :m]
        return (z_NF.gather(1, latents_NM)[:, :, None] * self.push_HF.T[latents_NM]).sum(dim=1)

    def class_edit(self, z_NF: Tensor, classes_N: Tensor, m: int) -> Tensor:
        """The edit (N, D) of the class token behind :meth:`class_change`, sum z_i d_i."""
        latents_NM = self.ranked_CM[classes_N, :m]
        picked_NF = torch.zeros_like(z_NF).scatter(1, latents_NM, z_NF.gather(1, latents_NM))
        return picked_NF @ self.sae.W_dec

    def random_change(self, z_NF: Tensor, classes_N: Tensor, m: int) -> Tensor:
        """The same for m random latents of the class, with an edit of the same size, (N, H).

        A random latent is seldom active on a given image, so amplifying its own code would do next to nothing:
        the edit is the latents' mean activation on train, scaled to the length of the class's edit.
        """
        random_CM = self.random_CM[:, :m]
        direction_CD = (self.mean_F[random_CM][:, :, None] * self.sae.W_dec[random_CM]).sum(dim=1)
        unit_CD = of_size(direction_CD, torch.ones_like(direction_CD[:, 0]))
        return (unit_CD @ self._weight_HD.T)[classes_N] * self.edit_size(z_NF, classes_N, m)[:, None]

    def edit_size(self, z_NF: Tensor, classes_N: Tensor, m: int) -> Tensor:
        """Length (N,) of the edit of :meth:`class_change`, || sum z_i d_i ||, by the Gram matrix of the d_i."""
        own_CMD = self.sae.W_dec[self.ranked_CM[:, :m]]
        gram_CMM = own_CMD @ own_CMD.transpose(1, 2)
        z_NM = z_NF.gather(1, self.ranked_CM[classes_N, :m])
        square_N = (z_NM[:, None] @ gram_CMM[classes_N] @ z_NM[:, :, None]).flatten()
        return square_N.clamp(min=0).sqrt()

    def mean_change(self, m: int) -> Tensor:
        """Mean over each class's train images of :meth:`class_change`, (C, H)."""
        own_CM = self.ranked_CM[:, :m]
        return (self.mean_CF.gather(1, own_CM)[:, :, None] * self.push_HF.T[own_CM]).sum(dim=1)

    def against_head(self, head: int) -> Tensor:
        """Latents from the one that lowers this head's logit most on, by its push times its mean activation."""
        return (self.push_HF[head] * self.mean_F).argsort(stable=True)


@torch.no_grad()
def scramble(sae: SAE, seed: int) -> SAE:
    """The SAE with random weights: decoder rows uniform on the sphere, the encoder their transpose.

    It keeps what places and thresholds the codes (b_dec, and what its kind adds), because without the centre
    every code would be that of the activations' large constant part.
    """
    random = copy.deepcopy(sae)
    rows_FD = torch.randn(sae.d_sae, sae.d_in, generator=torch.Generator().manual_seed(seed))
    random.W_dec.copy_(rows_FD)
    random.normalize_decoder()
    random.W_enc.copy_(random.W_dec.T)
    random.b_enc.zero_()
    return random
