"""Outcomes of table rows: predictions, masks and head usage of every image.

Shapes: N images, H heads.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from sparsight.pruning.last_block import LastBlockInputs
from sparsight.pruning.strategies import Decided, Row, Strategies

_AT_A_TIME = 2**24  # masks and numbers of edits per call for predictions


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
    for _, row, outcome in run_several(strategies, [(0, rows, routes)], inputs):
        yield row, outcome


def run_several(
    strategies: Strategies, jobs: Iterable[tuple[int, list[Row], dict[str, np.ndarray]]], inputs: LastBlockInputs
) -> Iterator[tuple[int, Row, Outcome]]:
    """Rows under several routes: of each job its number, and each of its rows with the outcome.

    Rows are predicted many at a time, whatever job they are of: an edit costs little beside a pass over the images.
    """
    waiting: dict[bool, list[tuple[int, Decided]]] = {False: [], True: []}  # by whether the row edits the stream
    n_numbers = {False: 0, True: 0}
    for number, rows, routes in jobs:
        for decided in strategies.codes(rows, inputs, routes):
            edited = decided.edit is not None
            waiting[edited].append((number, decided))
            n_numbers[edited] += _numbers(decided)
            if n_numbers[edited] >= _AT_A_TIME:
                yield from _outcomes(waiting[edited], inputs)
                waiting[edited], n_numbers[edited] = [], 0
    for rest in waiting.values():
        yield from _outcomes(rest, inputs)


def _numbers(decided: Decided) -> int:
    """Masks and numbers of edits that wait for a prediction."""
    edits = 0 if decided.edit is None else decided.edit.weights_NM.numel() + decided.edit.latents_NM.numel()
    return len(decided.codes) + edits


def _outcomes(waiting: list[tuple[int, Decided]], inputs: LastBlockInputs) -> Iterator[tuple[int, Row, Outcome]]:
    if not waiting:
        return
    numbers, decided = zip(*waiting, strict=True)
    codes_SN = np.stack([decision.codes for decision in decided])
    edits = [decision.edit for decision in decided if decision.edit is not None]
    predictions = inputs.predict_edited(codes_SN, edits) if edits else inputs.predict(codes_SN)
    for number, decision, by_block in zip(numbers, decided, predictions, strict=True):
        predicted = inputs.skipped if decision.row.strategy == "skip-block" else by_block
        usage = np.bitwise_count(decision.codes) / inputs.n_heads
        yield number, decision.row, Outcome(predicted, predicted == inputs.labels, decision.codes, usage)
