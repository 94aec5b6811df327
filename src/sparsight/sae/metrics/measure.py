"""Everything that is measured of an SAE on stored activations, beside baselines, in three passes over windows.

Train once: moments, and sums of codes by class, which choose the features of the probes. Train again: the chosen
features, on which the probes are fitted. Test once: all that is reported.

Shapes: B rows of a window, I images of it, D width (d_in), F latents (d_sae), E width of the embedding.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from sparsight.errors import SparsightError
from sparsight.sae.base import SAE
from sparsight.sae.metrics import geometry, methods, probing
from sparsight.sae.metrics.boards import boards
from sparsight.sae.metrics.latents import DENSE, ByClass, Firing, class_columns
from sparsight.sae.metrics.methods import Method
from sparsight.sae.metrics.monosemanticity import unit_rows
from sparsight.sae.metrics.probing import COUNTS, DenseMoments, Probe
from sparsight.sae.metrics.sparse import Matrix, pooled
from sparsight.sae.residual import Moments
from sparsight.seeds import derive_seed
from sparsight.store import ActivationStore
from sparsight.windows import in_order

_SAMPLE = 4096  # rows on which quantisation steps and the random dictionary's length are fitted
_CLUSTER_SAMPLE = 16384  # rows that k-means is fitted on
_ENTRIES = 2**25  # of dense codes at a time


@dataclasses.dataclass(frozen=True)
class Measured:
    """What :func:`measure` finds; tables as rows."""

    metrics: dict[str, Any]
    latents: list[dict[str, Any]]
    baselines: list[dict[str, Any]]
    probing: list[dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class _Window:
    x: Tensor
    """float32 (B, D), on the device."""
    images: np.ndarray
    """Mean over tokens, float64 (I, D)."""
    embedding: np.ndarray
    """Of unit length, float64 (I, E)."""
    labels: np.ndarray
    """int (I,)."""


class _Split:
    """A split's rows at the site, with the labels and the embeddings of its images."""

    def __init__(self, store: ActivationStore, site: str, labels: np.ndarray, like: SAE) -> None:
        self.rows, self.labels, self.device = store.rows(site), labels, like.W_dec.device
        self.tokens = self.rows.tokens_per_image
        self.embedding_site = "embedding" if "embedding" in store.sites else site
        self.embedding = store.rows(self.embedding_site)
        self.d_embedding = self.embedding.shape[1]
        self.of = f"{store.path}, site {site!r}"
        if len(self.rows) != len(labels) * self.tokens:
            raise SparsightError(
                f"{self.of}: {len(self.rows) // self.tokens} images, but the manifest of images lists {len(labels)}; "
                "extract again"
            )
        self._images = max(1, min(8192, _ENTRIES // like.d_sae) // self.tokens)

    def head(self, rows: int) -> Tensor:
        """The first rows, of whole images, (B, D); images are in random order."""
        return self._load(0, min(len(self.labels), max(1, rows // self.tokens)))

    def windows(self) -> Iterator[_Window]:
        """All rows in order."""
        for at in in_order(len(self.labels), self._images):
            x = self._load(at.start, at.stop)
            images = x.unflatten(0, (-1, self.tokens)).double().mean(dim=1).cpu().numpy()
            embedding = images
            if self.embedding_site == "embedding":
                embedding = self.embedding.images(at.start, at.stop)
            yield _Window(x, images, unit_rows(embedding), self.labels[at])

    def _load(self, first: int, last: int) -> Tensor:
        return torch.from_numpy(self.rows.images(first, last)).to(self.device).float()


@torch.no_grad()
def measure(
    sae: SAE, site: str, train: ActivationStore, test: ActivationStore, labels: Mapping[str, np.ndarray],
    n_classes: int, seed: int,
) -> Measured:  # fmt: skip
    """Measure an SAE on the test split, with everything that is fitted fitted on train.

    Args:
        sae: the SAE.
        site: whose activations it reads.
        train: store of the train split.
        test: store of the test split.
        labels: int (images,) of the splits ``train`` and ``test``.
        n_classes: how many classes there are.
        seed: of the random dictionary and of k-means.

    Raises:
        SparsightError: activations of a split that are all the same, or stores and labels of different length.
    """
    on_train, on_test = (_Split(store, site, labels[name], sae) for name, store in (("train", train), ("test", test)))
    sample = on_train.head(_SAMPLE)
    own = methods.of_sae(sae)
    coded = [own, methods.random_dictionary(sae, sample, derive_seed(seed, "metrics", "random"))]

    moments, dense = Moments(["x"]), DenseMoments(sae.d_in, n_classes)
    train_codes = {method.name: ByClass(sae.d_sae, n_classes) for method in coded}
    for window in on_train.windows():
        moments.update({"x": window.x})
        dense.update(window.images, window.labels)
        for method in coded:
            train_codes[method.name].update(pooled(method.encode(window.x), on_train.tokens), window.labels)
    unit = _deviation(moments, on_train)
    covariance, mean, _ = moments.covariance("x", "x")
    components = torch.linalg.eigh(covariance)[1].flip(1)  # the largest first

    probes = [
        *_sparse_probes(on_train, coded, train_codes),
        *dense.probes("neurons", np.eye(sae.d_in), COUNTS),
        *dense.probes("pca", components.cpu().numpy(), COUNTS),
        dense.probe("activation"),
    ]
    k = min(sae.k, sae.d_in)
    clusters = derive_seed(seed, "metrics", "kmeans")
    compared = [
        own,
        methods.pca("pca", mean, components[:, :k]),
        coded[1],
        methods.kmeans(on_train.head(_CLUSTER_SAMPLE), sae.d_sae, clusters),
        methods.neurons(mean, k),
    ]
    all_components = methods.pca("pca-all", mean, components)
    rows, firing, test_codes = Moments(["x"]), Firing(sae.d_sae, unit), ByClass(sae.d_sae, n_classes)
    held_out = boards(compared, all_components, on_test.head(_SAMPLE), on_test.d_embedding)
    for window in on_test.windows():
        rows.update({"x": window.x})
        x = window.x.cpu().numpy()
        features: dict[str, Any] = dict.fromkeys(("neurons", "pca", "activation"), window.images)
        for board in held_out:
            z = board.method.encode(window.x)
            images = pooled(z, on_test.tokens)
            board.update(x, z, images, window.embedding)
            if board.method in coded:
                features[board.method.name] = images
            if board.method is own:
                firing.update(z)
                test_codes.update(images, window.labels)
        for probe in probes:
            probe.update(features[probe.method], window.labels)

    variance = rows.n * _deviation(rows, on_test) ** 2
    table = [board.row(rows.n, variance) for board in held_out]
    monosemanticity = held_out[0].monosemanticity
    latents = _latents(sae, firing, monosemanticity.scores(), class_columns(train_codes["sae"], test_codes))
    answers = [probe.row() for probe in probes]
    metrics = {
        "n": rows.n,
        **{key: table[0][key] for key in ("fvu", "explained_variance", "l0", "bits", "fvu_quantised")},
        "fvu_pca_k": table[1]["fvu"],
        **{f"{key}_{row['method']}": row[key] for row in table[2:-1] for key in ("fvu", "monosemanticity")},
        "bits_pca": table[-1]["bits"],
        "dead_test": int((firing.count == 0).sum()),
        "dead_train": int((train_codes["sae"].fired.sum(axis=0) == 0).sum()),
        "dense_test": int((firing.frequency > DENSE).sum()),
        "activation_unit": unit,
        "macs_encode": sae.macs_encode,
        "macs_decode": table[0]["macs"] - sae.macs_encode,
        "monosemanticity": table[0]["monosemanticity"],
        "monosemanticity_of_all_images": monosemanticity.of_all_images(),
        "embedding": on_test.embedding_site,
        **_geometry(sae, latents),
        **{f"probing_{row['method']}_{row['features']}": row["accuracy"] for row in answers},
    }
    return Measured({k: v for k, v in metrics.items() if v is not None}, latents, table, answers)


def _sparse_probes(split: _Split, coded: Sequence[Method], sums: Mapping[str, ByClass]) -> list[Probe]:
    """Probes on the codes of each method: a second pass over train, for the codes of what was chosen in the first."""
    chosen, kept = {}, {}
    for method in coded:
        own = sums[method.name]
        chosen[method.name] = probing.select(own.means, own.mean, own.deviation, own.images, max(COUNTS))
        kept[method.name] = np.unique(chosen[method.name])
    blocks: dict[str, list[Matrix]] = {method.name: [] for method in coded}
    for window in split.windows():
        for method in coded:
            z = pooled(method.encode(window.x), split.tokens)
            blocks[method.name].append(z[:, kept[method.name]])
    found: list[Probe] = []
    for name, parts in blocks.items():
        columns = sparse.vstack(parts, format="csc").astype(np.float64)
        found += probing.sparse_probes(name, sums[name], chosen[name], columns, kept[name])
    return found


def _deviation(moments: Moments, split: _Split) -> float:
    """Square root of E||x - mean||^2."""
    covariance, mean, _ = moments.covariance("x", "x")
    variance = float(covariance.trace())
    if variance <= 1e-12 * (variance + float(mean.square().sum())):
        raise SparsightError(f"{split.of}: activations are all the same, nothing to measure; store another site")
    return variance**0.5


def _latents(
    sae: SAE, firing: Firing, monosemanticity: np.ndarray, classes: Mapping[str, np.ndarray]
) -> list[dict[str, Any]]:
    """The rows of ``latents.parquet``."""
    cosine, index = geometry.nearest(sae.W_dec)
    columns = {
        "latent": np.arange(sae.d_sae),
        "frequency": firing.frequency,
        "mean_activation": firing.mean,
        "max_activation": firing.largest,
        "decoder_norm": torch.linalg.vector_norm(sae.W_dec.double(), dim=1).cpu().numpy(),
        **classes,
        "monosemanticity": monosemanticity,
        "nearest": index.numpy(),
        "nearest_cosine": cosine.double().numpy(),
        "histogram": firing.histogram,
    }
    values = [column.tolist() for column in columns.values()]
    return [dict(zip(columns, row, strict=True)) for row in zip(*values, strict=True)]


def _geometry(sae: SAE, latents: list[dict[str, Any]]) -> dict[str, float]:
    """Of the decoder: its norms, and how many latents have a duplicate, in another expert too where there are some."""
    norms = [row["decoder_norm"] for row in latents]
    found = {"decoder_norm_min": min(norms), "decoder_norm_max": max(norms)}
    cosines = {"nearest": torch.tensor([row["nearest_cosine"] for row in latents])}
    experts = getattr(sae, "experts", 1)
    if experts > 1:
        cosines["other_expert"] = geometry.nearest(sae.W_dec, experts)[0]
    for name, cosine in cosines.items():
        if len(cosine) > 1:
            found[f"{name}_cosine"] = float(cosine.double().mean())
            found[f"{name}_duplicates"] = float((cosine > geometry.DUPLICATE).double().mean())
    return found
