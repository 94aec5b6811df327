"""A batch in parts has the values and gradients of the whole batch, whatever runs at the same time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sparsight.training.microbatches import MicroBatches


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.LayerNorm(7), nn.Linear(7, 3)).double()


@settings(deadline=None)
@given(rows=st.integers(1, 70), n_parallel=st.integers(1, 5))
def test_gradients_are_those_of_the_whole_batch(rows: int, n_parallel: int) -> None:
    net, scale = model(), torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    unused, frozen = torch.ones(2, requires_grad=True), torch.ones(2)
    parameters = [*net.parameters(), scale]
    x_BD = torch.randn(rows, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(rows))

    def loss(outputs_BC: Tensor) -> dict[str, Tensor]:
        """Reads all rows together, and a parameter that the forward pass does not know."""
        return {"loss": (scale * outputs_BC - outputs_BC.mean(dim=0)).square().mean() * scale, "rows": outputs_BC.sum()}

    for parameter in (*parameters, unused):
        parameter.grad = torch.full_like(parameter, 9.0)  # of a step before
    scalars = MicroBatches(n_parallel).backward(net, x_BD, loss, [*parameters, unused, frozen])
    expected = loss(net(x_BD))
    wanted = torch.autograd.grad(expected["loss"], parameters)
    for name, value in expected.items():
        torch.testing.assert_close(scalars[name], value)
    for parameter, gradient in zip(parameters, wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
    assert unused.grad is None and frozen.grad is None


@given(rows=st.integers(1, 70), n_parallel=st.integers(1, 5))
def test_outputs_are_those_of_the_whole_batch(rows: int, n_parallel: int) -> None:
    net = model()
    x_BD = torch.randn(rows, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(rows))
    found = MicroBatches(n_parallel).forward(net, x_BD)
    torch.testing.assert_close(found, net(x_BD).detach())
    assert not found.requires_grad


def test_an_error_in_a_part_is_raised() -> None:
    def refuse(x_BD: Tensor) -> Tensor:
        raise RuntimeError("does not fit")

    with pytest.raises(RuntimeError, match="does not fit"):
        MicroBatches(2).backward(refuse, torch.ones(32, 2), lambda x: {"loss": x.sum()}, [])
