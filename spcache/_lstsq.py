"""`spcache.lstsq`: least squares with a sparse matrix."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor

from .functional import find_system, system_of
from .library import is_vector, recorded, traced_least_squares
from .matrices import entries_of, require_dense

__all__ = ["lstsq"]


def lstsq(A: Any, b: Tensor, *, damping: float = 0.0, method: str = "auto", **options: Any) -> Tensor:
    """x that minimizes |A x - b|^2 + damping^2 |x|^2, differentiable in A and b to any order.

    The system of A's pattern, its plan and factor included, is kept in `spcache.plan_cache`: a matrix of the same
    pattern is factorized without analysis, one of equal values not even factorized. A loop that can keep a
    `SparseSystem` saves the search, which is O(nnz), and sees the counters.

    Args:
        A: [m, n] torch sparse COO, CSR or CSC, or SciPy; or a triple (indices, (m, n), values) with indices [2, nnz]
            and values [*B, nnz]. Of full rank, unless there is damping: columns where m >= n, rows where m < n, which
            gives the shortest x with A x = b. float32, float64, complex64 or complex128.
        b: [m] or [m, k], same dtype; with a triple as in `SparseSystem.lstsq`.
        damping: a number, not negative.
        method: "auto", "direct", "normal", "augmented" or "lsmr", as in `SparseSystem.lstsq`.
        options: for "lsmr", those of `spcache.iterative.lsmr`.

    Returns:
        x of shape [n] or [n, k]; with a triple [*P, n] or [*P, n, k]. The gradient of A is sparse, in A's layout,
        at its stored entries; with a triple, it is that of the values.

    Raises:
        SingularMatrixError, NotConvergedError, ValueError, TypeError: as `SparseSystem.lstsq`, which has the cost.

    Example:
        >>> import torch, spcache
        >>> A = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]]).to_sparse_csr()
        >>> spcache.lstsq(A, torch.tensor([1.0, 3.0, 5.0]))  # the line 1 + 2 t
        tensor([1., 2.])
    """
    if isinstance(A, tuple):
        indices, (m, n), values = _triple(A)
        if not isinstance(b, Tensor):
            raise TypeError(f"b must be a torch.Tensor, got {type(b).__name__}")
        if recorded():
            if options:
                raise TypeError(
                    f"recorded code (torch.compile, make_fx) takes no options of lsmr, got {', '.join(options)}"
                )
            fitter = torch.ops.spcache.fitter(indices, m, n)
            return traced_least_squares(fitter, values, b, is_vector(values, b), m, n, float(damping), method)
        return find_system(indices, (m, n)).lstsq(values, b, damping=damping, method=method, **options)
    entries = entries_of(A)
    require_dense("b", b, entries.values)
    m = entries.shape[0]
    if b.dim() not in (1, 2) or b.shape[0] != m:
        raise ValueError(f"b must have shape ({m},) or ({m}, k), got {tuple(b.shape)}")
    return system_of(entries).lstsq(entries.values, b, damping=damping, method=method, **options)


def _triple(A: tuple[Any, ...]) -> tuple[Tensor, tuple[int, int], Tensor]:
    if len(A) != 3 or not isinstance(A[0], Tensor) or not isinstance(A[2], Tensor):
        raise TypeError("A must be a sparse matrix or a triple (indices, (m, n), values), indices and values tensors")
    try:
        m, n = map(operator.index, A[1])
    except (TypeError, ValueError):
        raise TypeError(f"A = (indices, (m, n), values) needs a pair of integers (m, n), got {A[1]!r}") from None
    return A[0], (m, n), A[2]
