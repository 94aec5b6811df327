"""How well features rank patches: average precision and purity, of all features at once, from sparse codes.

Shapes: N patches, F features, R regions, E entries of the codes that are not zero.
"""

from dataclasses import dataclass

import numpy as np

from sparsight.sae.metrics.sparse_codes import Matrix


@dataclass(frozen=True)
class Ranking:
    """The patches of every feature, largest value first; all patches where it is zero are one tie at its end.

    Attributes of the entries are in the order of their features, within a feature by rank.
    """

    regions_N: np.ndarray
    """The region of every patch, int (N,); 0 is none."""
    starts: np.ndarray
    """The first entry of every feature, and the end of the last, int (F + 1,)."""
    regions_E: np.ndarray
    """The region of every entry's patch."""
    begins: np.ndarray
    """The first entry of the same value, int (E,)."""
    ends: np.ndarray
    """The end of the entries of the same value, int (E,)."""

    @classmethod
    def of(cls, codes_NF: Matrix, regions_N: np.ndarray) -> "Ranking":
        """Sort all entries once.

        Args:
            codes_NF: values of the features, none negative, sparse.
            regions_N: number of each patch's region.
        """
        columns = codes_NF.tocsc()
        starts = columns.indptr.astype(np.int64)
        values = columns.data.astype(np.float32)
        assert values.size == 0 or values.min() > 0, "stored entries are positive"
        # one key: the feature, then the value, falling; the bits of positive floats have the order of the floats
        feature = np.repeat(np.arange(columns.shape[1], dtype=np.uint64), np.diff(starts))
        key = feature << np.uint64(32) | (np.uint32(0xFFFFFFFF) - values.view(np.uint32))
        order = np.argsort(key)
        key = key[order]
        first = np.flatnonzero(np.diff(key, prepend=~key[:1]))
        bounds = np.append(first, len(key))
        sizes = np.diff(bounds)
        begins, ends = np.repeat(bounds[:-1], sizes), np.repeat(bounds[1:], sizes)
        return cls(regions_N, starts, regions_N[columns.indices[order]], begins, ends)

    def average_precision(self, region: int) -> np.ndarray:
        """Average precision of every feature for one region, float64 (F,).

        As scikit-learn's ``average_precision_score``: the mean over the region's patches of the precision at their
        value, where patches of equal value count together.
        """
        n, n_region = len(self.regions_N), int((self.regions_N == region).sum())
        hits, found = self._hits(region)
        entries = np.flatnonzero(self.regions_E == region)
        feature = np.searchsorted(self.starts, entries, side="right") - 1
        start, end = self.starts[feature], self.ends[entries]
        precision = (hits[end] - hits[start]) / (end - start)
        total = np.bincount(feature, precision, len(self.starts) - 1)
        return (total + (n_region - found) * n_region / n) / n_region

    def purity(self, region: int, k: int) -> np.ndarray:
        """Share of the region among the k patches of largest value, float64 (F,); a tie at the end counts in part."""
        n, n_region = len(self.regions_N), int((self.regions_N == region).sum())
        k = min(k, n)
        hits, found = self._hits(region)
        active = np.diff(self.starts)
        silent = (n_region - found) / np.maximum(n - active, 1)
        count = found + (k - active) * silent
        full = np.flatnonzero(active >= k)
        last = self.starts[full] + k - 1
        begin, end = self.begins[last], self.ends[last]
        certain = hits[begin] - hits[self.starts[full]]
        count[full] = certain + (last + 1 - begin) * (hits[end] - hits[begin]) / (end - begin)
        return np.asarray(count / k)

    def _hits(self, region: int) -> tuple[np.ndarray, np.ndarray]:
        """How many entries before each one are of the region, (E + 1,), and how many of each feature, (F,)."""
        hits = np.concatenate([[0], np.cumsum(self.regions_E == region)])
        return hits, np.diff(hits[self.starts])
