"""Operations on sparse codes: only the encoder product is dense, everything else touches active latents only.

This module selects the backend: ``cpu`` for a CPU tensor, ``triton`` for a CUDA tensor, ``reference`` for any other.
The environment variable ``SPARSIGHT_KERNELS`` forces one. All backends give the same values and gradients up to
rounding. Each gives the same bits on every run.

Shapes: B batch, D width (d_in), F latents (d_sae), K active latents (k), E experts.
"""

import os
from importlib import import_module
from typing import cast

from torch import Tensor

from sparsight.common.errors import SparsightError
from sparsight.kernels import functions

__all__ = ["BACKENDS", "batch_topk", "chosen", "decode", "routed_topk", "select", "topk"]

BACKENDS = ("reference", "cpu", "triton")


def topk(
    x_BD: Tensor, W_enc_DF: Tensor, b_enc_F: Tensor, k: int, center_D: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """ReLU of the k largest entries of (x - center) W_enc + b_enc (Gao et al. 2024, arXiv 2406.04093, equation 3).

    Args:
        x_BD: activations.
        center_D: b_dec; None if it is already subtracted.

    Returns:
        values (B, K), 0 where a chosen pre-activation is not positive, and indices (B, K) int64, in no
        particular order. Gradients reach x, W_enc, b_enc and center through the positive entries.

    Raises:
        SparsightError: ``SPARSIGHT_KERNELS`` names an unknown backend.
    """
    return functions.topk(_backend(x_BD), x_BD, W_enc_DF, b_enc_F, k, center_D)


def select(x_BD: Tensor, W_enc_DF: Tensor, b_enc_F: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """The selection of :func:`topk` alone: pre-activations (B, K), positive or not, and indices, without gradients.

    Raises:
        SparsightError: ``SPARSIGHT_KERNELS`` names an unknown backend.
    """
    return functions.select(_backend(x_BD), x_BD, W_enc_DF, b_enc_F, k)


def chosen(
    x_BD: Tensor, W_enc_DF: Tensor, b_enc_F: Tensor | None, pre_BK: Tensor, indices_BK: Tensor,
    center_D: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The values (B, K) of :func:`topk` with their gradients, for a selection that was made before.

    Raises:
        SparsightError: ``SPARSIGHT_KERNELS`` names an unknown backend.
    """
    return functions.chosen(_backend(x_BD), x_BD, W_enc_DF, b_enc_F, pre_BK, indices_BK, center_D)


def routed_topk(
    x_BD: Tensor, W_enc_DF: Tensor, b_enc_F: Tensor | None, expert_B: Tensor, n_experts: int, k: int,
    center_D: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Like :func:`topk`, but each row uses only its expert's latents (Switch SAE, arXiv 2410.08201, equation 6).

    Expert e owns the latents from e F / E to (e + 1) F / E. The other experts' latents are not computed, neither
    forward nor backward.

    Args:
        x_BD: activations.
        b_enc_F: biases, or None.
        expert_B: int64, the expert of each row; some experts may have no rows.
        center_D: b_pre, see :func:`topk`.

    Returns:
        values (B, K) and indices (B, K) into all F latents.

    Raises:
        SparsightError: ``SPARSIGHT_KERNELS`` names an unknown backend.
    """
    return functions.routed_topk(_backend(x_BD), x_BD, W_enc_DF, b_enc_F, expert_B, n_experts, k, center_D)


def batch_topk(
    x_BD: Tensor, W_enc_DF: Tensor, b_enc_F: Tensor, k: int, ends: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """On a GPU, the B k largest entries of x W_enc + b_enc, without gradients, in shapes that no value decides.

    Args:
        x_BD: activations, b_dec already subtracted.
        ends: rising int64 (P,), without 0 and F; cuts the latents into P + 1 ranges that share no part.

    Returns:
        pre-activations and latents in parts, (V, W) both, where what is missing is an entry of value 0; and the group
        of each part, (V,), rising: the number of its range times B, plus its row.
    """
    return functions.batch_topk(x_BD, W_enc_DF, b_enc_F, k, ends)


def decode(values_BK: Tensor, indices_BK: Tensor, W_dec_FD: Tensor) -> Tensor:
    """Sum of the decoder rows weighted by the values, (B, D), without bias; differentiable in values and W_dec.

    An entry with value 0 is padding, whatever its index: it contributes to no gradient and receives none.

    Raises:
        SparsightError: ``SPARSIGHT_KERNELS`` names an unknown backend.
    """
    return functions.decode(_backend(values_BK), values_BK, indices_BK, W_dec_FD)


def _backend(tensor: Tensor) -> functions.Backend:
    default = {"cpu": "cpu", "cuda": "triton"}.get(tensor.device.type, "reference")
    name = os.environ.get("SPARSIGHT_KERNELS") or default
    if name not in BACKENDS:
        raise SparsightError(f"SPARSIGHT_KERNELS={name}: no such backend; use one of {', '.join(BACKENDS)}")
    return cast(functions.Backend, import_module(f"sparsight.kernels.{name}"))
