"""The rows of a stored split, window by window, with labels and embeddings of their images.

Shapes: B rows of a window, I images of it, D width (d_in), E width of the embedding.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
from torch import Tensor

from sparsight.activations.store import ActivationStore
from sparsight.common.errors import SparsightError
from sparsight.common.progress import followed
from sparsight.common.slices import row_slices
from sparsight.sae.base import SAE
from sparsight.sae.inputs import SaeInputs
from sparsight.sae.metrics.monosemanticity import unit_rows
from sparsight.sae.resae import ReSAE

_ENTRIES = 2**25  # largest number of entries of dense codes at a time


@dataclasses.dataclass(frozen=True)
class Window:
    """Rows of whole images."""

    x: Tensor
    """Inputs of the SAE, float32 (B, D), on the device."""
    images: np.ndarray
    """Mean of ``x`` over the tokens of each image, float64 (I, D)."""
    embeddings: dict[str, np.ndarray]
    """Embeddings of the images, of unit length, float64 (I, E), by the key of the score that compares images by them:
    ``monosemanticity`` and, with a judge, ``monosemanticity_judge``."""
    labels: np.ndarray
    """Classes of the images, int (I,)."""


class SplitRows:
    """A split's rows at the site, with the labels and the embeddings of its images.

    With a chain, the rows are the inputs of its SAE at the site: the activations minus the map's prediction. A judge is
    the store of another backbone's embeddings of the same images.
    """

    def __init__(
        self, store: ActivationStore, site: str, labels: np.ndarray, like: SAE, chain: ReSAE | None = None,
        tokens: str | None = None, judge: ActivationStore | None = None,
    ) -> None:  # fmt: skip
        self._seen, self.labels = SaeInputs(store, site, like.W_dec.device, chain, tokens), labels
        self.tokens = self._seen.tokens
        self.embedding_site = "embedding" if "embedding" in store.sites else site
        self.embedding = store.rows(self.embedding_site)
        self._judge = None if judge is None else judge.rows("embedding")
        self.widths = {"monosemanticity": self.embedding.shape[1]}
        """Width E of the embeddings, by the key of their score."""
        if self._judge is not None:
            self.widths["monosemanticity_judge"] = self._judge.shape[1]
        self.of = f"{store.path}, site {site!r}"
        n_rows = len(self._seen.rows)
        if n_rows != len(labels) * self.tokens:
            raise SparsightError(
                f"{self.of}: {n_rows // self.tokens} images, but the manifest of images lists {len(labels)}; "
                "extract again"
            )
        if self._judge is not None and len(self._judge) != len(labels):
            raise SparsightError(
                f"{judge and judge.path}: {len(self._judge)} images, but the manifest of images lists {len(labels)}; "
                "extract again"
            )
        self._images = max(1, min(8192, _ENTRIES // like.d_sae) // self.tokens)

    def head(self, rows: int) -> Tensor:
        """About the first ``rows`` rows, of whole images, (B, D). Images are in random order."""
        return self._seen.images(slice(0, self._first(rows)))

    def windows(self, rows: int | None = None) -> Iterator[Window]:
        """All rows in order, or about the first ``rows``, of whole images."""
        n_images = len(self.labels) if rows is None else self._first(rows)
        windows = list(row_slices(n_images, self._images))
        for window in followed(windows, len(windows), "windows"):
            x = self._seen.images(window)
            images = self._means(x)
            if self.embedding_site == "embedding":
                embedding = self.embedding.images(window.start, window.stop)
            else:  # the activations, not the residuals, so that all chains compare images alike
                embedding = self._means(self._seen.clean(window)) if self._seen.residual else images
            embeddings = {"monosemanticity": unit_rows(embedding)}
            if self._judge is not None:
                embeddings["monosemanticity_judge"] = unit_rows(self._judge.images(window.start, window.stop))
            yield Window(x, images, embeddings, self.labels[window])

    def _first(self, rows: int) -> int:
        """The number of whole images in ``rows`` rows, at least one and at most all."""
        return min(len(self.labels), max(1, rows // self.tokens))

    def _means(self, x_BD: Tensor) -> np.ndarray:
        return np.asarray(x_BD.unflatten(0, (-1, self.tokens)).double().mean(dim=1).cpu().numpy())
