"""The LDL engine: L D L^H of Hermitian, L D L^T of symmetric matrices, indefinite ones too; our own kernels.

Tree, schedules and memory are those of a Cholesky factorization. Pivots of order 1 and 2 are chosen inside each front;
what cannot be done there in a stable way shows in a report, and solves are refined. Where the diagonal does not serve,
trials with the first values find rows that must wait for fronts further up, and an order of elimination in which they
do. If that does not help, or no longer, a pairing of rows keeps pairs with large entries in one front.
"""

from __future__ import annotations

import numpy as np

from .._pattern import Assembly, compress, workers
from . import _ldl, multifrontal
from .pivoted import Plan, Status, assembly
from .protocol import Structure

__all__ = [
    "ORDERINGS",
    "Storage",
    "SymbolicFactor",
    "analyze",
    "arrangement",
    "assembly",
    "magnitudes",
    "pairing",
    "variant",
]

_ldl.use_workers(workers())

ORDERINGS = multifrontal.ORDERINGS
variant = multifrontal.variant

_WEAK = 0.01  # an entry of the diagonal below so much of the largest of its row asks for a trial
_TRIALS = 12


def analyze(
    structure: Structure, ordering: str, permutation: np.ndarray | None = None, partner: np.ndarray | None = None
) -> SymbolicFactor:
    """The plan of a lower-triangular structure.

    Args:
        structure: canonical lower triangle of the symmetric pattern.
        ordering: one of `ORDERINGS`; "auto" takes AMD or METIS, whichever predicts less work.
        permutation: [n; int32] an ordering computed before or given; `ordering` then only names it.
        partner: [n; int32] from `pairing`: who shares a front with whom, themselves where nobody does. Or from
            `arrangement`, all of it negative: ~order, an order of elimination, whatever the permutation.
    """
    if partner is None:
        if permutation is None:
            ordering, elimination = multifrontal.order(structure, ordering)
            permutation = elimination.perm
        return SymbolicFactor(structure, ordering, permutation)
    if partner[0] < 0:
        return SymbolicFactor(structure, ordering, ~partner, moved=True)
    small, members = _merged(structure, partner)
    if permutation is None:
        ordering, elimination = multifrontal.order(small, ordering)
        order = elimination.perm
    else:  # each pair where the first of it stands
        place = np.empty(structure.n, np.int32)
        place[permutation] = np.arange(structure.n, dtype=np.int32)
        order = np.argsort(np.where(members[:, 1] < 0, place[members[:, 0]], place[members].min(1)))
    permutation = members[order].ravel()
    return SymbolicFactor(structure, ordering, permutation[permutation >= 0], _expanded(structure, small, members))


def _merged(structure: Structure, partner: np.ndarray) -> tuple[Structure, np.ndarray]:
    """The structure with each pair as one row and column; and who is in each of these, [., 2; int32], -1: nobody."""
    own = np.arange(structure.n, dtype=np.int32)
    leader = np.flatnonzero(own <= partner).astype(np.int32)
    group = np.empty(structure.n, np.int32)
    group[leader] = np.arange(len(leader), dtype=np.int32)
    group[partner[leader]] = group[leader]
    members = np.stack([leader, np.where(partner[leader] == leader, -1, partner[leader])], 1).astype(np.int32)
    rows, columns = group[structure.indices], np.repeat(group, np.diff(structure.indptr))
    count = len(leader)
    indptr, indices, _ = compress(np.maximum(rows, columns), np.minimum(rows, columns), count, count)
    return Structure(count, indptr, indices, True), members


