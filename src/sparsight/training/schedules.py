"""Learning-rate schedules: factors on the peak, by the number of the step.

Steps count from 1 to ``total``. No step has factor 0, as it would learn nothing: a decay to 0 would reach it in the
step after the last one.
"""

import math

_WARMUP_STEPS = 10  # one step of so many belongs to the warm-up, rounded up
_DECAY_FROM = 0.8


def warmup_cosine(step: int, total: int) -> float:
    """Linear over the first tenth of the steps, whose last one has factor 1, then half a cosine to 0."""
    warmup = math.ceil(total / _WARMUP_STEPS)
    if step <= warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup + 1)))


def linear_decay(step: int, total: int) -> float:
    """1, then linear to 0 over the last fifth of the steps, without warm-up (as for Switch SAEs, arXiv 2410.08201)."""
    return min(1.0, (1 - (step - 1) / total) / (1 - _DECAY_FROM))
