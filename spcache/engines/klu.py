"""KLU (SuiteSparse): LU of general matrices, pivots chosen once and used again while they can be trusted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .._pattern import Assembly, workers
from . import _klu
from .protocol import Failure, Structure

__all__ = ["LIBRARIES", "ORDERINGS", "Storage", "SymbolicFactor", "analyze", "variant"]

_klu.use_workers(workers())

LIBRARIES = _klu.LIBRARIES
ORDERINGS = ("auto", *_klu.ORDERINGS)


def variant() -> str:
    return ""


def analyze(structure: Structure, ordering: str, permutation: np.ndarray | None = None) -> SymbolicFactor:
    """The plan of a full structure; block triangular form first, `ordering` inside its blocks.

    Args:
        structure: n > 0, at least one entry. May be structurally singular: then every factorize fails.
        ordering: "auto" (which is "amd"), "amd", "colamd", "natural".
        permutation: [n; int32] an ordering of rows and columns instead; `ordering` then only names it.
    """
    if permutation is None and ordering not in ORDERINGS:
        raise ValueError(f"ordering={ordering!r}: the KLU engine knows {', '.join(ORDERINGS)}")
    if structure.triangle:
        raise ValueError("the KLU engine needs the full structure, got one triangle")
    name = "amd" if ordering == "auto" else ordering
    return SymbolicFactor(structure.indptr, structure.indices, name, False, permutation)


class SymbolicFactor(_klu.Symbolic):
    """See protocol.SymbolicFactor. The factor's values are those of the canonical CSC array, one group."""

    __slots__ = ()
    engine = "klu"
    permutation = None

    def assembly(
        self,
        nnz: int,
        slots: np.ndarray,
        sources: np.ndarray,
        roles: np.ndarray,
        weight: float,
        hermitian: bool,
    ) -> Assembly:
        return Assembly(nnz, slots, sources, roles, 1, None, None, weight, hermitian)

    def storage(self, dtype: int, batch: int, strict: bool = False) -> Storage:
        """strict: pivots are chosen for accuracy from the start, whatever fill they make."""
        return Storage(self, dtype, batch, strict)


class Storage(_klu.Storage):
    """See protocol.Storage."""

    __slots__ = ()

    def failures(self) -> Sequence[Failure | None] | None:
        columns = self.failed_columns()
        if columns is None:
            return None
        structural = self.symbolic.structural_rank < self.symbolic.n
        reason = "structurally singular" if structural else "singular"
        return [None if column < 0 else Failure(column, reason) for column in columns]
