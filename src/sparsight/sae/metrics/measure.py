"""Everything that is measured of an SAE on stored activations, beside baselines, in three passes over windows.

Train once: moments, and sums of codes by class, which choose the features of the probes. Train again: the chosen
features, on which the probes are fitted. Test once: all that is reported.

Shapes: D width (d_in), F latents (d_sae).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy import sparse

from sparsight.errors import SparsightError
from sparsight.sae.base import SAE
from sparsight.sae.metrics import geometry, methods, probing
from sparsight.sae.metrics.boards import boards
from sparsight.sae.metrics.latents import DENSE, ByClass, Firing, class_columns
from sparsight.sae.metrics.methods import Method
from sparsight.sae.metrics.probing import COUNTS, DenseMoments, Probe
from sparsight.sae.metrics.sparse import Matrix, pooled
from sparsight.sae.metrics.windows import SplitRows
from sparsight.sae.residual import Moments, ReSAE
from sparsight.seeds import derive_seed
from sparsight.store import ActivationStore

_SAMPLE = 4096  # rows on which quantisation steps and the random dictionary's length are fitted
_CLUSTER_SAMPLE = 16384  # rows that k-means is fitted on


@dataclasses.dataclass(frozen=True)
class Measured:
    """What :func:`measure` finds; tables as rows."""

    metrics: dict[str, Any]
    latents: list[dict[str, Any]]
    baselines: list[dict[str, Any]]
    probing: list[dict[str, Any]]


@torch.no_grad()
def measure(
    sae: SAE, site: str, train: ActivationStore, test: ActivationStore, labels: Mapping[str, np.ndarray],
    n_classes: int, seed: int, chain: ReSAE | None = None,
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
        chain: whose SAE it is; then what it sees is what the chain's map leaves of the site.

    Raises:
        SparsightError: activations of a split that are all the same, or stores and labels of different length.
    """
    on_train, on_test = (
        SplitRows(store, site, labels[name], sae, chain) for name, store in (("train", train), ("test", test))
    )
    fitted = _fit(sae, on_train, n_classes, seed)
    own = fitted.compared[0]
    rows, firing, codes = Moments(["x"]), Firing(sae.d_sae, fitted.unit), ByClass(sae.d_sae, n_classes)
    held_out = boards(fitted.compared, fitted.all_components, on_test.head(_SAMPLE), on_test.d_embedding)
    for window in on_test.windows():
        rows.update({"x": window.x})
        x = window.x.cpu().numpy()
        features: dict[str, Any] = dict.fromkeys(("neurons", "pca", "activation"), window.images)
        for board in held_out:
            z = board.method.encode(window.x)
            images = pooled(z, on_test.tokens)
            board.update(x, z, images, window.embedding)
            if board.method.name in ("sae", "random"):
                features[board.method.name] = images
            if board.method is own:
                firing.update(z)
                codes.update(images, window.labels)
        for probe in fitted.probes:
            probe.update(features[probe.method], window.labels)

    variance = rows.n * _deviation(rows, on_test) ** 2
    table = [board.row(rows.n, variance) for board in held_out]
    monosemanticity = held_out[0].monosemanticity
    latents = _latents(sae, firing, monosemanticity.scores(), class_columns(fitted.codes, codes))
    answers = [probe.row() for probe in fitted.probes]
    metrics = {
        "n": rows.n,
        **_of_baselines(table),
        "dead_test": int((firing.count == 0).sum()),
        "dead_train": int((fitted.codes.fired.sum(axis=0) == 0).sum()),
        "dense_test": int((firing.frequency > DENSE).sum()),
        "activation_unit": fitted.unit,
        "macs_encode": sae.macs_encode,
        "macs_decode": table[0]["macs"] - sae.macs_encode,
        "monosemanticity_of_all_images": monosemanticity.of_all_images(),
        "embedding": on_test.embedding_site,
        **_geometry(sae, latents),
        **{f"probing_{row['method']}_{row['features']}": row["accuracy"] for row in answers},
    }
    return Measured({k: v for k, v in metrics.items() if v is not None}, latents, table, answers)


@dataclasses.dataclass(frozen=True)
class _Fitted:
    """What comes from the train split."""

    unit: float
    """Square root of E||x - mean||^2."""
    codes: ByClass
    """Of the SAE."""
    compared: list[Method]
    """The SAE, PCA, the random dictionary, k-means, neurons."""
    all_components: Method
    probes: list[Probe]


def _fit(sae: SAE, train: SplitRows, n_classes: int, seed: int) -> _Fitted:
    own = methods.of_sae(sae)
    control = methods.random_dictionary(sae, train.head(_SAMPLE), derive_seed(seed, "metrics", "random"))
    coded = [own, control]
    moments, dense = Moments(["x"]), DenseMoments(sae.d_in, n_classes)
    codes = {method.name: ByClass(sae.d_sae, n_classes) for method in coded}
    for window in train.windows():
        moments.update({"x": window.x})
        dense.update(window.images, window.labels)
        for method in coded:
            codes[method.name].update(pooled(method.encode(window.x), train.tokens), window.labels)
    unit = _deviation(moments, train)
    covariance, mean, _ = moments.covariance("x", "x")
    components = torch.linalg.eigh(covariance)[1].flip(1)  # the largest first
    k = min(sae.k, sae.d_in)
    compared = [
        own,
        methods.pca("pca", mean, components[:, :k]),
        control,
        methods.kmeans(train.head(_CLUSTER_SAMPLE), sae.d_sae, derive_seed(seed, "metrics", "kmeans")),
        methods.neurons(mean, k),
    ]
    probes = [
        *_sparse_probes(train, coded, codes),
        *dense.probes("neurons", np.eye(sae.d_in), COUNTS),
        *dense.probes("pca", components.cpu().numpy(), COUNTS),
        dense.probe("activation"),
    ]
    return _Fitted(unit, codes["sae"], compared, methods.pca("pca-all", mean, components), probes)


def _of_baselines(table: list[dict[str, Any]]) -> dict[str, Any]:
    """The SAE's own numbers and those of the baselines that the headline has beside them."""
    own, pca, *others, every = table
    return {
        **{key: own[key] for key in ("fvu", "explained_variance", "l0", "bits", "fvu_quantised", "monosemanticity")},
        "fvu_pca_k": pca["fvu"],
        "bits_pca": every["bits"],
        **{f"{key}_{row['method']}": row[key] for row in others for key in ("fvu", "monosemanticity")},
    }


def _sparse_probes(split: SplitRows, coded: Sequence[Method], sums: Mapping[str, ByClass]) -> list[Probe]:
    """Probes on the codes of each method: a second pass over train, for the codes of what was chosen in the first."""
    chosen, kept = {}, {}
    for method in coded:
        own = sums[method.name]
        chosen[method.name] = probing.select(own.means, own.mean, own.deviation, max(COUNTS))
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


def _deviation(moments: Moments, split: SplitRows) -> float:
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
