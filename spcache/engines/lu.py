"""The LU engine: large general matrices on the structure of A + A^T; our own kernels.

Tree, schedules and memory are those of a Cholesky factorization, with two panels for each front. Pivots are the
diagonal where that is stable; rows and columns are exchanged inside of fronts only, what cannot be done there shows in
a report, and solves are refined. Where the diagonal does not serve, a row matching found from values takes its place.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .._pattern import Assembly, compress, workers
from . import _lu, multifrontal
from .pivoted import Plan, Status, assembly
from .protocol import Permutation, Structure

__all__ = [
    "ORDERINGS", "Storage", "SymbolicFactor", "analyze", "arrangement", "assembly", "in_question", "magnitudes",
    "pairing", "pays", "variant",
]  # fmt: skip

_lu.use_workers(workers())

ORDERINGS = multifrontal.ORDERINGS
variant = multifrontal.variant

# The diagonal serves where no entry of it is below this share of the largest entries of its row and column (of their
# geometric mean).
_SERVES = 1e-3


# KLU serves matrices of lower order, and those with less work, or less for each entry of the factor: circuits, power
# grids, whose fronts are tiny. Measured on convection-diffusion in the plane and on the matrices of tests/data.
_FROM_ORDER = 500
_FROM_FLOPS = 4e5
_FROM_INTENSITY = 18


def in_question(n: int, ordering: str | Permutation) -> bool:
    """Whether this engine may serve a matrix of order n under an ordering; `pays` has the last word."""
    return n >= _FROM_ORDER and (ordering in ORDERINGS or isinstance(ordering, Permutation))


def pays(flops: float, nnz: int, share: float) -> bool:
    """Whether it will be faster than KLU.

    Args:
        flops, nnz: operations and entries of KLU's factor, as AMD predicts them for its blocks.
        share: of the rows that the largest block has. The other blocks cost KLU little, but here they cause fill.
    """
    return share >= 0.5 and flops >= max(_FROM_FLOPS, _FROM_INTENSITY * nnz)


def analyze(
    structure: Structure, ordering: str, permutation: np.ndarray | None = None, partner: np.ndarray | None = None
) -> SymbolicFactor:
    """The plan of a full structure.

    Args:
        structure: n > 0, at least one entry.
        ordering: one of `ORDERINGS`; "auto" takes AMD or METIS, whichever predicts less work.
        permutation: [n; int32] an ordering of columns computed before or given; `ordering` then only names it.
        partner: [n; int32] from `pairing`: the row that stands on the diagonal of each column, None: its own.
    """
    if structure.triangle:
        raise ValueError("the LU engine needs the full structure, got one triangle")
    rows = np.arange(structure.n, dtype=np.int32) if partner is None else partner
    lower, slots = _symmetrized(structure, rows)
    if permutation is None:
        ordering, elimination = multifrontal.order(lower, ordering)
        permutation = elimination.perm
    return SymbolicFactor(structure, ordering, permutation, rows, lower, slots)


def _symmetrized(structure: Structure, rows: np.ndarray) -> tuple[Structure, np.ndarray]:
    """The lower triangle of B + B^T, where B is the structure with row rows[j] as row j; and where in it each entry of
    the structure, or its mirror image, is."""
    n = structure.n
    number = np.empty(n, np.int32)
    number[rows] = np.arange(n, dtype=np.int32)
    i = number[structure.indices]
    j = np.repeat(np.arange(n, dtype=np.int32), np.diff(structure.indptr))
    indptr, indices, slots = compress(np.maximum(i, j), np.minimum(i, j), n, n)
    return Structure(n, indptr, indices, True), slots


def magnitudes(assembly: Assembly, values: int, nnz: int, dtype: int, structure: Structure) -> np.ndarray:
    """[nnz of the structure; float64] sizes of its entries for values [nnz] at an address."""
    return _lu.magnitudes(assembly, values, nnz, dtype, len(structure.indices))


def arrangement(
    structure: Structure, assembly: Assembly, values: int, nnz: int, dtype: int, *ordering: Any
) -> np.ndarray | None:
    """As `pairing` for values [nnz] at an address, but None where no entry of the diagonal is zero or small. The
    ordering has no say in it."""
    return pairing(structure, magnitudes(assembly, values, nnz, dtype, structure), False)


def pairing(structure: Structure, sizes: np.ndarray, always: bool = True) -> np.ndarray | None:
    """The rows with the largest product of entries on the diagonal, where those that stand there do not serve.

    Args:
        structure: a full structure.
        sizes: magnitudes of its entries.
        always: False: only where an entry of the diagonal is zero or small.

    Returns:
        [n; int32] the row for the diagonal of each column. None where they stay as they are, and where the structure of
        what is not zero is singular.
    """
    n = structure.n
    columns = np.repeat(np.arange(n, dtype=np.int32), np.diff(structure.indptr))
    if not always:
        diagonal, in_row, in_column = np.zeros((3, n))
        here = structure.indices == columns
        diagonal[columns[here]] = sizes[here]
        np.maximum.at(in_row, structure.indices, sizes)
        np.maximum.at(in_column, columns, sizes)
        with np.errstate(over="ignore"):
            if (diagonal > _SERVES * np.sqrt(in_row) * np.sqrt(in_column)).all():
                return None
    there = (sizes > 0) & np.isfinite(sizes)
    indptr = np.concatenate([[0], np.cumsum(np.bincount(columns[there], minlength=n))])
    rows = _lu.match(indptr, structure.indices[there], np.log(sizes[there]))
    return None if rows is None or (rows == np.arange(n)).all() else rows


class SymbolicFactor(Plan):
    """Assembly tree, memory plan and entry positions; see `protocol.SymbolicFactor`."""

    engine = "lu"

    def __init__(
        self,
        structure: Structure,
        ordering: str,
        permutation: np.ndarray,
        rows: np.ndarray,
        lower: Structure,
        slots: np.ndarray,
    ):
        native = _lu.Symbolic(
            structure.indptr, structure.indices, rows, lower.indptr, lower.indices, slots, permutation,
            multifrontal.level(),
        )  # fmt: skip
        super().__init__(native, ordering, bool((rows != np.arange(structure.n)).any()))
        self.nnz: int = 2 * native.nnz - structure.n
        self.flops: float = 2 * native.flops

    def storage(self, dtype: int, batch: int) -> Storage:
        return Storage(self._native, dtype, batch)


class Storage(Status, _lu.Storage):
    """Two panels of all supernodes, the scaled matrices; see `protocol.Storage`."""
