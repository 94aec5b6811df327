"""Training of SAEs that stops in the middle, for tests of how it continues."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from sparsight.sae import Trainer


@contextmanager
def interrupted(monkeypatch: pytest.MonkeyPatch, step: int) -> Iterator[None]:
    """Training within the context writes a checkpoint after every step, and is interrupted in this one."""
    own, calls = Trainer.step, [0]

    def failing(self: Trainer, *rest: Any) -> Any:
        calls[0] += 1
        if calls[0] == step:
            raise KeyboardInterrupt
        return own(self, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("sparsight.training.loop.Checkpoint.due", True)
        patch.setattr(Trainer, "step", failing)
        yield
