"""Passes in which the parts of a batch run side by side, with and without gradients.

The models that are trained on processors here are small: two cores that share each of their operations wait for each
other as long as they gain. So each core takes a part of the batch (docs/benchmarks.md has the figures). How a batch is
parted never depends on the number of cores, and gradients are added in the order of the parts: the cores change no bit
of the result.

Shapes: B batch.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from sparsight.config.compute import n_microbatches


class MicroBatches:
    """Forward and backward passes of a model, part by part of the batch.

    Args:
        n_parallel: parts that run at the same time.
    """

    def __init__(self, n_parallel: int) -> None:
        self._pool = ThreadPoolExecutor(max(1, n_parallel))

    def forward(self, forward: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        """What ``forward`` makes of all rows, (B, ...), without gradients; arguments as of :meth:`backward`."""
        without_gradients = torch.no_grad()(forward)  # a `with` would hold in this thread alone
        return torch.cat(list(self._pool.map(without_gradients, _split(inputs))))

    def backward(
        self, forward: Callable[[Tensor], Tensor], inputs: Tensor, loss: Callable[[Tensor], dict[str, Tensor]],
        parameters: Iterable[Tensor],
    ) -> dict[str, Tensor]:  # fmt: skip
        """What ``loss(forward(inputs))`` returns, with the gradient of its ``loss`` in every parameter's ``grad``.

        Args:
            forward: of some rows; must not depend on the others, nor draw random numbers. Runs in several threads.
            inputs: (B, ...).
            loss: of what forward made of all rows, (B, ...). May use parameters of its own.
            parameters: what is trained; frozen ones are left alone, what the others hold in ``grad`` is forgotten.
        """
        parameters = [parameter for parameter in parameters if parameter.requires_grad]
        outputs = list(self._pool.map(forward, _split(inputs)))
        whole = torch.cat([output.detach() for output in outputs]).requires_grad_()
        for parameter in parameters:
            parameter.grad = None
        scalars = loss(whole)
        scalars["loss"].backward()
        assert whole.grad is not None

        def gradients(output: Tensor, of_output: Tensor) -> tuple[Tensor | None, ...]:
            return torch.autograd.grad(output, parameters, of_output, allow_unused=True)

        by_part = self._pool.map(gradients, outputs, whole.grad.split([len(output) for output in outputs]))
        for found in by_part:
            for parameter, gradient in zip(parameters, found, strict=True):
                if gradient is not None:
                    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        return scalars


def _split(inputs: Tensor) -> tuple[Tensor, ...]:
    """The parts; one on a GPU, which fills itself."""
    return inputs.chunk(1 if inputs.is_cuda else n_microbatches(len(inputs)))
