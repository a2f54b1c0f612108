"""`sparse_mm`, `sparse_triangular_solve`, `sparse_generic_solve`, `sparse_generic_lstsq` of torchsparsegradutils 0.2.7,
over spcache.

    from spcache.compat.torchsparsegradutils import sparse_mm
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ... import autograd, functional
from ...functional import matmul, solve_triangular, system_of
from ...matrices import entries_of
from .utils import bicgstab, linear_cg, lsmr, minres

__all__ = ["sparse_generic_lstsq", "sparse_generic_solve", "sparse_mm", "sparse_triangular_solve"]

_LAYOUTS = (torch.sparse_coo, torch.sparse_csr)

Solver = Callable[..., Tensor]


def sparse_mm(A: Tensor, B: Tensor) -> Tensor:
    """A B of a sparse and a dense matrix; `spcache.matmul`.

    Args:
        A: [n, m] or [batch, n, m] sparse COO or CSR.
        B: [m, p] or [batch, m, p].

    Returns:
        [n, p] or [batch, n, p]. The gradient of A is at its stored entries only, in A's layout.

    Raises:
        ValueError: an argument is not as described.
    """
    _check_pair(A, B)
    _check_batch(A, B)
    if A.size(-1) != B.size(-2):
        raise ValueError(f"Incompatible inner dimensions: A[..., {A.size(-1)}] vs B[..., {B.size(-2)}]")
    return matmul(A, B)


def sparse_triangular_solve(
    A: Tensor, B: Tensor, upper: bool = True, unitriangular: bool = False, transpose: bool = False
) -> Tensor:
    """X = T^-1 B or T^-T B for a triangle T of a sparse matrix; `spcache.solve_triangular`.

    Args:
        A: [n, n] or [batch, n, n] sparse COO or CSR.
        B: [n, p] or [batch, n, p].
        upper: T is the upper triangle of A as stored.
        unitriangular: the diagonal is one, whatever is stored.
        transpose: solve T^T X = B.

    Returns:
        X of the shape of B. The gradient of A is in A's layout, zero outside of the triangle.

    Raises:
        ValueError: an argument is not as described; in the backward pass, a diagonal is stored with unitriangular=True.
        SingularMatrixError: a zero on the diagonal, or nothing.
    """
    _check_pair(A, B)
    if A.size(-2) != A.size(-1):
        raise ValueError("A must be square on its last two dimensions")
    if A.size(-2) != B.size(-2):
        raise ValueError(f"Incompatible inner dimensions: A[..., {A.size(-2)}] vs B[..., {B.size(-2)}]")
    _check_batch(A, B)
    if transpose:
        X = solve_triangular(A, B.conj(), upper=upper, unitriangular=unitriangular, adjoint=True).conj()
        X = X.resolve_conj()
    else:
        X = solve_triangular(A, B, upper=upper, unitriangular=unitriangular)
    if unitriangular:
        stored = A.detach()

        def has_diagonal() -> bool:
            row, column = entries_of(stored, batched=True).indices()
            return bool((row == column).any())

        _refuse_backward(X, has_diagonal, "First input should be strictly triangular (i.e. unit diagonals is implicit)")
    return X


def sparse_generic_solve(
    A: Tensor, B: Tensor, solve: Solver | None = None, transpose_solve: Solver | None = None, **kwargs: Any
) -> Tensor:
    """X = A^-1 B by any solver, differentiable in A and B to any order.

    Args:
        A: [n, n] sparse COO or CSR.
        B: [n] or [n, k].
        solve: `solve(A, B, **kwargs) -> X`, called with tensors without a graph. Default: minres, for symmetric A.
            With `spcache.solve` the backward pass uses the factor of the forward pass.
        transpose_solve: `transpose_solve(A, B, **kwargs)` solves with A^T, and gets A as it is. If only one of the two
            is given, it serves for both, and gets the transposed matrix where the other was meant. So does, in the
            backward pass, a transpose_solve that is the same as solve, or is one of `utils`, which know of no A^T.
        kwargs: for both.

    Returns:
        X of the shape of B in A's dtype. The gradient of A is at its stored entries only, in A's layout.

    Raises:
        TypeError, ValueError: an argument is not as described.
    """
    if not isinstance(A, Tensor) or not isinstance(B, Tensor):
        raise ValueError("Both A and B should be instances of torch.Tensor")
    if A.layout not in _LAYOUTS:
        raise TypeError(f"Unsupported sparse layout: {A.layout}. Only COO and CSR are supported.")
    if A.dim() != 2:
        raise ValueError("A must be a 2D tensor")
    if A.shape[0] != A.shape[1]:
        raise ValueError("A must be square")
    if B.dim() not in (1, 2):
        raise ValueError("B must be a 1D or 2D tensor")
    if A.shape[0] != B.shape[0]:
        raise ValueError(f"Incompatible dimensions: A has shape {tuple(A.shape)}, B has shape {tuple(B.shape)}")
    if B.layout is not torch.strided:
        raise TypeError("B must be a dense (strided) tensor")
    if A.dtype != B.dtype:
        warnings.warn(
            f"A and B have different dtypes: A={A.dtype}, B={B.dtype}. This may affect solver behavior.",
            UserWarning,
            stacklevel=2,
        )
    if solve is functional.solve and transpose_solve is None:
        return functional.solve(A, B.to(A.dtype), **kwargs)
    if A.layout is torch.sparse_coo:
        A = A.coalesce()
    entries = entries_of(A)
    numeric: Any = _Solver(A.detach().clone(), solve, transpose_solve, kwargs)
    return autograd.solve(system_of(entries)._factorizer, numeric, entries.values, B.to(A.dtype), B.dim() == 1, False)


class _Solver:
    """What `autograd.solve` asks of a factor, by functions of the user. It owns A, as a factor its values."""

    failed = None

    def __init__(self, A: Tensor, solve: Solver | None, transpose_solve: Solver | None, kwargs: dict[str, Any]):
        self._A, self._kwargs = A, kwargs
        # (function, whether it needs the transposed matrix): for A^-1 b and for A^-T b
        self._functions: tuple[tuple[Solver, bool], tuple[Solver, bool]]
        if transpose_solve in (None, solve, bicgstab, linear_cg, minres):  # those solve with what they get
            forward = solve or transpose_solve or minres
            self._functions = (forward, False), (transpose_solve or forward, True)
        else:
            assert transpose_solve is not None
            self._functions = (transpose_solve, True) if solve is None else (solve, False), (transpose_solve, False)

    def solve(self, b: Tensor, vector: bool, adjoint: bool) -> Tensor:
        """A^-1 b, or A^-H b, the conjugate of A^-T b̄."""
        function, transposed = self._functions[adjoint]
        b = b.detach().conj().resolve_conj() if adjoint else b.detach()
        with torch.no_grad():
            x = function(self._transposed if transposed else self._A, b, **self._kwargs)
        x = x.reshape(b.shape).to(self._A.dtype)
        return x.conj().resolve_conj() if adjoint else x

    @cached_property
    def _transposed(self) -> Tensor:
        return self._A.t().coalesce() if self._A.layout is torch.sparse_coo else self._A.t().to_sparse_csr()

    def same_values(self, values: Tensor) -> bool:
        return torch.equal(values, entries_of(self._A).values)


def sparse_generic_lstsq(
    A: Tensor, B: Tensor, lstsq: Solver | None = None, transpose_lstsq: Solver | None = None
) -> Tensor:
    """X that minimizes |A X - B|, by any solver; `spcache.lstsq` is the one with a solver of its own.

    Args:
        A: [m, n] sparse COO or CSR of full column rank, m >= n.
        B: [m] or [m, k].
        lstsq: `lstsq(A, B) -> X`. Default: LSMR.
        transpose_lstsq: `transpose_lstsq(A, B)` solves A^T Y = B for the smallest Y, and gets A as it is. Default:
            LSMR.

    Returns:
        X of shape [n] or [n, k]. The gradient of A is at its stored entries only, in A's layout.

    Raises:
        ValueError: in the backward pass, A is wide.

    References:
        Golub & Pereyra (1973), doi:10.1137/0710036, eq. 4.12.
    """
    entries = entries_of(A)
    (m, n), system, detached = entries.shape, system_of(entries), A.detach()
    values = entries.values.detach()

    def direct(x: Tensor) -> Tensor:
        return system.matmul(values, x)

    def adjoint(y: Tensor) -> Tensor:
        return system.matmul(values, y, adjoint=True)

    least: Solver = lstsq or (lambda _, B: lsmr(direct, B, adjoint, n)[0])
    smallest: Solver = transpose_lstsq or (lambda _, B: lsmr(adjoint, B, direct, m)[0])

    def solver(f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        shift = smallest(detached, g.detach()).reshape(f.shape) if g.any() else torch.zeros_like(f)
        x = least(detached, (f - shift).detach()).reshape(g.shape)
        if not f.any():
            return shift, x  # f - A x, more accurately
        return f - direct(x), x

    X = autograd.LeastSquares.apply(entries.values, B, B.new_zeros(n, *B.shape[1:]), system._factorizer, solver)[1]
    _refuse_backward(X, lambda: m < n, f"A should be a tall full-rank matrix. Got A.shape={A.shape}")
    return X


def _refuse_backward(x: Tensor, wrong: Callable[[], bool], message: str) -> None:
    """A backward pass through x raises where something is wrong."""

    def refuse(g: Tensor) -> None:
        if wrong():
            raise ValueError(message)

    if x.requires_grad:
        x.register_hook(refuse)


def _check_pair(A: Tensor, B: Tensor) -> None:
    if not isinstance(A, Tensor) or not isinstance(B, Tensor):
        raise ValueError("Both A and B should be instances of torch.Tensor")
    if A.dim() < 2 or B.dim() < 2:
        raise ValueError("Both A and B should be at least 2-dimensional tensors")
    if A.dim() != B.dim() or A.dim() > 3:
        raise ValueError("A and B must both be 2D or both be 3D tensors")
    if A.layout not in _LAYOUTS:
        raise ValueError("A should be in either COO or CSR sparse format")
    if B.layout is not torch.strided:
        raise ValueError("B must be a dense (strided) tensor")


def _check_batch(A: Tensor, B: Tensor) -> None:
    if A.dim() == 3 and A.size(0) != B.size(0):
        raise ValueError("If batched, A and B must have the same batch size")
