"""VS2++ (arXiv 2506.01247, sections 3.3 and 4.2): steer from an image's negative neighbours to its positive ones.

The neighbours of an image are train images, found by the embeddings of any model. Neighbours with one label are the
positives, all others the negatives. The steering vector is v = W_dec^T (mean code of the positives - mean code of the
negatives). Every edited token of the image gets the same vector; the code of a neighbour is then the mean over its
tokens. As in VS2, x' = x + alpha v, scaled back to the length of x, with alpha = lambda (gamma - 1). The two
sections disagree on the label: it is the most frequent one among the neighbours (``vs2++-majority``, the default) or
the query's own (``vs2++-query``).

Shapes: Q queries, N neighbours of a query, B rows of the bank (train images), D width (d_in), C classes.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from sparsight.activations.store import ActivationStore, Rows
from sparsight.backbones.backbone import Backbone
from sparsight.common.errors import SparsightError
from sparsight.common.slices import row_slices
from sparsight.steering import retrieval
from sparsight.steering.edits import Batch, Edit, keep_norm, of_size
from sparsight.steering.intervention import Place
from sparsight.steering.nearest_neighbours import Neighbours, nearest

_ROWS = 4096
_LABELS = ("predicted", "oracle")

_Sides = dict[str, tuple[Tensor, Tensor]]
"""By kind of label, which neighbours are positives, bool (Q, N), for ``vs2++-majority`` and ``vs2++-query``."""


class NeighbourSteering:
    """The nearest train images of every image of a split, and the edits computed from them.

    Args:
        n: neighbours per image (the paper's N = 50).
        places: where it steers; the codes of the SAEs there are compared.
        backbone: the steered model.
        stores: stores of the steered model by split, with the sites and ``embedding``.
        finder: stores by split of the model whose ``embedding`` finds the neighbours.
        labels: true classes by split, int (n,), for rows with ``oracle`` labels; if an image has none (-1), there are
            no such rows.
        seeds: for each place, the seed of the permutation for ``random-latents``.

    Raises:
        SparsightError: a store without an embedding or with other images, or more neighbours than train images.
    """

    def __init__(
        self, n: int, places: Sequence[Place], backbone: Backbone, stores: Mapping[str, ActivationStore],
        finder: Mapping[str, ActivationStore], labels: Mapping[str, np.ndarray], seeds: Sequence[int],
    ) -> None:  # fmt: skip
        self.n, self.places, self.backbone = n, places, backbone
        self.stores, self.finder = stores, finder
        self.device = places[0].sae.W_dec.device
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
        self.permutations = [
            torch.from_numpy(np.random.default_rng(seed).permutation(place.sae.d_sae)).to(self.device)
            for place, seed in zip(places, seeds, strict=True)
        ]
        self.kinds = _LABELS if all((of_split >= 0).all() for of_split in labels.values()) else _LABELS[:1]
        self.found: dict[str, Neighbours] = {}

    def edits(self, split: str) -> list[dict[str, Edit]]:
        """VS2++ and its controls for the images of a split, by name, for every place.

        ``mean-difference`` is the mean activation of the positives minus that of the negatives, without an SAE.
        ``random-latents`` puts the codes on randomly permuted latents. Both have the length of ``vs2++-majority``.
        ``retrieval`` and ``embedding-steering`` are the paper's baselines in the space of the embedding.
        ``nearest-neighbours`` predicts the majority label and ignores the image's own logits.
        """
        neighbours = nearest(
            self.finder[split].rows("embedding"), self.finder["train"].rows("embedding"), self.n, self.device
        )
        self.found[split] = neighbours
        embeddings = self.stores["train"].rows("embedding")
        sides: _Sides = {}
        at_embedding, votes = {}, {}
        for labels in self.kinds:
            known = self.labels if labels == "oracle" else self.pseudo
            of_train, of_queries = known["train"], known[split]
            labels_QN = of_train[neighbours.indices]
            majority_QN, query_QN = retrieval.positives(labels_QN), retrieval.positives(labels_QN, of_queries)
            sides[labels] = majority_QN, query_QN
            at_embedding[labels] = retrieval.embedding_steering(embeddings, neighbours, majority_QN)
            votes[labels] = self._votes(labels_QN, majority_QN)
        queries_QD = torch.from_numpy(self.stores[split].rows("embedding")[:]).to(self.device).float()
        retrieved_QD = retrieval.weighted_retrieval(queries_QD, embeddings, neighbours, 0.0)

        def towards(batch: Batch, s: float) -> Tensor:  # a q + (1 - a) r with a = 1 / (1 + s)
            return (batch.x + s * retrieved_QD[batch.images]) / (1 + s)

        def shifted(batch: Batch, s: float) -> Tensor:
            return batch.x + s * at_embedding[batch.labels][batch.images]

        def voted(batch: Batch, s: float) -> Tensor:
            return votes[batch.labels][batch.images]

        elsewhere = {
            "retrieval": Edit(towards, at="embedding"),
            "embedding-steering": Edit(shifted, self.kinds, at="embedding"),
            "nearest-neighbours": Edit(voted, self.kinds, at="logits", strength=1.0),
        }
        first, *others = (self._at_site(m, neighbours, sides) for m in range(len(self.places)))
        return [first | elsewhere, *others]

    def _at_site(self, m: int, neighbours: Neighbours, sides: _Sides) -> dict[str, Edit]:
        """The methods that edit the stream at one place."""
        sae, vectors = self.places[m].sae, dict[tuple[str, str], Tensor]()
        rows = self.stores["train"].rows(self.places[m].site, self.places[m].tokens)
        for labels, (majority_QN, query_QN) in sides.items():
            contrast = partial(retrieval.contrast, sae, rows, neighbours)
            main = contrast(majority_QN)
            vectors["vs2++-majority", labels], size_Q = main, main.norm(dim=1)
            vectors["vs2++-query", labels] = contrast(query_QN)
            plain = retrieval.embedding_steering(rows, neighbours, majority_QN)
            vectors["mean-difference", labels] = of_size(plain, size_Q)
            shuffled = contrast(majority_QN, sae.W_dec[self.permutations[m]])
            vectors["random-latents", labels] = of_size(shuffled, size_Q)

        def along(method: str) -> Edit:
            return Edit(lambda b, s: keep_norm(b.x, s * b.by_row(vectors[method, b.labels])), self.kinds)

        return {method: along(method) for method, labels in vectors if labels == "predicted"}

    def tensors(self) -> list[dict[str, Tensor]]:
        """For every place ``permutation``; for the first also ``<split>.neighbours`` and ``.similarity``, (Q, N)."""
        searched: dict[str, Tensor] = {}
        for split, neighbours in self.found.items():
            searched |= {f"{split}.neighbours": neighbours.indices, f"{split}.similarity": neighbours.similarity}
        first, *others = ({"permutation": permutation} for permutation in self.permutations)
        return [first | searched, *others]

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
