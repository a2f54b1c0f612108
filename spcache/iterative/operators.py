"""`as_operator`: whatever can multiply, as a pair of functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["Apply", "Operator", "as_operator"]

Apply = Callable[[Tensor], Tensor]


class Operator(NamedTuple):
    """A linear map.

    Attributes:
        apply: x -> A x; x is [n], [*B, n] for a batch of matrices, or [*B, n, k].
        adjoint: y -> A^H y, or None where A does not offer it.
        shape: (*B, m, n), or None where A does not tell.
    """

    apply: Apply
    adjoint: Apply | None
    shape: tuple[int, ...] | None


def as_operator(A: Any, name: str = "A") -> Operator:
    """The map of a tensor (dense, or sparse COO, CSR, CSC, BSR), of a sparse matrix of SciPy (copied), of a pair
    (matvec, rmatvec) of functions, of an object with `matmul`, `matvec` (and `matmat`) or `@`, or of a function.

    The adjoint of an object is its `rmatvec` (and `rmatmat`), or what multiplying by its `mH`, `H` or, conjugated,
    `T` does. Sparse matrices are converted to CSR here, once, and their adjoints when first asked for.

    Args:
        name: of the argument, for messages.

    Raises:
        TypeError: A is none of these.
        ValueError: A is a sparse tensor that is not two-dimensional, or has no two dimensions at all.
    """
    if hasattr(A, "tocsr") and not isinstance(A, Tensor):
        A = _from_scipy(A.tocsr())
    if isinstance(A, Tensor):
        matrix = _Matrix(A, name)
        return Operator(matrix.apply, None if A.layout is torch.sparse_bsr else matrix.adjoint, tuple(A.shape))
    if isinstance(A, np.ndarray):
        raise TypeError(f"{name} must be of torch, got a NumPy array; convert it: torch.from_numpy({name})")
    if isinstance(A, tuple):
        if len(A) != 2 or not all(callable(f) for f in A):
            raise TypeError(f"{name} as a tuple must be a pair of functions (matvec, rmatvec), got {A!r}")
        return Operator(*A, None)
    apply = _forward(A) or (A if callable(A) else None)
    if apply is None:
        raise TypeError(
            f"{name} must be a tensor, a function x -> {name} x, a pair (matvec, rmatvec) or an object with matmul, "
            f"matvec or @, got {type(A).__name__}"
        )
    shape = getattr(A, "shape", None)
    return Operator(apply, _adjoint(A), tuple(map(int, shape)) if shape is not None and len(shape) > 1 else None)


def _from_scipy(A: Any) -> Tensor:
    indptr, indices, data = (torch.tensor(part) for part in (A.indptr, A.indices, A.data))
    return torch.sparse_csr_tensor(indptr, indices, data, size=A.shape)


def _forward(A: Any) -> Apply | None:
    return _product(A, "matmul") or _product(A, "matvec", "matmat") or _product(A, "__matmul__")


def _product(A: Any, vector: str, matrix: str = "") -> Apply | None:
    """The method `vector`, or `matrix` for what has more than one dimension, if A has such a method."""
    one: Apply | None = getattr(A, vector, None)
    many: Apply | None = getattr(A, matrix, None) if matrix else None
    if one is None or many is None:
        return one
    return lambda x: many(x) if x.dim() > 1 else one(x)


def _adjoint(A: Any) -> Apply | None:
    found = _product(A, "rmatvec", "rmatmat")
    if found is not None:
        return found
    for attribute in ("mH", "H"):
        if (found := _forward(getattr(A, attribute, None))) is not None:
            return found
    transpose = _forward(getattr(A, "T", None))
    return None if transpose is None else lambda y: transpose(y.conj()).conj()


class _Matrix:
    """A tensor as a map."""

    def __init__(self, A: Tensor, name: str):
        if A.dim() < 2:
            raise ValueError(f"{name} must have at least two dimensions, got shape {tuple(A.shape)}")
        self._sparse = A.layout is not torch.strided
        if self._sparse and (A.dim() != 2 or A.dense_dim()):
            raise ValueError(f"a sparse {name} must be two-dimensional with scalar entries, got shape {tuple(A.shape)}")
        if A.layout is torch.sparse_bsc:
            raise TypeError(
                f"{name} must not be in layout torch.sparse_bsc, which torch cannot multiply; use BSR or CSR"
            )
        self._A = _rows(A)
        self._H: Tensor | None = None

    def apply(self, x: Tensor) -> Tensor:
        return self._multiply(self._A, x)

    def adjoint(self, y: Tensor) -> Tensor:
        if self._H is None:
            self._H = _rows(self._A.mH)
        return self._multiply(self._H, y)

    def _multiply(self, A: Tensor, x: Tensor) -> Tensor:
        if x.dim() == A.dim() - 1 > 1:
            return (A @ x.unsqueeze(-1)).squeeze(-1)
        if not self._sparse or x.dim() <= 2:
            return A @ x
        wide = x.movedim(-2, 0)  # sparse matrices multiply two-dimensional ones only
        return (A @ wide.flatten(1)).unflatten(1, wide.shape[1:]).movedim(0, -2)


def _rows(A: Tensor) -> Tensor:
    """A sparse matrix in CSR, which is the fastest to multiply with. torch has no derivative of the conversion of
    complex matrices: one that needs it stays what it is."""
    if A.layout not in (torch.sparse_coo, torch.sparse_csc) or (A.requires_grad and A.is_complex()):
        return A
    return A.to_sparse_csr()
