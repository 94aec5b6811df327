"""Inputs of an SAE, read from a store: the activations at its site, or their residuals in a chain.

Shapes: I images, T tokens of an image, D width (d_in).
"""

import torch
from torch import Tensor

from sparsight.activations.store import ActivationStore, Rows
from sparsight.sae.resae import ReSAE


class SaeInputs:
    """Inputs of one SAE: rows of whole images, in the order of the store.

    Args:
        store: a split's activations.
        site: the SAE's site.
        device: device of the returned rows.
        chain: the chain that the SAE belongs to, if any.
        tokens: the tokens that the SAE reads; None takes what the site stores.

    Raises:
        SparsightError: the store lacks the tokens, the site or, with a chain, the site before it.
    """

    def __init__(
        self, store: ActivationStore, site: str, device: torch.device, chain: ReSAE | None = None,
        tokens: str | None = None,
    ) -> None:  # fmt: skip
        self.rows, self.device = store.rows(site, tokens), device
        self.tokens = self.rows.tokens_per_image
        self.groups = store.token_groups(site, tokens)
        self._chain, self._place = chain, chain.sites.index(site) if chain else 0
        self._before = store.rows(chain.sites[self._place - 1], tokens) if chain and self._place else None

    @property
    def residual(self) -> bool:
        """Whether the inputs are residuals of a map: in a chain, at every site but the first."""
        return self._before is not None

    def images(self, at: slice) -> Tensor:
        """Inputs of the SAE for some images, float32 (I * T, D)."""
        x = self.clean(at)
        if self._chain is None or self._before is None:
            return x
        before, out = (rows.unflatten(0, (-1, self.tokens)) for rows in (self._load(self._before, at), x))
        for group, tokens in self.groups.items():
            carried = self._chain.carry(self._place - 1, before[:, tokens].flatten(0, 1), group)
            out[:, tokens] -= carried.unflatten(0, (len(out), -1))
        return out.flatten(0, 1)

    def clean(self, at: slice) -> Tensor:
        """The activations of some images, float32 (I * T, D)."""
        return self._load(self.rows, at)

    def _load(self, rows: Rows, at: slice) -> Tensor:
        return torch.from_numpy(rows.images(at.start, at.stop)).to(self.device).float()
