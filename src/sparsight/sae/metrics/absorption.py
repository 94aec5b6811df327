"""Absorption: how often the latent of a value stays silent while a more special latent fires in its place.

After Chanin et al. 2024 (arXiv 2409.14507) and SAEBench, for values of an attribute of images. The main latent of a
value is silent on some of the test images whose value a linear probe at the site reads rightly. Such an image is
absorbed if one other latent carries the value instead: of all latents along the probe's direction (a cosine of at least
0.025), the one with the largest projection has at least 0.4 of the activation's projection. Both thresholds are
SAEBench's. Ours: the main latent is the single best one on train, so that latents which share a value between them
count, too; probes are ridge regressions; codes are means over the tokens of an image; and the activation's projection
is taken from the dictionary's offset.

Shapes: I images, D width (d_in), F latents, C values.
"""

from typing import Any

import numpy as np

from sparsight.common.intervals import wilson
from sparsight.sae.metrics.baselines import Method
from sparsight.sae.metrics.firing import ByClass
from sparsight.sae.metrics.probing import SparseProbe
from sparsight.sae.metrics.sparse_codes import Matrix

COSINE, SHARE = 0.025, 0.4


class Absorption:
    """Counts over test images, for a dictionary and an attribute.

    Args:
        method: the dictionary.
        train: sums of its codes over train, by value of the attribute.
        probe: reads the attribute from the mean activation of an image; dense.
    """

    def __init__(self, method: Method, train: ByClass, probe: SparseProbe) -> None:
        self.main = main_latents(train)
        self._probe, self._offset = probe, method.offset.astype(np.float64)
        norms = np.linalg.norm(probe.W, axis=0)
        self._directions = probe.W / np.where(norms > 0, norms, 1)
        rows = method.rows.astype(np.float64)
        self._along = rows @ self._directions
        lengths = np.linalg.norm(rows, axis=1)[:, None]
        self._aligned = self._along >= COSINE * np.where(lengths > 0, lengths, np.inf)
        self.n, self.silent, self.absorbed = (np.zeros(len(self.main), np.int64) for _ in range(3))

    def update(self, z_IF: Matrix, x_ID: np.ndarray, values_I: np.ndarray) -> None:
        """Add test images.

        Args:
            z_IF: codes, CSR.
            x_ID: mean activations, float64.
            values_I: number of each image's value; -1 for an image without one.
        """
        right = (x_ID @ self._probe.W + self._probe.b).argmax(axis=1) == values_I
        for value in np.unique(values_I[right]):
            images = np.flatnonzero(right & (values_I == value))
            self.n[value] += len(images)
            if self.main[value] >= 0:
                images = images[z_IF[images][:, [self.main[value]]].toarray()[:, 0] <= 0]
            if not len(images):
                continue
            self.silent[value] += len(images)
            along = np.where(self._aligned[:, value], self._along[:, value], 0)
            largest = z_IF[images].multiply(along[None, :]).tocsr().max(axis=1).toarray().ravel()
            whole = (x_ID[images] - self._offset) @ self._directions[:, value]
            self.absorbed[value] += int(((largest > 0) & (whole > 0) & (largest >= SHARE * whole)).sum())

    def rows(self) -> list[dict[str, Any]]:
        """A row per value that the probe reads rightly on an image.

        Columns: value (its number), latent (the main one; -1 if no latent fires more for the value), n (images that the
        probe reads rightly), silent and absorbed (images), rate (absorbed / n) with its Wilson interval lo and hi.
        """
        return [
            {"value": value, "latent": int(self.main[value]), **counted(int(n), int(silent), int(absorbed))}
            for value, (n, silent, absorbed) in enumerate(zip(self.n, self.silent, self.absorbed, strict=True))
            if n
        ]

    def total(self) -> dict[str, Any]:
        """The same counts over all values; empty without images."""
        counts = (int(counts.sum()) for counts in (self.n, self.silent, self.absorbed))
        return counted(*counts) if self.n.any() else {}


def counted(n: int, silent: int, absorbed: int) -> dict[str, Any]:
    """The counts with the rate and its interval."""
    interval = wilson(np.arange(n) < absorbed)
    return {"n": n, "silent": silent, "absorbed": absorbed, "rate": interval["accuracy"],
            "lo": interval["lo"], "hi": interval["hi"]}  # fmt: skip


def main_latents(train: ByClass) -> np.ndarray:
    """The main latent of each value, int (C,): the one whose mean exceeds its overall mean by most deviations.

    -1 if no latent has a larger mean there.
    """
    deviation = train.deviation
    varies = deviation > 1e-6 * deviation.max(initial=0)
    score_CF = (train.means - train.mean) / np.where(varies, deviation, np.inf)
    return np.where(score_CF.max(axis=1) > 0, score_CF.argmax(axis=1), -1)
