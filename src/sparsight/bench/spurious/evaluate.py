"""Does ablating the latents of a spurious feature help the groups that lack it? Beside methods without an SAE.

Shapes: n images, E width of the embedding.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from sparsight import config
from sparsight.activations.store import ActivationStore
from sparsight.backbones.backbone import Backbone
from sparsight.bench.at_site import AtSite, Classifier
from sparsight.bench.site_rows import SiteRows
from sparsight.bench.spurious.cells import Cells, balanced
from sparsight.bench.spurious.edits import Edit, Erased, Key, Nothing, WithoutDirection, WithoutLatents, predictions
from sparsight.bench.spurious.fit import Fitted, fit
from sparsight.bench.spurious.statistics import hits, tabulate, worst
from sparsight.common import tables
from sparsight.common.errors import SparsightError
from sparsight.common.files import write_json
from sparsight.common.seeds import derive_seed
from sparsight.common.work import Work
from sparsight.images.split import Split
from sparsight.sae.base import SAE
from sparsight.sae.metrics.baselines import Method, of_sae
from sparsight.steering.intervention import place

_TYPES = {"sae": pa.string(), "worst_val": pa.float64(), "mean_val": pa.float64()}


@dataclass(frozen=True)
class Part:
    """A split on which the model is run."""

    model: Classifier
    embeddings: np.ndarray
    """(n, E)."""
    labels: np.ndarray
    """Class of every image, int (n,)."""
    cells: np.ndarray
    """Cell of every image, int (n,); -1 for none."""


def evaluate(
    section: config.Spurious, saes: Mapping[str, SAE], backbone: Backbone, stores: Mapping[str, ActivationStore],
    images: Mapping[str, Split], name: str, seed: int, work: Work, record: dict[str, Any],
) -> None:  # fmt: skip
    """Write ``<name>.parquet``, ``<name>-groups.parquet`` and ``<name>.json`` (docs/spurious.md).

    Args:
        section: the section of the configuration.
        saes: SAEs of one site and one shape by name, a seed each.
        backbone: their model.
        stores: stores of the splits train, val and test.
        images: the same splits' images.
        name: name of the result.
        seed: the run's seed.
        work: the stage's working folder.
        record: origin of the result.

    Raises:
        SparsightError: a model of other classes than the images', a column that the images lack, or no class with
            several values on train.
    """
    first = next(iter(saes.values()))
    if backbone.n_classes != len(images["train"].classes):
        raise SparsightError(
            f"spurious.{name}: the images have {len(images['train'].classes)} classes, the model {backbone.name!r} has "
            f"{backbone.n_classes}; train or probe it on these images, or set spurious.{name} to null"
        )
    cells = Cells.of(section.group, images["train"])
    where, device = place(first, backbone), first.W_dec.device
    rows = {part: SiteRows(one, where.site, where.tokens, device, first.d_sae) for part, one in stores.items()}
    numbers = {part: cells.numbers(one) for part, one in images.items()}
    methods = {sae: of_sae(one) for sae, one in saes.items()}
    even = balanced(numbers["train"], derive_seed(seed, "spurious", "balanced"))
    fitted = fit(rows["train"], numbers["train"], cells.shape, even, methods)
    splits = {
        part: Part(
            AtSite(backbone, where, images[part], stores[part]), rows[part].embeddings(slice(0, rows[part].n_images)),
            images[part].labels, numbers[part],
        )
        for part in ("val", "test")
    }  # fmt: skip
    edits = tried(section, methods, fitted)
    on_val = predicted(splits["val"], edits, fitted)
    scores = {key: worst(found, splits["val"].labels, splits["val"].cells) for key, found in on_val.items()}
    chosen = choose(scores)
    edits |= controls(chosen, methods, fitted, section.draws, seed)
    on_test = predicted(splits["test"], {key: edit for key, edit in edits.items() if key in chosen or key.draw}, fitted)
    judged = splits["test"].cells >= 0
    of_test = hits({key: (found == splits["test"].labels)[judged] for key, found in on_test.items()}, chosen)
    table, groups, flat = tabulate(
        of_test, chosen, scores, splits["test"].cells[judged], cells, derive_seed(seed, "spurious", "bootstrap")
    )
    tables.write(work.out / f"{name}.parquet", table, _TYPES)
    tables.write(work.out / f"{name}-groups.parquet", groups, {"sae": pa.string()})
    summary = {
        "sae": section.sae, "site": where.site, "tokens": where.tokens, "group": section.group,
        "groups": cells.counts(numbers), "balanced": len(even),
        "chosen": {
            key.sae: {"latents": ranked(fitted.scores[key.sae])[: key.latents].tolist(), "strength": key.strength}
            for key in chosen
            if key.method == "sae"
        },
        "saes": flat,
    }  # fmt: skip
    write_json(work.out / f"{name}.json", {**summary, "record": record})


def ranked(scores_F: np.ndarray) -> np.ndarray:
    """Latents, the largest difference first; of equal ones the first."""
    return np.argsort(-scores_F, kind="stable")


def tried(section: config.Spurious, methods: Mapping[str, Method], fitted: Fitted) -> dict[Key, Edit]:
    """All edits that val decides between, and those without a choice."""
    edits: dict[Key, Edit] = {Key("none"): Nothing(), Key("leace"): Erased(fitted.eraser)}
    for strength in section.strengths:
        edit = WithoutDirection(fitted.direction_D, fitted.centre_D, strength)
        edits[Key("mean_difference", strength=strength)] = edit
        for sae, method in methods.items():
            order = ranked(fitted.scores[sae])
            edits |= {
                Key("sae", sae, count, strength): WithoutLatents(method, order[:count], strength)
                for count in section.latents
                if count <= len(order)
            }
    return edits


def controls(
    chosen: Collection[Key], methods: Mapping[str, Method], fitted: Fitted, draws: int, seed: int
) -> dict[Key, Edit]:  # fmt: skip
    """For each SAE, random sets of as many latents as chosen, among those that fire on train, at the same strength."""
    edits: dict[Key, Edit] = {}
    for key in sorted(one for one in chosen if one.method == "sae"):
        alive = fitted.alive[key.sae]
        for draw in range(1, draws + 1):
            generator = np.random.default_rng(derive_seed(seed, "spurious", "random", key.sae, draw))
            some = np.sort(generator.permutation(alive)[: key.latents])
            edits[key._replace(method="random_latents", draw=draw)] = WithoutLatents(
                methods[key.sae], some, key.strength
            )
    return edits


def predicted(split: Part, edits: Mapping[Key, Edit], fitted: Fitted) -> dict[Key, np.ndarray]:
    """The classes that the model predicts after each edit, and those of the last layers, int (n,)."""
    heads = {Key("last_layer", strength=c): np.asarray(head(split.embeddings)) for c, head in fitted.heads.items()}
    return predictions(split.model, len(split.labels), edits) | heads


def choose(scores: Mapping[Key, tuple[float, float]]) -> list[Key]:
    """Of each method and SAE the settings that val prefers.

    The largest accuracy in the worst cell decides, then the largest accuracy, then the fewest latents, then the
    smallest strength.

    Args:
        scores: both accuracies on val.
    """
    best: dict[tuple[str, str], Key] = {}
    for key in sorted(scores):
        own = best.setdefault((key.method, key.sae), key)
        if scores[key] > scores[own]:
            best[key.method, key.sae] = key
    return list(best.values())
