"""Class latents: the SAE latents that stand for a class, and the edits that amplify or clamp them.

The strategy is that of arXiv 2603.26743. The rankings are our choice, because the paper's is not public.

Shapes: R edited rows, N images, S stored tokens of an image, D width (d_in), F latents (d_sae), C classes, M latents of
a class.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from sparsight.activations.store import Rows
from sparsight.common.errors import SparsightError
from sparsight.sae.base import SAE
from sparsight.steering import stored, vectors

_ROWS = 4096


@dataclass(frozen=True)
class ClassLatents:
    """What steering needs from the train split, by class.

    An image of which several tokens are steered counts with the means of its codes and activations over these tokens.
    """

    latents: Tensor
    """(C, M) int64: the class's latents, the highest ranked first."""
    random_latents: Tensor
    """(C, M) int64: random latents outside the class's own, among those that fire on train if there are enough."""
    mean_activation: Tensor
    """(C, F) mean code of the class's images."""
    mean_code: Tensor
    """(F,) mean code of all images."""
    class_mean: Tensor
    """(C, D) mean activation of the class's images."""
    mean: Tensor
    """(D,) mean activation of all images."""
    vectors: Tensor
    """(C, M, D) steering vectors: the m-th is the sum of mean z_i times W_dec_i over the class's first m latents."""

    @classmethod
    def load(cls, path: Path, device: torch.device, further: str | None = None) -> "ClassLatents":
        """Read the vectors of a section's first site, or of a further one, that the steering stage wrote."""
        return cls(**vectors.load(path, device, further))


@torch.no_grad()
def find(
    sae: SAE, rows: Rows | np.ndarray, labels: np.ndarray, n_classes: int, n_latents: int, seed: int,
    ranking: Literal["mean-difference", "mean"] | Tensor = "mean-difference",
) -> ClassLatents:  # fmt: skip
    """Rank the latents of every class on training activations.

    Args:
        rows: activations of the train split, with one or several tokens of every image.
        labels: int (N,), classes of the images.
        n_latents: M, at most half of F.
        seed: seed of the random latents.
        ranking: ``mean-difference``: mean activation in the class minus mean activation in the other classes;
            ``mean``: mean activation in the class; or the scores themselves, (C, F).

    Raises:
        SparsightError: too few latents, which is known before only of SAEs that are trained here.
    """
    if 2 * n_latents > sae.d_sae:
        raise SparsightError(
            f"latents: {n_latents} latents and as many random others do not fit into d_sae = {sae.d_sae} of "
            f"{sae.about.get('name')!r}; lower latents"
        )
    device = sae.W_dec.device
    total_CF = torch.zeros(n_classes, sae.d_sae, dtype=torch.float64, device=device)
    sum_CD = torch.zeros(n_classes, sae.d_in, dtype=torch.float64, device=device)
    for window, x_NSD in stored.images(rows, device, _ROWS):
        onehot_CN = torch.from_numpy(labels[window] == np.arange(n_classes)[:, None]).to(device).double()
        z_NSF = sae.encode(x_NSD.flatten(0, 1)).dense().unflatten(0, x_NSD.shape[:2])
        total_CF += onehot_CN @ z_NSF.double().mean(dim=1)
        sum_CD += onehot_CN @ x_NSD.double().mean(dim=1)
    count_C1 = torch.from_numpy(np.bincount(labels, minlength=n_classes)).to(device)[:, None]
    mean_CF = total_CF / count_C1
    other_mean_CF = (total_CF.sum(dim=0) - total_CF) / (len(labels) - count_C1).clamp(min=1)  # 0 for a single class
    if isinstance(ranking, Tensor):
        score_CF = ranking
    else:
        score_CF = mean_CF - other_mean_CF if ranking == "mean-difference" else mean_CF
    latents = score_CF.argsort(dim=1, descending=True, stable=True)[:, :n_latents]
    generator = np.random.default_rng(seed)
    alive = np.flatnonzero(total_CF.sum(dim=0).cpu().numpy() > 0)
    all_latents = np.arange(sae.d_sae)
    random = []
    for ranked in latents.cpu().numpy():
        outside = np.setdiff1d(alive, ranked)
        pool = outside if len(outside) >= n_latents else np.setdiff1d(all_latents, ranked)
        random.append(generator.choice(pool, n_latents, replace=False))
    push_CMD = mean_CF.gather(1, latents).float()[:, :, None] * sae.W_dec[latents]
    return ClassLatents(
        latents=latents,
        random_latents=torch.from_numpy(np.stack(random)).to(device),
        mean_activation=mean_CF.float(),
        mean_code=(total_CF.sum(dim=0) / len(labels)).float(),
        class_mean=(sum_CD / count_C1).float(),
        mean=(sum_CD.sum(dim=0) / len(labels)).float(),
        vectors=push_CMD.cpu().cumsum(dim=1),  # CUDA has no deterministic cumsum
    )


def class_edit(sae: SAE, codes_RF: Tensor, classes_R: Tensor, found: ClassLatents) -> Tensor:
    """The edit for factor 2, (R, D): sum over the class's latents of z_i W_dec_i.

    For factor gamma the edit is (gamma - 1) times this: x' = x + D(g z) - D(z), which keeps the SAE's error.
    """
    latents_RM = found.latents[classes_R]
    picked_RF = torch.zeros_like(codes_RF).scatter(1, latents_RM, codes_RF.gather(1, latents_RM))
    return picked_RF @ sae.W_dec


def clamp_edit(sae: SAE, codes_RF: Tensor, classes_R: Tensor, found: ClassLatents, factor: float) -> Tensor:
    """The edit x' - x, (R, D), that sets the class's latents to ``factor`` times their mean activation in the class.

    The rows' own codes of these latents are replaced; factor 0 ablates them. Like :func:`class_edit`, the edit keeps
    the SAE's error.
    """
    latents_RM = found.latents[classes_R]
    wanted_RM = factor * found.mean_activation[classes_R].gather(1, latents_RM)
    return torch.einsum("rm,rmd->rd", wanted_RM - codes_RF.gather(1, latents_RM), sae.W_dec[latents_RM])
