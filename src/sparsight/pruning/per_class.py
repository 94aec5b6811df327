"""One configuration per class: the heads that it keeps, and its effect on the class's own and on all other images.

For every strategy that takes a label, each class gets the strength and number of latents chosen on val for its own
images. A mask can push an image towards a class. So every configuration is also run on images of all classes: images of
other classes that it assigns to the class are its false positives. These are all images, or of many images and classes
the first, which are in random order: their product would decide the time of the stage.

A class is selected if, on val, its configuration halves the usage of the class's images and costs no more accuracy than
the tolerance. Deployed means that the images that a kind of label assigns to a selected class get its configuration,
and all others stay unsteered.

Shapes: N images, H heads, C classes.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from sparsight import config
from sparsight.common.intervals import bootstrap, loss_bound, paired, wilson
from sparsight.common.progress import followed
from sparsight.pruning.last_block import LastBlockInputs
from sparsight.pruning.masks import unpack
from sparsight.pruning.outcomes import Job, Outcome, run_several
from sparsight.pruning.selection import Point, points, rank
from sparsight.pruning.strategies import IN_STREAM, NONE, Row, Strategies

_ON_ALL = 200_000  # images times classes for false positives, but at least as many images as follow
_AT_LEAST = 1000


@dataclass(frozen=True)
class Configuration:
    """The configuration of a strategy for one class."""

    point: Point
    selected: bool
    """Whether it halves the class's usage on val, at a loss of accuracy within the tolerance."""


def configurations(
    on_val: dict[Row, Outcome], val: LastBlockInputs, n_classes: int, tolerance: float
) -> dict[str, dict[int, Configuration]]:
    """Configurations by strategy and class. A class without val images has none."""
    by_strategy: dict[str, dict[int, Configuration]] = {}
    none = on_val[NONE]
    for (strategy, labels), candidates in points(on_val).items():
        if labels != "oracle":
            continue
        hits = np.stack([point.hits(on_val) for point in candidates])
        usage = np.stack([point.usage(on_val) for point in candidates])
        by_strategy[strategy] = {}
        for c in range(n_classes):
            images = np.flatnonzero(val.labels == c)
            if len(images) == 0:
                continue
            floor = float(none.hits[images].mean()) - tolerance
            accuracies, usages = hits[:, images].mean(axis=1).tolist(), usage[:, images].mean(axis=1).tolist()
            ranks = [
                (rank(a, u, floor), point.strength, point.latents, i)
                for i, (a, u, point) in enumerate(zip(accuracies, usages, candidates, strict=True))
            ]
            (refused, *_), *_, best = min(ranks)
            halved = usages[best] <= 0.5 * float(none.usage[images].mean())
            by_strategy[strategy][c] = Configuration(candidates[best], halved and not refused)
    return by_strategy


@dataclass(frozen=True)
class ClassTables:
    """Results on test of the configurations chosen on val."""

    subsets: list[dict[str, Any]]
    """Per strategy, SAE and class, on the class's own images: kept heads, usage and accuracy."""
    false_positives: list[dict[str, Any]]
    """The same configurations on images of all classes."""
    deployed: list[dict[str, Any]]
    """Per strategy and kind of label, over all images, with the selected classes steered; means over SAEs."""


class _Routed(NamedTuple):
    """A class's configuration on the images that some kind of label assigns to the class.

    To keep all images for every class would take memory for their product.
    """

    images: np.ndarray
    hits: np.ndarray
    usage: np.ndarray

    @classmethod
    def of(cls, outcome: Outcome, routes: dict[str, np.ndarray], c: int) -> "_Routed":
        images = np.flatnonzero(np.any([route == c for route in routes.values()], axis=0))
        return cls(images, outcome.hits[images], outcome.usage[images])


