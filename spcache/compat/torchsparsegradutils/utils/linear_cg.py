"""Conjugate gradients that can also give the tridiagonal matrices of Lanczos; without: `spcache.iterative.cg`."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ....iterative.stopping import Arithmetic, scale_of
from .closure import Closure, closure

__all__ = ["CGInfo", "LinearCGSettings", "linear_cg"]


class LinearCGSettings(NamedTuple):
    """
    Attributes:
        max_cg_iterations: most iterations.
        max_lanczos_quadrature_iterations: largest tridiagonal matrix.
        cg_tolerance: done when ||b - A x|| <= cg_tolerance ||b||.
        terminate_cg_by_size: at most n iterations.
        verbose_linalg: print a line at the start.
    """

    max_cg_iterations: int = 1000
    max_lanczos_quadrature_iterations: int = 20
    cg_tolerance: float = 1e-5
    terminate_cg_by_size: bool = False
    verbose_linalg: bool = False


@dataclass(frozen=True)
class CGInfo:
    """
    Attributes:
        iterations, matvecs: how many; a matvec is of all columns.
        converged: [*B, k; bool] by the true residual.
        recursive_relative_residual: [*B, k] as the iteration has it.
        true_relative_residual: [*B, k] ||b - A x|| / ||b||, computed anew.
        reason: "converged"; "recursive_converged", "mean_converged": the iteration thought so, the true residual is
            larger; "stopped_updating": nothing to do at the start; "max_iter".
    """

    iterations: int
    matvecs: int
    converged: Tensor
    recursive_relative_residual: Tensor
    true_relative_residual: Tensor
    tolerance: float
    reason: Literal["converged", "recursive_converged", "mean_converged", "stopped_updating", "max_iter"]


def linear_cg(
    matmul_closure: Tensor | Closure,
    rhs: Tensor,
    n_tridiag: int = 0,
    tolerance: float | None = None,
    eps: float | None = None,
    stop_updating_after: float | None = None,
    max_iter: int | None = None,
    max_tridiag_iter: int | None = None,
    initial_guess: Tensor | None = None,
    preconditioner: Closure | None = None,
    settings: LinearCGSettings = LinearCGSettings(),  # noqa: B008
    convergence_reduction: Literal["all", "mean"] = "all",
    min_iter: int = 0,
    return_info: bool = False,
) -> Any:
    """X with A X = rhs for a symmetric positive definite A. Warns where a column does not converge.

    Autograd records the derivative of the iterations, not of the solution: wrong where they end early.

    Args:
        matmul_closure: A, [n, n] or [*B, n, n], or a function of [*B, n, k].
        rhs: [n] or [*B, n, k].
        n_tridiag: of so many columns the tridiagonal matrices are returned too.
        tolerance, max_iter, max_tridiag_iter: instead of the settings'.
        eps: p^T A p and r^T M r must not be smaller; None: the smallest normal number.
        stop_updating_after: a column whose relative residual is not larger changes no more; None: tolerance.
        preconditioner: r [*B, n, k] -> M r, a new tensor; positive definite.
        convergence_reduction: done when "all" columns are, or when the "mean" of their residuals is small enough.
        min_iter: fewest iterations.

    Returns:
        X; (X, T); (X, info); (X, T, info) with n_tridiag and return_info. T: [n_tridiag, *B, r, r].

    Raises:
        RuntimeError: A is not positive definite, by eps; A or M gives another shape, device or dtype, or NaN.
        TypeError, ValueError: another argument is wrong.

    References:
        Hestenes & Stiefel (1952), doi:10.6028/jres.049.044. Golub & Van Loan, Matrix Computations (2013), 11.3, on T.
    """
    if not isinstance(rhs, Tensor) or not rhs.is_floating_point():
        raise TypeError("rhs must be a real floating-point torch.Tensor")
    if rhs.dim() < 1:
        raise ValueError("rhs must have at least one dimension")
    vector = rhs.dim() == 1
    b = rhs.unsqueeze(-1) if vector else rhs
    max_iter = settings.max_cg_iterations if max_iter is None else max_iter
    max_tridiag_iter = settings.max_lanczos_quadrature_iterations if max_tridiag_iter is None else max_tridiag_iter
    tolerance = _number(settings.cg_tolerance if tolerance is None else tolerance, "tolerance")
    stop = _number(tolerance if stop_updating_after is None else stop_updating_after, "stop_updating_after")
    eps = torch.finfo(b.dtype).tiny if eps is None else eps
    if not 0 < eps < math.inf:
        raise ValueError("eps must be finite and positive")
    if not b.new_tensor(eps) > 0:
        raise ValueError("eps must be representable as a positive value in the rhs dtype")
    if convergence_reduction not in ("all", "mean"):
        raise ValueError("convergence_reduction must be 'all' or 'mean'")
    if min_iter < 0:
        raise ValueError("min_iter must be nonnegative")
    if max_tridiag_iter > max_iter:
        raise RuntimeError(f"max_tridiag_iter must not be larger than max_iter, got {max_tridiag_iter} > {max_iter}")
    multiply = closure(matmul_closure)
    A = _checked(multiply, b, "matmul_closure")
    M = None if preconditioner is None else _checked(preconditioner, b, "preconditioner")
    if settings.verbose_linalg:
        print(f"linear_cg: {tuple(b.shape)}, at most {max_iter} iterations, tolerance {tolerance}")

    # everything relative to ||b||; the solution for b = 0 is zero, whatever the guess
    run = Arithmetic(-2, recorded=True)
    scale = scale_of(b.detach(), -2)
    scale = b.new_ones(()) if scale is None else scale
    b = b / scale
    zero = (size := run.norm(b)) == 0
    size = size.masked_fill(zero, 1)
    x = torch.zeros_like(b) if initial_guess is None else (_guess(initial_guess, b) / scale / size).masked_fill(zero, 0)
    r, matvecs = b / size - A(x), 1
    if r.isnan().any():
        raise RuntimeError("NaNs encountered when trying to perform matrix-vector multiplication")
    residual = run.norm(r)
    done = residual <= stop
    n_iter = min(max_iter, b.shape[-2]) if settings.terminate_cg_by_size else max_iter
    n_tridiag_iter = min(max_tridiag_iter, b.shape[-2])
    stopped = bool(done.all()) and not n_tridiag and min_iter == 0
    iterations, reached, lanczos = 0, False, _Lanczos(n_tridiag)
    if not stopped:
        z = r if M is None else M(r)
        p, rho = z.clone(), run.dot(r, z)
        _require(rho, eps, done, "preconditioned residual inner product")
    for k in range(0 if stopped else n_iter):
        q = A(p)
        curvature = run.dot(p, q)
        _require(curvature, eps, done, "p^T A p")
        _require(rho, eps, done, "residual inner product")
        alpha = rho / curvature.masked_fill(done | (curvature < eps), math.inf)  # zero, and so are its derivatives
        x, r = run.add(x, alpha, p), run.add(r, alpha, q, -1)
        z = r if M is None else M(r)
        rho, previous = run.dot(r, z), rho
        beta = rho / previous.masked_fill(previous < eps, math.inf)
        p = run.add_to(z, beta, p)
        residual = run.norm(r)
        done, iterations, matvecs = residual <= stop, k + 1, matvecs + 1
        reached = bool(
            (residual <= tolerance).all() if convergence_reduction == "all" else residual.mean() <= tolerance
        )
        reached = reached and iterations >= min_iter
        if reached and not (n_tridiag and k < min(n_tridiag_iter, max_iter - 1)):
            break
        if k < n_tridiag_iter:
            lanczos.add(alpha, beta)

    x = x * size
    true = run.norm(b - A(x)) / size
    converged = true <= tolerance
    reason: Any = "stopped_updating" if stopped else "max_iter"
    if bool(converged.all()):
        reason = "converged"
    else:
        reason = ("mean" if convergence_reduction == "mean" else "recursive") + "_converged" if reached else reason
        warnings.warn(
            f"linear_cg: {int((~converged).sum())} of {converged.numel()} right-hand sides did not converge in "
            f"{iterations} iterations; the largest relative residual is {float(true.max()):.3g}, the tolerance "
            f"{tolerance:.3g}",
            UserWarning,
            stacklevel=2,
        )
    x = x * scale
    results = [x.squeeze(-1) if vector else x]
    if n_tridiag:
        results.append(lanczos.matrices(b))
    if not return_info:
        return results[0] if len(results) == 1 else tuple(results)
    converged, residual, true = (t.detach().squeeze(-2) for t in (converged, residual, true))
    return *results, CGInfo(iterations, matvecs + 1, converged, residual, true, tolerance, reason)


class _Lanczos:
    """The tridiagonal matrices of the first t columns:
    T[j, j] = 1 / alpha_j + beta_{j-1} / alpha_{j-1}, T[j, j-1] = T[j-1, j] = sqrt(beta_{j-1}) / alpha_{j-1}."""

    def __init__(self, t: int):
        self.t = t
        self.growing = t > 0
        self.inverses: list[Tensor] = []  # [*B, t] each
        self.betas: list[Tensor] = []

    def add(self, alpha: Tensor, beta: Tensor) -> None:
        """Ends where all of them fall apart."""
        if not self.growing:
            return
        if self.inverses:
            self.growing = bool((self.betas[-1].sqrt() * self.inverses[-1]).max() >= 1e-6)
        alpha, beta = alpha.squeeze(-2)[..., : self.t], beta.squeeze(-2)[..., : self.t]
        self.inverses.append(alpha.masked_fill(alpha == 0, 1).reciprocal())
        self.betas.append(beta)

    def matrices(self, b: Tensor) -> Tensor:
        """[t, *B, r, r]"""
        if not self.inverses:
            return b.new_zeros(self.t, *b.shape[:-2], 0, 0)
        inverse, beta = torch.stack(self.inverses, -1), torch.stack(self.betas, -1)[..., :-1]  # [*B, t, r]
        diagonal = inverse + torch.nn.functional.pad(beta * inverse[..., :-1], (1, 0))
        beside = beta.sqrt() * inverse[..., :-1]
        T = torch.diag_embed(diagonal) + torch.diag_embed(beside, 1) + torch.diag_embed(beside, -1)
        return T.movedim(-3, 0)


def _require(t: Tensor, eps: float, done: Tensor, name: str) -> None:
    if bool((~done & ~((t >= eps) & t.isfinite())).any()):
        raise RuntimeError(f"CG breakdown: {name} must be finite and at least eps for active right-hand sides")


def _number(value: float, name: str) -> float:
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and nonnegative")
    return value


def _guess(x: Tensor, b: Tensor) -> Tensor:
    x = x.unsqueeze(-1) if x.dim() == 1 else x
    if x.shape != b.shape:
        raise ValueError(f"initial_guess must have shape {tuple(b.shape)}, got {tuple(x.shape)}")
    if x.device != b.device or x.dtype != b.dtype:
        raise ValueError("initial_guess must share rhs device and dtype")
    return x


def _checked(apply: Closure, b: Tensor, name: str) -> Closure:
    def call(x: Tensor) -> Tensor:
        y = apply(x)
        if y.shape != b.shape or y.device != b.device or y.dtype != b.dtype:
            raise RuntimeError(f"{name} output must match rhs shape, device, and dtype")
        return y

    return call
