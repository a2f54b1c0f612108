"""Conjugate gradients."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .stopping import Callback, Solution, System

__all__ = ["cg", "sweep"]


def cg(
    A: Any, b: Tensor, x0: Tensor | None = None, *, rtol: float = 1e-5, atol: float = 0.0, maxiter: int | None = None,
    M: Any = None, callback: Callback | None = None, check: bool = True,
) -> Solution:  # fmt: skip
    """Solves A x = b for a Hermitian positive definite A by preconditioned conjugate gradients.

    Stops, for each right-hand side, when ||b - A x|| <= max(rtol ||b||, atol); one that is done changes no more while
    others go on. Not differentiated: that is what `solve_operator` is for.

    Cost: an iteration is one product with A, one with M, three updates and two reductions (three with M); memory is
    four times x.

    Args:
        A: [n, n] dense, sparse or SciPy's sparse, [*B, n, n] dense, or whatever `as_operator` takes; a function gets x
            in the shape of b and gives a new tensor.
        b: [n]; [*B, n] where A has batch dimensions; else [*B, n, k]: matrices of k columns.
        x0: start, of the shape of x; None: zero.
        rtol, atol: the tolerance.
        maxiter: most iterations; None: 10 n.
        M: Hermitian positive definite approximation of A^-1: a tensor, a function that gives a new tensor, a `Factor`
            (that of earlier values, say), or one of `diagonal`, `block_diagonal`. A constant as to derivatives.
        callback: called with x after each iteration; x is changed in place later, clone what is to be kept.
        check: False returns x whether or not it converged.

    Returns:
        (x, status), status a `Status`.

    Raises:
        NotConvergedError: with `x` and `status`; not with check=False.
        ValueError, TypeError: an argument is wrong.
        RuntimeError: grad mode is on, and A, b, x0 or a product with A requires grad.
        NotImplementedError: one of them has a forward-mode tangent.

    References:
        Hestenes & Stiefel (1952), doi:10.6028/jres.049.044.

    Example:
        >>> import torch
        >>> from spcache.iterative import cg
        >>> x, status = cg(torch.tensor([[4.0, 1.0], [1.0, 3.0]]), torch.tensor([5.0, 4.0]))
        >>> status.iterations
        tensor(2)
    """
    return System(A, b, x0, rtol, atol, maxiter, M, callback).solve("cg", sweep, check)


def sweep(run: System, x: Tensor, r: Tensor) -> Tensor:
    z = run.precondition(r)
    p, rho = z.clone(), run.dot(r, z)
    while True:
        q = run.A(p)
        alpha = run.divide(rho, run.dot(p, q))
        r = run.add(r, alpha, q, -1)
        rr = run.dot(r, r)
        run.judge_norm(rr, squared=True)
        x = run.step(x, alpha, p)
        run.report(x)
        if not run.going:
            return x
        z = run.precondition(r)
        rho, previous = rr if run.M is None else run.dot(r, z), rho
        p = run.add_to(z, run.divide(rho, previous), p)
