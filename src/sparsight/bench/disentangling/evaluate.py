"""Do latents disentangle two attributes? Interchanges by the latents of SAEs beside those by other features.

After Chaudhary and Geiger 2024 (arXiv 2409.04478) and RAVEL (Huang et al. 2024, arXiv 2402.17700), for images.

Shapes: D width (d_in).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from safetensors.torch import load_file, save_file

from sparsight import config
from sparsight.activations.store import ActivationStore
from sparsight.backbones.backbone import Backbone
from sparsight.bench.at_site import AtSite
from sparsight.bench.attribute import Attribute
from sparsight.bench.disentangling import statistics
from sparsight.bench.disentangling.das import Subspace, train_subspaces
from sparsight.bench.disentangling.interchange import Coordinates, Features, Latents
from sparsight.bench.disentangling.pairs import draw_pairs, usable
from sparsight.bench.disentangling.scores import Key, best_rules, outcomes, table
from sparsight.bench.disentangling.selection import RULES, ranked
from sparsight.bench.disentangling.statistics import Fitted, Name
from sparsight.bench.site_rows import SiteRows
from sparsight.common import tables
from sparsight.common.files import write_atomic, write_json
from sparsight.common.intervals import wilson
from sparsight.common.progress import log
from sparsight.common.seeds import derive_seed
from sparsight.common.work import Work
from sparsight.images.split import Split
from sparsight.sae.base import SAE
from sparsight.sae.metrics.absorption import Absorption
from sparsight.sae.metrics.baselines import of_sae, random_dictionary
from sparsight.steering.intervention import place

_SAMPLE = 4096  # rows of train that fit the random dictionary's factor, as in the evaluation of SAEs
_TYPES = {"sae": pa.string(), "rule": pa.string()}


@dataclass(frozen=True)
class Images:
    """A split: its images, activations and attributes."""

    split: Split
    store: ActivationStore
    values: np.ndarray
    """Number of each image's value of both attributes, int (2, n); -1 for none."""


def evaluate(
    section: config.Disentangle, saes: Mapping[str, SAE], backbone: Backbone, stores: Mapping[str, ActivationStore],
    images: Mapping[str, Split], name: str, seed: int, work: Work, record: dict[str, Any],
) -> None:  # fmt: skip
    """Write ``<name>.parquet``, ``<name>-absorption.parquet`` and ``<name>.json`` (docs/disentangling.md).

    Args:
        section: the section of the configuration.
        saes: SAEs of one site and one shape by name, a seed each.
        backbone: their model.
        stores: stores of the splits train, val and test.
        images: the same splits' images.
        name: name of the result.
        seed: the run's seed.
        work: the stage's working folder, which keeps trained subspaces until it is finished.
        record: origin of the result.

    Raises:
        SparsightError: an attribute that the images lack, that has one value, or no pair that differs in both.
    """
    first = next(iter(saes.values()))
    attributes = [Attribute.of(attribute, images["train"]) for attribute in section.attributes]
    site, tokens, device = first.about["site"], first.about["tokens"], first.W_dec.device
    splits = {
        part: Images(images[part], stores[part], np.stack([one.numbers(images[part]) for one in attributes]))
        for part in ("train", "val", "test")
    }
    rows = {part: SiteRows(one.store, site, tokens, device, first.d_sae) for part, one in splits.items()}
    dictionaries = {Name("sae", sae): of_sae(one) for sae, one in saes.items()}
    for sae, one in saes.items():
        drawn = derive_seed(seed, "disentangle", "random", sae)
        dictionaries[Name("random", sae)] = random_dictionary(one, rows["train"].head(_SAMPLE), drawn)
    sizes = [len(one.values) for one in attributes]
    fitted = statistics.fit(rows["train"], splits["train"].values, sizes, dictionaries)
    methods: dict[Name, Features] = {**{key: Latents(one) for key, one in dictionaries.items()}, **fitted.bases}
    where = place(first, backbone)
    models = {part: AtSite(backbone, where, one.split, one.store) for part, one in splits.items()}
    pairs, accuracy = {}, {}
    for part in ("val", "test"):
        right = accuracy[part] = statistics.read_right(rows[part], splits[part].values, fitted.readouts)
        values = usable(splits[part].values, right)
        count = min(section.pairs, int((values >= 0).all(axis=0).sum()))
        pairs[part] = draw_pairs(values, count, derive_seed(seed, "disentangle", "pairs", part))
        log(f"{part}: {len(pairs[part])} pairs")
    edits = _chosen(methods, fitted, section)
    edits |= _skyline(section, models["train"], splits["train"].values, fitted, seed, work)
    whole = Coordinates(torch.eye(first.d_in, device=device))
    edits |= {Key("everything", "", i, first.d_in, ""): (whole, np.arange(first.d_in)) for i in range(2)}
    on_val = outcomes(models["val"], pairs["val"], splits["val"].values, fitted.readouts, edits)
    best = best_rules(on_val)
    on_test = outcomes(
        models["test"], pairs["test"], splits["test"].values, fitted.readouts,
        {key: edit for key, edit in edits.items() if key in best},
    )  # fmt: skip
    names = [one.name for one in attributes]
    found, leads = table(names, on_test, on_val, derive_seed(seed, "disentangle", "bootstrap"))
    counts = statistics.absorption(rows["test"], splits["test"].values, dictionaries, fitted)
    tables.write(work.out / f"{name}.parquet", found, _TYPES)
    tables.write(work.out / f"{name}-absorption.parquet", _absorption(attributes, counts), {"value": pa.string()})
    readout = [
        {"attribute": one.name, "values": len(one.values), **wilson(right[splits["test"].values[i] >= 0])}
        for i, (one, right) in enumerate(zip(attributes, accuracy["test"], strict=True))
    ]
    summary = {
        "sae": section.sae, "site": site, "tokens": tokens, "attributes": names, "features": list(section.features),
        "readout": readout, "pairs": {part: len(some) for part, some in pairs.items()}, "leads": leads,
    }  # fmt: skip
    write_json(work.out / f"{name}.json", {**summary, "record": record})
    for line in leads:
        log("{attribute}, {features} features: SAE minus {control} {delta:+.3f}".format(**line))


