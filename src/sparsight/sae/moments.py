"""Means and covariances of activations at several sites, in one pass over a store.

Shapes: N rows, D width (d_in).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from sparsight.activations.store import ActivationStore
from sparsight.common.errors import SparsightError
from sparsight.common.progress import followed
from sparsight.common.slices import row_slices

Activations = Mapping[str, Tensor]


Affine = tuple[Tensor, Tensor]
"""A (D, D) and c (D,), float64."""

_ENOUGH = 2**18  # rows of a token group for an affine map; more would cost time and change little


class Moments:
    """Sums over the rows of one token group, for affine maps: float64, one pass, memory independent of N.

    Args:
        sites: the sites, in the order of the model.
        enough: number of rows from which on further batches are only counted; None adds all of them.
    """

    def __init__(self, sites: Sequence[str], enough: int | None = None) -> None:
        self.sites, self.enough = list(sites), enough
        self.n = 0
        """Rows in the sums."""
        self.seen = 0
        """Rows in the sums, and those that were only counted."""
        self._sums: dict[tuple[str, str], Tensor] = {}

    def update(self, rows: Activations) -> None:
        """Add rows (N, D) of every site, the same tokens in the same order.

        Raises:
            SparsightError: a site is missing, sites of different shapes, or rows that are not finite.
        """
        for site in self.sites:
            if site not in rows or rows[site].shape != rows[self.sites[0]].shape:
                raise SparsightError(f"ReSAE: site {site!r} needs rows of the shape of {self.sites[0]!r}")
        self.seen += len(rows[self.sites[0]])
        if self.enough is not None and self.n >= self.enough:
            return
        extended = {site: torch.nn.functional.pad(rows[site].double(), (0, 1), value=1.0) for site in self.sites}
        self.n += len(extended[self.sites[0]])
        for i, site in enumerate(self.sites):
            for later in self.sites[i : i + 2]:
                product = extended[site].T @ extended[later]  # the last row and column are sums
                if not product.isfinite().all():
                    raise SparsightError(f"ReSAE: NaN or infinite activation at site {site!r} or {later!r}")
                self._sums[site, later] = self._sums[site, later] + product if (site, later) in self._sums else product

    def spread(self, b: str, a: str | None = None, affine: Affine | None = None) -> tuple[Tensor, Tensor]:
        """Mean (D,) and mean squared length of h_b, or of its residual h_b - A h_a - c."""
        S_bb, mean, _ = self.covariance(b, b)
        variance = S_bb.trace()
        if a is not None and affine is not None:
            (A, c), (S_ab, mean_a, _), S_aa = affine, self.covariance(a, b), self.covariance(a, a)[0]
            mean = mean - A @ mean_a - c
            variance = variance - 2 * (A * S_ab.T).sum() + ((A @ S_aa) * A).sum()
        return mean, variance + mean.square().sum()

    def covariance(self, a: str, b: str) -> tuple[Tensor, Tensor, Tensor]:
        """Covariance (D, D) of a site with itself or with the next one, and both means (D,)."""
        if self.n == 0:
            raise SparsightError("ReSAE: no activations to fit the affine maps on")
        total = self._sums[a, b] / self.n
        mean_a, mean_b = total[:-1, -1], total[-1, :-1]
        return total[:-1, :-1] - torch.outer(mean_a, mean_b), mean_a, mean_b


def by_group(
    store: ActivationStore, sites: Sequence[str], device: torch.device, rows: int = 8192, tokens: str | None = None
) -> Iterator[dict[str, dict[str, Tensor]]]:
    """Batches of a store in order, of about ``rows`` rows each: {token group: {site: float32 (N, D)}}.

    ``tokens`` are those of every site; None takes what is stored.
    """
    groups, sources = store.token_groups(sites[0], tokens), {site: store.rows(site, tokens) for site in sites}
    n_tokens = sum(map(len, groups.values()))
    windows = list(row_slices(len(sources[sites[0]]) // n_tokens, max(1, rows // n_tokens)))
    for images in followed(windows, len(windows), "windows"):
        blocks = {
            site: torch.from_numpy(site_rows.images(images.start, images.stop)) for site, site_rows in sources.items()
        }
        x = {site: block.to(device).float().unflatten(0, (-1, n_tokens)) for site, block in blocks.items()}
        yield {group: {site: x[site][:, tokens].flatten(0, 1) for site in sites} for group, tokens in groups.items()}


def fit_moments(batches: Iterable[Mapping[str, Activations]], sites: Sequence[str]) -> dict[str, Moments]:
    """Moments of each token group, from one pass over batches of {token group: {site: rows (N, D)}}.

    The first 262,144 rows of a group, and the rest of their batch, are enough; a store's images are in random order.
    """
    moments: dict[str, Moments] = {}
    for batch in batches:
        for group, rows in batch.items():
            moments.setdefault(group, Moments(sites, _ENOUGH)).update(rows)
    return moments
