"""`spcache.solve`: one call for a sparse matrix, its system kept in the plan cache."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .matrices import MatrixKey, entries_of
from .plans import plan_cache
from .system import SparseSystem

__all__ = ["solve"]


def solve(A: Any, b: Tensor, *, kind: str = "auto") -> Tensor:
    """x = A^-1 b for a sparse matrix, differentiable in A and b.

    The system of A's pattern, its factor included, is kept in `spcache.plan_cache`: a matrix of the same pattern is
    refactorized without analysis, one of equal values not even factorized. A loop that can keep a `SparseSystem`
    saves the search, which is O(nnz).

    Args:
        A: [n, n] torch sparse COO, CSR or CSC, or SciPy; float32, float64, complex64 or complex128.
        b: [n] or [n, k], same dtype.
        kind: as in `SparseSystem`.

    Returns:
        x of the shape of b. The gradient of A is sparse, in A's layout, at A's stored entries.

    Raises:
        As `SparseSystem` and `SparseSystem.solve`; ValueError where A is not square.

    Example:
        >>> import torch, spcache
        >>> A = torch.tensor([[4.0, 1.0], [1.0, 3.0]]).to_sparse_csr()
        >>> spcache.solve(A, torch.tensor([5.0, 4.0]))
        tensor([1., 1.])
    """
    entries = entries_of(A)
    m, n = entries.shape
    if m != n:
        raise ValueError(f"A must be square, got shape {entries.shape}")
    key = MatrixKey(entries, (kind,))

    def build() -> SparseSystem:
        key.own()
        return SparseSystem(entries.indices(), n, kind=kind)

    system, _ = plan_cache.find(key, build)
    return system.solve(entries.values, b)
