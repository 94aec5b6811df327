"""What is fitted on train: readouts, features of every method, and how they separate the attributes' values.

All of it comes from sums over the rows of the store, which is read in windows of whole images.

Shapes: I images, D width (d_in), E width of the embedding.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from sparsight.bench.disentangling.interchange import Coordinates, neurons, principal
from sparsight.bench.disentangling.readout import Readout
from sparsight.bench.disentangling.selection import Separation
from sparsight.bench.site_rows import SiteRows
from sparsight.common.slices import row_slices
from sparsight.sae.metrics.absorption import Absorption
from sparsight.sae.metrics.baselines import Method
from sparsight.sae.metrics.firing import ByClass
from sparsight.sae.metrics.probing import DenseMoments, SparseProbe
from sparsight.sae.metrics.sparse_codes import pooled


class Name(NamedTuple):
    """A method."""

    method: str
    """``sae``, ``random``, ``neurons``, ``pca`` or ``das``; ``everything`` takes all edited rows from the donor."""
    sae: str
    """The SAE whose latents, or whose shape of a random dictionary, they are; empty for other methods."""


@dataclass(frozen=True)
class Fitted:
    """What train gives; lists have an entry per attribute."""

    readouts: list[Readout]
    probes: list[SparseProbe]
    """Of the mean activation at the site."""
    codes: dict[Name, list[ByClass]]
    """By dictionary, sums of its codes."""
    bases: dict[Name, Coordinates]
    """Neurons and principal components of the images' mean rows."""
    separations: dict[Name, list[Separation]]
    """By method."""


def fit(rows: SiteRows, values_An: np.ndarray, sizes: Sequence[int], dictionaries: Mapping[Name, Method]) -> Fitted:
    """Read train once.

    Args:
        rows: the rows of train.
        values_An: number of each image's value, for both attributes; -1 for none.
        sizes: number of values of each attribute.
        dictionaries: the dictionaries by name.
    """
    places: list[DenseMoments] = []
    outputs: list[DenseMoments] = []
    codes = {name: [ByClass(len(one.rows), size) for size in sizes] for name, one in dictionaries.items()}
    for window, x, means_ID in rows.windows():
        embedding_IE = rows.embeddings(window)
        if not places:
            places += [DenseMoments(means_ID.shape[1], size) for size in sizes]
            outputs += [DenseMoments(embedding_IE.shape[1], size) for size in sizes]
        for values_n, place, output in zip(values_An, places, outputs, strict=True):
            place.update(means_ID, values_n[window])
            output.update(embedding_IE, values_n[window])
        for name, dictionary in dictionaries.items():
            z_IF = pooled(dictionary.encode(x), rows.tokens)
            for values_n, sums in zip(values_An, codes[name], strict=True):
                sums.update(z_IF, values_n[window])
    n = places[0].images.sum()
    mean_D = places[0].total.sum(axis=0) / n
    device = rows.head(1).device
    bases = {
        Name("neurons", ""): neurons(len(mean_D), device),
        Name("pca", ""): principal(places[0].products / n - np.outer(mean_D, mean_D), device),
    }
    separations = {name: [Separation.of_codes(one) for one in sums] for name, sums in codes.items()}
    for name, basis in bases.items():
        columns = basis.basis_DF.double().cpu().numpy()
        separations[name] = [Separation.of_basis(moments, columns) for moments in places]
    readouts = [_readout(moments, device) for moments in outputs]
    return Fitted(readouts, [moments.probe("linear") for moments in places], codes, bases, separations)


def _readout(moments: DenseMoments, device: torch.device) -> Readout:
    probe = moments.probe("linear")
    weight, bias = (torch.from_numpy(np.ascontiguousarray(part)).float().to(device) for part in (probe.W, probe.b))
    return Readout(weight, bias)


def read_right(rows: SiteRows, values_An: np.ndarray, readouts: Sequence[Readout]) -> list[np.ndarray]:
    """Whether each attribute is read rightly from the stored embedding of each image, bool (n,) per attribute."""
    right = [np.zeros(rows.n_images, bool) for _ in readouts]
    for window in row_slices(rows.n_images, 8192):
        embedding_IE = torch.from_numpy(rows.embeddings(window)).float()
        for values_n, readout, found in zip(values_An, readouts, right, strict=True):
            found[window] = readout(embedding_IE.to(readout.bias_C.device)) == values_n[window]
    return right


def absorption(
    rows: SiteRows, values_An: np.ndarray, dictionaries: Mapping[Name, Method], fitted: Fitted
) -> dict[Name, list[Absorption]]:
    """Absorption on the images of ``rows``, by dictionary and attribute."""
    counts = {
        name: [Absorption(one, sums, probe) for sums, probe in zip(fitted.codes[name], fitted.probes, strict=True)]
        for name, one in dictionaries.items()
    }
    for window, x, means_ID in rows.windows():
        for name, dictionary in dictionaries.items():
            z_IF = pooled(dictionary.encode(x), rows.tokens)
            for values_n, one in zip(values_An, counts[name], strict=True):
                one.update(z_IF, means_ID, values_n[window])
    return counts
