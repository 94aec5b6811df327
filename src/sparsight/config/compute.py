"""How a run uses the machine."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from sparsight.common.digests import FREE
from sparsight.config.activations import Activations
from sparsight.config.bounds import Count, CountOrZero
from sparsight.config.checks import Section


@dataclass(frozen=True)
class Compute(Section):
    """How the stages use the machine."""

    device: Literal["cpu", "cuda"] = "cpu"
    """Device that holds the tensors. Results are byte-identical only on the same kind of device."""
    threads: Count = 2
    """CPU threads per operation, in every stage. They affect the results, because sums depend on how they are split.
    For models as small as the default run's, one thread is as fast as two; jobs and parts of a batch run in parallel
    instead."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Precision of the forward passes that fill the activation store, and of nothing else: all other stages compute in
    fp32 (an SAE's own training: ``bf16`` in its section). A change makes the store again and what is computed from it,
    not images and backbones. ``bf16`` (autocast) is faster on a GPU and on a processor with instructions for it, and
    many times slower on another; values differ in the third digit."""
    workers: CountOrZero = field(default=0, metadata=FREE)
    """Number of processes that decode images for each stage. 0 decodes in threads of the stage itself, which is
    faster for small images; beside a GPU they are as many as the stage may use cores. Never changes a result."""

    def of_stage(self, section: Any) -> "Compute":
        """What of it decides the result of the stage with this section: ``precision`` counts for extraction alone."""
        return self if isinstance(section, Activations) else replace(self, precision="fp32")


_ROWS = 32  # with fewer rows per part, launching operations takes a tenth to a quarter of the CPU time


def n_microbatches(n_rows: int) -> int:
    """Number of micro-batches into which a batch of ``n_rows`` is split (:mod:`sparsight.training.microbatches`)."""
    return max(1, min(8, n_rows // _ROWS))
