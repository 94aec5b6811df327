"""Outcomes of table rows: predictions, masks and head usage of every image.

Shapes: N images, H heads.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

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


class Job(NamedTuple):
    """Rows to run together."""

    number: int
    rows: list[Row]
    routes: dict[str, np.ndarray]
    """By kind of label, the class whose configuration an image gets, (N,)."""
    wanted: np.ndarray | None = None
    """bool (N,), the images whose outcome is asked for, None for all; what others get says nothing."""


def run(
    strategies: Strategies, rows: list[Row], inputs: LastBlockInputs, routes: dict[str, np.ndarray]
) -> Iterator[tuple[Row, Outcome]]:
    """Each row with its outcome; see :class:`Job` for ``routes``."""
    for _, row, outcome in run_several(strategies, [Job(0, rows, routes)], inputs):
        yield row, outcome


def run_several(
    strategies: Strategies, jobs: Iterable[Job], inputs: LastBlockInputs
) -> Iterator[tuple[int, Row, Outcome]]:
    """Rows under several routes: of each job its number, and each of its rows with the outcome.

    Rows are predicted many at a time, whatever job they are of: an edit costs little beside a pass over the images.
    """
    waiting: dict[bool, list[tuple[Job, Decided]]] = {False: [], True: []}  # by whether the row edits the stream
    n_numbers = {False: 0, True: 0}
    for job in jobs:
        for decided in strategies.codes(job.rows, inputs, job.routes):
            edited = decided.edit is not None
            waiting[edited].append((job, decided))
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


def _outcomes(waiting: list[tuple[Job, Decided]], inputs: LastBlockInputs) -> Iterator[tuple[int, Row, Outcome]]:
    if not waiting:
        return
    jobs, decided = zip(*waiting, strict=True)
    unsteered = inputs.unsteered  # of images that are not asked for: no mask that is not run anyway
    codes = [
        decision.codes if job.wanted is None else np.where(job.wanted, decision.codes, unsteered)
        for job, decision in waiting
    ]
    codes_SN = np.stack(codes)
    edits = [decision.edit for decision in decided if decision.edit is not None]
    wanted = [job.wanted for job in jobs]
    predictions = inputs.predict_edited(codes_SN, edits, wanted) if edits else inputs.predict(codes_SN)
    for job, decision, own_codes, by_block in zip(jobs, decided, codes, predictions, strict=True):
        predicted = inputs.skipped if decision.row.strategy == "skip-block" else by_block
        usage = np.bitwise_count(own_codes) / inputs.n_heads
        yield job.number, decision.row, Outcome(predicted, predicted == inputs.labels, own_codes, usage)
