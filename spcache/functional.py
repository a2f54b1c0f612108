"""`solve`, `matmul`, `solve_triangular`: one call for a sparse matrix, its system kept in the plan cache."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .dynamo import hide
from .handles import system_handle
from .library import is_vector, operator, recorded, traced_solve
from .matrices import Entries, MatrixKey, entries_of, require_dense
from .memory import read
from .pattern import Pattern
from .plans import plan_cache
from .system import SparseSystem

__all__ = ["find_system", "matmul", "require_square", "solve", "solve_triangular", "system_of"]


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
        return find_system(indices, (n, n), kind).solve(values, b)
    return _solve_matrix(A, b, kind)


def matmul(A: Any, B: Tensor, *, adjoint: bool = False) -> Tensor:
    """A B, or A^H B, of a sparse and a dense matrix, differentiable in both to any order.

    A is never made dense, and its gradient is computed at its stored entries only: memory beyond the result is O(nnz),
    whatever the number of columns. A's indices are validated and kept in `spcache.plan_cache` the first time.

    Args:
        A: [m, n] torch sparse COO, CSR or CSC, or SciPy; or a batch [batch, m, n] of torch, of equal or different
            patterns. float32, float64, complex64 or complex128.
        B: [n], [n, k], or with a batch [batch, n, k], same dtype; with adjoint=True m in place of n. More leading
            dimensions with a single A: one product for each.

    Returns:
        [m], [m, k], or [batch, m, k]; with adjoint=True n in place of m. The gradient of A is sparse, in A's layout.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Example:
        >>> import torch, spcache
        >>> A = torch.tensor([[4.0, 0.0, 1.0], [0.0, 3.0, 0.0]]).to_sparse_csr()
        >>> spcache.matmul(A, torch.tensor([1.0, 2.0, 3.0]))
        tensor([7., 6.])
    """
    entries = entries_of(A, batched=True)
    require_dense("B", B, entries.values)
    system = system_of(entries)
    if A.ndim == 2:
        return system.matmul(entries.values, B, adjoint=adjoint)
    return _blockwise(A, B, adjoint, lambda B: system.matmul(entries.values, B, adjoint=adjoint))


def solve_triangular(A: Any, B: Tensor, *, upper: bool, unitriangular: bool = False, adjoint: bool = False) -> Tensor:
    """X = T^-1 B, or T^-H B, for the lower or upper triangle T of a sparse matrix, differentiable in both to any order.

    Like `torch.linalg.solve_triangular`, which is for dense ones. By KLU, which finds nothing to eliminate; float32 and
    complex64 are computed in double.

    Args:
        A: [n, n] torch sparse COO, CSR or CSC, or SciPy; or a batch [batch, n, n] of torch. Entries in the other
            triangle are not looked at, and get zero gradients.
        B: [n], [n, k], or with a batch [batch, n, k], same dtype.
        upper: T is the upper triangle of A, as stored.
        unitriangular: the diagonal of T is one, whatever is stored there.
        adjoint: solve T^H X = B instead.

    Returns:
        X of the shape of B. The gradient of A is sparse, in A's layout.

    Raises:
        SingularMatrixError: a zero on the diagonal, or nothing.
        TypeError, ValueError: an argument is not as described.

    Example:
        >>> import torch, spcache
        >>> A = torch.tensor([[2.0, 9.0], [1.0, 4.0]]).to_sparse_csr()
        >>> spcache.solve_triangular(A, torch.tensor([2.0, 5.0]), upper=False)
        tensor([1., 1.])
    """
    entries = entries_of(A, batched=True)
    require_square(A)
    require_dense("B", B, entries.values)
    triangle = _find_triangle(entries, upper, unitriangular)
    values = entries.values[triangle.kept]
    if unitriangular:
        values = torch.cat([values, values.new_ones(entries.shape[0])])
    if A.ndim == 2:
        return triangle.system.solve(values, B, adjoint=adjoint)
    return _blockwise(A, B, adjoint, lambda B: triangle.system.solve(values, B, adjoint=adjoint))


def _blockwise(A: Tensor, B: Tensor, adjoint: bool, apply: Callable[[Tensor], Tensor]) -> Tensor:
    """`apply` of the block-diagonal matrix that a batch A is, to B [batch, n, k]."""
    batch, m, n = A.shape
    if adjoint:
        m, n = n, m
    if B.dim() != 3 or B.shape[:2] != (batch, n):
        raise ValueError(f"B must have shape ({batch}, {n}, k) with A of shape {tuple(A.shape)}, got {tuple(B.shape)}")
    return apply(B.flatten(0, 1)).unflatten(0, (batch, m))


class _Triangle(NamedTuple):
    """The system of a triangle, and which of the matrix's entries are in it."""

    system: SparseSystem
    kept: Tensor  # [kept; int64]

    @property
    def nbytes(self) -> int:
        return self.system.nbytes + self.kept.nbytes

    def trim(self) -> None:
        self.system.trim()


