"""LSMR."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import NotConvergedError
from .operators import Apply, as_operator
from .stopping import Callback, Columns, Solution, alike, count_of, no_derivative, number_of, start_of

__all__ = ["LeastSquaresStatus", "lsmr"]

_DRIFT = 10.0  # how far the true norms may be from the estimates by which the method stopped


class LeastSquaresStatus(NamedTuple):
    """What became of each right-hand side. The shape *S is [*B] where b holds vectors, [*B, k] where matrices.

    Attributes:
        converged: [*S; bool] whether `istop` is 0, 1 or 2, and the norms below, computed anew, bear it out within a
            factor of ten.
        iterations: [*S; int64] the iteration at which it stopped.
        residual: [*S; real] ||b - A x||.
        normal_residual: [*S; real] ||A^H (b - A x) - damp^2 (x - x0)||, zero at a minimum.
        istop: [*S; int64] which test stopped it, as in SciPy: 0 the start is a minimum; 1 A x = b, by atol and btol;
            2 a least-squares solution, by atol; 3 the condition number is beyond conlim; 7 none did: maxiter was
            reached or a number was not finite.
    """

    converged: Tensor
    iterations: Tensor
    residual: Tensor
    normal_residual: Tensor
    istop: Tensor


def lsmr(
    A: Any, b: Tensor, x0: Tensor | None = None, *, damp: float = 0.0, atol: float = 1e-6, btol: float = 1e-6,
    conlim: float = 1e8, maxiter: int | None = None, callback: Callback | None = None, check: bool = True,
) -> Solution:  # fmt: skip
    """Minimizes ||b - A x||^2 + damp^2 ||x - x0||^2; of all minima, that nearest to x0.

    Stops when ||r|| <= btol ||b|| + atol ||A|| ||x|| (r = b - A x), or ||A^H r|| <= atol ||A|| ||r||, or an estimate of
    the condition number of A reaches conlim. ||A|| is an estimate of the Frobenius norm. Tolerances below the rounding
    error count as that. For b = 0 without damping x = 0, whatever x0. Not differentiated: that is what `lstsq` is for.

    Cost: an iteration is one product with A, one with its adjoint, and three reductions; memory is four times x and
    twice b.

    Args:
        A: [m, n], of any form that `as_operator` takes, with an adjoint: a tensor, a pair of functions (matvec,
            rmatvec), an object with `rmatvec`, `mH`, `H` or `T`.
        b: [m]; [*B, m] where A has batch dimensions; else [*B, m, k].
        x0: start, of the shape of x; None: zero.
        damp: the damping.
        atol, btol: the tolerances: relative errors of A and b, roughly.
        conlim: 0 or infinity switches the test off.
        maxiter: most iterations; None: 10 min(m, n).
        callback, check: as in `cg`.

    Returns:
        (x, status), status a `LeastSquaresStatus`.

    Raises:
        As `cg`; TypeError where A offers no adjoint.

    References:
        Fong & Saunders (2011), doi:10.1137/10079687X.

    Example:
        >>> import torch
        >>> from spcache.iterative import lsmr
        >>> lsmr(torch.tensor([[1.0], [1.0]]), torch.tensor([1.0, 3.0])).x.round(decimals=4)
        tensor([2.])
    """
    map_A = as_operator(A)
    if map_A.adjoint is None:
        raise TypeError(
            f"A must offer its adjoint: a dense tensor or a sparse one in COO, CSR or CSC, a pair (matvec, rmatvec), "
            f"an object with rmatvec, mH, H or T; got {A.layout if isinstance(A, Tensor) else type(A).__name__}"
        )
    run = Columns(map_A, b, callback)
    alike(A, "A", run.b)
    no_derivative(A, "A")
    m = run.b.shape[run.dim]
    n = map_A.shape[-1] if map_A.shape is not None else _rows_of(map_A.adjoint(run.b), run)
    apply, adjoint = run.checked(map_A.apply, "A", m), run.checked(map_A.adjoint, "A's adjoint", n)
    damp, atol, btol = number_of(damp, "damp"), number_of(atol, "atol"), number_of(btol, "btol")
    conlim = math.inf if conlim in (0, math.inf) else number_of(conlim, "conlim")
    maxiter = 10 * min(m, n) if maxiter is None else count_of(maxiter, "maxiter")

    start = start_of(x0, run, n, b)
    if start is not None and not damp:
        start = torch.where(run.norm_b == 0, 0, start)
    r = run.b.clone() if start is None else run.b - apply(start)
    shape = (*run.b.shape[: run.dim], n, *run.b.shape[run.dim :][1:])
    x = run.b.new_zeros(shape) if start is None else start.clone()
    x, istop, norm_A = _iterate(run, apply, adjoint, x, r, damp, (atol, btol, conlim), maxiter)

    moved = x if start is None else x - start
    r = run.b - apply(x)
    gradient = adjoint(r) - damp**2 * moved
    residual, normal = run.norm(r), run.norm(gradient)
    damped = torch.hypot(residual, damp * run.norm(moved))
    first, second = _excess(run, damped, normal, norm_A, run.norm(x), atol, btol, _DRIFT)
    converged = (istop < 3) & ((istop == 0) | (first <= 0) | (second <= 0)) & normal.isfinite()
    x, residual, normal = map(run.scaled_back, (x, residual, normal))
    status = LeastSquaresStatus(*map(run.squeeze, (converged, run.iterations(), residual, normal, istop)))
    if check and not bool(converged.all()):
        raise NotConvergedError(_message(status), x, status)
    return Solution(x, status)


def _rows_of(y: Any, run: Columns) -> int:
    """How many rows x has, if y = A^H b is a tensor like b; if not, that is found out where it is checked."""
    return (y if isinstance(y, Tensor) and y.dim() == run.b.dim() else run.b).shape[run.dim]


def _excess(
    run: Columns, norm_r: Tensor, normal: Tensor, norm_A: Tensor, norm_x: Tensor, atol: float, btol: float,
    slack: float = 1.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """By how much the tests for A x = b and for a least-squares solution are missed; the latter cannot ask for less
    than what rounding leaves of A^H r."""
    eps = slack * torch.finfo(norm_r.dtype).eps
    atol, btol = max(slack * atol, eps), max(slack * btol, eps)
    rounding = eps * (run.norm_b + norm_A * norm_x)
    return norm_r - (btol * run.norm_b + atol * norm_A * norm_x), normal - norm_A * (atol * norm_r + rounding)


def _iterate(
    run: Columns, apply: Apply, adjoint: Apply, x: Tensor, r: Tensor, damp: float,
    tolerances: tuple[float, float, float], maxiter: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """x, istop and the norm of A. Golub-Kahan: A v = beta u + alpha u_old, A^H u = alpha v + beta v_old. The letters
    are those of Fong & Saunders, `_bar` and `_tilde` for the second and third rotation, `_dot` what is not final."""
    atol, btol, conlim = tolerances
    beta = run.norm(r)
    u = r / (beta + (beta == 0))
    v = adjoint(u)
    alpha = run.norm(v)
    vanished = (alpha == 0) & (v != 0).any(run.dim, keepdim=v.dim() > 1)  # A's numbers are too small to be squared
    alpha = torch.where(vanished, torch.nan, alpha)
    v = v / (alpha + (alpha == 0))
    run.active = ~((alpha * beta == 0) | (beta <= btol * run.norm_b))
    run.going = bool(run.active.any())
    istop = torch.where(run.active, 7, torch.where(beta > btol * run.norm_b, 0, 1))
    istop = torch.where(beta == 0, 0, istop)

    one, zero = torch.ones_like(alpha), torch.zeros_like(alpha)
    alpha_bar, zeta_bar, zeta, rho, rho_bar, c_bar, s_bar = alpha, alpha * beta, zero, one, one, one, zero
    h, h_bar = v.clone(), torch.zeros_like(x)
    beta_dd, beta_dot, rho_dot, tau_tilde, theta_tilde, lost = beta, zero, one, zero, zero, zero
    square, largest, smallest = alpha.square(), zero, torch.full_like(zero, math.inf)
    norm_A, norm_x = square.sqrt(), run.norm(x)
    while run.going and run.count < maxiter:
        u = run.add_to(apply(v), -alpha, u)
        beta = run.norm(u)
        u = u * run.divide(1.0, beta + (beta == 0))
        v = run.add_to(adjoint(u), -beta, v)
        alpha = run.norm(v)
        v = v * run.divide(1.0, alpha + (alpha == 0))

        alpha_hat = torch.hypot(alpha_bar, damp * one) if damp else alpha_bar
        c_hat, s_hat = run.divide(alpha_bar, alpha_hat), run.divide(damp * one, alpha_hat)
        rho, rho_old = torch.hypot(alpha_hat, beta), rho
        c, s = run.divide(alpha_hat, rho), run.divide(beta, rho)
        theta, alpha_bar = s * alpha, c * alpha

        theta_bar, rho_temp = s_bar * rho, c_bar * rho
        rho_bar, rho_bar_old = torch.hypot(rho_temp, theta), rho_bar
        c_bar, s_bar = run.divide(rho_temp, rho_bar), run.divide(theta, rho_bar)
        zeta, zeta_old, zeta_bar = c_bar * zeta_bar, zeta, -s_bar * zeta_bar
        h_bar = run.add_to(h, -run.divide(theta_bar * rho, rho_old * rho_bar_old), h_bar)

        length = run.divide(zeta, rho * rho_bar)

        beta_acute, lost = c_hat * beta_dd, lost + (s_hat * beta_dd).square()
        beta_dd = -s * beta_acute
        rho_tilde = torch.hypot(rho_dot, theta_bar)
        c_tilde, s_tilde = run.divide(rho_dot, rho_tilde), run.divide(theta_bar, rho_tilde)
        theta_tilde, theta_tilde_old = s_tilde * rho_bar, theta_tilde
        rho_dot = c_tilde * rho_bar
        beta_dot = c_tilde * c * beta_acute - s_tilde * beta_dot
        tau_tilde = run.divide(zeta_old - theta_tilde_old * tau_tilde, rho_tilde)
        tau_dot = run.divide(zeta - theta_tilde * tau_tilde, rho_dot)
        norm_r = (lost + (beta_dot - tau_dot).square() + beta_dd.square()).sqrt()

        if run.count:
            largest, smallest = torch.maximum(largest, rho_bar_old), torch.minimum(smallest, rho_bar_old)
        square = square + beta.square()
        norm_A, square = square.sqrt(), square + alpha.square()
        solved, minimal = _excess(run, norm_r, zeta_bar.abs(), norm_A, norm_x, atol, btol)
        excess = torch.minimum(solved, minimal)
        if conlim < math.inf:
            ill = conlim * torch.minimum(smallest, rho_temp) - torch.maximum(largest, rho_temp)
            excess = torch.minimum(excess, ill)
        before = run.active
        run.judge(excess)
        if not (run.single and run.going):
            now = torch.where(solved <= 0, 1, torch.where(minimal <= 0, 2, torch.where(excess <= 0, 3, 7)))
            istop = torch.where(before, now, istop)
        x = run.step(x, length, h_bar)
        h = run.add_to(v, -run.divide(theta, rho), h)
        norm_x = run.norm(x)
        run.report(x)
    return x, istop, norm_A


def _message(status: LeastSquaresStatus) -> str:
    failed = ~status.converged
    worst = float((status.normal_residual / status.residual)[failed].max())
    ill = int((status.istop[failed] == 3).sum())
    return (
        f"lsmr: {int(failed.sum())} of {failed.numel()} right-hand sides did not converge in "
        f"{int(status.iterations[failed].max())} iterations ({ill} of them because the condition number of A is beyond "
        f"conlim); the worst ||A^H r|| / ||r|| is {worst:.3g}; raise maxiter (or conlim), atol or btol, scale A's "
        f"columns, or pass check=False to get x as it is"
    )
