"""Per-class latents: which SAE latents stand for a class, and the edits that amplify them.

The strategy of arXiv 2603.26743; the rankings are our choice, the paper's is not public.

Shapes: B batch, N rows, D width (d_in), F latents (d_sae), C classes, M latents per class.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsight.activations.store import Rows
from sparsight.common.slices import row_slices
from sparsight.sae.base import SAE

_ROWS = 4096


@dataclass(frozen=True)
class ClassLatents:
    """What steering needs to know of the train split, class by class."""

    latents: Tensor
    """(C, M) int64: the class's latents, the highest ranked first."""
    random_latents: Tensor
    """(C, M) int64: latents drawn at random among those that fire on train and are not in ``latents``."""
    mean_activation: Tensor
    """(C, F) mean code of the class's images."""
    class_mean: Tensor
    """(C, D) mean activation of the class's images."""
    mean: Tensor
    """(D,) mean activation of all images."""
    vectors: Tensor
    """(C, M, D) steering vectors: the mean push of the first m latents of a class, sum of z_i W_dec_i."""

    def save(self, path: Path) -> None:
        """Write a safetensors file with these fields."""
        save_file({name: value.contiguous() for name, value in vars(self).items()}, path)

    @classmethod
    def load(cls, path: Path, device: torch.device) -> "ClassLatents":
        """Read what :meth:`save` wrote."""
        return cls(**load_file(path, device=str(device)))


@torch.no_grad()
def find(
    sae: SAE, rows: Rows | np.ndarray, labels: np.ndarray, n_classes: int, n_latents: int, seed: int,
    ranking: Literal["mean-difference", "mean"] | Tensor = "mean-difference",
) -> ClassLatents:  # fmt: skip
    """Rank the latents of every class on training activations.

    Args:
        rows: activations of the train split, one row an image.
        labels: (N,) int.
        n_latents: M, at most half of F.
        seed: of the random latents.
        ranking: ``mean-difference``: mean activation in the class minus mean activation elsewhere; ``mean``: the first
            of the two alone; or the scores themselves, (C, F).
    """
    device = sae.W_dec.device
    total_CF = torch.zeros(n_classes, sae.d_sae, dtype=torch.float64, device=device)
    sum_CD = torch.zeros(n_classes, sae.d_in, dtype=torch.float64, device=device)
    for window in row_slices(len(rows), _ROWS):
        x_BD = torch.from_numpy(rows[window]).to(device)
        onehot_CB = torch.from_numpy(labels[window] == np.arange(n_classes)[:, None]).to(device).double()
        total_CF += onehot_CB @ sae.encode(x_BD).dense().double()
        sum_CD += onehot_CB @ x_BD.double()
    count_C1 = torch.from_numpy(np.bincount(labels, minlength=n_classes)).to(device)[:, None]
    mean_CF = total_CF / count_C1
    elsewhere_CF = (total_CF.sum(dim=0) - total_CF) / (len(labels) - count_C1)
    if isinstance(ranking, Tensor):
        score_CF = ranking
    else:
        score_CF = mean_CF - elsewhere_CF if ranking == "mean-difference" else mean_CF
    latents = score_CF.argsort(dim=1, descending=True, stable=True)[:, :n_latents]
    generator = np.random.default_rng(seed)
    alive = np.flatnonzero(total_CF.sum(dim=0).cpu().numpy() > 0)
    every = np.arange(sae.d_sae)
    random = []
    for own in latents.cpu().numpy():
        others = np.setdiff1d(alive, own)
        pool = others if len(others) >= n_latents else np.setdiff1d(every, own)
        random.append(generator.choice(pool, n_latents, replace=False))
    push_CMD = mean_CF.gather(1, latents).float()[:, :, None] * sae.W_dec[latents]
    return ClassLatents(
        latents=latents,
        random_latents=torch.from_numpy(np.stack(random)).to(device),
        mean_activation=mean_CF.float(),
        class_mean=(sum_CD / count_C1).float(),
        mean=(sum_CD.sum(dim=0) / len(labels)).float(),
        vectors=push_CMD.cpu().cumsum(dim=1),  # CUDA has no deterministic cumsum
    )


def class_edit(sae: SAE, codes_BF: Tensor, classes_B: Tensor, found: ClassLatents) -> Tensor:
    """The edit of factor 2, (B, D): sum over the class's latents of z_i W_dec_i.

    Factor gamma adds (gamma - 1) times this: x' = x + D(g z) - D(z), which keeps the SAE's error.
    """
    latents_BM = found.latents[classes_B]
    picked_BF = torch.zeros_like(codes_BF).scatter(1, latents_BM, codes_BF.gather(1, latents_BM))
    return picked_BF @ sae.W_dec


def clamp_edit(sae: SAE, codes_BF: Tensor, classes_B: Tensor, found: ClassLatents, factor: float) -> Tensor:
    """Set the class's latents to ``factor`` times their mean activation in the class: x' - x, (B, D).

    The image's own codes there do not matter; factor 0 ablates. As :func:`class_edit` it keeps the SAE's error.
    """
    latents_BM = found.latents[classes_B]
    wanted_BM = factor * found.mean_activation[classes_B].gather(1, latents_BM)
    return torch.einsum("bm,bmd->bd", wanted_BM - codes_BF.gather(1, latents_BM), sae.W_dec[latents_BM])
