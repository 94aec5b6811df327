"""All metrics of SAEs on stored activations, beside baselines, in three passes over windows of rows.

The first pass over train collects moments, and sums of codes by class, which choose the features of the probes. The
second pass over train collects the chosen features, on which the probes are fitted. Quantisation steps are chosen on
rows of val, because an SAE reconstructs those of train better than others. The pass over test computes all that is
reported. SAEs of one shape share the passes and the baselines.

Shapes: D width (d_in), F latents (d_sae).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy import sparse

from sparsight.activations.store import ActivationStore
from sparsight.common.errors import SparsightError
from sparsight.common.seeds import derive_seed
from sparsight.sae.base import SAE
from sparsight.sae.metrics import baselines, geometry, probing
from sparsight.sae.metrics.baselines import Method
from sparsight.sae.metrics.firing import DENSE, ByClass, Firing, class_columns, labelled
from sparsight.sae.metrics.probing import COUNTS, DenseMoments, SparseProbe
from sparsight.sae.metrics.reconstruction import ReconstructionScores, at_error_of, at_own_error
from sparsight.sae.metrics.sparse_codes import Matrix, pooled
from sparsight.sae.metrics.split_rows import SplitRows
from sparsight.sae.moments import Moments
from sparsight.sae.resae import ReSAE

_SAMPLE = 4096  # rows of val for quantisation steps, rows of train for the random dictionary's factor
_CLUSTER_SAMPLE = 16384  # rows on which k-means is fitted


@dataclasses.dataclass(frozen=True)
class Measured:
    """Results of :func:`measure` for one SAE; tables are lists of rows."""

    metrics: dict[str, Any]
    latents: list[dict[str, Any]]
    baselines: list[dict[str, Any]]
    probing: list[dict[str, Any]]


@torch.no_grad()
def measure(
    saes: Sequence[SAE], site: str, stores: Mapping[str, ActivationStore], labels: Mapping[str, np.ndarray],
    n_classes: int, seed: int, chain: ReSAE | None = None, tokens: str | None = None,
    judge: ActivationStore | None = None,
) -> list[Measured]:  # fmt: skip
    """Measure SAEs on the test split. Baselines and probes are fitted on train, quantisation steps on val.

    Args:
        saes: SAEs of one shape (d_in, d_sae, k), such as those of a section.
        site: the SAEs' site.
        stores: stores of the splits ``train``, ``val`` and ``test``.
        labels: classes of the images, int (images,), of the same splits; -1 without a label. Probes and classes of
            latents are of labelled images, and left out if train or test has none.
        n_classes: number of classes.
        seed: seed of the random dictionary and of k-means.
        chain: the chain that the SAE belongs to, if any; the inputs are then residuals at the site.
        tokens: the tokens that the SAEs read; None takes what the site stores.
        judge: the store of another backbone on the test split, in the folder of its name; monosemanticity is also
            computed with its embeddings.

    Returns:
        The results of each SAE, the same as if it had been measured alone.

    Raises:
        SparsightError: constant activations, tokens that are not stored, or stores and labels of different length.
    """
    assert len({(sae.d_in, sae.d_sae, sae.k) for sae in saes}) == 1, "baselines have the shape of the SAEs"
    n_labelled = int((labels["test"] >= 0).sum())
    if not n_labelled or not (labels["train"] >= 0).any():
        n_classes, labels = 0, {split: np.full_like(of_split, -1) for split, of_split in labels.items()}
    judges = {"train": None, "val": None, "test": judge}
    on_train, on_val, on_test = (
        SplitRows(stores[split], site, labels[split], saes[0], chain, tokens, of) for split, of in judges.items()
    )
    fitted = _fit(saes, on_train, n_classes, seed)
    head, per_image = on_val.head(_SAMPLE), on_test.tokens
    moments = Moments(["x"])
    references = [at_own_error(method, head, on_test.widths) for method in fitted.baselines]
    trials = []
    for fitted_sae in fitted.saes:
        scores = at_own_error(fitted_sae.method, head, on_test.widths)
        all_components = at_error_of(scores, fitted.all_components, head, on_test.widths)
        firing, codes = Firing(fitted_sae.sae.d_sae, fitted.unit), ByClass(fitted_sae.sae.d_sae, n_classes)
        trials.append(_TestedSae(fitted_sae, scores, all_components, firing, codes))
    for window in on_test.windows():
        moments.update({"x": window.x})
        x = window.x.cpu().numpy()
        features: dict[str, Any] = dict.fromkeys(("neurons", "pca", "activation"), window.images)
        for baseline in references:
            z = baseline.method.encode(window.x)
            images = pooled(z, per_image)
            baseline.update(x, z, images, window.embeddings)
            if baseline.method.name == "random":
                features["random"] = images
        for probe in fitted.probes:
            probe.update(features[probe.method], window.labels)
        components = fitted.all_components.encode(window.x)
        image_components = pooled(components, per_image)
        for trial in trials:
            trial.all_components.update(x, components, image_components, window.embeddings)
            z = trial.board.method.encode(window.x)
            images = pooled(z, per_image)
            trial.board.update(x, z, images, window.embeddings)
            trial.firing.update(z)
            trial.codes.update(images, window.labels)
            for probe in trial.own.probes:
                probe.update(images, window.labels)

    variance = moments.n * deviation(moments, on_test) ** 2
    of_baselines = [baseline.row(moments.n, variance) for baseline in references]
    baseline_probes = [probe.row() for probe in fitted.probes]
    common: dict[str, Any] = {"activation_unit": fitted.unit, "embedding": on_test.embedding_site}
    if judge is not None:
        common["judge"] = judge.path.parent.name
    if n_labelled < len(on_test.labels):
        common["n_labelled"] = n_labelled
    return [_measured(trial, moments.n, variance, of_baselines, baseline_probes, common) for trial in trials]


@dataclasses.dataclass(frozen=True)
class _FittedSae:
    """An SAE with what is fitted for it on the train split."""

    sae: SAE
    method: Method
    codes: ByClass
    probes: list[SparseProbe]


@dataclasses.dataclass(frozen=True)
class _TestedSae:
    """An SAE with its sums over the test split."""

    own: _FittedSae
    board: ReconstructionScores
    all_components: ReconstructionScores
    """Scores of PCA with all components, quantised to the SAE's error."""
    firing: Firing
    codes: ByClass


