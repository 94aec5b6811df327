"""The CUDA backend: Triton kernels for sparse operations; the encoder product is PyTorch's.

Sums run in a fixed order without atomics, so they give the same bits on every run. Tails of D, K and of a latent's
entries are masked, not padded. The product follows PyTorch's precision setting: full fp32 unless TF32 is allowed.
With ``TRITON_INTERPRET=1`` in the environment, the kernels run on CPU tensors, for tests.

Shapes: B batch, D width (d_in), F latents (d_sae), K active latents (k), N entries sorted by latent, C chunks of them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparsight.kernels import ordering
from sparsight.kernels.largest import largest

_BLOCK_D = 256
_BLOCK_K = 16
_BLOCK_N = 8  # most latents have few entries
_CHUNK = 128
_OPTIONS = {"enable_fp_fusion": True}  # Triton's default depends on its version, and so would the bits of the sums
_PRODUCT = 2**28  # entries of the encoder product that exist at a time: 1 GiB in fp32


def select(x_BD: Tensor, W_enc_DF: Tensor, b_enc_F: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """See :class:`sparsight.kernels.functions.Backend`."""
    blocks = [
        largest(x @ W_enc_DF if b_enc_F is None else torch.addmm(b_enc_F, x, W_enc_DF), k)
        for x in x_BD.split(max(1, _PRODUCT // W_enc_DF.shape[1]))
    ]
    if len(blocks) == 1:
        return blocks[0]
    pre, indices = zip(*blocks, strict=True)
    return torch.cat(pre), torch.cat(indices)


def combine(values_BK: Tensor, indices_BK: Tensor, W_FD: Tensor) -> Tensor:
    """See :class:`sparsight.kernels.functions.Backend`."""
    (n, k), d_in = values_BK.shape, W_FD.shape[1]
    x_hat_BD = W_FD.new_empty(n, d_in)
    grid = (n, triton.cdiv(d_in, _BLOCK_D))
    _combine[grid](
        values_BK.contiguous(), indices_BK.contiguous(), W_FD.contiguous(), x_hat_BD, k, d_in,
        _sum_type(W_FD), _BLOCK_D, **_OPTIONS,
    )  # fmt: skip
    return x_hat_BD


def dots(g_BD: Tensor, W_FD: Tensor, indices_BK: Tensor, active_BK: Tensor) -> Tensor:
    """See :class:`sparsight.kernels.functions.Backend`."""
    (n, k), d_in = indices_BK.shape, W_FD.shape[1]
    products_BK = g_BD.new_empty(n, k)
    _dots[(n, triton.cdiv(k, _BLOCK_K))](
        g_BD.contiguous(), W_FD.contiguous(), indices_BK.contiguous(), active_BK.contiguous(), products_BK, k, d_in,
        _sum_type(W_FD), _BLOCK_K, _BLOCK_D, **_OPTIONS,
    )  # fmt: skip
    return products_BK


def accumulate(values_BK: Tensor, indices_BK: Tensor, g_BD: Tensor, n_rows: int) -> tuple[Tensor, Tensor]:
    """See :class:`sparsight.kernels.functions.Backend`."""
    k, d_in = values_BK.shape[1], g_BD.shape[1]
    # Entries of value 0 are sorted, too: which ones they are differs between the gradients of decoder and encoder.
    latents_N, order_N, starts = ordering.once(_by_latent, indices_BK, None, n_rows)
    chunks, blocks = triton.cdiv(len(order_N), _CHUNK), triton.cdiv(d_in, _BLOCK_D)
    sums_FD, sums_F = g_BD.new_empty(n_rows, d_in), values_BK.new_empty(n_rows)
    exact = torch.float64 if g_BD.dtype == torch.float64 else torch.float32
    parts_CD, parts_C = g_BD.new_empty(chunks, d_in, dtype=exact), g_BD.new_empty(chunks, dtype=exact)
    where = (latents_N, starts, sums_FD, sums_F, parts_CD, parts_C)
    _accumulate[(n_rows + chunks, blocks)](
        values_BK.contiguous(), order_N, g_BD.contiguous(), *where, n_rows, k, d_in,
        _sum_type(g_BD), _CHUNK, _BLOCK_N, _BLOCK_D, **_OPTIONS,
    )  # fmt: skip
    _add_parts[(chunks, blocks)](*where, d_in, _sum_type(g_BD), _CHUNK, _BLOCK_N, _BLOCK_D, **_OPTIONS)
    return sums_FD, sums_F


def _by_latent(indices_BK: Tensor, _: Tensor | None, n_latents: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents of the entries, sorted, (N,), places before sorting, (N,), and the start of each latent, (F + 1,)."""
    latents_N, order_N = indices_BK.flatten().int().sort(stable=True)
    return latents_N, order_N, torch._convert_indices_from_coo_to_csr(latents_N, n_latents, out_int32=True)


def _sum_type(tensor: Tensor) -> tl.dtype:
    return tl.float64 if tensor.dtype == torch.float64 else tl.float32


