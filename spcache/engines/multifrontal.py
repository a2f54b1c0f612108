"""The multifrontal engine: sparse Cholesky of Hermitian positive definite matrices, our own kernels."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence

import numpy as np

from .._pattern import Assembly
from . import _multifrontal
from .protocol import Failure, Structure

__all__ = ["ORDERINGS", "SymbolicFactor", "analyze"]

ORDERINGS = ("auto", "amd", "metis", "natural")

# Below this much work AMD is taken as it comes: METIS would cost more than it can save.
_METIS_FROM_FLOPS = 1e6

# METIS calls rand(): never two calls at once, or the orderings differ from time to time, and no fork during one, or the
# child would find the lock inside rand() taken forever.
_metis_lock = threading.Lock()
os.register_at_fork(before=_metis_lock.acquire, after_in_parent=_metis_lock.release, after_in_child=_metis_lock.release)


def _simd() -> str:
    """The instruction set of the kernels: the best this processor has, or what SPCACHE_SIMD names."""
    return os.environ.get("SPCACHE_SIMD") or _multifrontal.best_simd()


def _metis(structure: Structure) -> np.ndarray:
    """Nested dissection: METIS finds the separators, CAMD orders inside of the parts."""
    with _metis_lock:
        sets = _multifrontal.separate(structure.indptr, structure.indices)
    return _multifrontal.camd(structure.indptr, structure.indices, sets)


def _order(structure: Structure, ordering: str) -> tuple[str, np.ndarray]:
    """The chosen ordering's name and its permutation."""
    if ordering == "natural":
        return ordering, np.arange(structure.n, dtype=np.int32)
    if ordering == "metis":
        return ordering, _metis(structure)
    amd = _multifrontal.amd(structure.indptr, structure.indices)
    if ordering == "amd":
        return ordering, amd
    _, amd_flops = _multifrontal.predict(structure.indptr, structure.indices, amd)
    if amd_flops < _METIS_FROM_FLOPS:
        return "amd", amd
    metis = _metis(structure)
    _, metis_flops = _multifrontal.predict(structure.indptr, structure.indices, metis)
    return ("metis", metis) if metis_flops < amd_flops else ("amd", amd)


def analyze(structure: Structure, ordering: str, permutation: np.ndarray | None = None) -> SymbolicFactor:
    """The plan of a lower-triangular structure.

    Args:
        structure: canonical lower triangle of the symmetric pattern.
        ordering: one of `ORDERINGS`; "auto" takes AMD or METIS, whichever predicts less work.
        permutation: [n; int32] an ordering computed before; `ordering` then only names it.
    """
    if permutation is None:
        ordering, permutation = _order(structure, ordering)
    return SymbolicFactor(structure, ordering, permutation)


class SymbolicFactor:
    """Assembly tree, memory plan and entry positions; see `protocol.SymbolicFactor`."""

    engine = "multifrontal"

    def __init__(self, structure: Structure, ordering: str, permutation: np.ndarray):
        self.ordering = ordering
        self._structure = structure
        self._native = _multifrontal.Symbolic(structure.indptr, structure.indices, permutation, _simd())
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
        # Where the ordering exchanges row and column, a lower entry is stored through its mirror image.
        pivot = np.empty(self._structure.n, np.int32)
        pivot[self.permutation] = np.arange(self._structure.n, dtype=np.int32)
        columns = np.repeat(np.arange(self._structure.n, dtype=np.int32), np.diff(self._structure.indptr))
        exchanged = (pivot[self._structure.indices] < pivot[columns])[slots] & (roles < 2)
        roles = np.where(exchanged, 1 - roles, roles).astype(np.uint8)
        supernodes, positions = self._native.positions()
        return Assembly(nnz, slots, sources, roles, self._native.supernodes, supernodes, positions, weight, hermitian)

    def storage(self, dtype: int, batch: int) -> Storage:
        return Storage(self._native, dtype, batch)

    def trim(self) -> None:
        self._native.trim()


class Storage(_multifrontal.Storage):
    """Panels of all supernodes; see `protocol.Storage`."""

    refactorized = True  # the pivots of a Cholesky factorization never change
    repivots = 0

    def failures(self) -> Sequence[Failure | None] | None:
        if not self.failed:
            return None
        return [None if c < 0 else Failure(c, "not positive definite") for c in self.failed_columns()]