@dataclasses.dataclass(frozen=True)
class _Fitted:
    """Everything that is fitted on the train split."""

    unit: float
    """Square root of E||x - mean||^2."""
    saes: list[_FittedSae]
    baselines: list[Method]
    """PCA, the random dictionary, k-means, neurons."""
    all_components: Method
    probes: list[SparseProbe]
    """Probes on the features of the baselines."""


def _fit(saes: Sequence[SAE], train: SplitRows, n_classes: int, seed: int) -> _Fitted:
    d_in, d_sae, k = saes[0].d_in, saes[0].d_sae, min(saes[0].k, saes[0].d_in)
    control = baselines.random_dictionary(saes[0], train.head(_SAMPLE), derive_seed(seed, "metrics", "random"))
    coded = [*map(baselines.of_sae, saes), control]
    moments, dense = Moments(["x"]), DenseMoments(d_in, n_classes)
    codes = [ByClass(d_sae, n_classes) for _ in coded]
    for window in train.windows():
        moments.update({"x": window.x})
        dense.update(window.images, window.labels)
        for method, sums in zip(coded, codes, strict=True):
            sums.update(pooled(method.encode(window.x), train.tokens), window.labels)
    unit = deviation(moments, train)
    covariance, mean, _ = moments.covariance("x", "x")
    components = torch.linalg.eigh(covariance)[1].flip(1)  # the largest first
    references = [
        baselines.pca("pca", mean, components[:, :k]),
        control,
        baselines.kmeans(train.head(_CLUSTER_SAMPLE), d_sae, derive_seed(seed, "metrics", "kmeans")),
        baselines.neurons(mean, k),
    ]
    own_probes: list[list[SparseProbe]] = [[] for _ in saes]
    probes: list[SparseProbe] = []
    if n_classes:
        *own_probes, control_probes = _sparse_probes(train, coded, codes)
        probes = [
            *control_probes,
            *dense.probes("neurons", np.eye(d_in), COUNTS),
            *dense.probes("pca", components.cpu().numpy(), COUNTS),
            dense.probe("activation"),
        ]
    fitted_saes = [_FittedSae(*parts) for parts in zip(saes, coded[:-1], codes[:-1], own_probes, strict=True)]
    return _Fitted(unit, fitted_saes, references, baselines.pca("pca-all", mean, components), probes)


