"""`SparseSolver` of pytorch-sparse-solve (`sparse_solver`), over spcache.

from spcache.compat import sparse_solver
x = sparse_solver.SparseSolver.apply(A, b)
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import autograd
from ..errors import NotPositiveDefiniteError
from ..functional import require_square
from ..matrices import Entries, MatrixKey, entries_of
from ..memory import read
from ..plans import plan_cache
from ..system import SparseSystem
from ..version import __version__

__all__ = ["SparseSolver", "__version__"]


class SparseSolver:
    """Solves with a symmetric positive definite matrix of which the lower triangle counts, by Cholesky."""

    @staticmethod
    def apply(A: Tensor, b: Tensor) -> Tensor:
        """x = A^-1 b, differentiable in A and b to any order.

        The matrix solved with is the lower triangle of A and its mirror image. The gradient of A is sparse, at every
        stored entry of both triangles independently, -lam_i x_j with lam = A^-1 g: not symmetrized.

        Args:
            A: [n, n] sparse COO, coalesced; another layout is converted.
            b: [n] or [n, k].

        Returns:
            x of the shape of b, float64.

        Raises:
            TypeError: A or b is complex, or no tensor with data.
            ValueError: A is not positive definite, not finite or not square; b does not fit.
            RuntimeError: A is not coalesced.
        """
        for name, t in ("A", A), ("b", b):
            if not isinstance(t, Tensor) or t.is_complex() or t.is_meta:
                what = f"{t.dtype} on {t.device}" if isinstance(t, Tensor) else type(t).__name__
                raise TypeError(f"{name} must be a real torch.Tensor with data, got {what}")
        if A.layout is not torch.sparse_coo:
            A = A.to_sparse_coo().coalesce()
        A.indices()  # torch's own error where A is not coalesced
        require_square(A)
        entries = entries_of(A)
        halves = _find(entries)
        values, b = entries.values.double(), b.double()
        source = halves.both._factorizer
        vector = source.check_arguments(values, b)
        if b.numel() == 0:
            return source.empty(values, b, vector, False)
        try:
            factor: Any = read(values, partial(_LowerFactor, halves))
        except NotPositiveDefiniteError:
            raise ValueError("Matrix is not positive definite!") from None
        return autograd.solve(source, factor, values, b, vector, False, None, True)


class _LowerFactor:
    """What `autograd.solve` asks of a factor: that of the lower triangle, for the values of both."""

    failed = None

    def __init__(self, halves: _Halves, values: Tensor):
        self._kept = halves.kept
        self._factor = halves.lower._factorizer.find(values.detach()[halves.kept])
        self.solve = self._factor.solve

    def same_values(self, values: Tensor) -> bool:
        return self._factor.same_values(values[self._kept])


class _Halves(NamedTuple):
    """A matrix as its gradient sees it, and as it is factorized."""

    both: SparseSystem
    lower: SparseSystem
    kept: Tensor  # [kept; int64] entries of the lower triangle

    @property
    def nbytes(self) -> int:
        return self.both.nbytes + self.lower.nbytes + self.kept.nbytes

    def trim(self) -> None:
        self.lower.trim()


def _find(entries: Entries) -> _Halves:
    key = MatrixKey(entries, ("lower half",))

    def build() -> _Halves:
        key.own()
        indices = entries.indices()
        kept = np.flatnonzero(indices[0] >= indices[1])
        lower = SparseSystem(indices[:, kept], entries.shape, kind="spd", triangle="lower")
        return _Halves(SparseSystem(indices, entries.shape, kind="general"), lower, torch.from_numpy(kept))

    return plan_cache.find(key, build)[0]
