"""What the methods share: checked arguments, arithmetic column by column, the stopping rule, the result."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..errors import NotConvergedError
from ..torch_private import in_dual_level
from .operators import Apply, Operator, as_operator

__all__ = [
    "Arithmetic",
    "Columns",
    "Solution",
    "Status",
    "System",
    "alike",
    "count_of",
    "no_derivative",
    "number_of",
    "scale_of",
    "start_of",
]

Callback = Callable[[Tensor], Any]

DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)


class Status(NamedTuple):
    """What became of each right-hand side. The shape *S is [*B] where b holds vectors, [*B, k] where matrices.

    Attributes:
        converged: [*S; bool] whether ||b - A x|| <= max(rtol ||b||, atol), by the residual computed anew.
        iterations: [*S; int64] the iteration at which it converged or stopped.
        residual: [*S; real] ||b - A x||.
    """

    converged: Tensor
    iterations: Tensor
    residual: Tensor


class Solution(NamedTuple):
    """`x, status = cg(A, b)`."""

    x: Tensor
    status: Any


def number_of(value: Any, name: str) -> float:
    """A finite number that is not negative."""
    if not isinstance(value, Real) or value is True or value is False:
        raise TypeError(f"{name} must be a number, got {value!r}")
    number = float(value)
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} must be finite and not negative, got {value!r}")
    return number


def count_of(value: Any, name: str) -> int:
    """A positive integer."""
    try:
        if isinstance(value, bool):
            raise TypeError
        value = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return int(value)


def _dense(t: Any, name: str) -> Tensor:
    if not isinstance(t, Tensor) or t.layout is not torch.strided:
        got = f"layout {t.layout}" if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(f"{name} must be a dense tensor, got {got}")
    return t


def alike(t: Any, name: str, b: Tensor) -> None:
    """A tensor's dtype and device are those of b."""
    if isinstance(t, Tensor) and t.dtype != b.dtype:
        raise TypeError(
            f"{name} and b must have the same dtype, got {t.dtype} and {b.dtype}; convert one: b.to({name}.dtype)"
        )
    if isinstance(t, Tensor) and t.device != b.device:
        raise ValueError(f"{name} and b must be on the same device, got {t.device} and {b.device}")


def no_derivative(t: Any, name: str) -> None:
    """Raises where a derivative is asked for: that of the iterations is not that of A^-1."""
    if not isinstance(t, Tensor):
        return
    if t.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} requires grad, but iterative methods are not differentiated (their iterations would give "
            f'wrong gradients): use spcache.solve_operator(A, b, solver="cg"), for least squares spcache.lstsq, '
            f"whose gradients are those of the solution, or torch.no_grad(), or detach"
        )
    # a sparse tensor has no tangent
    if in_dual_level() and t.layout is torch.strided and forward_ad.unpack_dual(t).tangent is not None:
        raise NotImplementedError(
            f"{name} has a forward-mode tangent, but iterative methods are not differentiated (their iterations "
            f"would give wrong tangents): detach, or use spcache.solve_operator in reverse mode"
        )


