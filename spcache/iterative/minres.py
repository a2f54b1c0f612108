"""MINRES."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .stopping import Callback, Solution, System

__all__ = ["minres", "sweep"]


def minres(
    A: Any, b: Tensor, x0: Tensor | None = None, *, rtol: float = 1e-5, atol: float = 0.0, maxiter: int | None = None,
    M: Any = None, callback: Callback | None = None, check: bool = True,
) -> Solution:  # fmt: skip
    """Solves A x = b for a Hermitian A that may be indefinite, by the minimum residual method.

    Without M the residual never grows. With M the method minimizes ||b - A x|| in the norm of M, but stops by the
    Euclidean norm, as the others do.

    Cost: an iteration is one product with A, one with M, two reductions (three with M); memory is seven times x.

    Args, Returns, Raises: as `cg`; M must be Hermitian positive definite even where A is not. A ValueError says so
    where a product x^H M x is met that is negative.

    References:
        Paige & Saunders (1975), doi:10.1137/0712047. Elman, Silvester & Wathen, Finite Elements and Fast Iterative
        Solvers (2014), on the preconditioned method.

    Example:
        >>> import torch
        >>> from spcache.iterative import minres
        >>> minres(torch.tensor([[1.0, 2.0], [2.0, -1.0]]), torch.tensor([5.0, 0.0])).x
        tensor([1., 2.])
    """
    return System(A, b, x0, rtol, atol, maxiter, M, callback).solve("minres", sweep, check)


def sweep(run: System, x: Tensor, r: Tensor) -> Tensor:
    """Lanczos: A z_j = gamma_{j+1} v_{j+1} + delta_j v_j + gamma_j v_{j-1}, z = M v, z_i^H v_j = 1 if i = j else 0. Its
    tridiagonal matrix is made triangular (diagonal rho) by rotations (c, s) as it grows; eta is what is left of the
    right-hand side. d / rho are the directions in which x moves."""
    v = r if run.M is None else r.clone()
    z = run.precondition(v)
    v_old, d_old, d = (torch.zeros_like(r) for _ in range(3))
    if run.M is not None:
        _require_positive(run, z, v)
    gamma = _norm(run, z, v)
    eta = gamma
    c = c_old = rho = rho_old = torch.ones_like(gamma)
    s = s_old = torch.zeros_like(gamma)
    while True:
        inverse = run.divide(1.0, gamma)
        z = z * inverse if run.M is not None else z
        v = run.scale(v, inverse)
        z = v if run.M is None else z
        q = run.A(z)
        delta = run.dot(z, q).real
        v, v_old = run.add(run.add_to(q, -gamma, v_old), delta, v, -1), v
        z_old, z = z, run.precondition(v)
        gamma, gamma_old = _norm(run, z, v), gamma

        first = c * delta - c_old * s * gamma_old
        second = s * delta + c_old * c * gamma_old
        third = s_old * gamma_old
        d_old, d = d, _direction(run, z_old, third, rho_old, d_old, second, rho, d)
        rho, rho_old = run.hypot(first, gamma), rho
        c, c_old = run.divide(first, rho), c
        s, s_old = run.divide(gamma, rho), s
        length = run.divide(c * eta, rho)
        if run.M is None:
            norm = (s * eta).abs()
        else:
            r = torch.addcmul(r * s.square(), -length, v)
            norm = run.norm(r.detach())
        eta = -s * eta
        run.judge_norm(norm)
        if run.fault and run.M is not None:
            _require_positive(run, z, v)
        x = run.step(x, length, d)
        run.report(x)
        if not run.going:
            return x


def _direction(
    run: System, z: Tensor, third: Tensor, rho_old: Tensor, d_old: Tensor, second: Tensor, rho: Tensor, d: Tensor
) -> Tensor:
    """z - third d_old / rho_old - second d / rho."""
    return run.add(run.add_to(z, -run.divide(third, rho_old), d_old), -run.divide(second, rho), d)


def _norm(run: System, z: Tensor, v: Tensor) -> Tensor:
    """sqrt(v^H M v), NaN where that is negative."""
    return run.norm(v) if run.M is None else run.root(run.dot(z, v).real)


def _require_positive(run: System, z: Tensor, v: Tensor) -> None:
    product = run.dot(z, v).real.detach()
    scale = run.norm(z.detach()) * run.norm(v.detach())
    if bool((product < -(torch.finfo(product.dtype).eps ** 0.5) * scale).any()):
        raise ValueError(
            f"M must be Hermitian positive definite, got x^H M x = {float(product.min()):.3g} for some x; "
            f"of an indefinite matrix take the absolute values: M = |D|^-1 for its diagonal D, say"
        )
