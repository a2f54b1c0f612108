"""cg and minres that autograd may record, for drop-ins of libraries that do so.

What is recorded is the derivative of the iterations, not of the solution: wrong where they end early.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .cg import sweep as _cg
from .minres import sweep as _minres
from .stopping import Solution, System

__all__ = ["cg", "minres"]


def cg(A: Any, b: Tensor, x0: Tensor | None = None, *, rtol: float, maxiter: int) -> Solution:
    """`iterative.cg` with check=False."""
    return System(A, b, x0, rtol, 0.0, maxiter, None, None, recorded=True).solve("cg", _cg, check=False)


def minres(A: Any, b: Tensor, x0: Tensor | None = None, *, rtol: float, maxiter: int, M: Any = None) -> Solution:
    """`iterative.minres` with check=False."""
    return System(A, b, x0, rtol, 0.0, maxiter, M, None, recorded=True).solve("minres", _minres, check=False)
