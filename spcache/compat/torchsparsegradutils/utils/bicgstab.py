"""BiCGSTAB, column by column, within a number of products with the matrix.

`spcache.iterative.bicgstab` has all columns at once, and counts iterations."""

from __future__ import annotations

import cmath
import logging
import math
import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from ....iterative.stopping import scale_of
from .closure import Closure, closure

__all__ = ["BICGSTABSettings", "bicgstab"]


class BICGSTABSettings(NamedTuple):
    """
    Attributes:
        matvec_max: most products with A for a right-hand side, that for the first residual included, that to confirm
            the last one not; None: 2 n.
        abstol, reltol: done when ||b - A x|| <= max(abstol, reltol ||b||).
        precon: approximates A^-1; a function gives a new tensor.
        logger: gets the residuals, level INFO.
    """

    matvec_max: int | None = None
    abstol: float = 1e-8
    reltol: float = 1e-6
    precon: Tensor | Closure | None = None
    logger: logging.Logger = logging.getLogger(__name__)


def bicgstab(
    matmul_closure: Tensor | Closure,
    rhs: Tensor,
    initial_guess: Tensor | None = None,
    settings: BICGSTABSettings = BICGSTABSettings(),  # noqa: B008
) -> Tensor:
    """X with A X = rhs for a general A, column by column. Warns where a column does not get to the tolerance.

    Autograd records the derivative of the iterations, not of the solution: wrong where they end early.

    Args:
        matmul_closure: A, [n, n], or a function of a vector [n].
        rhs: [n] or [n, k].
        initial_guess: of the shape of rhs.

    Raises:
        ValueError: matvec_max is negative, or rhs has another shape.
        RuntimeError: A or precon is neither a tensor nor callable.

    References:
        van der Vorst (1992), doi:10.1137/0913035.
    """
    budget, start = settings.matvec_max, initial_guess
    if budget is not None and budget < 0:
        raise ValueError("settings.matvec_max must be nonnegative or None")
    A = closure(matmul_closure)
    M = None if settings.precon is None else closure(settings.precon, "settings.precon")
    if rhs.dim() not in (1, 2):
        raise ValueError(f"rhs must have shape (n,) or (n, k), got {tuple(rhs.shape)}")
    if budget == 0:
        warnings.warn(
            "matvec_max=0: the initial guess is returned without evaluating the operator.", UserWarning, stacklevel=2
        )
        return torch.zeros_like(rhs) if start is None else start.clone()
    columns = rhs.unsqueeze(-1) if rhs.dim() == 1 else rhs
    starts = torch.zeros_like(columns) if start is None else start.reshape(columns.shape)
    pairs = zip(columns.unbind(-1), starts.unbind(-1), strict=True)
    solutions = [_solve(A, M, b, x, 2 * len(b) if budget is None else budget, settings) for b, x in pairs]
    failed = sum(not converged for _, converged in solutions)
    if failed:
        warnings.warn(
            f"bicgstab: {failed} of {len(solutions)} right-hand sides did not get to the tolerance",
            UserWarning,
            stacklevel=2,
        )
    return torch.stack([x for x, _ in solutions], -1).reshape(rhs.shape) if solutions else torch.zeros_like(rhs)


def _solve(
    A: Closure, M: Closure | None, b: Tensor, x: Tensor, budget: int, settings: BICGSTABSettings
) -> tuple[Tensor, bool]:
    """(x, whether ||b - A x|| is below the limit); b, x: [n]. Starts again from x where it breaks down, and where
    it was wrong about the residual."""
    found = scale_of(b.detach(), -1)
    scale = 1.0 if found is None else found.item()
    b, x, products = b / scale, x / scale, 1
    limit = max(settings.abstol / scale, settings.reltol * float(b.detach().norm()))
    # The residual carried along is believed far above rounding, and where M cannot have written into vectors of ours.
    doubtful = M is not None or limit < 1e5 * torch.finfo(b.dtype).eps * float(b.detach().norm())
    r = shadow = p = b - A(x)
    rho = torch.vdot(r, r)

    def done(r: Tensor) -> bool:
        size = torch.linalg.vector_norm(r).item()
        settings.logger.info("%6d products, residual %8.2e", products, size * scale)
        return size <= limit < math.inf

    converged = done(r)
    while not converged and products < budget:
        q = p if M is None else M(p)
        v = A(q)
        products += 1
        alpha = rho / torch.vdot(shadow, v)
        if not cmath.isfinite(alpha.item()):
            if p is r:
                break  # at the first step, where nothing else can be tried
            r = shadow = p = b - A(x)
            rho, products = torch.vdot(r, r), products + 1
            continue
        x_half = torch.addcmul(x, alpha, q)  # before M may write over q
        s = torch.addcmul(r, alpha, v, value=-1)
        converged = done(s)
        if converged or products == budget:
            x = x_half
        else:
            z = s if M is None else M(s)
            t = A(z)
            products += 1
            tt = torch.vdot(t, t)
            omega = torch.vdot(t, s) / torch.where(tt == 0, 1, tt)
            r = torch.addcmul(s, omega, t, value=-1)
            x = torch.addcmul(x_half, omega, z)
            converged = done(r)
            rho, previous = torch.vdot(shadow, r), rho
            p = torch.addcmul(r, rho / previous * alpha / omega, torch.addcmul(p, omega, v, value=-1))
        if converged and doubtful:
            r = shadow = p = b - A(x)
            rho, products = torch.vdot(r, r), products + 1
            converged = done(r)
    return x * scale, converged
