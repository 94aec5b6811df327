"""The CPU backend: embedding bags for sums over active latents, a sampled product for products at active latents.

Only the encoder product has size (B, F). It is computed in blocks of rows that stay in the cache.

Shapes: B batch, D width (d_in), F latents (d_sae), K active latents (k), N active entries.
"""

import warnings

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from sparsight.kernels import dense, ordering, screening

_ROWS = 256  # new memory costs page faults; a block of pre-activations this small reuses its memory

with warnings.catch_warnings(action="ignore", category=UserWarning):
    torch.sparse_csr_tensor([0], [], [], (0, 0))  # triggers PyTorch's one-time warning that CSR tensors are in beta


def select(x_BD: Tensor, W_enc_DF: Tensor, b_enc_F: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """See :class:`sparsight.kernels.functions.Backend`."""
    if _fast_bf16() and screening.worthwhile(x_BD, W_enc_DF, k):
        return screening.select(x_BD, W_enc_DF, b_enc_F, k, dots, _dense_select)
    return _dense_select(x_BD, W_enc_DF, b_enc_F, k)


def combine(values_BK: Tensor, indices_BK: Tensor, W_FD: Tensor) -> Tensor:
    """See :class:`sparsight.kernels.functions.Backend`."""
    active_BK = values_BK != 0
    latents_N, values_N = indices_BK.masked_select(active_BK), values_BK.masked_select(active_BK)
    return _bags(_starts(active_BK.sum(dim=1)), latents_N, values_N, W_FD)


def dots(g_BD: Tensor, W_FD: Tensor, indices_BK: Tensor, active_BK: Tensor) -> Tensor:
    """See :class:`sparsight.kernels.functions.Backend`."""
    active_BK = active_BK != 0
    starts, rows_N, order_N = ordering.once(_by_latent, indices_BK, active_BK, len(W_FD))
    # Sorted by latent: W is read once in order, and random access goes to g, which is small.
    shape = (len(W_FD), len(g_BD))
    pattern = torch.sparse_csr_tensor(starts, rows_N, g_BD.new_zeros(len(rows_N)), shape, check_invariants=False)
    products = torch.sparse.sampled_addmm(pattern, W_FD.contiguous(), g_BD.T, beta=0.0).values()
    unsorted = torch.empty_like(products).index_copy_(0, order_N, products)
    return g_BD.new_zeros(indices_BK.shape).masked_scatter_(active_BK, unsorted)


def accumulate(values_BK: Tensor, indices_BK: Tensor, g_BD: Tensor, n_rows: int) -> tuple[Tensor, Tensor]:
    """See :class:`sparsight.kernels.functions.Backend`."""
    active_BK = values_BK != 0
    starts, rows_N, order_N = ordering.once(_by_latent, indices_BK, active_BK, n_rows)
    values_N = values_BK.masked_select(active_BK)
    sums_F = values_BK.new_zeros(n_rows).index_add_(0, indices_BK.masked_select(active_BK), values_N)
    return _bags(starts, rows_N, values_N.index_select(0, order_N), g_BD), sums_F


def _by_latent(indices_BK: Tensor, active_BK: Tensor, n_latents: int) -> tuple[Tensor, Tensor, Tensor]:
    """Active entries sorted by latent: start of each latent, rows of the entries, their positions before sorting."""
    rows_N, _ = active_BK.nonzero(as_tuple=True)
    latents_N = indices_BK.masked_select(active_BK)
    order_N = latents_N.int().argsort(stable=True)
    return _starts(torch.bincount(latents_N, minlength=n_latents)), rows_N.index_select(0, order_N), order_N


def _dense_select(x_BD: Tensor, W_enc_DF: Tensor, b_enc_F: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    return dense.select(x_BD, W_enc_DF, b_enc_F, k, _ROWS)


def _bags(starts: Tensor, rows_N: Tensor, weights_N: Tensor, table: Tensor) -> Tensor:
    """Weighted sum of the table's rows for each bag."""
    return embedding_bag(rows_N, table, starts, per_sample_weights=weights_N, mode="sum", include_last_offset=True)


def _starts(counts: Tensor) -> Tensor:
    """Start of each bag, and the end of the last one."""
    return torch.nn.functional.pad(counts.cumsum(dim=0), (1, 0))


def _fast_bf16() -> bool:
    """Whether this CPU computes bf16 products several times faster than fp32 ones."""
    return torch.cpu._is_avx512_bf16_supported()
