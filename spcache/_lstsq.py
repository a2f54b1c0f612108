"""`spcache.lstsq`: least squares with a sparse matrix."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .autograd import LeastSquares
from .errors import SingularMatrixError
from .functional import system_of
from .iterative import lsmr
from .matrices import Entries, entries_of, require_dense
from .system import SparseSystem
from .torch_private import transformed

__all__ = ["lstsq"]

_DEFICIENT = (
    "A has no full column rank, or is too near to that for method='direct': a column is zero, or depends on others; "
    "remove it, or use method='lsmr'"
)


def lstsq(A: Any, b: Tensor, *, method: str = "auto", **options: Any) -> Tensor:
    """x that minimizes |A x - b|, differentiable in A and b to any order.

    Args:
        A: [m, n] torch sparse COO, CSR or CSC, or SciPy, of full column rank, m >= n; float32, float64, complex64 or
            complex128.
        b: [m] or [m, k], same dtype.
        method: "auto" is "direct": LU of the augmented system [[I, A], [A^H, 0]] in double precision, and one step of
            refinement; as accurate as QR for condition numbers, columns scaled, up to about 1e7, and refused beyond
            about 1e8. It fills in as A^H A does: where there is no order in the pattern, "lsmr" is faster by far,
            iterative (Fong and Saunders 2011).
        options: for "lsmr", those of `spcache.iterative.lsmr`, forward and backward: atol, btol (default here: ten
            times the precision of b), conlim, maxiter, callback, check.

    Returns:
        x of shape [n] or [n, k]. The gradient of A is sparse, in A's layout, at its stored entries.

    Raises:
        NotConvergedError: lsmr did not converge (check=True).
        SingularMatrixError: A has no full column rank, or is too near to that ("direct").
        TypeError, ValueError: an argument is not as described.

    Cost: "lsmr": two products an iteration; each backward pass as much again, twice. "direct": as
    `SparseSystem.solve` of order m + n.

    Example:
        >>> import torch, spcache
        >>> A = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]]).to_sparse_csr()
        >>> spcache.lstsq(A, torch.tensor([1.0, 3.0, 5.0]))  # the line 1 + 2 t
        tensor([1., 2.])
    """
    if method not in ("auto", "lsmr", "direct"):
        raise ValueError(f"method must be one of 'auto', 'lsmr', 'direct', got {method!r}")
    entries = entries_of(A)
    m, n = entries.shape
    if m < n:
        raise ValueError(f"A must have at least as many rows as columns, got shape {(m, n)}")
    require_dense("b", b, entries.values)
    if b.dim() not in (1, 2) or b.shape[0] != m:
        raise ValueError(f"b must have shape ({m},) or ({m}, k), got {tuple(b.shape)}")
    system, values = system_of(entries), entries.values
    if method != "lsmr":
        if options:
            raise TypeError(f"options are for method='lsmr'; method={method!r} has none, got {', '.join(options)}")
        return _augmented(system, values, b)
    precision = 10 * torch.finfo(b.dtype).eps
    options = {"atol": precision, "btol": precision, **options}
    detached = values.detach()

    def apply(x: Tensor) -> Tensor:
        return system.matmul(detached, x)

    def apply_adjoint(u: Tensor) -> Tensor:
        return system.matmul(detached, u, adjoint=True)

    def solver(f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        rhs = f - lsmr((apply_adjoint, apply), g, **options).x if g.any() else f
        x = lsmr((apply, apply_adjoint), rhs, **options).x
        return f - apply(x), x

    zero = b.new_zeros(n, *b.shape[1:])
    return LeastSquares.apply(values, b, zero, system._factorizer, solver)[1]


def _augmented(system: SparseSystem, values: Tensor, b: Tensor) -> Tensor:
    pattern = system._factorizer.pattern
    m, n = pattern.m, pattern.n
    diagonal = np.arange(m, dtype=np.int32)
    row = np.concatenate([diagonal, pattern.rows, m + pattern.columns])
    column = np.concatenate([diagonal, m + pattern.columns, pattern.rows])
    square = system_of(Entries((m + n, m + n), (row, column), None, values))
    wide = torch.promote_types(b.dtype, torch.float64)
    values, rhs = values.to(wide), torch.cat([b, b.new_zeros(n, *b.shape[1:])]).to(wide)
    values = torch.cat([values.new_ones(m), values, values.conj()])
    try:
        both = square.solve(values, rhs)
    except SingularMatrixError as error:
        blamed = error.column - m if error.column is not None and error.column >= m else None
        raise SingularMatrixError(_DEFICIENT, blamed) from None
    # Pivots on the identity: the error of both is eps cond(A)^2, as its step tells. The derivative is refined as well.
    step = square.solve(values, rhs - square.matmul(values, both))
    if not transformed():
        _require_accurate(both[m:].detach(), step[m:].detach(), rhs.detach(), values[m:].detach())
    return (both + step)[m:].to(b.dtype)


def _require_accurate(x: Tensor, step: Tensor, b: Tensor, values: Tensor) -> None:
    """The step tells the error of x, whose square is that of x + step. Where x is next to nothing it tells nothing."""
    if x.numel():
        x_size, step_size, b_size = (torch.linalg.vector_norm(t, dim=0) for t in (x, step, b))
        if not (step_size <= 1e-3 * x_size + 1e-8 * b_size / values.abs().max()).all():
            raise SingularMatrixError(_DEFICIENT)
