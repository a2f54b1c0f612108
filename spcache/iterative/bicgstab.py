"""BiCGSTAB."""

from __future__ import annotations

from typing import Any

from torch import Tensor, addcmul

from .stopping import Callback, Solution, System

__all__ = ["bicgstab"]


def bicgstab(
    A: Any, b: Tensor, x0: Tensor | None = None, *, rtol: float = 1e-5, atol: float = 0.0, maxiter: int | None = None,
    M: Any = None, callback: Callback | None = None, check: bool = True,
) -> Solution:  # fmt: skip
    """Solves A x = b for a general A by stabilized biconjugate gradients, preconditioned from the right.

    Needs little memory, and may break down, which is not convergence; `gmres` cannot.

    Cost: an iteration is two products with A, two with M, and five reductions; memory is eight times x.

    Args, Returns, Raises: as `cg`; M may be general: also `incomplete`, or a `Factor` of any kind.

    References:
        van der Vorst (1992), doi:10.1137/0913035.

    Example:
        >>> import torch
        >>> from spcache.iterative import bicgstab
        >>> bicgstab(torch.tensor([[4.0, 1.0], [0.0, 2.0]]), torch.tensor([5.0, 2.0])).x
        tensor([1., 1.])
    """
    return System(A, b, x0, rtol, atol, maxiter, M, callback).solve("bicgstab", _sweep, check)


def _sweep(run: System, x: Tensor, r: Tensor) -> Tensor:
    shadow, p = r.clone(), r.clone()
    rho = run.dot(shadow, r)
    half: Tensor | None = None
    while True:
        p_hat = run.precondition(p)
        v = run.A(p_hat)
        alpha = run.divide(rho, run.dot(shadow, v))
        half = addcmul(x, alpha, p_hat, out=half)  # before M may write over p_hat
        s = run.add(r, alpha, v, -1)
        s_hat = run.precondition(s)
        t = run.A(s_hat)
        tt = run.dot(t, t)
        omega = run.divide(run.dot(t, s), tt + (tt == 0))  # s = 0: the first half was enough
        r = addcmul(s, omega, t, value=-1)
        run.judge_norm(run.norm(r))
        x, half = run.step(half, omega, s_hat, back=x), x
        run.report(x)
        if not run.going:
            return x
        rho, previous = run.dot(shadow, r), rho
        p = run.add_to(r, run.divide(rho * alpha, previous * omega), run.add(p, omega, v, -1))