def _expanded(structure: Structure, small: Structure, members: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A structure in which the two of a pair have the same neighbours, and are neighbours: they end up in one
    supernode. Its indptr and indices, and where in it each entry of `structure` is."""
    columns = np.repeat(np.arange(small.n), np.diff(small.indptr))
    pairs = [np.stack([members[small.indices, a], members[columns, b]]) for a in (0, 1) for b in (0, 1)]
    pairs.append(members.T)
    more = np.concatenate(pairs, 1)
    more = more[:, (more >= 0).all(0)]
    own = np.repeat(np.arange(structure.n, dtype=np.int32), np.diff(structure.indptr))
    rows, columns = np.concatenate([structure.indices, more.max(0)]), np.concatenate([own, more.min(0)])
    indptr, indices, slots = compress(rows.astype(np.int32), columns.astype(np.int32), structure.n, structure.n)
    return indptr, indices, slots[: len(own)].copy()


def magnitudes(assembly: Assembly, values: int, nnz: int, dtype: int, structure: Structure) -> np.ndarray:
    """[nnz of the structure; float64] sizes of the entries of the lower triangle for values [nnz] at an address."""
    return _ldl.magnitudes(assembly, values, nnz, dtype, len(structure.indices))


def arrangement(
    structure: Structure,
    assembly: Assembly,
    values: int,
    nnz: int,
    dtype: int,
    ordering: str,
    permutation: np.ndarray | None = None,
) -> np.ndarray | None:
    """An order of elimination in which fronts have stable pivots for values [nnz] at an address, where the usual one
    has not: rows without go where a pivoting factorization would have delayed them, to a front further up.

    Each trial is an analysis and a factorization that leaves such rows out; they are moved up by 1, 1, 2, 2, 4, ...
    fronts, those that are still without by more the next time.

    Args:
        structure: a lower triangle.
        assembly: how values add up to it.
        ordering, permutation: as for `analyze`.

    Returns:
        [n; int32] ~order, for `analyze`. None where no entry of the diagonal is zero or small, or no row must move.
    """
    sizes = magnitudes(assembly, values, nnz, dtype, structure)
    columns = np.repeat(np.arange(structure.n, dtype=np.int32), np.diff(structure.indptr))
    diagonal, others = np.zeros(structure.n), np.zeros(structure.n)
    own = structure.indices == columns
    diagonal[columns[own]] = sizes[own]
    for side in (structure.indices, columns):
        np.fmax.at(others, side[~own], sizes[~own])
    if (diagonal > _WEAK * others).all():
        return None
    order = None
    plan = analyze(structure, ordering, permutation)
    for trial in range(_TRIALS):
        left_out = plan.storage(dtype, 1).trial(assembly, values, nnz)
        if left_out is None or not left_out.any():
            break
        lifted = plan.lift(left_out, 1 << trial // 2)
        if lifted is None:
            break
        order = lifted
        plan = SymbolicFactor(structure, plan.ordering, order, moved=True)
    return None if order is None else ~order


def pairing(structure: Structure, sizes: np.ndarray) -> np.ndarray | None:
    """Pairs of rows i, j with a large entry a_ij, where the diagonal does not serve.

    A permutation of rows with the largest product of entries decides; its cycles are cut into pairs.

    Args:
        structure: a lower triangle.
        sizes: magnitudes of its entries.

    Returns:
        [n; int32] the partner of each row, itself where it has none. None where there are no pairs, and where the
        structure is singular.
    """
    partner = _ldl.pair(structure.indptr, structure.indices, sizes)
    return None if partner is None or (partner == np.arange(structure.n)).all() else partner


class SymbolicFactor(Plan):
    """Assembly tree, memory plan and entry positions; see `protocol.SymbolicFactor`."""

    engine = "ldl"

    def __init__(
        self,
        structure: Structure,
        ordering: str,
        permutation: np.ndarray,
        expanded: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
        moved: bool = False,
    ):
        if expanded is None:
            slots = np.arange(len(structure.indices), dtype=np.int32)
            expanded = structure.indptr, structure.indices, slots
        native = _ldl.Symbolic(
            structure.indptr,
            structure.indices,
            expanded[0],
            expanded[1],
            expanded[2],
            permutation,
            multifrontal.level(),
        )
        super().__init__(native, ordering, moved or expanded[0] is not structure.indptr)
        self.nnz: int = native.nnz
        self.flops: float = native.flops

    def lift(self, left_out: np.ndarray, steps: int) -> np.ndarray | None:
        """[n; int32] the order of elimination with rows of left_out [n; bool] in fronts so many steps further up; None
        where all of them are in roots."""
        return self._native.lift(left_out, steps)

    def storage(self, dtype: int, batch: int) -> Storage:
        return Storage(self._native, dtype, batch)


class Storage(Status, _ldl.Storage):
    """Panels of all supernodes, the scaled matrices; see `protocol.Storage`."""
