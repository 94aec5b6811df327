"""Outcomes of table rows: predictions, masks and head usage of every image.

Shapes: N images, H heads.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from sparsight.pruning.last_block import LastBlockInputs
from sparsight.pruning.strategies import Decided, Row, Strategies

_AT_A_TIME = 2**25  # masks, or numbers of edits, per call for predictions


@dataclass(frozen=True)
class Outcome:
    """Outcome of every image under one row."""

    predicted: np.ndarray
    """(N,) predicted classes."""
    hits: np.ndarray
    """bool (N,), whether each image is classified correctly."""
    codes: np.ndarray
    """(N,) codes of the last block's masks."""
    usage: np.ndarray
    """(N,) shares of the last block's heads that are kept."""


def run(
    strategies: Strategies, rows: list[Row], inputs: LastBlockInputs, routes: dict[str, np.ndarray]
) -> Iterator[tuple[Row, Outcome]]:
    """Each row with its outcome. ``routes`` is, by kind of label, the class whose configuration an image gets."""
    waiting: dict[bool, list[Decided]] = {False: [], True: []}  # by whether the row edits the stream
    limits = {False: _AT_A_TIME // len(inputs), True: _AT_A_TIME // inputs.read_ND.numel()}
    for decided in strategies.codes(rows, inputs, routes):
        edited = decided.edit_ND is not None
        waiting[edited].append(decided)
        if len(waiting[edited]) >= limits[edited]:
            yield from _outcomes(waiting[edited], inputs)
            waiting[edited] = []
    for rest in waiting.values():
        yield from _outcomes(rest, inputs)


def _outcomes(decided: list[Decided], inputs: LastBlockInputs) -> Iterator[tuple[Row, Outcome]]:
    if not decided:
        return
    codes_SN = np.stack([decision.codes for decision in decided])
    edits = [decision.edit_ND for decision in decided if decision.edit_ND is not None]
    predictions = inputs.predict_edited(codes_SN, torch.stack(edits)) if edits else inputs.predict(codes_SN)
    for decision, by_block in zip(decided, predictions, strict=True):
        predicted = inputs.skipped if decision.row.strategy == "skip-block" else by_block
        usage = np.bitwise_count(decision.codes) / inputs.n_heads
        yield decision.row, Outcome(predicted, predicted == inputs.labels, decision.codes, usage)