class Arithmetic:
    """Vectors, scalars in their shape with 1 in place of n, and no new memory where no derivative is recorded.

    Attributes:
        dim: the dimension of n, -1 or -2.
        recorded: whether there may be derivatives: those of the iterations, not of the solution, wrong where they end
            early.
    """

    def __init__(self, dim: int, recorded: bool = False):
        self.dim = dim
        self.recorded = recorded
        self._dual = in_dual_level()
        self._product: Tensor | None = None

    def _free(self, *tensors: Tensor) -> bool:
        # in-place operations of a constant would lose the tangent
        return not self.recorded or not (self._dual or any(t.requires_grad for t in tensors))

    def dot(self, u: Tensor, v: Tensor) -> Tensor:
        """u^H v, column by column."""
        if u.dim() == 1:
            return torch.vdot(u, v)
        if not self._free(u, v):
            return torch.linalg.vecdot(u, v, dim=self.dim).unsqueeze(self.dim)
        self._product = torch.mul(u.conj(), v, out=self._product)
        return self._product.sum(self.dim, keepdim=True)

    def norm(self, u: Tensor) -> Tensor:
        if not self._free(u):
            return self.root(self.dot(u, u).real)
        return torch.linalg.vector_norm(u, dim=self.dim, keepdim=u.dim() > 1)

    def root(self, a: Tensor) -> Tensor:
        """sqrt(a); where a = 0, which is a column that is done, derivatives are zero."""
        if self._free(a):
            return a.sqrt()
        zero = a == 0
        return torch.where(zero, 1, a).sqrt().masked_fill(zero, 0)

    def hypot(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.hypot(a, b) if self._free(a, b) else self.root(a * a + b * b)

    def add(self, y: Tensor, a: Tensor, x: Tensor, sign: int = 1) -> Tensor:
        """y + sign a x, in the memory of y where that is free."""
        return y.addcmul_(a, x, value=sign) if self._free(y, a, x) else torch.addcmul(y, a, x, value=sign)

    def add_to(self, y: Tensor, a: Tensor, x: Tensor) -> Tensor:
        """y + a x, in the memory of x where that is free."""
        return torch.addcmul(y, a, x, out=x if self._free(y, a, x) else None)

    def scale(self, x: Tensor, a: Tensor) -> Tensor:
        """a x, in the memory of x where that is free."""
        return torch.mul(x, a, out=x if self._free(x, a) else None)


class Columns(Arithmetic):
    """Right-hand sides, and which of them are still worked on. A scalar of the method is a tensor, one number per
    column: [] for one vector, else the shape of b with 1 in place of n.

    Attributes:
        b: [*B, n] or [*B, n, k], scaled where it must be.
        norm_b: its norms.
        count: iterations so far.
        going: whether there is a next iteration.
        active: the columns not yet done; what `divide` gives for others is zero, so that they change no more.
        fault: whether a number that is not finite was met, at the latest `judge`.
    """

    def __init__(self, A: Operator, b: Tensor, callback: Callback | None, recorded: bool = False):
        _dense(b, "b")
        if b.dtype not in DTYPES:
            raise TypeError(f"b must be float32, float64, complex64 or complex128, got dtype {b.dtype}")
        if b.dim() < 1:
            raise ValueError("b must have at least one dimension, got a scalar")
        if callback is not None and not callable(callback):
            raise TypeError(f"callback must be a function of x, got {type(callback).__name__}")
        matrix_dims = 2 if A.shape is None else len(A.shape)
        self.vector = b.dim() == 1 or b.dim() == matrix_dims - 1
        super().__init__(-1 if self.vector else -2, recorded)
        if not recorded:
            no_derivative(b, "b")
        if A.shape is not None:
            if b.shape[self.dim] != A.shape[-2]:
                raise ValueError(
                    f"b must have {A.shape[-2]} rows, as A has (shape {A.shape}), got shape {tuple(b.shape)}, which is "
                    f"{'a vector' if self.vector else 'a matrix'} for each A"
                )
            batch = b.shape[: self.dim]
            try:
                batch = torch.broadcast_shapes(batch, A.shape[:-2])
            except RuntimeError:
                raise ValueError(
                    f"b's batch dimensions {tuple(batch)} do not broadcast with A's {A.shape[:-2]}"
                ) from None
            b = b.expand(*batch, *b.shape[self.dim :])
        if not bool(b.detach().isfinite().all()):
            raise ValueError("b must be finite, got NaN or infinity")
        self._scale = scale_of(b.detach(), self.dim)
        self.b = b if self._scale is None else b / self._scale
        self.single = b.numel() == b.shape[self.dim]
        self.callback = callback
        self.count = 0
        self.fault = False
        self.going = True
        self.norm_b = self.norm(self.b.detach())
        self.active = torch.ones_like(self.norm_b, dtype=torch.bool)
        self.sound: Tensor | None = None
        self._iterations = torch.zeros_like(self.norm_b, dtype=torch.int64)

    def divide(self, a: Any, b: Tensor) -> Tensor:
        """a / b, zero where a column is done."""
        if self.single:
            return a / b
        b = torch.where(self.active, b, 1)  # also for autograd, to which 0 times infinity is no zero
        return torch.where(self.active, a, 0) / b

    def step(self, x: Tensor, a: Tensor, p: Tensor, back: Tensor | None = None) -> Tensor:
        """x + a p; where `judge` has just met a number that is not finite, `back`, by default x."""
        back = x if back is None else back
        if self.sound is None:
            return back if self.single and self.fault else self.add(x, a, p)
        return torch.where(self.sound, torch.addcmul(x, a, p), back)

    def judge(self, excess: Tensor) -> None:
        """An iteration is over: columns whose excess is not positive are done, those where it is not finite too. The
        one place where a method waits for the device."""
        if self.single:
            self.judge_single(excess.item())
            return
        self.count += 1
        excess = excess.detach()
        self._iterations += self.active
        excess = torch.where(self.active, excess, -1.0)
        top = float(excess.amax())
        self.active = excess > 0
        self.going, self.fault = top > 0, not math.isfinite(top)
        if self.fault:
            sound = excess.isfinite()
            self.sound = sound if self.sound is None else self.sound & sound
            self.active = self.active & sound
            self.going = bool(self.active.any())

    def judge_single(self, excess: float) -> None:
        self.count += 1
        self.fault = not math.isfinite(excess)
        self.going = excess > 0 and not self.fault

    def report(self, x: Tensor) -> None:
        if self.callback is not None:
            self.callback(self.scaled_back(x))

    def scaled_back(self, t: Tensor) -> Tensor:
        return t if self._scale is None else t * self._scale

    def scaled(self, t: Tensor) -> Tensor:
        return t if self._scale is None else t / self._scale

    def iterations(self) -> Tensor:
        return torch.full_like(self._iterations, self.count) if self.single else self._iterations

    def squeeze(self, scalars: Tensor) -> Tensor:
        """Scalars in the shape in which a status has them."""
        return scalars.squeeze(self.dim) if self.b.dim() > 1 else scalars

    def checked(self, apply: Apply, name: str, rows: int, constant: bool = False) -> Apply:
        """The same map; a result that is no tensor of `rows` rows and of b's dtype and device is an error, and so is
        one that asks for a derivative, unless the map is to be constant."""
        b, dim, watched, dual = self.b, self.dim, not self.recorded, self._dual  # not self, which will own the map
        shape = (*b.shape[:dim], rows, *b.shape[dim:][1:])

        def call(x: Tensor) -> Tensor:
            y = apply(x)
            if not isinstance(y, Tensor):
                raise TypeError(f"{name} must give a tensor, got {type(y).__name__}")
            if y.shape != shape or y.dtype != b.dtype or y.device != b.device:
                raise ValueError(
                    f"{name} must give shape {shape}, {b.dtype} on {b.device}, got {tuple(y.shape)}, {y.dtype} on "
                    f"{y.device}"
                )
            if watched and (y.requires_grad or dual):
                if constant:
                    return y.detach()
                no_derivative(y, f"what {name} gives")
            return y

        return call


def scale_of(b: Tensor, dim: int) -> Tensor | None:
    """Powers of two that a b is divided by whose square is no number of its type, 1 for the others; None: no need."""
    if not b.numel():
        return None
    peak = b.abs().amax(dim, keepdim=b.dim() > 1)
    info = torch.finfo(peak.dtype)
    extreme = (peak > 0) & ((peak < info.tiny**0.25) | (peak > info.max**0.25))
    if not bool(extreme.any()):
        return None
    bits = 120 if peak.dtype == torch.float32 else 1000
    return torch.where(extreme, torch.exp2(peak.log2().floor().clamp(-bits, bits)), 1)


def start_of(x0: Any, columns: Columns, n: int, b: Tensor) -> Tensor | None:
    """x0 with n rows and the batch of `columns`, scaled as they are; it may also have the batch of b, as it came."""
    if x0 is None:
        return None
    dim = columns.dim
    alike(_dense(x0, "x0"), "x0", columns.b)
    if not columns.recorded:
        no_derivative(x0, "x0")
    shape, given = (tuple((*t.shape[:dim], n, *t.shape[dim:][1:])) for t in (columns.b, b))
    if tuple(x0.shape) not in (shape, given):
        raise ValueError(f"x0 must have shape {shape}, got {tuple(x0.shape)}")
    if not bool(x0.detach().isfinite().all()):
        raise ValueError("x0 must be finite, got NaN or infinity")
    return columns.scaled(x0.expand(shape))


class System(Columns):
    """A square system and the rule by which the methods for it stop: ||b - A x|| <= max(rtol ||b||, atol).

    A method gives its sweep: from x and its residual r, until not `going`. The residual that a sweep carries along
    departs from the true one by rounding. So it is computed anew when all are done; a column that is not below its
    limit after all starts again from there, as long as that gets it somewhere. This also mends breakdowns.

    Attributes:
        A, M: the maps; M is None without a preconditioner.
        limit: what the norm of the residual has to come below.
    """

    def __init__(
        self, A: Any, b: Tensor, x0: Tensor | None, rtol: float, atol: float, maxiter: int | None, M: Any,
        callback: Callback | None, recorded: bool = False,
    ):  # fmt: skip
        map_A = as_operator(A)
        if map_A.shape is not None and map_A.shape[-1] != map_A.shape[-2]:
            raise ValueError(f"A must be square, got shape {map_A.shape}; lsmr solves least-squares problems")
        super().__init__(map_A, b, callback, recorded)
        alike(A, "A", self.b)
        if not recorded:
            no_derivative(A, "A")
        n = self.b.shape[self.dim]
        self.A = self.checked(map_A.apply, "A", n)
        self.M = None if M is None else self.checked(_preconditioner(M, n, self.b), "M", n, constant=True)
        rtol, atol = number_of(rtol, "rtol"), number_of(atol, "atol")
        self.maxiter = 10 * n if maxiter is None else count_of(maxiter, "maxiter")
        self._x0 = start_of(x0, self, n, b)
        limit = torch.maximum(rtol * self.norm_b, self.scaled(torch.full_like(self.norm_b, atol)))
        self.limit = limit
        self._limit = float(limit) if self.single and n else 0.0

    def judge_norm(self, norm: Tensor, squared: bool = False) -> None:
        """`judge` by the norm of the residual. A sweep also ends with a fault, because M need not bear NaN."""
        if self.single:
            value = norm.item().real
            self.judge_single((abs(value) ** 0.5 if squared else value) - self._limit)
        else:
            self.judge((norm.real.sqrt() if squared else norm) - self.limit)
        self.going = self.going and not self.fault and self.count < self.maxiter

    def precondition(self, r: Tensor) -> Tensor:
        return r if self.M is None else self.M(r)

    def solve(
        self, method: str, sweep: Callable[[System, Tensor, Tensor], Tensor], check: bool, progress: float = 0.5,
        monotone: bool = False,
    ) -> Solution:  # fmt: skip
        """Sweeps until all is done. A column goes on after a sweep that brought its residual to less than `progress`
        times what it was. One whose residual is not finite afterwards, or has grown where the method is monotone, goes
        back to where it was."""
        b, limit = self.b, self.limit
        if self._x0 is None:
            x, r = torch.zeros_like(b), b.clone()
        else:
            x = torch.where(self.norm_b == 0, 0, self._x0)
            r = b - self.A(x)
        residual = self.norm(r.detach())
        self.active = active = residual > limit
        while self.count < self.maxiter and bool(active.any()):
            if not self.single:
                r = torch.where(active, r, 0)
            self.fault, self.sound = False, None
            new = sweep(self, x.clone(), r)
            r = b - self.A(new)
            before, residual = residual, self.norm(r.detach())
            broken = ~(residual <= before) if monotone else ~residual.isfinite()
            if bool(broken.any()):
                new, residual = torch.where(broken, x, new), torch.where(broken, before, residual)
                r = b - self.A(new)
            x = new
            onward = residual < progress * before
            sound: Tensor | None = self.sound
            if sound is not None:  # another column's fault ended the sweep
                onward = onward | sound
            self.active = active = active & (residual > limit) & onward & ~broken
        converged = residual <= limit
        x, residual = self.scaled_back(x), self.scaled_back(residual)
        status = Status(*map(self.squeeze, (converged, self.iterations(), residual)))
        if check and not bool(converged.all()):
            raise NotConvergedError(self._message(method, status), x, status)
        return Solution(x, status)

    def _message(self, method: str, status: Status) -> str:
        failed = ~status.converged
        residual, most = status.residual[failed], int(status.iterations[failed].max())
        ratio = (residual / self.squeeze(self.scaled_back(self.limit))[failed]).max()
        if self.count >= self.maxiter:
            why, remedy = f"in {most} iterations", "raise maxiter"
        else:
            why, remedy = (
                f"and made no more progress after {most} iterations",
                "check that A (and M) are what the method needs",
            )
        return (
            f"{method}: {int(failed.sum())} of {failed.numel()} right-hand sides did not converge {why}; the worst "
            f"residual is {float(residual.max()):.3g}, up to {float(ratio):.3g} times its tolerance; {remedy}, pass a "
            f"(better) preconditioner M, raise rtol or atol, or pass check=False to get x as it is"
        )


def _preconditioner(M: Any, n: int, b: Tensor) -> Apply:
    alike(M, "M", b)
    if hasattr(M, "factorize"):
        raise TypeError(f"M must be a factor, got a {type(M).__name__}; factorize first: M=system.factorize(values)")
    if hasattr(M, "solve") and not isinstance(M, Tensor):

        def solve(r: Tensor) -> Tensor:
            with torch.set_grad_enabled(r.requires_grad):  # without r no graph, whatever the factor's values need
                return M.solve(r)

        return solve
    if not (isinstance(M, Tensor) or hasattr(M, "matmul") or hasattr(M, "matvec") or callable(M)):
        raise TypeError(
            f"M must approximate the inverse of A: a tensor, a function r -> M r, a Factor or an object with solve, "
            f"got {type(M).__name__}"
        )
    found = as_operator(M, "M")
    if found.shape is not None and found.shape[-2:] != (n, n):
        raise ValueError(f"M must have shape {(n, n)}, got {found.shape}")
    return found.apply
