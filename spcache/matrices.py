"""Sparse matrices of torch and SciPy: their COO indices, their values, and `spcache.solve`."""

from __future__ import annotations

import math
import zlib
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .memory import read
from .pattern import Pattern

__all__ = ["MatrixKey", "entries_of", "values_in_order"]

_COMPRESSED = {torch.sparse_csr: 0, torch.sparse_csc: 1}  # the dimension that is compressed


class Entries(NamedTuple):
    """The stored entries of a matrix, in its own order.

    Attributes:
        shape: (m, n).
        parts: [2] integer arrays of the format: (row, column), or compressed pointers and plain indices.
        compressed: 0 rows, 1 columns are compressed, None: neither.
        values: [nnz], connected to the matrix's graph.
    """

    shape: tuple[int, int]
    parts: tuple[np.ndarray, np.ndarray]
    compressed: int | None
    values: Tensor

    def indices(self) -> np.ndarray:
        """[2, nnz] row and column of each entry."""
        if self.compressed is None:
            return np.stack(self.parts)
        pointers, plain = self.parts
        expanded = np.repeat(np.arange(len(pointers) - 1, dtype=plain.dtype), np.diff(pointers))
        return np.stack([expanded, plain] if self.compressed == 0 else [plain, expanded])


def entries_of(A: Any, batched: bool = False) -> Entries:
    """The entries of a two-dimensional sparse matrix: torch COO, CSR, CSC, or SciPy. Uncoalesced COO is coalesced.

    Args:
        batched: A may be a batch [B, m, n], of any patterns; it becomes one block-diagonal matrix [B m, B n].

    Raises:
        TypeError: A is not sparse, or in a layout that is not served.
        ValueError: A is not two-dimensional.
    """
    if isinstance(A, Tensor):
        if A.layout is torch.strided:
            raise TypeError("A must be a sparse matrix, got a dense tensor; convert it: A.to_sparse()")
        if A.dim() != 2 and not (batched and A.dim() == 3):
            raise ValueError(f"A must be two-dimensional{', or a batch' * batched}, got shape {tuple(A.shape)}")
        if A.dense_dim():
            raise ValueError(f"A must have sparse dimensions only, got {A.dense_dim()} dense")
        *batch, m, n = A.shape
        blocks = math.prod(batch)
        shape = (blocks * m, blocks * n)
        if A.layout is torch.sparse_coo:
            A = A.coalesce()
            *block, row, column = read(A, lambda A: A.indices().cpu().numpy())
            if block:
                row, column = block[0] * m + row, block[0] * n + column
            return Entries(shape, (row, column), None, A.values())
        if A.layout in _COMPRESSED:
            compressed = _COMPRESSED[A.layout]
            if compressed == 0:
                pointers, plain = A.crow_indices(), A.col_indices()
            else:
                pointers, plain = A.ccol_indices(), A.row_indices()
            if batch:
                block = torch.arange(blocks, device=plain.device)[:, None]
                ends = torch.tensor([plain.numel()], device=plain.device)
                pointers = torch.cat([(pointers[:, :-1] + block * plain.shape[-1]).flatten(), ends])
                plain = (plain + block * (n if compressed == 0 else m)).flatten()
            return Entries(shape, (pointers.cpu().numpy(), plain.cpu().numpy()), compressed, A.values().flatten())
        raise TypeError(f"A must be sparse COO, CSR or CSC, got layout {A.layout}")
    if hasattr(A, "tocoo"):
        if A.ndim != 2:
            raise ValueError(f"A must be two-dimensional, got shape {A.shape}")
        coo = A.tocoo()
        data = coo.data if coo.data.flags.writeable else coo.data.copy()
        values = torch.from_numpy(np.ascontiguousarray(data))
        return Entries((int(A.shape[0]), int(A.shape[1])), (coo.row, coo.col), None, values)
    raise TypeError(f"A must be a sparse matrix of torch or SciPy, got {type(A).__name__}")


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
        first, second = entries.parts
        self._hash = hash((
            entries.shape, entries.compressed, options,
            zlib.crc32(np.ascontiguousarray(second).data, zlib.crc32(np.ascontiguousarray(first).data)),
        ))  # fmt: skip

    def own(self) -> None:
        """Copies the index arrays, so that the key may outlive the matrix."""
        first, second = self._entries.parts
        self._entries = self._entries._replace(parts=(first.copy(), second.copy()))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, MatrixKey) or self._options != other._options:
            return False
        a, b = self._entries, other._entries
        return (
            (a.shape, a.compressed) == (b.shape, b.compressed)
            and np.array_equal(a.parts[0], b.parts[0])
            and np.array_equal(a.parts[1], b.parts[1])
        )
