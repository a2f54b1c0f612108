"""Refinement of solutions in working precision, whatever factor corrects them, and estimates of condition numbers.

    r = b - S x,    x := x + F^-1 r,

F^-1 being what a doubtful factor, or one in single precision, does. Every step reduces the error by about
cond(S) |F - S| / |S|, down to a componentwise backward error of some eps (R. D. Skeel 1980, "Iterative refinement
implies numerical stability for Gaussian elimination", doi:10.1090/S0025-5718-1980-0572859-4; for factors in single
precision A. Buttari et al. 2008, "Using mixed precision for sparse matrix computations",
doi:10.1145/1377596.1377597, and E. Carson, N. J. Higham 2018, doi:10.1137/17M1140819).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .convention import Convention
from .engines.protocol import DTYPE_CODES

__all__ = ["EPS", "Errors", "rcond_of_definite", "refine", "residual", "scales"]

EPS = torch.finfo(torch.float64).eps
# In units of eps: refinement ends at _GOOD at once, and at ENOUGH where a step gains less than _GAIN. It has failed
# where steps stop to halve the error before.
_GOOD, ENOUGH, _GAIN, _STEPS = 2.0, 32.0, 0.3, 20

Errors = np.ndarray  # [2, count, width] componentwise backward errors and scaled residuals


def scales(convention: Convention, values: int, batch: int, code: int, symmetric: bool) -> np.ndarray:
    """[2, batch, n] the diagonals of L and R, powers of two, that bring the largest entries of the rows and columns of
    L S R near 1; values [batch, nnz] in float64 or complex128 at an address. symmetric: L = R."""
    n = convention.pattern.n
    both = np.empty((2, batch, n))
    convention.pattern.entries.equilibrate(values, batch, n, code, symmetric, *both)
    return both


def residual(
    convention: Convention, values: int, scale: np.ndarray, b: Tensor, x: Tensor, select: np.ndarray, adjoint: bool
) -> tuple[Tensor, Errors]:
    """b[p] - S x[p], or S^H, with the select[p]-th of values [batch, nnz] at an address; and how large that is. All are
    float64 or complex128, b and x [count, n, width] and contiguous; scale as from `scales`."""
    r = torch.empty_like(b)
    count, n, width = b.shape
    errors = convention.pattern.entries.residual(
        values, scale[0 if adjoint else 1], select, b.data_ptr(), x.data_ptr(), r.data_ptr(), count, n, width,
        DTYPE_CODES[b.dtype],
        convention.mirror, convention.one_triangle, adjoint,
    )  # fmt: skip
    return r, errors


def rcond_of_definite(
    convention: Convention, values: np.ndarray, inverse: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """[batch] estimated reciprocal condition numbers, in the 1-norm, of C = D S D, S positive definite and D such that
    the diagonal of C is 1 (W. W. Hager 1984, doi:10.1137/0905023; A. van der Sluis 1969, doi:10.1007/BF02165096).

    Args:
        values: [batch, nnz]
        inverse: b [batch, n] -> S^-1 b.
    """
    rows, columns, n = convention.pattern.rows, convention.pattern.columns, convention.pattern.n
    size, on = np.abs(values).astype(np.float64), rows == columns
    D = np.stack([np.bincount(rows[on], v[on], n) for v in size]) ** -0.5
    size *= D[:, rows] * D[:, columns]
    sums = np.stack([np.bincount(columns, v, n) for v in size])
    if convention.one_triangle:
        sums += np.stack([np.bincount(rows[~on], v[~on], n) for v in size])
    each = np.arange(len(values))
    x, estimate = np.full(D.shape, 1.0 / n, values.dtype), np.zeros(len(values))
    for _ in range(4):
        y = inverse((x / D).astype(values.dtype)) / D
        estimate = np.maximum(estimate, np.abs(y).sum(1))
        signs = np.divide(y, np.abs(y), out=np.ones_like(y), where=y != 0)
        z = np.abs(inverse((signs / D).astype(values.dtype)) / D)
        x = np.zeros_like(x)
        x[each, z.argmax(1)] = 1
    return 1 / (sums.max(1) * estimate)


def refine(
    x: Tensor, look: Callable[[Tensor], tuple[Tensor, Errors]], improve: Callable[[Tensor, Tensor], Tensor]
) -> tuple[Tensor, int, Errors]:
    """The best x found, the number of steps, and its errors; every column by itself.

    Args:
        look: x -> its residual and errors.
        improve: (x, r) -> another x.
    """
    r, errors = look(x)
    active = errors[0] > _GOOD * EPS
    steps = 0
    while steps < _STEPS and active.any():
        y = improve(x, r)
        s, now = look(y)
        steps += 1
        better = active & (now[0] < errors[0])
        if better.all():
            x, r = y, s
        elif better.any():
            mask = torch.from_numpy(better).unsqueeze(1)
            x, r = torch.where(mask, y, x), torch.where(mask, s, r)
        slow = now[0] > _GAIN * errors[0]
        ended = (now[0] <= _GOOD * EPS) | (now[0] > 0.5 * errors[0]) | (slow & (now[0] <= ENOUGH * EPS))
        errors = np.where(better, now, errors)
        active = better & ~ended
    return x, steps, errors
