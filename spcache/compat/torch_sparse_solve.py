"""`solve` of torch_sparse_solve, over spcache.

from spcache.compat.torch_sparse_solve import solve
x = solve(A, b)
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..functional import system_of
from ..matrices import Entries

__all__ = ["solve"]


def solve(A: Tensor, b: Tensor) -> Tensor:
    """x = A^-1 b for a batch of matrices of one pattern, by LU, differentiable in A and b to any order.

    Args:
        A: [batch, m, m; float64] sparse COO; each matrix with the same pattern.
        b: [batch, m, n; float64].

    Returns:
        x [batch, m, n]. The gradient of A is sparse COO, summed over the right-hand sides.

    Raises:
        ValueError: an argument is not as described, or not finite.
        SingularMatrixError: with the index in the batch.
    """
    if A.ndim != 3 or A.shape[1] != A.shape[2] or A.layout is not torch.sparse_coo:
        raise ValueError(f"'A' must be sparse COO of shape (b, m, m), got layout {A.layout}, shape {tuple(A.shape)}")
    if b.ndim != 3 or b.shape[:2] != A.shape[:2]:
        raise ValueError(f"'b' must have shape ({A.shape[0]}, {A.shape[1]}, n), got {tuple(b.shape)}")
    for name, t in (("A", A), ("b", b)):
        if t.dtype != torch.float64:
            raise ValueError(f"'{name}' must be float64, got {t.dtype}")
    A = A.coalesce()
    batch, m, _ = A.shape
    nnz = A.values().shape[0] // max(batch, 1)
    first = A.indices()[1:, :nnz]
    regular = A.values().shape[0] == batch * nnz
    if regular:
        block, *indices = A.indices().reshape(3, batch, nnz)
        regular = bool((block == torch.arange(batch, device=A.device)[:, None]).all()) and all(
            bool((each == each[:1]).all()) for each in indices
        )
    if not regular:
        raise ValueError(
            "'A' must have the same pattern in every element of the batch; store zeros where one lacks an entry"
        )
    row, column = first.cpu().numpy()
    system = system_of(Entries((m, m), (row, column), None, first))
    return system.solve(A.values().view(batch, nnz), b)
