"""Distributed alignment search (Geiger et al. 2024, arXiv 2303.02536): the trained subspace, which is the skyline.

Shapes: P pairs, B pairs of a batch, D width (d_in), K dimensions, E width of the embedding.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsight.common.progress import followed
from sparsight.common.slices import row_slices
from sparsight.disentangling.model import Model, Readout

_SHARPNESS = 10.0
"""Scores of a readout lie near 0 and 1; so many times a score is the logit of its value."""


def train_subspace(
    model: Model, pairs_P2: np.ndarray, values_An: np.ndarray, readouts: Sequence[Readout], attribute: int,
    dimensions: int, batch_size: int, lr: float, seed: int,
) -> Tensor:  # fmt: skip
    """Orthonormal columns (D, K) of the subspace whose interchange changes one attribute and keeps the other.

    Adam lowers the cross-entropy of the readouts of the edited embedding: of the attribute to the donor's value, of the
    other one to the base's. Each step makes the columns orthonormal by a QR decomposition. The model is frozen.

    Args:
        model: the model, with the images of train.
        pairs_P2: base and donor of every step's pairs, in order.
        values_An: number of each train image's value, for both attributes.
        readouts: of both attributes.
        attribute: 0 or 1, the attribute that is interchanged.
        dimensions: K.
        batch_size: pairs per step.
        lr: learning rate.
        seed: seed of the first columns.
    """
    first = model.rows(model.stream(pairs_P2[:1, 0]))
    generator = torch.Generator().manual_seed(seed)
    start_DK = torch.randn(first.shape[1], dimensions, generator=generator) / first.shape[1] ** 0.5
    weight_DK = start_DK.to(first.device).requires_grad_(True)
    optimizer = torch.optim.Adam([weight_DK], lr)
    batches = list(row_slices(len(pairs_P2), batch_size))
    for batch in followed(batches, len(batches), "steps"):
        bases, donors = pairs_P2[batch].T
        stream = model.stream(bases)
        base_RD, donor_RD = model.rows(stream), model.rows(model.stream(donors))
        basis_DK = torch.linalg.qr(weight_DK).Q
        edited_RD = base_RD + (donor_RD - base_RD) @ basis_DK @ basis_DK.T
        embedding_BE = model.embedding(stream, edited_RD)
        loss = embedding_BE.new_zeros(())
        for place, readout in enumerate(readouts):
            wanted = torch.from_numpy(values_An[place, donors if place == attribute else bases])
            logits = _SHARPNESS * readout.scores(embedding_BE)
            loss = loss + F.cross_entropy(logits, wanted.to(logits.device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return torch.linalg.qr(weight_DK.detach()).Q
