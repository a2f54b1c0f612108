"""KLU (SuiteSparse): LU of general matrices, pivots chosen once and used again while they can be trusted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .._pattern import Assembly
from . import _klu
from .protocol import Failure, Structure

__all__ = ["ORDERINGS", "Storage", "SymbolicFactor", "analyze"]

ORDERINGS = ("auto", *_klu.ORDERINGS)


def analyze(structure: Structure, ordering: str) -> SymbolicFactor:
    """The plan of a full structure; block triangular form first, `ordering` inside its blocks.

    Args:
        structure: n > 0, at least one entry. May be structurally singular: then every factorize fails.
        ordering: "auto" (which is "amd"), "amd", "colamd", "natural".
    """
    if ordering not in ORDERINGS:
        raise ValueError(f"ordering={ordering!r}: the KLU engine knows {', '.join(ORDERINGS)}")
    if structure.triangle:
        raise ValueError("the KLU engine needs the full structure, got one triangle")
    return SymbolicFactor(structure.indptr, structure.indices, "amd" if ordering == "auto" else ordering)


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

    def storage(self, dtype: int, batch: int) -> Storage:
        return Storage(self, dtype, batch)


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
