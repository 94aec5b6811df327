"""VS2++ (arXiv 2506.01247, sections 3.3 and 4.2): steer from an image's negative neighbours to its positive ones.

The neighbours of an image are train images, found by the embeddings of any model. Neighbours with one label are the
positives, all others the negatives. The steering vector is v = W_dec^T (mean code of the positives - mean code of the
negatives). As in VS2, x' = x + alpha v, scaled back to the length of x, with alpha = lambda (gamma - 1). The two
sections disagree on the label: it is the most frequent one among the neighbours (``vs2++-majority``, the default) or
the query's own (``vs2++-query``).

Shapes: Q queries, N neighbours of a query, B rows of the bank (train images), D width (d_in), C classes.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from sparsight.activations.store import ActivationStore, Rows
from sparsight.backbones.backbone import Backbone
from sparsight.common.errors import SparsightError
from sparsight.common.slices import row_slices
from sparsight.sae.base import SAE
from sparsight.steering import retrieval
from sparsight.steering.edits import Batch, Edit, keep_norm, of_size
from sparsight.steering.nearest_neighbours import Neighbours, nearest

_ROWS = 4096
_LABELS = ("predicted", "oracle")


class NeighbourSteering:
    """The nearest train images of every image of a split, and the edits computed from them.

    Args:
        n: neighbours per image (the paper's N = 50).
        sae: the SAE whose codes are compared.
        backbone: the steered model.
        stores: stores of the steered model by split, with the SAE's site and ``embedding``.
        finder: stores by split of the model whose ``embedding`` finds the neighbours.
        labels: true classes by split, int (n,), for rows with ``oracle`` labels; if an image has none (-1), there are
            no such rows.
        seed: seed of the permutation for ``random-latents``.

    Raises:
        SparsightError: a store without an embedding or with other images, or more neighbours than train images.
    """

    def __init__(
        self, n: int, sae: SAE, backbone: Backbone, stores: Mapping[str, ActivationStore],
        finder: Mapping[str, ActivationStore], labels: Mapping[str, np.ndarray], seed: int,
    ) -> None:  # fmt: skip
        self.n, self.sae, self.backbone = n, sae, backbone
        self.stores, self.finder = stores, finder
        self.device = sae.W_dec.device
        for split, store in stores.items():
            for source in (store, finder[split]):
                if len(source.rows("embedding")) != len(labels[split]):
                    raise SparsightError(
                        f"steering: a store of the {split} split has {len(source.rows('embedding'))} images, the "
                        f"manifest {len(labels[split])}; run the activations stage again"
                    )
        self.labels = {
            split: torch.from_numpy(split_labels).long().to(self.device) for split, split_labels in labels.items()
        }
        self.pseudo = {split: self._predict(store.rows("embedding")) for split, store in stores.items()}
        generator = np.random.default_rng(seed)
        self.permutation = torch.from_numpy(generator.permutation(sae.d_sae)).to(self.device)
        self.kinds = _LABELS if all((of_split >= 0).all() for of_split in labels.values()) else _LABELS[:1]
        self.found: dict[str, Neighbours] = {}

    def edits(self, split: str) -> dict[str, Edit]:
        """VS2++ and its controls for the images of a split, by name.

        ``mean-difference`` is the mean activation of the positives minus that of the negatives, without an SAE.
        ``random-latents`` puts the codes on randomly permuted latents. Both have the length of ``vs2++-majority``.
        ``retrieval`` and ``embedding-steering`` are the paper's baselines in the space of the embedding.
        ``nearest-neighbours`` predicts the majority label and ignores the image's own logits.
        """
        neighbours = nearest(
            self.finder[split].rows("embedding"), self.finder["train"].rows("embedding"), self.n, self.device
        )
        self.found[split] = neighbours
        train = self.stores["train"]
        site_rows, embeddings = train.rows(self.sae.about["site"]), train.rows("embedding")
        at_site: dict[tuple[str, str], Tensor] = {}
        at_embedding, votes = {}, {}
        for labels in self.kinds:
            known = self.labels if labels == "oracle" else self.pseudo
            of_train, of_queries = known["train"], known[split]
            labels_QN = of_train[neighbours.indices]
            majority_QN, query_QN = retrieval.positives(labels_QN), retrieval.positives(labels_QN, of_queries)
            contrast = partial(retrieval.contrast, self.sae, site_rows, neighbours)
            main = contrast(majority_QN)
            at_site["vs2++-majority", labels], size_Q = main, main.norm(dim=1)
            at_site["vs2++-query", labels] = contrast(query_QN)
            plain = retrieval.embedding_steering(site_rows, neighbours, majority_QN)
            at_site["mean-difference", labels] = of_size(plain, size_Q)
            shuffled = contrast(majority_QN, self.sae.W_dec[self.permutation])
            at_site["random-latents", labels] = of_size(shuffled, size_Q)
            at_embedding[labels] = retrieval.embedding_steering(embeddings, neighbours, majority_QN)
            votes[labels] = self._votes(labels_QN, majority_QN)
        queries_QD = torch.from_numpy(self.stores[split].rows("embedding")[:]).to(self.device).float()
        retrieved_QD = retrieval.weighted_retrieval(queries_QD, embeddings, neighbours, 0.0)

        def along(method: str) -> Edit:
            return Edit(lambda b, s: keep_norm(b.x, s * at_site[method, b.labels][b.images]), self.kinds)

        def towards(batch: Batch, s: float) -> Tensor:  # a q + (1 - a) r with a = 1 / (1 + s)
            return (batch.x + s * retrieved_QD[batch.images]) / (1 + s)

        def shifted(batch: Batch, s: float) -> Tensor:
            return batch.x + s * at_embedding[batch.labels][batch.images]

        def voted(batch: Batch, s: float) -> Tensor:
            return votes[batch.labels][batch.images]

        return {
            **{method: along(method) for method, labels in at_site if labels == "predicted"},
            "retrieval": Edit(towards, at="embedding"),
            "embedding-steering": Edit(shifted, self.kinds, at="embedding"),
            "nearest-neighbours": Edit(voted, self.kinds, at="logits", strength=1.0),
        }

    def save(self, path: Path) -> None:
        """Write a safetensors file: ``<split>.neighbours`` (Q, N), ``<split>.similarity`` (Q, N), ``permutation``."""
        tensors = {"permutation": self.permutation}
        for split, neighbours in self.found.items():
            tensors |= {f"{split}.neighbours": neighbours.indices, f"{split}.similarity": neighbours.similarity}
        save_file({name: value.contiguous() for name, value in tensors.items()}, path)

    @torch.no_grad()
    def _predict(self, rows: Rows) -> Tensor:
        """Predictions of the unsteered model for stored embeddings, int64 (n,): the pseudo-labels."""
        blocks = (torch.from_numpy(rows[window]).to(self.device).float() for window in row_slices(len(rows), _ROWS))
        return torch.cat([self.backbone.classify_embedding(block).argmax(dim=1) for block in blocks])

    def _votes(self, labels_QN: Tensor, majority_QN: Tensor) -> Tensor:
        """Number of neighbours with each label, (Q, C). In a tie the label of :func:`retrieval.positives` wins."""
        assert self.backbone.n_classes is not None
        weights_QN = 1 + majority_QN / (2 * self.n)
        return torch.stack([((labels_QN == c) * weights_QN).sum(1) for c in range(self.backbone.n_classes)], dim=1)
