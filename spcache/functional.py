"""`spcache.solve`: one call for a sparse matrix, its system kept in the plan cache."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from .dynamo import hide
from .handles import system_handle
from .library import is_vector, operator, recorded, traced_solve
from .matrices import Entries, MatrixKey, entries_of
from .plans import plan_cache
from .system import SparseSystem

__all__ = ["solve"]


def solve(A: Any, b: Tensor, *, kind: str = "auto") -> Tensor:
    """x = A^-1 b for a sparse matrix, differentiable in A and b.

    The system of A's pattern, its factor included, is kept in `spcache.plan_cache`: a matrix of the same pattern is
    refactorized without analysis, one of equal values not even factorized. A loop that can keep a `SparseSystem`
    saves the search, which is O(nnz).

    Args:
        A: [n, n] torch sparse COO, CSR or CSC, or SciPy; float32, float64, complex64 or complex128. Or a pair (indices,
            values) as `SparseSystem` takes them, [2, nnz] and [*B, nnz]; the only form for code under
            `torch.compile`, which refuses sparse tensors.
        b: [n] or [n, k], same dtype; with a pair as in `SparseSystem.solve`.
        kind: as in `SparseSystem`.

    Returns:
        x of the shape of b. The gradient of A is sparse, in A's layout, at A's stored entries; with a pair, it is that
        of the values.

    Raises:
        As `SparseSystem` and `SparseSystem.solve`; ValueError where A is not square.

    Example:
        >>> import torch, spcache
        >>> A = torch.tensor([[4.0, 1.0], [1.0, 3.0]]).to_sparse_csr()
        >>> spcache.solve(A, torch.tensor([5.0, 4.0]))
        tensor([1., 1.])
    """
    if isinstance(A, tuple):
        if len(A) != 2 or not all(isinstance(t, Tensor) for t in (*A, b)):
            raise TypeError("A must be a sparse matrix or a pair (indices, values) of tensors, and b a tensor")
        indices, values = A
        vector = is_vector(values, b)
        if b.dim() < 1:
            raise ValueError("b must have at least one dimension, got a scalar")
        n = b.shape[-1 if vector else -2]
        if recorded():
            return traced_solve(torch.ops.spcache.system(indices, n, kind), None, values, b, vector, False, True, True)
        return _find(indices, n, kind).solve(values, b)
    return _solve_matrix(A, b, kind)


def _solve_matrix(A: Any, b: Tensor, kind: str) -> Tensor:
    entries = entries_of(A)
    m, n = entries.shape
    if m != n:
        raise ValueError(f"A must be square, got shape {entries.shape}")
    return _cached(entries, kind).solve(entries.values, b)


def _cached(entries: Entries, kind: str) -> SparseSystem:
    """The system of a square matrix."""
    key = MatrixKey(entries, (kind,))

    def build() -> SparseSystem:
        key.own()
        return SparseSystem(entries.indices(), entries.shape, kind=kind)

    return plan_cache.find(key, build)[0]


def _find(indices: Tensor, n: int, kind: str) -> SparseSystem:
    """The system of a pair's indices."""
    if indices.layout is not torch.strided or indices.dim() != 2 or indices.shape[0] != 2:
        raise ValueError(f"indices must be a dense tensor of shape (2, nnz), got {tuple(indices.shape)}")
    row, column = indices.detach().cpu().numpy()
    return _cached(Entries((n, n), (row, column), None, indices), kind)


@operator("system", "(Tensor indices, SymInt n, str kind) -> Tensor")
def _system(indices: Tensor, n: int, kind: str) -> Tensor:
    """The handle of a system in the plan cache."""
    return system_handle(_find(indices, n, kind)._factorizer)


@torch.library.register_fake("spcache::system")
def _(indices: Tensor, n: int, kind: str) -> Tensor:
    return torch.empty(1, dtype=torch.int64, device="cpu")


hide(sys.modules[__name__], "_solve_matrix")  # called at a graph break