def _find_triangle(entries: Entries, upper: bool, unitriangular: bool) -> _Triangle:
    key = MatrixKey(entries, ("triangle", bool(upper), bool(unitriangular)))

    def build() -> _Triangle:
        key.own()
        indices = entries.indices()
        Pattern(indices, *entries.shape)  # raises, also for what is in the other triangle
        above = indices[1] - indices[0] if upper else indices[0] - indices[1]
        kept = np.flatnonzero(above >= bool(unitriangular))
        indices = indices[:, kept]
        if unitriangular:
            diagonal = np.arange(entries.shape[0], dtype=indices.dtype)
            indices = np.concatenate([indices, np.stack([diagonal, diagonal])], 1)
        system = SparseSystem(indices, entries.shape, kind="general", ordering="natural")
        return _Triangle(system, torch.from_numpy(kept))

    return plan_cache.find(key, build)[0]


def require_square(A: Any) -> None:
    if A.shape[-1] != A.shape[-2]:
        raise ValueError(f"A must be square, got shape {tuple(A.shape)}")


def _solve_matrix(A: Any, b: Tensor, kind: str) -> Tensor:
    entries = entries_of(A)
    require_square(A)
    require_dense("b", b, entries.values)
    return system_of(entries, kind).solve(entries.values, b)


def system_of(entries: Entries, kind: str = "general") -> SparseSystem:
    """The system of a matrix, from the plan cache; its values are `entries.values`."""
    key = MatrixKey(entries, (kind,))

    def build() -> SparseSystem:
        key.own()
        return SparseSystem(entries.indices(), entries.shape, kind=kind)

    return plan_cache.find(key, build)[0]


def find_system(indices: Tensor, shape: tuple[int, int], kind: str = "general") -> SparseSystem:
    """The system of COO indices, from the plan cache."""
    if indices.layout is not torch.strided or indices.dim() != 2 or indices.shape[0] != 2:
        raise ValueError(f"indices must be a dense tensor of shape (2, nnz), got {tuple(indices.shape)}")
    row, column = read(indices, lambda t: t.detach().cpu().numpy())
    return system_of(Entries(shape, (row, column), None, indices), kind)


@operator("system", "(Tensor indices, SymInt n, str kind) -> Tensor")
def _system(indices: Tensor, n: int, kind: str) -> Tensor:
    """The handle of a system in the plan cache."""
    return system_handle(find_system(indices, (n, n), kind)._factorizer)


@torch.library.register_fake("spcache::system")
def _(indices: Tensor, n: int, kind: str) -> Tensor:
    return torch.empty(1, dtype=torch.int64, device="cpu")


@operator("fitter", "(Tensor indices, SymInt m, SymInt n) -> Tensor")
def _fitter(indices: Tensor, m: int, n: int) -> Tensor:
    """The handle of least squares with a system in the plan cache."""
    return system_handle(find_system(indices, (m, n))._fitter)


@torch.library.register_fake("spcache::fitter")
def _(indices: Tensor, m: int, n: int) -> Tensor:
    return torch.empty(1, dtype=torch.int64, device="cpu")


hide(sys.modules[__name__], "_solve_matrix")  # called at a graph break
