"""Adam in place, by the fused operator of PyTorch.

``torch.optim`` would run the same operator, but its first optimiser imports TorchDynamo: 1.2 seconds and 150 MB in
every process that trains.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

BETAS, EPS = (0.9, 0.999), 6.25e-10
"""As Gao et al. (arXiv 2406.04093, appendix A)."""


class Adam:
    """Adam (Kingma and Ba 2015, algorithm 1) on the memory of some parameters.

    Args:
        parameters: by name; they change in place.
        lr: learning rate.
    """

    def __init__(self, parameters: Mapping[str, Tensor], lr: float) -> None:
        self.lr = lr
        self.rows = {name: _rows(p.detach()) for name, p in parameters.items()}
        """The parameters, as views with contiguous rows."""
        self.state = {name: _state(rows) for name, rows in self.rows.items()}
        """By name: the number of steps, ``step``, and the moments, ``exp_avg`` and ``exp_avg_sq``."""

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], clip: Tensor, failed: Tensor | None = None) -> None:
        """One step of the parameters that have a gradient.

        Args:
            gradients: by name, of the parameters' shapes; they are divided in place.
            clip: scalar, by which the gradients are divided. The operator does so while it reads them, so clipping
                needs no extra pass.
            failed: scalar; 1 leaves everything as it was. Only a GPU takes it.
        """
        states = [self.state[name] for name in gradients]
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, 1)
        torch._fused_adam_(
            [self.rows[name] for name in gradients], [_rows(gradient) for gradient in gradients.values()],
            [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states], [], steps,
            lr=self.lr, beta1=BETAS[0], beta2=BETAS[1], weight_decay=0.0, eps=EPS, amsgrad=False, maximize=False,
            grad_scale=clip, found_inf=failed,
        )  # fmt: skip
        if failed is not None:
            torch._foreach_sub_(steps, [failed] * len(steps))

    def tensors(self) -> dict[str, Tensor]:
        """Parameters, moments and numbers of steps, under flat names."""
        tensors = {}
        for name, state in self.state.items():
            tensors[name] = self.rows[name]
            tensors |= {f"{name}.{slot}": value for slot, value in state.items()}
        return tensors


def _rows(p: Tensor) -> Tensor:
    """A view with contiguous rows. The operator would copy a transposed weight, at ten times its cost."""
    return p.T if p.ndim == 2 and p.T.is_contiguous() else p


def _state(rows: Tensor) -> dict[str, Tensor]:
    return {
        "step": torch.zeros((), device=rows.device),
        "exp_avg": torch.zeros_like(rows),
        "exp_avg_sq": torch.zeros_like(rows),
    }
