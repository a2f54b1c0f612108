"""`sparse_mm`, `sparse_triangular_solve`, `sparse_generic_solve`, `sparse_generic_lstsq` of torchsparsegradutils 0.2.7,
over spcache.

    from spcache.compat.torchsparsegradutils import sparse_mm
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ... import autograd, functional, iterative
from ..._lstsq import lstsq as spcache_lstsq
from ...functional import matmul, solve_triangular, system_of
from ...matrices import entries_of, require_dense
from .utils import bicgstab, linear_cg, lsmr, minres

__all__ = ["sparse_generic_lstsq", "sparse_generic_solve", "sparse_mm", "sparse_triangular_solve"]

_LAYOUTS = (torch.sparse_coo, torch.sparse_csr)

Solver = Callable[..., Any]


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
        solve: `solve(A, B, **kwargs) -> X`, or (X, ...), called with tensors without a graph. Default: minres, for
            symmetric A. With `spcache.solve` the backward pass uses the factor of the forward pass.
        transpose_solve: `transpose_solve(A, B, **kwargs)` solves with A^T, and gets A as it is. But what solves with
            the matrix that it gets, gets A^T: `spcache.solve`, the solvers of `utils` and of `spcache.iterative`, also
            in a `functools.partial`; the same function as solve; and if only one of the two is given, that one, which
            serves for both. In backward passes B is scaled to columns of norm one, so that absolute tolerances hold.
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
    entries = entries_of(A)
    require_dense("B", B := B.to(A.dtype), entries.values)
    solve = solve or transpose_solve or minres
    if transpose_solve is None or transpose_solve == solve:
        if _root(solve) is functional.solve:
            return solve(A, B, **kwargs)
        transpose_solve = None
    if A.layout is torch.sparse_coo:
        A = A.coalesce()
    numeric: Any = _Solver(A.detach().clone(), solve, transpose_solve, kwargs)
    return autograd.solve(system_of(entries)._factorizer, numeric, entries.values, B, B.dim() == 1, False)


class _Solver:
    """What `autograd.solve` asks of a factor, by functions of the user. It owns A, as a factor its values."""

    failed = None

    def __init__(self, A: Tensor, solve: Solver, transpose_solve: Solver | None, kwargs: dict[str, Any]):
        self._values = entries_of(A).values
        self._direct = _Linear(partial(solve, **kwargs), A, scaled=False)
        self._transpose = _transpose(solve, transpose_solve, A, kwargs)

    def solve(self, b: Tensor, vector: bool, adjoint: bool) -> Tensor:
        """A^-1 b, or A^-H b, the conjugate of A^-T b̄."""
        return _conj(self._transpose(_conj(b), b.shape)) if adjoint else self._direct(b, b.shape)

    def same_values(self, values: Tensor) -> bool:
        return torch.equal(values, self._values)


class _Linear:
    """A solver of the user's as the linear map that it is. Gives new memory, also where the solver gives what it got.

    Args:
        scaled: every right-hand side is a cotangent, and not only those after the first: zero gives zero without a
            solve, and columns have norm one, so that tolerances mean what they mean for the user's own.
    """

    def __init__(self, solve: Solver, A: Tensor, scaled: bool):
        self._solve, self._A, self._scaled = solve, A, scaled

    @torch.no_grad()
    def __call__(self, b: Tensor, shape: tuple[int, ...]) -> Tensor:
        """x, of a shape."""
        b = b.detach()
        if not self._scaled:
            self._scaled = True
            return self._run(b, shape)
        if not b.any():
            return b.new_zeros(shape)
        largest = b.abs().amax(0)  # the norm of what is tiny or huge would underflow or overflow
        zero = largest == 0
        b = b / largest.masked_fill(zero, 1)
        norm = torch.linalg.vector_norm(b, dim=0).masked_fill(zero, 1)
        return (self._run(b / norm, shape) * norm * largest).masked_fill(zero, 0)

    def _run(self, b: Tensor, shape: tuple[int, ...]) -> Tensor:
        found: Any = self._solve(self._A, b)
        x: Tensor = found[0] if isinstance(found, tuple) else found
        return x.reshape(shape).to(b.dtype, copy=True)


def _root(solve: Solver) -> Solver:
    """What a partial function is part of."""
    return _root(solve.func) if isinstance(solve, partial) else solve


def _transpose(solve: Solver | None, transpose: Solver | None, A: Tensor, kwargs: dict[str, Any]) -> _Linear:
    """The solver with A^T: of A, or of its transpose where the function solves with what it gets."""
    own = transpose is None or _root(transpose) in _OWN
    transpose = transpose or solve
    assert transpose is not None
    run = partial(transpose, **kwargs)

    def run_on_transpose(A: Tensor, b: Tensor) -> Any:
        return run(A.t().coalesce() if A.layout is torch.sparse_coo else A.t().to_sparse_csr(), b)

    return _Linear(run_on_transpose if own else run, A, scaled=True)


# they solve with the matrix that they get
_OWN = (
    functional.solve, bicgstab, linear_cg, lsmr, minres,
    iterative.bicgstab, iterative.cg, iterative.gmres, iterative.lsmr, iterative.minres,
)  # fmt: skip


def sparse_generic_lstsq(
    A: Tensor, B: Tensor, lstsq: Solver | None = None, transpose_lstsq: Solver | None = None
) -> Tensor:
    """X that minimizes |A X - B|, by any solver; `spcache.lstsq` is the one with a solver of its own.

    Args:
        A: [m, n] sparse COO or CSR of full column rank, m >= n.
        B: [m] or [m, k].
        lstsq: `lstsq(A, B) -> X`, or (X, ...). Default: LSMR. `spcache.lstsq` has its own derivative.
        transpose_lstsq: `transpose_lstsq(A, B)` solves A^T Y = B for the smallest Y, and gets A as it is; but A^T if it
            is `utils.lsmr` or `spcache.iterative.lsmr`. Default: LSMR.

    Returns:
        X of shape [n] or [n, k]. The gradient of A is at its stored entries only, in A's layout.

    Raises:
        ValueError: in the backward pass, A is wide.

    References:
        Golub & Pereyra (1973), doi:10.1137/0710036, eq. 4.12.
    """
    entries = entries_of(A)
    require_dense("B", B, entries.values)
    if transpose_lstsq is None and lstsq is not None and _root(lstsq) is spcache_lstsq:
        return lstsq(A, B)
    (m, n), system, detached = entries.shape, system_of(entries), A.detach()
    values = entries.values.detach()

    def direct(x: Tensor) -> Tensor:
        return system.matmul(values, x)

    def adjoint(y: Tensor) -> Tensor:
        return system.matmul(values, y, adjoint=True)

    least = _Linear(lstsq or (lambda _, B: lsmr(direct, B, adjoint, n)), detached, scaled=False)
    if transpose_lstsq is None:
        default = _Linear(lambda _, B: lsmr(adjoint, B, direct, m), detached, scaled=True)
    else:
        given = _transpose(None, transpose_lstsq, detached, {})

    def smallest(g: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The smallest f with A^H f = g."""
        return default(g, shape) if transpose_lstsq is None else _conj(given(_conj(g), shape))

    def solver(f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        shift = smallest(g, f.shape)
        x = least(f - shift, g.shape)
        if not f.any():
            return shift, x  # f - A x, more accurately
        return f - direct(x), x

    source = _LeastSquares(system._factorizer, solver, B.dim() == 1)
    f = B.unsqueeze(-1) if source.vector else B
    X = autograd.LeastSquares.apply(entries.values, f, f.new_zeros(n, f.shape[1]), source, autograd.Memo(()), False)[1]
    X = X.squeeze(-1) if source.vector else X
    _refuse_backward(X, lambda: m < n, f"A should be a tall full-rank matrix. Got A.shape={A.shape}")
    return X


class _LeastSquares:
    """A `LeastSquaresSource` by a solver of the user's, which gets vectors where B is one."""

    wide = False

    def __init__(self, factorizer: Any, solver: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], vector: bool):
        self.solver, self.vector = solver, vector
        self.convention, self.outer, self.matvec = factorizer.convention, factorizer.outer, factorizer.matvec
        self.shape = factorizer.pattern.m, factorizer.pattern.n

    def recall(self, memo: autograd.Memo, values: Tensor) -> None:
        return None

    def run(self, factor: None, values: Tensor, f: Tensor, g: Tensor, check: bool) -> tuple[Tensor, Tensor]:
        if not self.vector:
            return self.solver(f, g)
        r, x = self.solver(f.squeeze(-1), g.squeeze(-1))
        return r.unsqueeze(-1), x.unsqueeze(-1)


def _conj(x: Tensor) -> Tensor:
    return x.conj().resolve_conj()


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