def evaluate(
    strategies: Strategies, chosen: dict[str, dict[int, Configuration]], test: LastBlockInputs, none: Outcome,
    routes: dict[str, np.ndarray], classes: list[str], section: config.Pruning, seed: int,
) -> ClassTables:  # fmt: skip
    """Run every configuration on the test images of its class, those routed to it, and images of all classes."""
    tables = ClassTables([], [], [])
    first = np.arange(len(test)) < max(_AT_LEAST, _ON_ALL // len(classes))
    steered: dict[tuple[str, str], dict[int, _Routed]] = {}
    rows_C = [
        {row: by_class[c] for by_class in chosen.values() if c in by_class for row in by_class[c].point.rows}
        for c in range(len(classes))
    ]
    jobs = (
        Job(c, list(rows), {"oracle": np.full(len(test), c)}, _wanted(first, test.labels, routes, c))
        for c, rows in enumerate(rows_C)
    )
    outcomes = run_several(strategies, jobs, test)
    for c, row, outcome in followed(outcomes, sum(map(len, rows_C)), "configurations"):
        key = {**row._asdict(), "class": c, "class_name": classes[c], "selected": rows_C[c][row].selected}
        steered.setdefault((row.strategy, row.sae), {})[c] = _Routed.of(outcome, routes, c)
        images = np.flatnonzero(test.labels == c)
        if len(images):  # an official split need not have every class
            tables.subsets.append({**key, **_subset(outcome, none, images, test.n_heads, section.margin)})
            tables.false_positives.append({**key, **_on_all(outcome, none, test.labels, c, first)})
    for table in (tables.subsets, tables.false_positives):
        table.sort(key=lambda line: (line["class"], line["strategy"] == IN_STREAM))  # which comes last, see run_several
    for strategy, by_class in chosen.items():
        selected = [c for c, configuration in by_class.items() if configuration.selected]
        by_sae = [outcomes for (name, _), outcomes in steered.items() if name == strategy]
        for labels, route in routes.items() if by_sae else ():
            tables.deployed.append(
                {"strategy": strategy, "labels": labels, "classes_selected": len(selected),
                 **_deployed([_merge(none, outcomes, route, selected) for outcomes in by_sae], none, section, seed)}
            )  # fmt: skip
    return tables


def _wanted(first: np.ndarray, labels: np.ndarray, routes: dict[str, np.ndarray], c: int) -> np.ndarray | None:
    """Bool (N,), the images on which the configuration of a class is run; None for all."""
    return None if first.all() else np.any([first, labels == c, *(route == c for route in routes.values())], axis=0)


def _subset(outcome: Outcome, none: Outcome, images: np.ndarray, n_heads: int, margin: float) -> dict[str, Any]:
    share_H = unpack(outcome.codes[images], n_heads).mean(axis=0)
    hits, reference = outcome.hits[images], none.hits[images]
    bound = loss_bound(hits, reference)
    return {
        "heads": ", ".join(f"h{h}" for h in np.flatnonzero(share_H >= 0.5)),
        "usage_none": float(none.usage[images].mean()),
        "usage_last": float(outcome.usage[images].mean()),
        "accuracy_none": float(reference.mean()),
        **wilson(hits),
        **paired(hits, reference),
        "loss_bound": bound,
        "non_inferior": bound < margin,
        "distinct_masks_last": len(np.unique(outcome.codes[images])),
    }


def _on_all(outcome: Outcome, none: Outcome, labels: np.ndarray, c: int, first: np.ndarray) -> dict[str, Any]:
    """Effects on the class, and on the images ``first``, bool (N,)."""
    in_class = labels == c
    others = first & ~in_class
    return {
        "n_own": int(in_class.sum()),
        "recall": float(outcome.hits[in_class].mean()),
        "recall_none": float(none.hits[in_class].mean()),
        "n_others": int(others.sum()),
        "false_positives": int((outcome.predicted[others] == c).sum()),
        "false_positives_none": int((none.predicted[others] == c).sum()),
        "accuracy": float(outcome.hits[first].mean()),
        "usage_last": float(outcome.usage[first].mean()),
    }


def _merge(
    none: Outcome, steered: dict[int, _Routed], route: np.ndarray, selected: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Hits and usage (N,) if the images routed to a selected class get its configuration."""
    hits, usage = none.hits.copy(), none.usage.copy()
    for c in selected:
        own = route[steered[c].images] == c
        images = steered[c].images[own]
        hits[images], usage[images] = steered[c].hits[own], steered[c].usage[own]
    return hits, usage


def _deployed(
    merged: list[tuple[np.ndarray, np.ndarray]], none: Outcome, section: config.Pruning, seed: int
) -> dict[str, Any]:
    hits = np.mean([hits for hits, _ in merged], axis=0)
    (delta,) = bootstrap([hits - none.hits], seed)
    return {
        "accuracy": float(hits.mean()),
        "accuracy_none": float(none.hits.mean()),
        "usage_last": float(np.mean([usage.mean() for _, usage in merged])),
        "usage_none": float(none.usage.mean()),
        "delta": delta["mean"],
        "delta_lo": delta["lo"],
        "delta_hi": delta["hi"],
        "loss_bound": 0 - delta["low"],
        "non_inferior": 0 - delta["low"] < section.margin,
    }
