"""Cause and isolate of interchanges, pair by pair, and their table with intervals.

Shapes: P pairs, A = 2 attributes, n images.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from sparsight.bench.at_site import Embedder
from sparsight.bench.disentangling.interchange import Features
from sparsight.bench.disentangling.readout import Readout
from sparsight.common.intervals import bootstrap
from sparsight.common.progress import followed
from sparsight.common.slices import row_slices

_IMAGES, _ROWS = 125, 4096  # at most so many pairs, and of several tokens so many edited rows, at a time


class Key(NamedTuple):
    """An interchange."""

    method: str
    sae: str
    """With the method, a :class:`sparsight.bench.disentangling.statistics.Name`."""
    attribute: int
    features: int
    rule: str
    """How features were chosen; empty if there was no choice."""


@dataclass(frozen=True)
class Outcome:
    """What an interchange does to every pair."""

    cause: np.ndarray
    """Whether the attribute is read as the donor's, bool (P,)."""
    isolate: np.ndarray
    """Whether the other attribute is still read as the base's, bool (P,)."""

    @property
    def score(self) -> np.ndarray:
        """The mean of both, (P,)."""
        return (self.cause.astype(np.float64) + self.isolate) / 2


@torch.no_grad()
def outcomes(
    model: Embedder, pairs_P2: np.ndarray, values_An: np.ndarray, readouts: Sequence[Readout],
    edits: Mapping[Key, tuple[Features, np.ndarray]],
) -> dict[Key, Outcome]:  # fmt: skip
    """The outcome of every edit.

    Args:
        model: the model with the images of the pairs.
        pairs_P2: base and donor of every pair.
        values_An: number of each image's value, for both attributes.
        readouts: of both attributes.
        edits: the features and which of them are taken from the donor, int (S,).
    """
    features = list({id(one): one for one, _ in edits.values()}.values())
    found: dict[Key, list[list[np.ndarray]]] = {key: [[], []] for key in edits}
    batches = list(row_slices(len(pairs_P2), max(1, min(_IMAGES, _ROWS // model.rows_per_image))))
    for batch in followed(batches, len(batches), "batches of pairs"):
        bases, donors = pairs_P2[batch].T
        stream = model.stream(bases)
        base_RD, donor_RD = model.rows(stream), model.rows(model.stream(donors))
        differences = {id(one): one.difference(base_RD, donor_RD) for one in features}
        for key, (one, chosen) in edits.items():
            embedding_BE = model.embedding(stream, one.move(base_RD, differences[id(one)], chosen))
            predicted = [readout(embedding_BE) for readout in readouts]
            own, other = key.attribute, 1 - key.attribute
            found[key][0].append(predicted[own] == values_An[own, donors])
            found[key][1].append(predicted[other] == values_An[other, bases])
    return {key: Outcome(*(np.concatenate(parts) for parts in both)) for key, both in found.items()}


def best_rules(on_val: Mapping[Key, Outcome]) -> set[Key]:
    """Of edits that differ in their rule alone, the one of the largest mean score; of equals the first."""
    best: dict[Key, tuple[float, Key]] = {}
    for key, outcome in on_val.items():
        of = key._replace(rule="")
        score = float(outcome.score.mean())
        if of not in best or score > best[of][0]:
            best[of] = score, key
    return {key for _, key in best.values()}


def table(
    names: Sequence[str], on_test: Mapping[Key, Outcome], on_val: Mapping[Key, Outcome], seed: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of all edits, and the lead of the SAEs over every other method.

    Intervals are 95 %, from a bootstrap over the pairs, which draws the same pairs for all edits.

    Args:
        names: the attributes' names.
        on_test: outcomes of the chosen edits.
        on_val: their outcomes, and those of edits that were not chosen.
        seed: seed of the bootstrap.

    Returns:
        Rows with attribute, method, sae, features, rule (sae and rule may be None), n, score_val, and cause, isolate
        and score with ``_lo`` and ``_hi``; and lines with attribute, features, control, n_saes, delta, delta_lo and
        delta_hi: the score of the SAEs minus that of the control, both means over seeds.
    """
    pooled: dict[tuple[int, int, str], list[np.ndarray]] = {}
    columns: list[np.ndarray] = []
    for key, outcome in on_test.items():
        columns += [outcome.cause, outcome.isolate, outcome.score]
        pooled.setdefault((key.attribute, key.features, key.method), []).append(outcome.score)
    compared = [key for key in pooled if key[2] != "sae" and (*key[:2], "sae") in pooled]
    columns += [_mean(pooled[(*key[:2], "sae")]) - _mean(pooled[key]) for key in compared]
    intervals = iter(bootstrap(columns, seed))
    rows = []
    for key, outcome in on_test.items():
        row: dict[str, Any] = {
            "attribute": names[key.attribute], "method": key.method, "sae": key.sae or None,
            "features": key.features, "rule": key.rule or None, "n": len(outcome.cause),
            "score_val": float(on_val[key].score.mean()),
        }  # fmt: skip
        for name, interval in zip(("cause", "isolate", "score"), intervals, strict=False):
            row |= {name: interval["mean"], f"{name}_lo": interval["lo"], f"{name}_hi": interval["hi"]}
        rows.append(row)
    leads = [
        {"attribute": names[attribute], "features": features, "control": method,
         "n_saes": len(pooled[attribute, features, "sae"]), "delta": interval["mean"], "delta_lo": interval["lo"],
         "delta_hi": interval["hi"]}
        for (attribute, features, method), interval in zip(compared, intervals, strict=True)
    ]  # fmt: skip
    return rows, leads


def _mean(scores: Iterable[np.ndarray]) -> np.ndarray:
    return np.asarray(np.mean(list(scores), axis=0))
