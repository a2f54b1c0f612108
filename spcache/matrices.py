"""Sparse matrices of torch and SciPy: their COO indices, their values, and `spcache.solve`."""

from __future__ import annotations

import zlib
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .engines.protocol import DTYPE_CODES
from .memory import read
from .pattern import Pattern

__all__ = ["MatrixKey", "entries_of", "require_dense", "values_in_order"]

_COMPRESSED = {torch.sparse_csr: 0, torch.sparse_csc: 1}  # the dimension that is compressed


class Entries(NamedTuple):
    """The stored entries of a matrix, in its own order.

    Attributes:
        shape: (m, n); of a batch, that of the block-diagonal matrix.
        parts: integer arrays of the format: (row, column), or compressed pointers and plain indices; of a batch
            (block, row, column), or both with a row for each block.
        compressed: 0 rows, 1 columns are compressed, None: neither.
        values: [nnz], connected to the matrix's graph.
        blocks: how many there are in a batch; None: no batch.
    """

    shape: tuple[int, int]
    parts: tuple[np.ndarray, ...]
    compressed: int | None
    values: Tensor
    blocks: int | None = None

    def indices(self) -> np.ndarray:
        """[2, nnz] row and column of each entry. ValueError where pointers are wrong, or an index is outside of its
        block, which would be a place in another one; outside of the matrix is for `Pattern` to find."""
        m, n = (size // max(self.blocks or 1, 1) for size in self.shape)
        if self.compressed is None:
            *block, row, column = self.parts
        else:
            pointers, plain = map(np.atleast_2d, self.parts)
            counts, nnz = np.diff(pointers), plain.shape[1]
            if (
                counts.shape[1] != (m, n)[self.compressed]
                or (counts < 0).any()
                or ((pointers[:, 0] != 0) | (pointers[:, -1] != nnz)).any()
            ):
                raise ValueError(f"the compressed pointers of A must grow from 0 to the number of entries, {nnz}")
            parts = np.repeat(np.indices(counts.shape).reshape(2, -1), counts.reshape(-1), axis=1)
            row, column = (parts[1], plain.reshape(-1))[:: 1 if self.compressed == 0 else -1]
            block = [parts[0]] if self.blocks is not None else []
        if not block:
            return np.stack([row, column])
        Pattern(np.stack([row, column]), m, n)  # raises
        return np.stack([block[0] * m + row, block[0] * n + column])


def entries_of(A: Any, batched: bool = False) -> Entries:
    """The entries of a two-dimensional sparse matrix: torch COO, CSR, CSC, or SciPy. Uncoalesced COO is coalesced.

    Args:
        batched: A may be a batch [B, m, n], of any patterns; it becomes one block-diagonal matrix [B m, B n].

    Raises:
        TypeError: A is not sparse, in a layout that is not served, or without data.
        ValueError: A is not two-dimensional.
    """
    if isinstance(A, Tensor):
        if A.layout is torch.strided:
            raise TypeError("A must be a sparse matrix, got a dense tensor; convert it: A.to_sparse()")
        if A.dim() != 2 and not (batched and A.dim() == 3):
            raise ValueError(f"A must be two-dimensional{', or a batch' * batched}, got shape {tuple(A.shape)}")
        if A.dense_dim():
            raise ValueError(f"A must have sparse dimensions only, got {A.dense_dim()} dense")
        if A.is_meta:
            raise TypeError("A must have data, got a tensor on the meta device")
        *batch, m, n = A.shape
        blocks = batch[0] if batch else None
        shape = (m, n) if blocks is None else (blocks * m, blocks * n)
        if A.layout is torch.sparse_coo:
            A = A if A.is_coalesced() else A.coalesce()
            return Entries(shape, tuple(read(A, lambda A: A.indices().cpu().numpy())), None, A.values(), blocks)
        if A.layout in _COMPRESSED:
            compressed = _COMPRESSED[A.layout]
            if compressed == 0:
                pointers, plain = A.crow_indices(), A.col_indices()
            else:
                pointers, plain = A.ccol_indices(), A.row_indices()
            parts = pointers.cpu().numpy(), plain.cpu().numpy()
            return Entries(shape, parts, compressed, A.values().flatten(), blocks)
        raise TypeError(f"A must be sparse COO, CSR or CSC, got layout {A.layout}")
    if hasattr(A, "tocoo"):
        if A.ndim != 2:
            raise ValueError(f"A must be two-dimensional, got shape {A.shape}")
        coo = A.tocoo()
        data = coo.data if coo.data.flags.writeable else coo.data.copy()
        values = torch.from_numpy(np.ascontiguousarray(data))
        return Entries((int(A.shape[0]), int(A.shape[1])), (coo.row, coo.col), None, values)
    raise TypeError(f"A must be a sparse matrix of torch or SciPy, got {type(A).__name__}")


def require_dense(name: str, b: Any, values: Tensor) -> None:
    """Raises TypeError where b, the argument of that name, is no tensor with data in the dtype of A's values."""
    if not isinstance(b, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(b).__name__}")
    if b.is_meta:
        raise TypeError(f"{name} must have data, got a tensor on the meta device")
    if values.dtype not in DTYPE_CODES:
        raise TypeError(f"A must be float32, float64, complex64 or complex128, got {values.dtype}")
    if b.dtype != values.dtype:
        raise TypeError(
            f"{name} must have the dtype of A, {values.dtype}, got {b.dtype}; convert it: {name}.to(A.dtype)"
        )


def values_in_order(A: Any, pattern: Pattern) -> Tensor:
    """The values of A in the order of a pattern, after an exact comparison; differentiable in A."""
    entries = entries_of(A)
    if entries.shape != (pattern.m, pattern.n):
        raise ValueError(f"A has shape {entries.shape}, the system {(pattern.m, pattern.n)}")
    other = Pattern(entries.indices(), *entries.shape)
    if other == pattern:
        return entries.values
    mine, theirs = pattern.stored, other.stored
    if mine.structure != theirs.structure:
        raise ValueError(
            "A has another sparsity pattern than the system; make a system for it: SparseSystem.from_matrix(A)"
        )
    if pattern.nnz != len(mine.structure.indices) or other.nnz != pattern.nnz:
        raise ValueError("A and the system store duplicates in different orders; coalesce A (sum_duplicates in SciPy)")
    position = np.empty(pattern.nnz, np.int64)
    position[theirs.slots] = np.arange(pattern.nnz)
    return entries.values.index_select(0, torch.from_numpy(position[mine.slots]).to(entries.values.device))


class MatrixKey:
    """A sparse matrix's pattern and the options of its system, hashed and compared exactly."""

    __slots__ = ("_entries", "_hash", "_options")

    def __init__(self, entries: Entries, options: tuple[Any, ...]):
        self._entries = entries._replace(values=None)  # type: ignore[arg-type]
        self._options = options
        checksums = tuple(zlib.crc32(np.ascontiguousarray(part).data) for part in entries.parts)
        self._hash = hash((entries.shape, entries.compressed, entries.blocks, options, checksums))

    def own(self) -> None:
        """Copies the index arrays, so that the key may outlive the matrix."""
        self._entries = self._entries._replace(parts=tuple(part.copy() for part in self._entries.parts))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MatrixKey) or self._options != other._options:
            return False
        a, b = self._entries, other._entries
        return (a.shape, a.compressed, a.blocks) == (b.shape, b.compressed, b.blocks) and all(
            np.array_equal(p, q) for p, q in zip(a.parts, b.parts, strict=True)
        )
