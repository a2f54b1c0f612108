"""What the engines with pivots chosen inside of fronts, `ldl` and `lu`, have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .._pattern import Assembly
from .protocol import Failure

__all__ = ["Plan", "Status", "assembly"]

_REASONS = ("", "singular", "untrusted")


def assembly(
    nnz: int, slots: np.ndarray, sources: np.ndarray, roles: np.ndarray, weight: float, hermitian: bool
) -> Assembly:
    """How COO values add up to the canonical entries; the same for every plan of a structure."""
    return Assembly(nnz, slots, sources, roles, 1, None, None, weight, hermitian)


class Plan:
    """Around the native plan: assembly tree, memory plan and entry positions; see `protocol.SymbolicFactor`.

    Args:
        native: the native object.
        ordering: its name.
        by_values: whether values had a say in the plan, in which case its permutation is of no use to others.
    """

    def __init__(self, native: Any, ordering: str, by_values: bool):
        self.ordering = ordering
        self._native = native
        self._by_values = by_values

    @property
    def nbytes(self) -> int:
        return self._native.nbytes

    @property
    def permutation(self) -> np.ndarray | None:
        """[n; int32] original index of each pivot; None where values had a say."""
        return None if self._by_values else self._native.perm

    def assembly(
        self, nnz: int, slots: np.ndarray, sources: np.ndarray, roles: np.ndarray, weight: float, hermitian: bool
    ) -> Assembly:
        return assembly(nnz, slots, sources, roles, weight, hermitian)

    def trim(self) -> None:
        self._native.trim()


class Status:
    """What a `protocol.Storage` says, of the native one."""

    refactorized = True  # pivots are chosen inside fronts, whose structure never changes
    repivots = 0
    doubtful = False  # refinement is the engine's own

    def failures(self: Any) -> Sequence[Failure | None] | None:
        columns = self.failed_columns()
        if columns is None:
            return None
        return [None if c < 0 else Failure(c, _REASONS[v]) for c, v in zip(columns, self.verdicts(), strict=True)]
