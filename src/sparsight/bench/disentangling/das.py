"""Distributed alignment search (Geiger et al. 2024, arXiv 2303.02536): the trained subspace, which is the skyline.

Shapes: P pairs, B pairs of a batch, D width (d_in), K dimensions, E width of the embedding.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsight.bench.at_site import Embedder
from sparsight.bench.disentangling.readout import Readout
from sparsight.common.progress import followed
from sparsight.common.slices import row_slices
from sparsight.training import schedules

_SHARPNESS = 10.0
"""Scores of a readout lie near 0 and 1; so many times a score is the logit of its value."""


class Subspace(NamedTuple):
    """A subspace to be trained."""

    attribute: int
    """0 or 1, the attribute whose interchange it is for."""
    start_DK: Tensor
    """Orthonormal columns from which the training starts."""


def train_subspaces(
    model: Embedder, pairs_P2: np.ndarray, values_An: np.ndarray, readouts: Sequence[Readout],
    subspaces: Sequence[Subspace], batch_size: int, lr: float,
) -> list[Tensor]:  # fmt: skip
    """For each subspace orthonormal columns (D, K), whose interchange changes one attribute and keeps the other.

    Adam lowers the cross-entropy of the readouts of the edited embedding: of the attribute to the donor's value, of the
    other one to the base's. Each step makes the columns orthonormal by a QR decomposition. The model is frozen. All
    subspaces are trained on the same pairs, each as if alone.

    Args:
        model: the model, with the images of train.
        pairs_P2: base and donor of every step's pairs, in order.
        values_An: number of each train image's value, for both attributes.
        readouts: of both attributes.
        subspaces: what to train.
        batch_size: pairs per step.
        lr: the largest learning rate, which decays.
    """
    weights = [one.start_DK.clone().requires_grad_(True) for one in subspaces]
    optimizer = torch.optim.Adam(weights, lr)
    batches = list(row_slices(len(pairs_P2), batch_size))
    for number, batch in enumerate(followed(batches, len(batches), "steps"), 1):
        optimizer.param_groups[0]["lr"] = lr * schedules.linear_decay(number, len(batches))
        bases, donors = pairs_P2[batch].T
        stream = model.stream(bases)
        base_RD, donor_RD = model.rows(stream), model.rows(model.stream(donors))
        optimizer.zero_grad()
        for one, weight_DK in zip(subspaces, weights, strict=True):
            basis_DK = torch.linalg.qr(weight_DK).Q
            edited_RD = base_RD + (donor_RD - base_RD) @ basis_DK @ basis_DK.T
            embedding_BE = model.embedding(stream, edited_RD)
            loss = embedding_BE.new_zeros(())
            for place, readout in enumerate(readouts):
                wanted = torch.from_numpy(values_An[place, donors if place == one.attribute else bases])
                logits = _SHARPNESS * readout.scores(embedding_BE)
                loss = loss + F.cross_entropy(logits, wanted.to(logits.device))
            loss.backward()
        optimizer.step()
    return [torch.linalg.qr(weight_DK.detach()).Q for weight_DK in weights]