def _chosen(
    methods: Mapping[Name, Features], fitted: Fitted, section: config.Disentangle
) -> dict[Key, tuple[Features, np.ndarray]]:
    """The interchanges of chosen features: every method, attribute, rule, and number of features that it has."""
    edits: dict[Key, tuple[Features, np.ndarray]] = {}
    for key, method in methods.items():
        separations = fitted.separations[key]
        for attribute in range(2):
            own, other = separations[attribute], separations[1 - attribute]
            orders = {rule: ranked(own, other, rule) for rule in RULES}
            for count in section.features:
                if count <= method.n_features:
                    edits |= {Key(*key, attribute, count, rule): (method, orders[rule][:count]) for rule in RULES}
    return edits


def _skyline(
    section: config.Disentangle, model: AtSite, values_An: np.ndarray, fitted: Fitted, seed: int, work: Work
) -> dict[Key, tuple[Features, np.ndarray]]:
    """The interchanges of trained subspaces, which the working folder keeps until the stage is finished.

    They start as principal components, so that a short training does not end below these.
    """
    pca = Name("pca", "")
    components, separations = fitted.bases[pca], fitted.separations[pca]
    orders = [ranked(separations[attribute], separations[1 - attribute], "surplus") for attribute in range(2)]
    subspaces = {
        (attribute, count): Subspace(attribute, components.basis_DF[:, torch.from_numpy(order[:count].copy())])
        for attribute, order in enumerate(orders)
        for count in section.features
        if count <= components.n_features
    }
    kept = work.state / "subspaces.safetensors"
    if not kept.exists():
        log(f"training of {len(subspaces)} subspaces")
        needed = section.das_steps * section.das_batch_size
        pairs = draw_pairs(values_An, needed, derive_seed(seed, "disentangle", "pairs", "train"))
        bases = train_subspaces(
            model, pairs, values_An, fitted.readouts, list(subspaces.values()), section.das_batch_size, section.das_lr
        )
        columns = {_file_name(*of): basis.cpu().contiguous() for of, basis in zip(subspaces, bases, strict=True)}
        write_atomic(kept, partial(save_file, columns))
    columns, device = load_file(kept), fitted.readouts[0].bias_C.device
    edits: dict[Key, tuple[Features, np.ndarray]] = {}
    for attribute, count in subspaces:
        basis = columns[_file_name(attribute, count)].to(device)
        edits[Key("das", "", attribute, count, "")] = Coordinates(basis), np.arange(count)
    return edits


def _file_name(attribute: int, count: int) -> str:
    return f"{attribute}-{count}"


def _absorption(attributes: list[Attribute], counts: Mapping[Name, list[Absorption]]) -> list[dict[str, Any]]:
    """Rows per dictionary and attribute: of all values (value null), and of each."""
    rows: list[dict[str, Any]] = []
    for key, by_attribute in counts.items():
        for attribute, one in zip(attributes, by_attribute, strict=True):
            about = {"attribute": attribute.name, "method": key.method, "sae": key.sae}
            if total := one.total():
                rows.append({**about, "value": None, "latent": -1, **total})
            rows += [{**about, **row, "value": attribute.values[row["value"]]} for row in one.rows()]
    return rows
