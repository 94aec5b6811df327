"""Class latents: the SAE latents that stand for a class, and the edits that amplify or clamp them.

The strategy is that of arXiv 2603.26743. The rankings are our choice, because the paper's is not public.

Shapes: B batch, N rows, D width (d_in), F latents (d_sae), C classes, M latents per class.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparsight.activations.store import Rows
from sparsight.common.slices import row_slices
from sparsight.sae.base import SAE

_ROWS = 4096
Ranking = Literal["mean-difference", "mean", "attribution"]


@dataclass(frozen=True)
class ClassLatents:
    """What steering needs from the train split, by class."""

    ranking: Ranking
    """What ``score`` is."""
    score: Tensor
    """(C, F) what the latents are ranked by, float32."""
    latents: Tensor
    """(C, M) int64: the class's latents, the highest ranked first."""
    random_latents: Tensor
    """(C, M) int64: random latents outside the class's own, among those that fire on train if there are enough."""
    mean_activation: Tensor
    """(C, F) mean code of the class's images."""
    class_mean: Tensor
    """(C, D) mean activation of the class's images."""
    mean: Tensor
    """(D,) mean activation of all images."""
    vectors: Tensor
    """(C, M, D) steering vectors: the m-th is the sum of mean z_i times W_dec_i over the class's first m latents."""

    def save(self, path: Path) -> None:
        """Write a safetensors file with these fields; ``ranking`` is in its metadata."""
        tensors = {name: value.contiguous() for name, value in vars(self).items() if isinstance(value, Tensor)}
        save_file(tensors, path, {"ranking": self.ranking})

    @classmethod
    def load(cls, path: Path, device: torch.device) -> "ClassLatents":
        """Read what :meth:`save` wrote."""
        with safe_open(path, "pt") as file:
            ranking = file.metadata()["ranking"]
        return cls(ranking, **load_file(path, device=str(device)))


@torch.no_grad()
def find(
    sae: SAE, rows: Rows | np.ndarray, labels: np.ndarray, n_classes: int, n_latents: int, seed: int,
    ranking: Ranking = "mean-difference", attribution_CF: Tensor | None = None,
) -> ClassLatents:  # fmt: skip
    """Rank the latents of every class on training activations.

    Args:
        rows: activations of the train split, one row per image.
        labels: int (N,), classes of the images.
        n_latents: M, at most half of F.
        seed: seed of the random latents.
        ranking: ``mean-difference``: mean activation in the class minus mean activation in the other classes;
            ``mean``: mean activation in the class; ``attribution``: ``attribution_CF``.
        attribution_CF: attribution of each class's logit to each latent (:func:`.intervention.attribution`), needed
            for this ranking only.
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
    other_mean_CF = (total_CF.sum(dim=0) - total_CF) / (len(labels) - count_C1)
    if ranking == "attribution":
        assert attribution_CF is not None
        score_CF = attribution_CF
    else:
        score_CF = (mean_CF - other_mean_CF if ranking == "mean-difference" else mean_CF).float()
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
        ranking=ranking,
        score=score_CF,
        latents=latents,
        random_latents=torch.from_numpy(np.stack(random)).to(device),
        mean_activation=mean_CF.float(),
        class_mean=(sum_CD / count_C1).float(),
        mean=(sum_CD.sum(dim=0) / len(labels)).float(),
        vectors=push_CMD.cpu().cumsum(dim=1),  # CUDA has no deterministic cumsum
    )


def class_edit(sae: SAE, codes_BF: Tensor, classes_B: Tensor, found: ClassLatents) -> Tensor:
    """The edit for factor 2, (B, D): sum over the class's latents of z_i W_dec_i.

    For factor gamma the edit is (gamma - 1) times this: x' = x + D(g z) - D(z), which keeps the SAE's error.
    """
    latents_BM = found.latents[classes_B]
    picked_BF = torch.zeros_like(codes_BF).scatter(1, latents_BM, codes_BF.gather(1, latents_BM))
    return picked_BF @ sae.W_dec


def clamp_edit(sae: SAE, codes_BF: Tensor, classes_B: Tensor, found: ClassLatents, factor: float) -> Tensor:
    """The edit x' - x, (B, D), that sets the class's latents to ``factor`` times their mean activation in the class.

    The image's own codes of these latents are replaced; factor 0 ablates them. Like :func:`class_edit`, the edit keeps
    the SAE's error.
    """
    latents_BM = found.latents[classes_B]
    wanted_BM = factor * found.mean_activation[classes_B].gather(1, latents_BM)
    return torch.einsum("bm,bmd->bd", wanted_BM - codes_BF.gather(1, latents_BM), sae.W_dec[latents_BM])