@triton.jit
def _combine(values, indices, W, out, k, d_in, SUM: tl.constexpr, BLOCK_D: tl.constexpr):
    """One row and one block of D: out[row] = sum over j of values[row, j] * W[indices[row, j]]."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), dtype=SUM)
    for j in range(k):
        value = tl.load(values + row * k + j)
        if value != 0:
            latent = tl.load(indices + row * k + j)
            total += value.to(SUM) * tl.load(W + latent * d_in + d, mask=d < d_in, other=0.0).to(SUM)
    tl.store(out + row * d_in + d, total, mask=d < d_in)


@triton.jit
def _dots(g, W, indices, active, out, k, d_in, SUM: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr):
    """One row and one block of K: out[row, j] = g[row] . W[indices[row, j]] where active."""
    row = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    wanted = tl.load(active + row * k + j, mask=j < k, other=0) != 0
    latent = tl.load(indices + row * k + j, mask=wanted, other=0)
    total = tl.zeros((BLOCK_K,), dtype=SUM)
    for start in range(0, d_in, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        g_d = tl.load(g + row * d_in + d, mask=d < d_in, other=0.0).to(SUM)
        mask = wanted[:, None] & (d < d_in)[None, :]
        W_jd = tl.load(W + latent[:, None] * d_in + d[None, :], mask=mask, other=0.0).to(SUM)
        total += tl.sum(W_jd * g_d[None, :], axis=1)
    tl.store(out + row * k + j, total, mask=j < k)


@triton.jit
def _accumulate(
    values, order, g, latents, starts, out, sums, parts, part_sums, n_latents, k, d_in,
    SUM: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One latent or one chunk, and one block of D: sum over entries of value * g[row], and the sum of the values.

    ``order`` has the places of the entries in the (B, K) values, sorted by latent; chunks divide it. The latent's
    program adds the entries in the chunk in which the latent starts. The chunk's program adds, into ``parts``, the
    first entries of the chunk if their latent started before it.
    """
    program = tl.program_id(0)
    own, chunk = program < n_latents, program - n_latents
    latent = tl.where(own, program, tl.load(latents + chunk * CHUNK, mask=program >= n_latents, other=0))
    begin = tl.load(starts + latent)
    start = tl.where(own, begin, chunk * CHUNK)
    end = (start // CHUNK + 1) * CHUNK
    end = tl.where(own | (begin < start), tl.minimum(end, tl.load(starts + latent + 1)), start)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.zeros((BLOCK_D,), dtype=SUM)
    total_value = tl.zeros((BLOCK_N,), dtype=SUM)
    for first in range(start, end, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        place = tl.load(order + n, mask=n < end, other=0)
        value = tl.load(values + place, mask=n < end, other=0.0).to(SUM)
        row = (place.to(tl.int32) // k).to(tl.int64)  # a card divides 64-bit numbers by a slow routine
        mask = (n < end)[:, None] & (d < d_in)[None, :]
        g_nd = tl.load(g + row[:, None] * d_in + d[None, :], mask=mask, other=0.0).to(SUM)
        total += tl.sum(value[:, None] * g_nd, axis=0)
        total_value += value
    tl.store(out + latent.to(tl.int64) * d_in + d, total, mask=d < tl.where(own, d_in, 0))
    tl.store(parts + chunk.to(tl.int64) * d_in + d, total, mask=d < tl.where(own, 0, d_in))
    if tl.program_id(1) == 0:
        tl.store(sums + latent, tl.sum(total_value, axis=0), mask=own)
        tl.store(part_sums + chunk, tl.sum(total_value, axis=0), mask=program >= n_latents)


@triton.jit
def _add_parts(
    latents, starts, out, sums, parts, part_sums, d_in,
    SUM: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One chunk and one block of D: if a latent continues in this chunk for the first time, add all its parts."""
    chunk = tl.program_id(0)
    latent = tl.load(latents + chunk * CHUNK).to(tl.int64)
    if tl.load(starts + latent) // CHUNK + 1 == chunk:
        end = (tl.load(starts + latent + 1) + CHUNK - 1) // CHUNK
        d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        total = tl.load(out + latent * d_in + d, mask=d < d_in, other=0.0).to(SUM)
        total_value = tl.zeros((BLOCK_N,), dtype=SUM)
        for first in range(chunk, end, BLOCK_N):
            n = first + tl.arange(0, BLOCK_N)
            mask = (n < end)[:, None] & (d < d_in)[None, :]
            total += tl.sum(tl.load(parts + n.to(tl.int64)[:, None] * d_in + d[None, :], mask=mask, other=0.0), axis=0)
            total_value += tl.load(part_sums + n, mask=n < end, other=0.0)
        tl.store(out + latent * d_in + d, total, mask=d < d_in)
        if tl.program_id(1) == 0:
            tl.store(sums + latent, tl.load(sums + latent).to(SUM) + tl.sum(total_value, axis=0))
