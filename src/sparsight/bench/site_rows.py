"""The rows of a stored split at a site, window by window, with its embeddings.

Shapes: I images, T tokens, D width (d_in), E width of the embedding.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from sparsight.activations.store import ActivationStore
from sparsight.common.progress import followed
from sparsight.common.slices import row_slices
from sparsight.common.tokens import EMBEDDING
from sparsight.sae.inputs import SaeInputs

_ENTRIES = 2**25
"""Largest number of entries of dense codes at a time."""


class SiteRows:
    """A split's rows at the site, with its embeddings.

    Args:
        store: the split's activations.
        site: the site.
        tokens: the tokens that the SAE reads.
        device: device of the rows.
        width: the largest number of features, which decides how many images are read at a time.
    """

    def __init__(self, store: ActivationStore, site: str, tokens: str, device: torch.device, width: int) -> None:
        self._inputs = SaeInputs(store, site, device, tokens=tokens)
        self._embedding = store.rows(EMBEDDING)
        self.tokens, self.n_images = self._inputs.tokens, len(self._embedding)
        self._at_once = max(1, min(8192, _ENTRIES // width) // self.tokens)

    def head(self, rows: int) -> Tensor:
        """About the first ``rows`` rows, of whole images, (B, D)."""
        return self._inputs.images(slice(0, min(self.n_images, max(1, rows // self.tokens))))

    def windows(self) -> Iterator[tuple[slice, Tensor, np.ndarray]]:
        """All images in order: their numbers, their rows (I T, D), and the mean of each image's, float64 (I, D)."""
        windows = list(row_slices(self.n_images, self._at_once))
        for window in followed(windows, len(windows), "windows"):
            x = self._inputs.images(window)
            yield window, x, x.unflatten(0, (-1, self.tokens)).double().mean(dim=1).cpu().numpy()

    def embeddings(self, window: slice) -> np.ndarray:
        """Embeddings of some images, float64 (I, E)."""
        return self._embedding.images(window.start, window.stop).astype(np.float64)
