"""The reconstruction alone of SAEs on stored activations, beside PCA, in one pass over at most 524,288 rows of test.

It is for sweeps over millions of activations, where :func:`sparsight.sae.metrics.measure.measure` would take longer
than training. On fewer rows of test both say the same, but PCA is fitted on a sample of train here.

Shapes: D width (d_in).
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from sparsight.activations.store import ActivationStore
from sparsight.sae.base import SAE
from sparsight.sae.metrics import baselines
from sparsight.sae.metrics.firing import DENSE, ByClass, Firing, class_columns
from sparsight.sae.metrics.measure import Measured, deviation, geometry_of, latent_rows
from sparsight.sae.metrics.split_rows import SplitRows
from sparsight.sae.moments import Moments
from sparsight.sae.resae import ReSAE

_SAMPLE = 65536  # rows of train on which PCA is fitted
_TEST = 2**19  # rows of test at most: seeds differ by far more than what is left out


@torch.no_grad()
def measure_reconstruction(
    saes: Sequence[SAE], site: str, stores: Mapping[str, ActivationStore], labels: Mapping[str, np.ndarray],
    chain: ReSAE | None = None, tokens: str | None = None,
) -> list[Measured]:  # fmt: skip
    """FVU, L0, firing and geometry of SAEs of one shape on test; the arguments are those of :func:`measure`.

    Raises:
        SparsightError: constant activations, tokens that are not stored, or stores and labels of different length.
    """
    train, test = (SplitRows(stores[s], site, labels[s], saes[0], chain, tokens) for s in ("train", "test"))
    of_train, of_test = Moments(["x"]), Moments(["x"])
    of_train.update({"x": train.head(_SAMPLE)})
    unit = deviation(of_train, train)
    covariance, mean, _ = of_train.covariance("x", "x")
    components = torch.linalg.eigh(covariance)[1].flip(1)[:, : min(saes[0].k, saes[0].d_in)]
    pca = baselines.pca("pca", mean, components)
    methods = [*map(baselines.of_sae, saes), pca]
    squares, active = np.zeros(len(methods)), np.zeros(len(methods), np.int64)
    errors = np.zeros((len(methods), saes[0].d_in))
    firing = [Firing(sae.d_sae, unit) for sae in saes]
    for window in test.windows(_TEST):
        of_test.update({"x": window.x})
        x = window.x.cpu().numpy()
        for i, method in enumerate(methods):
            z = method.encode(window.x)
            error = x - method.decode(z)
            squares[i] += np.square(error, dtype=np.float64).sum()
            errors[i] += error.sum(axis=0, dtype=np.float64)
            active[i] += np.count_nonzero(z.data)
            if i < len(saes):
                firing[i].update(z)
    n, variance = of_test.n, of_test.n * deviation(of_test, test) ** 2
    fvu, l0 = squares / variance, active / n
    explained = 1 - (squares - np.square(errors).sum(axis=1) / n) / variance
    tables = [
        {"method": m.name, "features": len(m.rows), "fvu": fvu[i], "explained_variance": explained[i], "l0": l0[i],
         "macs": m.macs(l0[i])}
        for i, m in enumerate(methods)
    ]  # fmt: skip
    nothing = ByClass(saes[0].d_sae, 0)
    measured = []
    for sae, fired, row in zip(saes, firing, tables, strict=False):
        latents = latent_rows(sae, fired, {}, class_columns(nothing, nothing))
        metrics = {
            "n": n,
            **{key: float(row[key]) for key in ("fvu", "explained_variance", "l0")},
            "fvu_pca_k": float(fvu[-1]),
            "dead_test": int((fired.count == 0).sum()),
            "dense_test": int((fired.frequency > DENSE).sum()),
            "macs_encode": sae.macs_encode,
            "macs_decode": row["macs"] - sae.macs_encode,
            "activation_unit": unit,
            **geometry_of(sae, latents),
        }
        measured.append(Measured(metrics, latents, [row, tables[-1]], []))
    return measured
