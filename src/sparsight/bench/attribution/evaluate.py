"""Which latents cause the logit of an image's class, beside other features of the same activations.

Shapes: D width (d_in).
"""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from sparsight import config
from sparsight.activations.store import ActivationStore
from sparsight.backbones.backbone import Backbone
from sparsight.bench.at_site import AtSite
from sparsight.bench.attribution import statistics
from sparsight.bench.attribution.curves import measure
from sparsight.common import tables
from sparsight.common.errors import SparsightError
from sparsight.common.files import write_json
from sparsight.common.progress import followed, log
from sparsight.common.seeds import derive_seed
from sparsight.common.slices import row_slices
from sparsight.common.work import Work
from sparsight.images.split import Split
from sparsight.sae.base import SAE
from sparsight.sae.inputs import SaeInputs
from sparsight.sae.metrics import baselines
from sparsight.sae.metrics.baselines import Method
from sparsight.sae.moments import Moments
from sparsight.steering.intervention import place

_SAMPLE = 4096  # rows of train that fit the random dictionary's factor, as in the evaluation of SAEs
_ROWS = 8192  # rows of train at a time
_OF_LATENTS = {
    "sae": pa.string(), "latent": pa.int64(), "class": pa.int64(), "class_name": pa.string(), "n": pa.int64(),
    "attribution": pa.float64(),
}  # fmt: skip


def evaluate(
    section: config.Attribution, saes: Mapping[str, SAE], backbone: Backbone, stores: Mapping[str, ActivationStore],
    split: Split, name: str, seed: int, work: Work, record: dict[str, Any],
) -> None:  # fmt: skip
    """Write ``<name>.parquet``, ``<name>-latents.parquet`` and ``<name>.json`` (docs/attribution.md).

    Args:
        section: the section of the configuration.
        saes: SAEs of one site and one shape by name, a seed each.
        backbone: their model.
        stores: stores of the splits train and test.
        split: the images of test.
        name: name of the result.
        seed: the run's seed.
        work: the stage's working folder.
        record: origin of the result.

    Raises:
        SparsightError: a model without two classes, or SAEs that do not fit the model.
    """
    if (backbone.n_classes or 0) < 2:
        raise SparsightError(
            f"attribution.{name}: the model {backbone.name!r} has no classes, whose logits are attributed; name an SAE "
            f"of another model, or set attribution.{name} to null"
        )
    first = next(iter(saes.values()))
    where = place(first, backbone)
    train = SaeInputs(stores["train"], where.site, first.W_dec.device, tokens=first.about["tokens"])
    shared = _bases(train)
    methods: dict[str, dict[str, Method]] = {}
    rows = train.images(slice(0, min(len(train.rows), max(_SAMPLE, train.tokens)) // train.tokens))
    for sae, one in saes.items():
        random = baselines.random_dictionary(one, rows, derive_seed(seed, "attribution", "random", sae))
        methods[sae] = {"sae": baselines.of_sae(one), "random": random, **shared}
    model, n_images = AtSite(backbone, where, split, stores["test"]), min(section.images, len(split))
    found, predicted, probabilities = measure(
        model, n_images, methods, section, derive_seed(seed, "attribution", "orders") % 2**32
    )
    curves: list[dict[str, Any]] = []
    latents: list[dict[str, Any]] = []
    flat: dict[str, dict[str, float]] = {}
    for sae, of_sae in found.items():
        own = derive_seed(seed, "attribution", "bootstrap")
        curves += statistics.curve_rows(sae, of_sae, own)
        latents += statistics.effects_by_class(sae, of_sae, predicted, backbone.class_names or split.classes)
        flat[sae] = statistics.numbers(of_sae, probabilities, own)
        log("{}: area of deletion {deletion_sae:.3f}, in random order {deletion_random_order:.3f}".format(
            sae, **flat[sae]
        ))  # fmt: skip
    tables.write(work.out / f"{name}.parquet", curves)
    tables.write(work.out / f"{name}-latents.parquet", latents, _OF_LATENTS)
    summary = {"sae": section.sae, "site": where.site, "tokens": where.tokens, "images": n_images, "saes": flat}
    write_json(work.out / f"{name}.json", {**summary, "record": record})


def _bases(train: SaeInputs) -> dict[str, Method]:
    """Principal components and neurons: all coordinates, as differences from the mean of train."""
    moments, n_images = Moments(["x"]), len(train.rows) // train.tokens
    windows = list(row_slices(n_images, max(1, _ROWS // train.tokens)))
    for window in followed(windows, len(windows), "windows"):
        moments.update({"x": train.images(window)})
    covariance, mean, _ = moments.covariance("x", "x")
    components: Tensor = torch.linalg.eigh(covariance)[1].flip(1)  # the largest first
    return {"pca": baselines.pca("pca", mean, components), "neurons": baselines.neurons(mean, len(mean))}
