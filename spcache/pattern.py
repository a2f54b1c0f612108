"""`Pattern`: the caller's COO indices, their canonical structures, and the map from one to the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from ._pattern import Entries, compress
from .engines.protocol import Structure
from .memory import read

__all__ = ["Contributions", "Pattern", "lazy"]

_INT32_MAX = 2**31 - 1

# Roles of a contribution, as in src/kernels/assembly.hpp.
_DIRECT, _MIRRORED, _DIAGONAL = 0, 1, 2


class lazy:
    """An attribute computed once, at first use. Takes no lock, unlike `functools.cached_property` before Python 3.12,
    whose lock a forked child may find taken: two threads may compute the same thing, and one of the results stays."""

    def __init__(self, compute: Callable[[Any], Any]):
        self._compute = compute
        self.__doc__ = compute.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self
        return instance.__dict__.setdefault(self._name, self._compute(instance))


class Contributions(NamedTuple):
    """A canonical structure and what each of the caller's entries adds to it, one contribution a place."""

    structure: Structure
    slots: np.ndarray  # [contributions; int32] place in structure.indices
    sources: np.ndarray  # [contributions; int32] entry of the caller
    roles: np.ndarray  # [contributions; uint8]

    @property
    def nbytes(self) -> int:
        arrays = (self.structure.indptr, self.structure.indices, self.slots, self.sources, self.roles)
        return sum(a.nbytes for a in arrays)


class Pattern:
    """A sparsity pattern; immutable.

    Args:
        indices: [2, nnz; integer] row and column of each entry, any order, duplicates allowed; torch or NumPy.
        m, n: number of rows and columns.

    Raises:
        TypeError: indices is not an integer array.
        ValueError: wrong shape, an index out of range, more than 2^31 - 1 entries, rows or columns.
    """

    def __init__(self, indices: Any, m: int, n: int):
        if max(m, n) > _INT32_MAX:
            raise ValueError(f"n must be below 2^31, got {max(m, n)}")
        self.m, self.n = m, n
        self.rows, self.columns = _rows_and_columns(indices, m, n)
        self._on: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def nnz(self) -> int:
        """Number of the caller's entries, duplicates counted."""
        return len(self.rows)

    @property
    def nbytes(self) -> int:
        """Memory of the indices, and of the structures asked for so far."""
        made = (self.__dict__.get(name) for name in ("stored", "lower", "mirrored", "paired"))
        return self.rows.nbytes + self.columns.nbytes + sum(c.nbytes for c in made if c is not None)

    def on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows and columns of the entries as tensors [nnz; int64] on a device, kept for the next time."""
        kept: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = self._on
        if device not in kept:
            row, column = (torch.from_numpy(a).to(device, torch.int64) for a in (self.rows, self.columns))
            kept.setdefault(device, (row, column))
        return kept[device]

    @lazy
    def entries(self) -> Entries:
        """The native view of the entries, for the gradient's gather and the symmetry tests."""
        return Entries(self.rows, self.columns)

    @lazy
    def paired(self) -> Entries:
        """The same, prepared for the symmetry tests."""
        lower = self.lower
        entries = Entries(self.rows, self.columns)
        entries.pair(self.n, lower.structure.indptr, lower.structure.indices, lower.slots)
        return entries

    @lazy
    def stored(self) -> Contributions:
        """The structure as the caller stores it."""
        indptr, indices, slots = compress(self.rows, self.columns, self.m, self.n)
        sources = np.arange(self.nnz, dtype=np.int32)
        return Contributions(
            Structure(self.n, indptr, indices, False), slots, sources, np.full(self.nnz, _DIRECT, np.uint8)
        )

    @lazy
    def lower(self) -> Contributions:
        """The lower triangle of the pattern and its transpose; what is stored above contributes mirrored."""
        below = np.maximum(self.rows, self.columns)
        right = np.minimum(self.rows, self.columns)
        indptr, indices, slots = compress(below, right, self.n, self.n)
        roles = np.where(
            self.rows == self.columns, _DIAGONAL, np.where(self.rows > self.columns, _DIRECT, _MIRRORED)
        ).astype(np.uint8)
        sources = np.arange(self.nnz, dtype=np.int32)
        return Contributions(Structure(self.n, indptr, indices, True), slots, sources, roles)

    @lazy
    def mirrored(self) -> Contributions:
        """The pattern and its transpose; every entry off the diagonal contributes directly and mirrored."""
        off = np.flatnonzero(self.rows != self.columns).astype(np.int32)
        rows = np.concatenate([self.rows, self.columns[off]])
        columns = np.concatenate([self.columns, self.rows[off]])
        indptr, indices, slots = compress(rows, columns, self.n, self.n)
        direct = np.where(self.rows == self.columns, _DIAGONAL, _DIRECT)
        roles = np.concatenate([direct, np.full(len(off), _MIRRORED)]).astype(np.uint8)
        sources = np.concatenate([np.arange(self.nnz, dtype=np.int32), off])
        return Contributions(Structure(self.n, indptr, indices, False), slots, sources, roles)

    def without_partner(self) -> int | None:
        """The first entry (i, j) of the caller for which nothing is stored at (j, i), or None."""
        below, above = np.zeros((2, len(self.lower.structure.indices)), bool)
        below[self.lower.slots[self.rows >= self.columns]] = True
        above[self.lower.slots[self.rows <= self.columns]] = True
        lonely = np.flatnonzero((below != above)[self.lower.slots])
        return int(lonely[0]) if len(lonely) else None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Pattern) and (
            self is other
            or (
                (self.m, self.n) == (other.m, other.n)
                and np.array_equal(self.rows, other.rows)
                and np.array_equal(self.columns, other.columns)
            )
        )

    __hash__ = None  # type: ignore[assignment]  # structures are hashed, patterns only compared


def _rows_and_columns(indices: Any, m: int, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Validated int32 copies of the two rows of `indices`."""
    if isinstance(indices, torch.Tensor):
        if indices.layout is not torch.strided:
            raise TypeError(f"indices must be a dense (strided) tensor, got layout {indices.layout}")
        if indices.is_meta:
            raise TypeError("indices must have data, got a tensor on the meta device")
        indices = read(indices, lambda t: t.detach().cpu().numpy())
    elif not isinstance(indices, np.ndarray):
        raise TypeError(f"indices must be a torch tensor or a NumPy array, got {type(indices).__name__}")
    if indices.dtype.kind not in "iu":
        raise TypeError(f"indices must be integers (int32 or int64), got dtype {indices.dtype}; convert them first")
    if indices.ndim != 2 or indices.shape[0] != 2:
        raise ValueError(
            f"indices must have shape (2, nnz), rows above columns, got {tuple(indices.shape)}"
            + ("; did you mean indices.T?" if indices.ndim == 2 and indices.shape[1] == 2 else "")
        )
    if indices.shape[1] > _INT32_MAX:
        raise ValueError(f"at most 2^31 - 1 entries are supported, got {indices.shape[1]}")
    out = []
    for name, index, bound in (("row", indices[0], m), ("column", indices[1], n)):
        bad = np.flatnonzero((index < 0) | (index >= bound))
        if len(bad):
            k = int(bad[0])
            raise ValueError(
                f"indices: entry {k} = ({int(indices[0, k])}, {int(indices[1, k])}) has its {name} outside "
                f"0..{bound - 1} (shape is ({m}, {n}); negative indices do not wrap around)"
            )
        out.append(np.ascontiguousarray(index, np.int32).copy())
    return out[0], out[1]
