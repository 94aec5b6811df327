"""Passes that run the micro-batches of a batch in parallel, with and without gradients.

Models trained on CPUs here are small. If two cores share each operation, they lose as much time waiting for each other
as they gain, so each core takes a part of the batch instead (figures in docs/benchmarks.md). The parts do not depend on
the number of cores, and their gradients are added in order. So the number of cores changes no bit of the result.

Shapes: B batch.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from sparsight.config.compute import n_microbatches


class MicroBatches:
    """Forward and backward passes of a model over the parts of a batch.

    Args:
        n_parallel: number of parts that run at the same time.
    """

    def __init__(self, n_parallel: int) -> None:
        self._pool = ThreadPoolExecutor(max(1, n_parallel))

    def forward(self, forward: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        """Output of ``forward`` for all rows, (B, ...), without gradients; arguments as in :meth:`backward`."""
        without_gradients = torch.no_grad()(forward)  # a `with` would affect this thread only
        return torch.cat(list(self._pool.map(without_gradients, _split(inputs))))

    def backward(
        self, forward: Callable[[Tensor], Tensor], inputs: Tensor, loss: Callable[[Tensor], dict[str, Tensor]],
        parameters: Iterable[Tensor],
    ) -> dict[str, Tensor]:  # fmt: skip
        """Return ``loss(forward(inputs))`` and put the gradient of its ``loss`` into every parameter's ``grad``.

        Args:
            forward: maps some rows to outputs. Must not depend on other rows nor draw random numbers. Runs in several
                threads.
            inputs: (B, ...).
            loss: maps the outputs of all rows, (B, ...), to scalars. May use parameters of its own.
            parameters: parameters to train. Frozen ones are skipped; the others' previous ``grad`` is discarded.
        """
        parameters = [parameter for parameter in parameters if parameter.requires_grad]
        outputs = list(self._pool.map(forward, _split(inputs)))
        all_outputs = torch.cat([output.detach() for output in outputs]).requires_grad_()
        for parameter in parameters:
            parameter.grad = None
        scalars = loss(all_outputs)
        scalars["loss"].backward()
        assert all_outputs.grad is not None

        def gradients(output: Tensor, of_output: Tensor) -> tuple[Tensor | None, ...]:
            return torch.autograd.grad(output, parameters, of_output, allow_unused=True)

        by_part = self._pool.map(gradients, outputs, all_outputs.grad.split([len(output) for output in outputs]))
        for part_gradients in by_part:
            for parameter, gradient in zip(parameters, part_gradients, strict=True):
                if gradient is not None:
                    parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        return scalars


def _split(inputs: Tensor) -> tuple[Tensor, ...]:
    """The parts of a batch; a single part on a GPU, which one batch keeps busy."""
    return inputs.chunk(1 if inputs.is_cuda else n_microbatches(len(inputs)))
