"""Exact fp32 top-k at the cost of a bf16 product: about a quarter of an fp32 product on CPUs with fast bf16.

A bf16 product screens all latents. A rigorous bound on its error gives candidates that include the true top-k. Only
the candidates are computed in fp32. Let s = x.w + b be a pre-activation, s' its bf16 computation before the result is
rounded, u = 2^-8 the unit round-off of bf16, and x~, w~ the rounded operands. By Cauchy-Schwarz

    |s' - s| <= |x - x~| max|w| + |x~| max|w - w~| + rounding of fp32 sums + rounding of the bias =: e.

If k latents have screened values of at least m, the true k-th largest is at least m - u |m| - e. Rounding is monotone,
so every latent of the true top-k has a screened value of at least round(m - u |m| - 2 e). As m, the code uses the k-th
largest of the maxima over disjoint groups of latents. It is cheap and hardly below the k-th largest of all latents.

The dense product recomputes the rows that screening does not settle:

* rows with too many candidates;
* rows whose bound is not above 0 (only above 0 do screened values compare like integers);
* rows whose k-th and (k+1)-th fp32 values are so close that the dense product's rounding may swap them. Of these it
  needs the candidates alone.

Shapes: B batch, D width (d_in), F latents (d_sae), K active latents (k), M candidates, G groups of latents,
N candidates of all rows, P pairs of a row and a group that has candidates.
"""

from collections.abc import Callable

import torch
from torch import Tensor

_ROWS = 256  # a block of screened values stays in the cache
_LATENTS = 1024  # a block of weights stays in the cache, too
_GROUP = 16
_U16 = 2.0**-8
_U32 = 2.0**-24
_TINY = 2.0**-126  # bf16 instructions flush smaller numbers to zero
_SLACK = 1.01  # covers rounding in the bounds themselves

Dots = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Select = Callable[[Tensor, Tensor, Tensor | None, int], tuple[Tensor, Tensor]]


def worthwhile(x_BD: Tensor, W_enc_DF: Tensor, k: int) -> bool:
    """Whether screening can pay off: fp32, far more latents than k, and enough rows to make up for rounding W."""
    far_more = W_enc_DF.shape[1] >= 4 * _GROUP * k
    return x_BD.dtype == W_enc_DF.dtype == torch.float32 and far_more and len(x_BD) >= _ROWS


