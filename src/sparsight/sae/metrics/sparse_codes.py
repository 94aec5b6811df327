"""Codes of a window of rows as sparse matrices, so that no array of size (N, F) is needed.

Shapes: B rows of a window, I images, T tokens of an image (B = I T), D width (d_in), F features.
"""

from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from sparsight.sae.codes import Codes, SparseCodes

Matrix = Any
"""A scipy CSR array; scipy has no types here."""
_DENSE = 0.2  # share of non-zero entries from which a dense product is faster


def from_codes(codes: Codes) -> Matrix:
    """The active latents as a CSR array (B, F)."""
    if not isinstance(codes, SparseCodes):
        return sparse.csr_array(codes.dense().cpu().numpy())
    values, indices = codes.values.cpu(), codes.indices.cpu()  # what a mask picks on a GPU, the host waits for
    active = values > 0  # the rest is padding, which may repeat the index of an active latent
    return _csr(values[active], indices[active], active.sum(dim=1), codes.d_sae)


def from_entries(values_BK: Tensor, indices_BK: Tensor, width: int) -> Matrix:
    """K entries per row, of either sign, as a CSR array (B, F)."""
    counts = torch.full((len(values_BK),), values_BK.shape[1])
    return _csr(values_BK.flatten(), indices_BK.flatten(), counts, width)


def _csr(values: Tensor, indices: Tensor, counts_B: Tensor, width: int) -> Matrix:
    starts = np.concatenate([[0], counts_B.cpu().numpy().cumsum()]).astype(np.int32)
    columns = indices.cpu().numpy().astype(np.int32)
    matrix = sparse.csr_array((values.float().cpu().numpy(), columns, starts), shape=(len(counts_B), width))
    matrix.sort_indices()
    return matrix


def pooled(z_BF: Matrix, tokens: int) -> Matrix:
    """Mean over the tokens of each image, (I, F)."""
    if tokens == 1:
        return z_BF
    rows = z_BF.shape[0]
    starts = np.arange(0, rows + 1, tokens, dtype=np.int32)
    mean = (np.full(rows, 1 / tokens, np.float32), np.arange(rows, dtype=np.int32), starts)
    return sparse.csr_array(mean, shape=(rows // tokens, rows)) @ z_BF


def by_class(labels_I: np.ndarray, n_classes: int) -> Matrix:
    """The matrix (C, I) whose product with codes (I, F) is their sum by class, (C, F)."""
    n = len(labels_I)
    return sparse.csc_array((np.ones(n), labels_I, np.arange(n + 1)), shape=(n_classes, n)).tocsr()


def times(z: Matrix, table: np.ndarray) -> np.ndarray:
    """The product of a sparse matrix and a dense one."""
    if z.nnz < _DENSE * z.shape[0] * z.shape[1]:
        return z @ table
    return (torch.from_numpy(z.toarray()).to(torch.from_numpy(table).dtype) @ torch.from_numpy(table)).numpy()
