"""Mixed precision: factors in single precision, solutions refined in double until they are as good as those of a
factor in double. Half the memory, and nearly half the time of a factorization.

Convergence needs a condition number (rows and columns scaled) well below 1/eps of single precision. A right-hand side
of random signs, solved for once per factorization, shows most of the matrices beyond; the others show in the first
solution whose residual does not shrink. They are factorized in working precision, and after some of them in a row all
are.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ._pattern import ValuesCopy, narrow, widen
from .convention import NONE
from .engines.protocol import DTYPE_CODES
from .factor import NumericFactor, Pool
from .refinement import refine, scales

__all__ = ["MixedFactor", "MixedPool"]

_NARROW = {torch.float64: torch.float32, torch.complex128: torch.complex64}

# The scaled solution of a right-hand side of ones in magnitude, up to which refinement is tried: with eps of single
# precision about a hundredth. It is seldom above a hundredth of the condition number.
_LARGEST = 1e5

# After so many factorizations in a row that were of no use, none is tried.
_DISTRUST = 3


class MixedFactor(NumericFactor):
    """As `NumericFactor`: of L A R, rounded to single precision; `scale` has the diagonals of L and R."""

    __slots__ = ()

    _pool: MixedPool

    def _refined(self, b: Tensor, x: Tensor, index: Tensor | None, adjoint: bool) -> int:
        select = self._select(index, len(b))
        best, steps, errors = refine(
            self._improved(None, b, index, select, adjoint),
            lambda x: self.residual(b, x, select, adjoint),
            lambda x, r: self._improved(x, r, index, select, adjoint),
        )
        steps = self._judged(steps, errors[0], b, select)
        if steps >= 0:
            self._pool.distrust = 0
        np.copyto(x.numpy(), best.numpy())
        return steps

    def _improved(self, x: Tensor | None, r: Tensor, index: Tensor | None, select: np.ndarray, adjoint: bool) -> Tensor:
        """x + A^-1 r = x + R (L A R)^-1 L r, or x + A^-H r = x + L (L A R)^-H R r; x None: 0."""
        (count, n, width), code = r.shape, DTYPE_CODES[r.dtype]
        L, R = self._scales()[::-1] if adjoint else self._scales()
        rounded, size = torch.empty_like(r, dtype=_NARROW[r.dtype]), np.empty((count, width))
        narrow(r.data_ptr(), count, n, width, code, L, select, rounded.data_ptr(), size)
        d = torch.empty_like(rounded)
        self._direct(rounded, d, count, width, index, adjoint)
        y, begin = torch.empty_like(r), 0 if x is None else x.data_ptr()
        widen(begin, y.data_ptr(), count, n, width, code, R, select, d.data_ptr(), size)
        return y

    def looks_regular(self) -> bool:
        """Whether single precision can tell the solution of a right-hand side of random signs, in scaled numbers."""
        b = self._pool.signs(self.storage.batch, _NARROW[self.dtype])
        x = torch.empty_like(b)
        self._direct(b, x, len(b), 1, None, False)
        return bool(np.abs(x.numpy()).max() <= _LARGEST)

    def in_working_precision(self, values: Tensor, check: bool) -> NumericFactor:
        """Another factor of the values, refinement with this one having stalled."""
        self._pool.distrust += 1
        return Pool.factorize(self._pool, values, check)


class MixedPool(Pool):
    """A pool whose factors of float64 and complex128 are in single precision, where that serves.

    Attributes:
        distrust: factorizations in a row that were of no use.
    """

    distrust = 0
    _signs: Tensor | None = None

    def signs(self, batch: int, dtype: torch.dtype) -> Tensor:
        """[batch, n, 1] random signs, the same ones every time."""
        signs = self._signs
        if signs is None or signs.dtype != dtype or len(signs) != batch:
            one = np.random.default_rng(0).integers(0, 2, (self.n, 1)) * 2.0 - 1
            signs = self._signs = torch.from_numpy(np.broadcast_to(one, (batch, self.n, 1)).copy()).to(dtype)
        return signs

    def factorize(self, values: Tensor, check: bool, fresh: bool = False) -> NumericFactor:
        if values.dtype not in _NARROW or self.distrust >= _DISTRUST or fresh:
            return super().factorize(values, check, fresh)
        batch, n, nnz = values.numel() // values.shape[-1], self.n, values.shape[-1]
        rounded, code = torch.empty(batch * nnz, dtype=_NARROW[values.dtype]), DTYPE_CODES[values.dtype]
        symmetric = self.convention.mirror != NONE or self.plan.engine == "multifrontal"
        scale: list[np.ndarray] = []

        def round_(copy: ValuesCopy) -> int:
            scale.append(scales(self.convention, copy.address, batch, code, symmetric))
            self.convention.pattern.entries.narrow(copy.address, batch, n, code, *scale[0], rounded.data_ptr())
            return rounded.data_ptr()

        factor = self._factorize(values, check, rounded.dtype, MixedFactor, round_)
        assert isinstance(factor, MixedFactor)
        factor.scale, factor.doubtful = scale[0], True
        if factor.failures is None and (not check or factor.looks_regular()):
            return factor
        self.distrust += 1
        self.stats.repivots += batch
        del factor
        return super().factorize(values, check)
