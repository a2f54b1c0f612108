"""`spcache.lstsq`: least squares with a sparse matrix."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .autograd import LeastSquares
from .functional import system_of
from .iterative import lsmr
from .matrices import Entries, entries_of
from .system import SparseSystem

__all__ = ["lstsq"]


def lstsq(A: Any, b: Tensor, *, method: str = "auto", **options: Any) -> Tensor:
    """x that minimizes |A x - b|, differentiable in A and b to any order.

    Args:
        A: [m, n] torch sparse COO, CSR or CSC, or SciPy, of full column rank, m >= n; float32, float64, complex64 or
            complex128.
        b: [m] or [m, k], same dtype.
        method: "lsmr", iterative (Fong and Saunders 2011); "auto" is the same for now. "direct" solves the augmented
            system [[I, A], [A^H, 0]] by LU: its accuracy suffers where |b - A x| is large and A ill-conditioned.
        options: of `spcache.iterative.lsmr`, for forward and backward: atol, btol (default here: ten times the
            precision of b), conlim, maxiter, callback, check.

    Returns:
        x of shape [n] or [n, k]. The gradient of A is sparse, in A's layout, at its stored entries.

    Raises:
        NotConvergedError: lsmr did not converge (check=True).
        SingularMatrixError: A has no full column rank ("direct").
        TypeError, ValueError: an argument is not as described.

    Cost: "lsmr": two products an iteration; each backward pass as much again, twice. "direct": as
    `SparseSystem.solve` of order m + n.

    Example:
        >>> import torch, spcache
        >>> A = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]]).to_sparse_csr()
        >>> spcache.lstsq(A, torch.tensor([1.0, 3.0, 5.0]))  # the line 1 + 2 t
        tensor([1.0000, 2.0000])
    """
    if method not in ("auto", "lsmr", "direct"):
        raise ValueError(f"method must be one of 'auto', 'lsmr', 'direct', got {method!r}")
    entries = entries_of(A)
    m, n = entries.shape
    if m < n:
        raise ValueError(f"A must have at least as many rows as columns, got shape {(m, n)}")
    if not isinstance(b, Tensor):
        raise TypeError(f"b must be a torch.Tensor, got {type(b).__name__}")
    if b.dim() not in (1, 2) or b.shape[0] != m:
        raise ValueError(f"b must have shape ({m},) or ({m}, k), got {tuple(b.shape)}")
    if b.dtype != entries.values.dtype:
        raise TypeError(f"b must have the dtype of A, {entries.values.dtype}, got {b.dtype}")
    system, values = system_of(entries), entries.values
    if method == "direct":
        if options:
            raise TypeError(f"method='direct' has no options, got {', '.join(options)}")
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
    both = square.solve(
        torch.cat([values.new_ones(m), values, values.conj()]), torch.cat([b, b.new_zeros(n, *b.shape[1:])])
    )
    return both[m:]
