"""The frozen model from a site on, as interchanges and removals of features need it.

Shapes: B images, T tokens, R edited rows, D width (d_in), E width of the embedding, C classes.
"""

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sparsight.activations.store import ActivationStore
from sparsight.backbones.backbone import Backbone
from sparsight.images.split import Pixels, Split
from sparsight.steering.intervention import Place


class Model(Protocol):
    """What is needed of a model and the images of a split (:class:`AtSite`)."""

    rows_per_image: int

    def stream(self, images: np.ndarray) -> Tensor:
        """The stream at the site for the images of these numbers, (B, ...)."""

    def rows(self, stream: Tensor) -> Tensor:
        """The rows of the stream that are edited, (R, D)."""


class Embedder(Model, Protocol):
    """A model that is asked for embeddings."""

    def embedding(self, stream: Tensor, rows_RD: Tensor) -> Tensor:
        """The embedding (B, E) that the rest of the model makes of the stream with edited rows."""


class Classifier(Model, Protocol):
    """A model that is asked for classes."""

    def logits(self, stream: Tensor, rows_RD: Tensor) -> Tensor:
        """Class logits (B, C) of the stream with edited rows."""


class AtSite:
    """A Vision Transformer from a site on.

    The stream of all tokens is read from the store if the site stores it; else the blocks before the site run.

    Args:
        backbone: the model; its weights get no gradients.
        where: the tokens of the residual stream that are edited.
        split: the images.
        store: their activations.
    """

    def __init__(self, backbone: Backbone, where: Place, split: Split, store: ActivationStore) -> None:
        self._backbone, self._where = backbone.requires_grad_(False), where
        self.rows_per_image = where.n_tokens
        self._stored = store.rows(where.site) if store.tokens_of(where.site) == "all" else None
        self._pixels = None if self._stored else Pixels(split, backbone.preprocess, backbone.decoding_threads)

    @torch.no_grad()
    def stream(self, images: np.ndarray) -> Tensor:
        """(B, T, D)."""
        if self._stored is not None:
            n_tokens = self._stored.tokens_per_image
            rows = self._stored[(images[:, None] * n_tokens + np.arange(n_tokens)).ravel()]
            return torch.from_numpy(rows).to(self._backbone.device).float().unflatten(0, (-1, n_tokens))
        assert self._pixels is not None
        x_BTD = self._backbone.tokens(self._backbone.normalize(self._pixels[images]))
        return self._backbone.run_blocks(x_BTD, 0, self._where.start)[0]

    def rows(self, stream: Tensor) -> Tensor:
        return self._where.read(stream)

    def embedding(self, stream: Tensor, rows_RD: Tensor) -> Tensor:
        return self._backbone.tower.pool(self._last(stream, rows_RD))

    def logits(self, stream: Tensor, rows_RD: Tensor) -> Tensor:
        return self._backbone.classify(self._last(stream, rows_RD))

    def _last(self, stream: Tensor, rows_RD: Tensor) -> Tensor:
        """The stream after the last block, (B, T, D)."""
        x_BTD = self._where.write(stream, rows_RD)
        return self._backbone.run_blocks(x_BTD, self._where.start, self._backbone.n_blocks)[0]
