"""The multifrontal engine: sparse Cholesky of Hermitian positive definite matrices, our own kernels."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence

import numpy as np

from .._pattern import Assembly, workers
from . import _multifrontal
from ._multifrontal import Elimination
from .protocol import Failure, Structure

__all__ = ["LIBRARIES", "ORDERINGS", "SymbolicFactor", "analyze", "instruction_sets", "variant"]

_multifrontal.use_workers(workers())

LIBRARIES = _multifrontal.LIBRARIES

ORDERINGS = ("auto", "amd", "metis", "natural")

# Below this much work, or this much for each entry of the factor, AMD is taken as it comes: on meshes of up to 10,000
# unknowns its factorizations take no longer, although METIS predicts a fifth less work and is most of an analysis.
_METIS_FROM_FLOPS = 1e6
_METIS_FROM_INTENSITY = 64

# METIS calls rand(): never two calls at once, or the orderings differ from time to time, and no fork during one, or the
# child would find the lock inside rand() taken forever.
_metis_lock = threading.Lock()
os.register_at_fork(before=_metis_lock.acquire, after_in_parent=_metis_lock.release, after_in_child=_metis_lock.release)


def variant() -> str:
    """The instruction set of the kernels: the best this processor has, or what SPCACHE_SIMD names."""
    return os.environ.get("SPCACHE_SIMD") or _multifrontal.best_simd()


def instruction_sets() -> tuple[tuple[str, ...], str]:
    """Those that this processor has kernels for, the best one last; and what the first of them is here."""
    sets = _multifrontal.INSTRUCTION_SETS
    return sets[: sets.index(_multifrontal.best_simd()) + 1], _multifrontal.BASELINE


def level() -> int:
    """The number of the instruction set of the kernels."""
    simd, available = variant(), instruction_sets()[0]
    if simd not in available:
        raise ValueError(f"SPCACHE_SIMD must be one of {', '.join(available)} on this processor, got {simd!r}")
    return available.index(simd)


def _metis(structure: Structure) -> np.ndarray:
    """Nested dissection: METIS finds the separators, CAMD orders inside of the parts."""
    with _metis_lock:
        sets = _multifrontal.separate(structure.indptr, structure.indices)
    return _multifrontal.camd(structure.indptr, structure.indices, sets)


def order(structure: Structure, ordering: str) -> tuple[str, Elimination]:
    """The chosen ordering's name, and the structure under it."""

    def under(perm: np.ndarray) -> Elimination:
        return Elimination(structure.indptr, structure.indices, perm)

    if ordering == "natural":
        return ordering, under(np.arange(structure.n, dtype=np.int32))
    if ordering == "metis":
        return ordering, under(_metis(structure))
    amd = under(_multifrontal.amd(structure.indptr, structure.indices))
    if ordering == "amd" or amd.flops < _METIS_FROM_FLOPS or amd.flops < _METIS_FROM_INTENSITY * amd.nnz:
        return "amd", amd
    metis = under(_metis(structure))
    return ("metis", metis) if metis.flops < amd.flops else ("amd", amd)


def analyze(structure: Structure, ordering: str, permutation: np.ndarray | None = None) -> SymbolicFactor:
    """The plan of a lower-triangular structure.

    Args:
        structure: canonical lower triangle of the symmetric pattern.
        ordering: one of `ORDERINGS`; "auto" takes AMD or METIS, whichever predicts less work.
        permutation: [n; int32] an ordering computed before; `ordering` then only names it.
    """
    if permutation is not None:
        elimination = Elimination(structure.indptr, structure.indices, permutation)
    else:
        ordering, elimination = order(structure, ordering)
    return SymbolicFactor(ordering, elimination)


class SymbolicFactor:
    """Assembly tree, memory plan and entry positions; see `protocol.SymbolicFactor`."""

    engine = "multifrontal"

    def __init__(self, ordering: str, elimination: Elimination):
        self.ordering = ordering
        self._native = _multifrontal.Symbolic(elimination, variant())
        self.nnz: int = self._native.nnz
        self.flops: float = self._native.flops

    @property
    def nbytes(self) -> int:
        return self._native.nbytes

    @property
    def permutation(self) -> np.ndarray:
        """[n; int32] original index of each pivot."""
        return self._native.perm

    def assembly(
        self, nnz: int, slots: np.ndarray, sources: np.ndarray, roles: np.ndarray, weight: float, hermitian: bool
    ) -> Assembly:
        return Assembly(
            nnz, slots, sources, roles, self._native.supernodes, *self._native.positions(), weight, hermitian
        )

    def storage(self, dtype: int, batch: int) -> Storage:
        return Storage(self._native, dtype, batch)

    def trim(self) -> None:
        self._native.trim()


class Storage(_multifrontal.Storage):
    """Panels of all supernodes; see `protocol.Storage`."""

    refactorized = True  # the pivots of a Cholesky factorization never change
    repivots = 0
    doubtful = False

    def failures(self) -> Sequence[Failure | None] | None:
        if not self.failed:
            return None
        return [None if c < 0 else Failure(c, "not positive definite") for c in self.failed_columns()]