def _measured(
    trial: _TestedSae, n: int, variance: float, of_baselines: list[dict[str, Any]], answers: list[dict[str, Any]],
    about: dict[str, Any],
) -> Measured:  # fmt: skip
    """The results of one SAE."""
    sae = trial.own.sae
    table = [trial.board.row(n, variance), *of_baselines, trial.all_components.row(n, variance)]
    of_images = trial.board.monosemanticity
    scores = {key: of.scores() for key, of in of_images.items()}
    latents = latent_rows(sae, trial.firing, scores, class_columns(trial.own.codes, trial.codes))
    probes = [*(probe.row() for probe in trial.own.probes), *answers]
    metrics = {
        "n": n,
        **_of_baselines(table),
        "dead_test": int((trial.firing.count == 0).sum()),
        "dead_train": int((~trial.own.codes.fires).sum()),
        "dense_test": int((trial.firing.frequency > DENSE).sum()),
        "macs_encode": sae.macs_encode,
        "macs_decode": table[0]["macs"] - sae.macs_encode,
        **{f"{key}_of_all_images": of.of_all_images() for key, of in of_images.items()},
        **about,
        **geometry_of(sae, latents),
        **{f"probing_{row['method']}_{row['features']}": row["accuracy"] for row in probes},
    }
    return Measured({k: v for k, v in metrics.items() if v is not None}, latents, table, probes)


def _of_baselines(table: list[dict[str, Any]]) -> dict[str, Any]:
    """The SAE's numbers and, beside them, those of the baselines, as ``metrics.json`` has them."""
    sae_row, pca_row, *other_rows, all_components_row = table
    scores = [key for key in sae_row if key.startswith("monosemanticity")]
    return {
        **{key: sae_row[key] for key in ("fvu", "explained_variance", "l0", "bits", "fvu_quantised", *scores)},
        "fvu_pca_k": pca_row["fvu"],
        "bits_pca": all_components_row["bits"],
        **{f"{key}_{row['method']}": row[key] for row in other_rows for key in ("fvu", *scores)},
    }


def _sparse_probes(split: SplitRows, coded: Sequence[Method], sums: Sequence[ByClass]) -> list[list[SparseProbe]]:
    """Probes on the codes of each method. A second pass over train collects the codes of the chosen features."""
    chosen = [
        probing.select(class_sums.means, class_sums.mean, class_sums.deviation, max(COUNTS)) for class_sums in sums
    ]
    kept = [np.unique(features) for features in chosen]
    blocks: list[list[Matrix]] = [[] for _ in coded]
    for window in split.windows():
        for method, columns, block in zip(coded, kept, blocks, strict=True):
            block.append(labelled(pooled(method.encode(window.x), split.tokens)[:, columns], window.labels)[0])
    return [
        list(
            probing.sparse_probes(
                method.name, class_sums, features, sparse.vstack(block, format="csc").astype(np.float64), columns
            )
        )
        for method, class_sums, features, columns, block in zip(coded, sums, chosen, kept, blocks, strict=True)
    ]


def deviation(moments: Moments, split: SplitRows) -> float:
    """Square root of E||x - mean||^2."""
    covariance, mean, _ = moments.covariance("x", "x")
    variance = float(covariance.trace())
    if variance <= 1e-12 * (variance + float(mean.square().sum())):
        raise SparsightError(f"{split.of}: activations are all the same, nothing to measure; store another site")
    return variance**0.5


def latent_rows(
    sae: SAE, firing: Firing, scores: Mapping[str, np.ndarray], classes: Mapping[str, np.ndarray]
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
        **scores,
        "nearest": index.numpy(),
        "nearest_cosine": cosine.double().numpy(),
        "histogram": firing.histogram,
    }
    values = [column.tolist() for column in columns.values()]
    return [dict(zip(columns, row, strict=True)) for row in zip(*values, strict=True)]


def geometry_of(sae: SAE, latents: list[dict[str, Any]]) -> dict[str, float]:
    """Metrics of the decoder: norms, and the share of latents with a duplicate, of a Switch SAE also across experts."""
    norms = [row["decoder_norm"] for row in latents]
    metrics = {"decoder_norm_min": min(norms), "decoder_norm_max": max(norms)}
    cosines = {"nearest": torch.tensor([row["nearest_cosine"] for row in latents])}
    experts = getattr(sae, "experts", 1)
    if experts > 1:
        cosines["other_expert"] = geometry.nearest(sae.W_dec, experts)[0]
    for name, cosine in cosines.items():
        if len(cosine) > 1:
            metrics[f"{name}_cosine"] = float(cosine.double().mean())
            metrics[f"{name}_duplicates"] = float((cosine > geometry.DUPLICATE).double().mean())
    return metrics
