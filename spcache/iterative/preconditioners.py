"""Preconditioners: functions that nearly undo a matrix. Constants as far as derivatives are concerned."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import SingularMatrixError
from .stopping import DTYPES, count_of

__all__ = ["block_diagonal", "diagonal", "incomplete"]


class diagonal:
    """Division by the diagonal of A (Jacobi): `M=diagonal(A)`.

    Cost: O(nnz) to make, O(n) to apply.

    Args:
        A: [*B, n, n] dense, or [n, n] sparse in any layout of torch but blocks.

    Raises:
        ValueError: a diagonal entry is zero or not finite; A is not square.
    """

    def __init__(self, A: Tensor):
        A = _square(A)
        if A.layout is torch.strided:
            d = torch.diagonal(A, dim1=-2, dim2=-1)
        else:
            A = _coo(A)
            row, column = A.indices()
            d = A.values().new_zeros(A.shape[0]).index_add(0, row, torch.where(row == column, A.values(), 0))
        bad = ((d == 0) | ~d.isfinite()).nonzero()
        if len(bad):
            *batch, row = bad[0].tolist()
            where = f"row {row}" + (f" of matrix {tuple(batch)}" if batch else "")
            raise ValueError(
                f"A must have a diagonal without zeros, got {d[tuple(bad[0])].item()} in {where} (counted from 0); use "
                f"block_diagonal or incomplete"
            )
        self._inverse = 1 / d

    def __call__(self, r: Tensor) -> Tensor:
        return self._inverse * r if r.dim() == self._inverse.dim() else self._inverse.unsqueeze(-1) * r


class block_diagonal:
    """Products with the inverses of the diagonal blocks of A (block Jacobi): `M=block_diagonal(A, 8)`.

    Cost: O(nnz + n size^2) to make, O(n size) to apply.

    Args:
        A: [*B, n, n] dense, or [n, n] sparse in any layout of torch but blocks.
        size: rows of a block; the last one may be smaller.

    Raises:
        ValueError: a block is singular; A is not square.
    """

    def __init__(self, A: Tensor, size: int):
        A, size = _square(A), count_of(size, "size")
        n = A.shape[-1]
        self._n, self._size = n, size
        count = -(-n // size)
        if A.layout is torch.strided:
            batch = A.shape[:-2]
            padded = A.new_zeros(*batch, count * size, count * size)
            padded[..., :n, :n] = A
            grid = padded.unflatten(-1, (count, size)).unflatten(-3, (count, size))  # [*B, count, size, count, size]
            blocks = torch.diagonal(grid, dim1=-4, dim2=-2).movedim(-1, -3).clone()
        else:
            A = _coo(A)
            row, column = A.indices()
            inside = row // size == column // size
            at = row * size + column % size
            flat = A.values().new_zeros(count * size * size)
            blocks = flat.index_add(0, at, torch.where(inside, A.values(), 0)).view(count, size, size)
        if n % size:
            fill = torch.arange(n % size, size, device=A.device)
            blocks[..., -1, fill, fill] = 1
        inverse, info = torch.linalg.inv_ex(blocks)
        bad = ((info != 0) | ~inverse.isfinite().all(-1).all(-1)).nonzero()
        if len(bad):
            *batch_index, block = bad[0].tolist()
            where = f" of matrix {tuple(batch_index)}" if batch_index else ""
            raise ValueError(
                f"A must have regular diagonal blocks, got a singular one in rows {block * size} to "
                f"{min(n, (block + 1) * size) - 1}{where} (counted from 0); use another size, or incomplete"
            )
        self._inverse = inverse  # [*B, count, size, size]

    def __call__(self, r: Tensor) -> Tensor:
        vector = r.dim() == self._inverse.dim() - 2
        if vector:
            r = r.unsqueeze(-1)
        n, count = self._n, self._inverse.shape[-3]
        padded = torch.nn.functional.pad(r, (0, 0, 0, count * self._size - n))
        z = (self._inverse @ padded.unflatten(-2, (count, self._size))).flatten(-3, -2)[..., :n, :]
        return z.squeeze(-1) if vector else z


class incomplete:
    """Solves with an incomplete LU factorization by SuperLU, `scipy.sparse.linalg.spilu`: `M=incomplete(A)`.

    On the CPU only, and without derivatives.

    Args:
        A: [n, n] sparse tensor in any layout of torch but blocks, or a sparse matrix of SciPy.
        options: those of `spilu`: drop_tol, fill_factor, …

    Raises:
        SingularMatrixError: a pivot is zero.

    References:
        Li & Shao (2011), doi:10.1145/1916461.1916467.
    """

    def __init__(self, A: Any, **options: Any):
        from scipy.sparse import csc_matrix
        from scipy.sparse.linalg import spilu

        if isinstance(A, Tensor):
            if A.device.type != "cpu":
                raise ValueError(f"A must be on the CPU, where SuperLU works, got device {A.device}")
            A = _square(A)
            if A.dim() != 2:
                raise ValueError(f"A must be two-dimensional, got shape {tuple(A.shape)}")
            A = _coo(A)
            A = csc_matrix((A.values().numpy(), tuple(A.indices().numpy())), shape=tuple(A.shape))
        elif not hasattr(A, "tocsc"):
            raise TypeError(f"A must be a matrix of torch or a sparse one of SciPy, got {type(A).__name__}")
        try:
            self._lu = spilu(A.tocsc(), **options)
        except RuntimeError as error:
            if "singular" not in str(error):
                raise
            raise SingularMatrixError(
                "the incomplete factorization of A met a zero pivot; use another permc_spec"
            ) from None

    def __call__(self, r: Tensor) -> Tensor:
        if r.requires_grad:
            raise RuntimeError(
                "incomplete() has no derivative: call the method under torch.no_grad(), or use another M"
            )
        columns = r.movedim(-2, 0) if r.dim() > 1 else r  # [n, *]
        solved = self._lu.solve(
            np.asfortranarray(columns.reshape(len(r) if r.dim() == 1 else columns.shape[0], -1).numpy())
        )
        z = torch.from_numpy(np.ascontiguousarray(solved)).view(columns.shape)
        return z.movedim(0, -2) if r.dim() > 1 else z


def _square(A: Any) -> Tensor:
    if not isinstance(A, Tensor):
        raise TypeError(f"A must be a tensor, got {type(A).__name__}")
    if A.dtype not in DTYPES:
        raise TypeError(f"A must be float32, float64, complex64 or complex128, got dtype {A.dtype}")
    if A.dim() < 2 or A.shape[-1] != A.shape[-2]:
        raise ValueError(f"A must be square, got shape {tuple(A.shape)}")
    return A.detach()


def _coo(A: Tensor) -> Tensor:
    return (A if A.layout is torch.sparse_coo else A.to_sparse_coo()).coalesce()
