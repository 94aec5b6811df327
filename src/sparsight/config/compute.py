"""The machine that a run uses."""

from dataclasses import dataclass, field
from typing import Literal

from sparsight.common.digests import FREE
from sparsight.config.checks import not_negative, positive


@dataclass(frozen=True)
class Compute:
    """On what the stages run."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Where tensors live. Results are byte-equal on the same kind of device only."""
    threads: int = 2
    """CPU threads of an operation, in every stage. Part of the result: sums depend on how they are split. For
    models as small as the default run's one is as fast as two; jobs and parts of a batch run side by side instead."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the forward passes that fill the activation store: full, or bfloat16 autocast, which is faster
    where the processor has it and differs in the third digit."""
    workers: int = field(default=0, metadata=FREE)
    """Processes that decode images beside each stage; 0 decodes in threads of the stage itself, which is
    faster for small images. Never changes a result."""

    def __post_init__(self) -> None:
        positive(self, "threads")
        not_negative(self, "workers")


_ROWS = 32  # with fewer in a part, starting operations takes a tenth to a quarter of the processor time


def n_microbatches(n_rows: int) -> int:
    """Micro-batches into which so many rows of a training batch are split (:mod:`sparsight.training.microbatches`)."""
    return max(1, min(8, n_rows // _ROWS))
