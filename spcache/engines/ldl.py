"""The LDL engine: L D L^H of Hermitian, L D L^T of symmetric matrices, indefinite ones too; our own kernels.

Tree, schedules and memory are those of a Cholesky factorization. Pivots of order 1 and 2 are chosen inside each front;
what cannot be done there in a stable way shows in a report, and solves are refined. A pairing of rows, found from
values whose diagonal does not serve, keeps such pairs in one front.
"""

from __future__ import annotations

import numpy as np

from .._pattern import Assembly, compress
from . import _ldl, multifrontal
from .pivoted import Plan, Status, assembly
from .protocol import Structure

__all__ = ["ORDERINGS", "Storage", "SymbolicFactor", "analyze", "assembly", "magnitudes", "pairing", "variant"]

ORDERINGS = multifrontal.ORDERINGS
variant = multifrontal.variant


def analyze(
    structure: Structure, ordering: str, permutation: np.ndarray | None = None, partner: np.ndarray | None = None
) -> SymbolicFactor:
    """The plan of a lower-triangular structure.

    Args:
        structure: canonical lower triangle of the symmetric pattern.
        ordering: one of `ORDERINGS`; "auto" takes AMD or METIS, whichever predicts less work.
        permutation: [n; int32] an ordering computed before or given; `ordering` then only names it.
        partner: [n; int32] from `pairing`: who shares a front with whom, themselves where nobody does.
    """
    if partner is None:
        if permutation is None:
            ordering, elimination = multifrontal.order(structure, ordering)
            permutation = elimination.perm
        return SymbolicFactor(structure, ordering, permutation)
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


def pairing(structure: Structure, sizes: np.ndarray, always: bool = False) -> np.ndarray | None:
    """Pairs of rows i, j with a large entry a_ij, where the diagonal does not serve.

    A permutation of rows with the largest product of entries decides; its cycles are cut into pairs.

    Args:
        structure: a lower triangle.
        sizes: magnitudes of its entries.
        always: False: only where an entry of the diagonal is zero.

    Returns:
        [n; int32] the partner of each row, itself where it has none. None where there are no pairs, where none are
        needed, and where the structure is singular.
    """
    columns = np.repeat(np.arange(structure.n, dtype=np.int32), np.diff(structure.indptr))
    if not always and np.count_nonzero(sizes[structure.indices == columns]) == structure.n:
        return None
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
        super().__init__(native, ordering, expanded[0] is not structure.indptr)
        self.nnz: int = native.nnz
        self.flops: float = native.flops

    def storage(self, dtype: int, batch: int) -> Storage:
        return Storage(self._native, dtype, batch)


class Storage(Status, _ldl.Storage):
    """Panels of all supernodes, the scaled matrices; see `protocol.Storage`."""
