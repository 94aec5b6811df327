"""The pretended device itself: the rules of CUDA, what it counts, page-locked memory and streams."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pretended_cuda import Activity

from sparsight.common.devices import sent

DEVICE = torch.device("cuda")


def on_device(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, device=DEVICE)


@pytest.mark.parametrize(
    ("forbidden", "message"),
    [
        (lambda: on_device(3) + torch.ones(3), "same device"),
        (lambda: torch.ones(3)[on_device(2).long()], "indices should be either on cpu"),
        (lambda: on_device(3).pin_memory(), "cannot pin"),
        (lambda: on_device(3).cumsum(dim=0), "deterministic"),
        (lambda: torch.rand(3, device=DEVICE, generator=torch.Generator()), "generator"),
        (lambda: on_device(3).normal_(generator=torch.Generator()), "generator"),
    ],
    ids=["devices", "indices", "pinning", "determinism", "random numbers", "random numbers in place"],
)
def test_the_pretended_device_has_the_rules_of_cuda(
    forbidden: Callable[[], object], message: str, cuda: Activity
) -> None:
    with pytest.raises(RuntimeError, match=message):
        forbidden()
    with pytest.raises(TypeError, match="numpy"):
        np.asarray(on_device(3))


def test_the_pretended_device_counts(cuda: Activity) -> None:
    x = torch.ones(4, 3).to(DEVICE)
    assert (x.device, x.device == DEVICE) == (torch.device("cuda", 0), False)
    (x.T @ x + 1).sum().item()
    x[x > 0]
    assert sum(cuda.copies.values()) == 1
    assert cuda.operations == {"mm": 1, "add": 1, "sum": 1, "gt": 1, "index": 1}
    assert sum(cuda.waits.values()) == 2, "of the number, and of the places of the mask"


def test_a_copy_of_page_locked_memory_waits_only_when_told_to(cuda: Activity) -> None:
    there, back = torch.ones(3).pin_memory(), torch.zeros(3, pin_memory=True)
    x = sent(torch.ones(3), DEVICE)
    back.copy_(x, non_blocking=True)
    assert (sum(cuda.waits.values()), back.tolist()) == (0, [0, 0, 0])
    torch.cuda.current_stream().synchronize()
    assert (sum(cuda.waits.values()), back.tolist()) == (1, [1, 1, 1])
    back.copy_(x)
    assert sum(cuda.waits.values()) == 2
    there.to(DEVICE, non_blocking=True)
    there.zero_()
    with pytest.raises(RuntimeError, match="page-locked memory was changed"):
        torch.cuda.synchronize()


@pytest.mark.parametrize("told", [lambda a, b: a.wait_stream(b), lambda a, b: a.wait_event(b.record_event()), None])
def test_a_stream_that_has_not_waited_for_another_may_not_read_its_work(told: Any, cuda: Activity) -> None:
    side, main = torch.cuda.Stream(), torch.cuda.current_stream()
    with torch.cuda.stream(side):
        x = torch.ones(3, device=DEVICE) * 2
    if told is None:
        with pytest.raises(RuntimeError, match="let it wait"):
            x + 1
    else:
        told(main, side)
        assert (x + 1).tolist() == [3, 3, 3]