def select(
    x_BD: Tensor, W_enc_DF: Tensor, b_enc_F: Tensor | None, k: int, dots: Dots, dense: Select
) -> tuple[Tensor, Tensor]:
    """The k largest entries of each row of x W_enc + b_enc and their columns, as the dense product selects them.

    Args:
        dots: fp32 products at given latents, see :class:`sparsight.kernels.functions.Backend`.
        dense: selection for the rows that screening does not settle.

    Returns:
        pre-activations and indices, (B, K) both, in no particular order.
    """
    W_FD = W_enc_DF.T
    b_F = W_FD.new_zeros(len(W_FD)) if b_enc_F is None else b_enc_F
    low_x, low_W, bound_B, tie_B = _bounds(x_BD, W_FD, b_F)
    rows_N, latents_N = _candidates(low_x, low_W, bound_B, tie_B, k)
    counts_B = torch.bincount(rows_N, minlength=len(x_BD))
    settled_B = (counts_B >= k) & (counts_B <= len(W_FD) // _GROUP)
    kept_N = settled_B[rows_N]
    place_N = torch.arange(len(rows_N), device=x_BD.device) - (counts_B.cumsum(0) - counts_B)[rows_N]
    entries = (rows_N[kept_N], place_N[kept_N])
    indices_BM = rows_N.new_zeros(len(x_BD), max(k + 1, int((counts_B * settled_B).max())))
    indices_BM[entries] = latents_N[kept_N]
    active_BM = torch.zeros_like(indices_BM, dtype=torch.bool)
    active_BM[entries] = True
    pre_BM = (dots(x_BD, W_FD, indices_BM, active_BM) + b_F[indices_BM]).masked_fill(~active_BM, -torch.inf)
    best, order = pre_BM.topk(k + 1, dim=1)
    pre_BK, indices_BK = best[:, :k], indices_BM.gather(1, order[:, :k])
    unsettled = (~settled_B).nonzero().squeeze(1)
    if len(unsettled):
        pre_BK[unsettled], indices_BK[unsettled] = dense(x_BD[unsettled], W_enc_DF, b_enc_F, k)
    tied_B = settled_B & ~(best[:, k - 1] - best[:, k] > tie_B)  # also where the difference is NaN
    tied = tied_B.nonzero().squeeze(1)
    if len(tied):  # their candidates are few
        columns = latents_N[tied_B[rows_N]].unique()
        bias = None if b_enc_F is None else b_enc_F[columns]
        pre_BK[tied], places = dense(x_BD[tied], W_FD[columns].T, bias, k)
        indices_BK[tied] = columns[places]
    return pre_BK, indices_BK


def _bounds(x_BD: Tensor, W_FD: Tensor, b_F: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """bf16 operands (B, D + 2) and (F, D + 2), the error bound e and the distance below which values tie, (B,) both.

    The bias enters the product as two columns: its bf16 value and the remainder. Rows of zeros fill the last group of
    latents; their screened values are 0, and candidates are above 0. The weights are rounded in every call, because no
    cheap check proves that a rounded copy from an earlier call is still up to date.
    """
    d_in = W_FD.shape[1]
    low_x = x_BD.new_ones(len(x_BD), d_in + 2, dtype=torch.bfloat16)
    low_x[:, :d_in] = x_BD
    padding = -len(W_FD) % _GROUP
    padded_W = torch.empty(len(W_FD) + padding, d_in + 2, dtype=torch.bfloat16, device=W_FD.device)
    low_W, _ = padded_W.split([len(W_FD), padding])
    padded_W[len(W_FD) :] = 0
    low_W[:, d_in] = b_F
    low_W[:, d_in + 1] = b_F - low_W[:, d_in]
    sizes, errors = [], []
    for W, low in zip(W_FD.split(_LATENTS), low_W[:, :d_in].split(_LATENTS), strict=True):
        low.copy_(W)
        sizes.append(W.norm(dim=1).max())
        errors.append((W - low).norm(dim=1).max())
    size, error = torch.stack(sizes).max(), torch.stack(errors).max()
    norm_B, rounding_B = x_BD.norm(dim=1), (x_BD - low_x[:, :d_in]).norm(dim=1)
    largest = b_F.abs().max()
    bias = (b_F - low_W[:, d_in] - low_W[:, d_in + 1]).abs().max()
    sums_B = (d_in + 2) * (2 * _U32 * ((norm_B + rounding_B) * (size + error) + largest) + _TINY)
    bound_B = rounding_B * size + (norm_B + rounding_B) * error + bias + sums_B
    # Errors of sums of D terms grow as sqrt(D) (Higham and Mary 2019); 4 is many standard deviations.
    tie_B = 4 * _U32 * (d_in**0.5 * norm_B * size + largest)
    return low_x, padded_W, _SLACK * bound_B, tie_B


def _candidates(low_x: Tensor, low_W: Tensor, bound_B: Tensor, tie_B: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Rows and latents of the candidates, (N,) both, sorted by row; with every settled row's top-k and its ties."""
    n_latents = len(low_W)
    n_groups = n_latents // _GROUP
    screened = torch.empty(min(_ROWS, len(low_x)), n_latents, dtype=torch.bfloat16, device=low_x.device)
    found = []
    for start in range(0, len(low_x), _ROWS):
        rows = slice(start, start + _ROWS)
        x = low_x[rows]
        s = torch.mm(x, low_W.T, out=screened[: len(x)]).view(torch.int16).view(len(x), _GROUP, n_groups)
        maxima = s.amax(dim=1)
        m = maxima.topk(k, dim=1, sorted=False).values.amin(dim=1).view(torch.bfloat16).float()
        floor = (m - _SLACK * _U16 * m - 2 * bound_B[rows] - tie_B[rows]).bfloat16()
        floor = floor.masked_fill(~((floor > 0) & (m < torch.inf)), torch.inf).view(torch.int16).unsqueeze(1)
        row_P, group_P = (maxima >= floor).nonzero(as_tuple=True)  # the other groups have no candidate
        pair_N, place_N = (s[row_P, :, group_P] >= floor[row_P]).nonzero(as_tuple=True)
        found.append((row_P[pair_N] + start, place_N * n_groups + group_P[pair_N]))
    rows_N, latents_N = zip(*found, strict=True)
    return torch.cat(rows_N), torch.cat(latents_N)
