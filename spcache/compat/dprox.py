"""The linear solver of ∇-Prox (`dprox`): matrix-free, differentiable in the right-hand side and in the operator.

`linear_solve(A, b, config)` and `pcg(A, b)` under their names, over `solve_operator`. Where a solver differs from those
of `spcache.iterative` (it starts at ones, its tolerance is absolute, its method is another), it is a loop below.

Other than in dprox: an operator need not be cloneable, nor its parameters be leaves or registered; an incoming gradient
is scaled to norm one before its solve, which starts without x0 (so that the absolute tolerance of cg2 and pcg is for
norm one there); the adjoint is the derivative of A; all of b is one vector, its first dimension no batch; a start that
solves the system gives no NaN. An operator that gives NaN or infinity does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._operators import solve_operator
from ..iterative import recorded
from ..iterative.stopping import scale_of

__all__ = ["LinearSolve", "LinearSolveConfig", "linear_solve", "pcg"]

_Apply = Callable[[Tensor], Tensor]


@dataclass
class LinearSolveConfig:
    """How to solve.

    Attributes:
        rtol: tolerance, in the sense of the solver (see `solver_type`).
        max_iters: most iterations; what has been reached by then is returned without a word.
        verbose: print the number of iterations.
        solver_type: "cg" from 0 until ||r|| <= rtol ||b||; "cg2" from ones until r.r < rtol; "pcg" from ones until
            max |r| < rtol; "minres", "plss", "plssw" from 0 until ||r|| <= rtol ||b||. A must be symmetric (for the
            first three positive definite), except for plss and plssw.
        solver_kwargs: `x0`, the start, for each; `Minv`, a function in the shape of b that approximates A^-1, for pcg
            and minres; `Wh`, the weights of plssw, in the shape of b. For an incoming gradient x0 is not used.
        use_analytic_grad: False: autograd records the iterations (unrolled) instead of solving with the adjoint.
    """

    rtol: float = 1e-6
    max_iters: int = 100
    verbose: bool = False
    solver_type: str = "cg"
    solver_kwargs: dict[str, Any] = field(default_factory=dict)
    use_analytic_grad: bool = True


def linear_solve(A: torch.nn.Module, b: Tensor, config: LinearSolveConfig = LinearSolveConfig()) -> Tensor:  # noqa: B008
    """x with A(x) = b.

    Args:
        A: linear, keeps shape and dtype: a module, or any callable.
        b: any shape.
        config: see there; nobody writes to the default.

    Returns:
        x: shape, dtype and device of b. Differentiable to any order in b and in whatever A(x) depends on.

    Raises:
        KeyError: no such solver_type.

    Example:
        >>> import torch
        >>> from spcache.compat.dprox import linear_solve
        >>> A = torch.nn.Linear(2, 2, bias=False)
        >>> A.weight.data = torch.tensor([[2.0, 0.0], [0.0, 4.0]])
        >>> linear_solve(A, torch.tensor([2.0, 2.0])).detach()
        tensor([1.0000, 0.5000])
    """
    options = dict(config.solver_kwargs)
    x0 = options.pop("x0", None)
    if x0 is not None:
        x0 = x0.expand(b.shape).reshape(-1).clone()  # it may be returned
    if options.get("Wh") is not None:
        options["Wh"] = options["Wh"].expand(b.shape).reshape(-1)
    if options.get("Minv") is not None:
        options["Minv"] = _flat(options["Minv"], b)
    method = SOLVERS[config.solver_type]
    solver = partial(method, rtol=config.rtol, max_iters=config.max_iters, verbose=config.verbose, **options)
    solver.hermitian = config.solver_type not in ("plss", "plssw")  # type: ignore[attr-defined]
    if config.use_analytic_grad:
        return solve_operator(A, b, solver=solver, x0=x0)
    if b.numel() == 0:
        return b.clone()
    return solver(_Recorded(A, b), b.reshape(-1), x0=x0).reshape(b.shape)


class LinearSolve:
    """`LinearSolve.apply(A, b, config, *parameters)`: `linear_solve`, which finds the parameters by itself."""

    @staticmethod
    def apply(A: torch.nn.Module, b: Tensor, config: LinearSolveConfig, *parameters: Tensor) -> Tensor:
        return linear_solve(A, b, config)


def pcg(
    A: torch.nn.Module, b: Tensor, rtol: float = 1e-6, max_iters: int = 100, verbose: bool = False, **kwargs: Any
) -> Tensor:
    """`linear_solve` by preconditioned conjugate gradients; kwargs are `Minv` and `x0`."""
    return linear_solve(A, b, LinearSolveConfig(rtol, max_iters, verbose, "pcg", kwargs))


# --- operators on vectors ------------------------------------------------------------------------------------------


def _flat(function: _Apply, like: Tensor) -> _Apply:
    """A function in the shape of `like`, on vectors."""
    return lambda v: function(v.reshape(like.shape)).reshape(-1)


class _Recorded:
    """A on vectors, with history."""

    def __init__(self, A: _Apply, like: Tensor):
        self._apply = _flat(A, like)

    def __call__(self, x: Tensor) -> Tensor:
        return self._apply(x)

    def rmatvec(self, v: Tensor) -> Tensor:
        with torch.enable_grad():
            z = torch.zeros_like(v, requires_grad=True)
            return torch.autograd.grad(self(z), z, v, create_graph=True)[0]


# --- solvers: A maps vectors [N] to vectors, b is [N] ----------------------------------------------------------------


def _from_zero(
    name: str, A: Any, b: Tensor, x0: Tensor | None, max_iters: int, verbose: bool, method: Callable[..., Any]
) -> Tensor:
    """A method of `spcache.iterative`, that may have nothing to do, and does not go back to a finite x from NaN."""
    if max_iters < 1:
        return _report(name, torch.zeros_like(b) if x0 is None else x0, 0, verbose)
    x, status = method(A, b, x0, maxiter=max_iters)
    iterations = int(status.iterations)
    if iterations < max_iters and not status.converged:
        y = A(b)
        if not y.isfinite().all():
            x = (b - y) * torch.nan
    return _report(name, x, iterations, verbose)


def _cg(A: Any, b: Tensor, rtol: float, max_iters: int, verbose: bool, x0: Tensor | None = None) -> Tensor:
    return _from_zero("cg", A, b, x0, max_iters, verbose, partial(recorded.cg, rtol=rtol))


def _minres(
    A: Any, b: Tensor, rtol: float, max_iters: int, verbose: bool, x0: Tensor | None = None, Minv: _Apply | None = None
) -> Tensor:
    return _from_zero("minres", A, b, x0, max_iters, verbose, partial(recorded.minres, rtol=rtol, M=Minv))


def _cg2(A: Any, b: Tensor, rtol: float, max_iters: int, verbose: bool, x0: Tensor | None = None) -> Tensor:
    def done(r: Tensor, rz: Tensor) -> bool:
        return rz.item().real < rtol

    return _cg_from_ones("cg2", A, b, x0, done, max_iters, verbose)


def _pcg(
    A: Any, b: Tensor, rtol: float, max_iters: int, verbose: bool, x0: Tensor | None = None, Minv: _Apply | None = None
) -> Tensor:
    def done(r: Tensor, rz: Tensor) -> bool:
        return torch.linalg.vector_norm(r, torch.inf).item() < rtol

    return _cg_from_ones("pcg", A, b, x0, done, max_iters, verbose, Minv or (lambda r: r))


def _cg_from_ones(
    name: str,
    A: Any,
    b: Tensor,
    x: Tensor | None,
    done: Callable[[Tensor, Tensor], bool],
    max_iters: int,
    verbose: bool,
    Minv: _Apply = lambda r: r,
) -> Tensor:
    """Hestenes & Stiefel (1952), doi:10.6028/jres.049.044, with another start and another end: done(r, r . Minv r)."""
    x = torch.ones_like(b) if x is None else x
    r = b - A(x)
    p = z = Minv(r)
    rz = torch.vdot(r, z)
    k = 0
    while k < max_iters and not done(r, rz):
        q = A(p)
        alpha = rz / torch.vdot(p, q)
        x, r = torch.addcmul(x, alpha, p), torch.addcmul(r, alpha, q, value=-1)
        z = Minv(r)
        rz, previous = torch.vdot(r, z), rz
        p = torch.addcmul(z, rz / previous, p)
        k += 1
    return _report(name, x, k, verbose)


def _plss(A: Any, b: Tensor, rtol: float, max_iters: int, verbose: bool, x0: Tensor | None = None) -> Tensor:
    return _plssw(A, b, rtol, max_iters, verbose, torch.ones_like(b, dtype=b.real.dtype), x0, "plss")


def _plssw(
    A: Any,
    b: Tensor,
    rtol: float,
    max_iters: int,
    verbose: bool,
    Wh: Tensor,
    x0: Tensor | None = None,
    name: str = "plssw",
) -> Tensor:
    """A projection method with all earlier residuals as sketch.

    Step k is the shortest p, in the norm ||W p|| with W = diag(Wh), after which the residual is orthogonal to all of
    r_0 ... r_k. As r_k is orthogonal to those before it already, p is orthogonal to the step before. With y = A^H r_k

        p = d (r_k . r_k) / (y . d),    d = W^-2 y made orthogonal to the step before, in the inner product of W^2.

    Any A whose range contains b, symmetric or not; an iteration costs one product with A and one with A^H. The best
    iterate is returned, because the norm of r need not fall in every step; NaN where one is met. A tiny or huge b is
    scaled by a power of two, and y to largest entry one, so that no square underflows or overflows.

    References:
        Brust & Saunders (2023), doi:10.1137/22M1509783.
    """
    inverse = torch.where(Wh == 0, 0, 1 / Wh**2)  # W^-2
    found = scale_of(b.detach(), -1)
    scale = 1 if found is None else found
    b = b / scale
    x = torch.zeros_like(b) if x0 is None else x0 / scale
    limit = rtol * torch.linalg.vector_norm(b)
    best, least = x, torch.inf
    d: Tensor | None = None
    dd: Tensor | None = None
    for k in range(max_iters + 1):
        r = b - A(x)
        norm = torch.linalg.vector_norm(r)
        if not norm.isfinite():
            best = r * torch.nan
            break
        if norm < least:
            best, least = x, norm.detach()
        if k == max_iters or not norm > limit:
            break
        u = r / norm
        y = A.rmatvec(u)
        size = y.detach().abs().max()
        size = torch.where(size == 0, 1, size)
        y = y / size
        new = inverse * y
        if d is not None and dd is not None:
            new = new - torch.vdot(d, y) / dd * d
        d, dd = new, torch.vdot(new, y)  # y . d = d . W^2 d
        if dd == 0:  # b is not in the range of A
            break
        x = x + norm / size / dd * d
    return _report(name, best * scale, k, verbose)


def _report(name: str, x: Tensor, iterations: int, verbose: bool) -> Tensor:
    if verbose:
        print(f"{name}: {iterations} iterations")
    return x


SOLVERS: dict[str, Callable[..., Tensor]] = {
    "cg": _cg,
    "cg2": _cg2,
    "pcg": _pcg,
    "plss": _plss,
    "plssw": _plssw,
    "minres": _minres,
}
