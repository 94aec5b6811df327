"""What rows of a table do to images: predictions, masks and head usage.

Shapes: N images, H heads.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from sparsight.pruning.last_block import LastBlockInputs
from sparsight.pruning.strategies import Decided, Row, Strategies

_AT_A_TIME = 2**25  # masks whose predictions are asked for together


@dataclass(frozen=True)
class Outcome:
    """What happened to each image under one row."""

    predicted: np.ndarray
    """(N,) classes."""
    hits: np.ndarray
    """bool (N,), classified correctly."""
    codes: np.ndarray
    """(N,) masks of the last block."""
    usage: np.ndarray
    """(N,) shares of its heads that are kept."""


def run(
    strategies: Strategies, rows: list[Row], inputs: LastBlockInputs, routes: dict[str, np.ndarray]
) -> Iterator[tuple[Row, Outcome]]:
    """Each row with its outcome; ``routes`` holds the class whose configuration an image gets, by kind of label."""
    waiting: dict[bool, list[Decided]] = {False: [], True: []}  # with and without an edit of the stream
    several = {False: _AT_A_TIME // len(inputs), True: _AT_A_TIME // inputs.cls_ND.numel()}
    for decided in strategies.codes(rows, inputs, routes):
        edited = decided.edit_ND is not None
        waiting[edited].append(decided)
        if len(waiting[edited]) >= several[edited]:
            yield from _outcomes(waiting[edited], inputs)
            waiting[edited] = []
    for rest in waiting.values():
        yield from _outcomes(rest, inputs)


def _outcomes(decided: list[Decided], inputs: LastBlockInputs) -> Iterator[tuple[Row, Outcome]]:
    if not decided:
        return
    codes_SN = np.stack([one.codes for one in decided])
    edits = [one.edit_ND for one in decided if one.edit_ND is not None]
    found = inputs.predict_edited(codes_SN, torch.stack(edits)) if edits else inputs.predict(codes_SN)
    for one, own in zip(decided, found, strict=True):
        predicted = inputs.skipped if one.row.strategy == "skip-block" else own
        usage = np.bitwise_count(one.codes) / inputs.n_heads
        yield one.row, Outcome(predicted, predicted == inputs.labels, one.codes, usage)
