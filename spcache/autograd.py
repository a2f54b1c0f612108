"""Every derivative rule of spcache, and every autograd Function.

Derivation. Let S be the matrix that `solve` inverts and x = S^-1 b, so S x = b. Perturbing both sides,

    dx = S^-1 (db - dS x).                                                        (tangent)

For a real loss with cotangent g of x, <g, dx> = <S^-H g, db> - <S^-H g, dS x>. With lam = S^-H g:

    grad b = lam,    grad S = -lam x^H.                                           (adjoint)

For x = S^-H b the same steps give dx = S^-H (db - dS^H x), lam = S^-1 g, grad b = lam, grad S = -x lam^H.

S = L(v) is linear in the stored values v (see `Convention`). With L* its adjoint over the reals, two products remain,
both linear in each of their arguments, and each the derivative of the other:

    matvec(v, x) = L(v) x        grad v = L*(g x^H) = -outer(g, x),    grad x = L(v)^H g = matvec^H(v, g)
    outer(u, w)  = -L*(u w^H)    grad u = -L(t) w = -matvec(t, w),     grad w = -L(t)^H u = -matvec^H(t, u)

(for y = L(v)^H x: grad v = -outer(x, g), grad x = matvec(v, g)). So the operations factor, solve, outer and matvec are
closed under differentiation: `Solve` calls `Outer` and `Matvec` and itself, and every higher derivative follows.

Least squares. B is A where it has at least as many rows as columns and A^H where not, and (r, x) = K^-1 (f, g) solves

    r + B x = f,    B^H r - mu^2 x = g.                                           (augmented)

Where B is A, f = b and g = 0, x minimizes |A x - b|^2 + mu^2 |x|^2 and r is what is left. Where B is A^H, f = 0 and
g = b, r is the shortest solution of A r = b, or with mu that which minimizes |A r - b|^2 + mu^2 |r|^2. K is its own
adjoint, so that (rho, xi) = K^-1 of the cotangents of (r, x) are the gradients of f and g, and

    grad B = -rho x^H - r xi^H,    d(r, x) = K^-1 (df - dB x, dg - dB^H r).

With z = A^+ A^+H g, y = A^+H x and h = g - A^H A^+H g for the cotangent g of the solution x this is
-A^+H g x^H + r z^H for a tall A, and -A^+H g x^H + y h^H for a wide one (Golub and Pereyra 1973).

Front ends. All of them are the same rules over a `Source`, which has the four operations:

    eager            `_Solve`, context style, the cheapest; first-order backward passes, which nobody differentiates
                     again, call native code directly
    torch.func       `Solve`, with setup_context, vmap and jvp; inside its `forward` the tensors are plain
    torch.compile    `Solve` over `library.Traced`, whose four operations are library operators that the compiler
                     calls without looking inside (library.py)

Every `backward` is hidden from Dynamo: where compiled code calls `loss.backward()`, Dynamo would follow the
engine into the rule of a node that eager code made, and trip over native calls. AOTAutograd traces it all the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.overrides import handle_torch_function, has_torch_function

from .dynamo import hide
from .torch_private import in_dual_level, in_forward_mode, transformed

if TYPE_CHECKING:
    from .convention import Convention
    from .factor import NumericFactor

__all__ = [
    "LeastSquares", "LeastSquaresSource", "Matvec", "Memo", "Outer", "Solve", "Source", "least_squares", "matmul",
    "seen", "silence", "solve",
]  # fmt: skip


def _requires_grad(a: Tensor, b: Tensor) -> bool:
    return torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)


def _differentiated() -> bool:
    """Whether a backward pass may itself be differentiated, so that native shortcuts are out of place."""
    return torch.is_grad_enabled() or transformed() or in_dual_level()


_MODE = (None,)  # `has_torch_function` of it: whether a mode sees torch functions


def seen(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, or what such modes put in their place (`solve_operator` does): a custom Function goes past them."""
    return handle_torch_function(seen, (), *tensors) if has_torch_function(_MODE) else tensors


class Source(Protocol):
    """The four operations on tensors without derivatives, whatever makes them."""

    convention: Convention

    @property
    def checks(self) -> bool:
        """Whether a factorization that failed raises, so that every x has a factor behind it."""

    @property
    def keep_factor(self) -> bool:
        """Whether a node may hold on to its factor."""

    def find(self, values: Tensor, raising: bool | None = None) -> NumericFactor:
        """The factor of values that can be read, found or made; raises as `SparseSystem.solve` does, or never."""

    def recall(self, memo: Memo, values: Tensor, b: Tensor) -> Any:
        """The factor of values, from memo or found; b is what it is needed for."""

    def run(
        self, factor: Any, values: Tensor, b: Tensor, vector: bool, adjoint: bool, check: bool, cotangent: bool
    ) -> Tensor:
        """S^-1 b or S^-H b by what `recall` returned; b is [*P, n] if vector, else [*P, n, k]. With check, b must be
        finite. With cotangent, b is an incoming gradient and what failed is silenced (see `silence`)."""

    def outer(self, u: Tensor, w: Tensor, vector: bool, nnz: int) -> Tensor:
        """-L*(u w^H), [*P, nnz]; u is [*P, m, k] and w [*P, n, k], without k if vector."""

    def matvec(self, values: Tensor, x: Tensor, adjoint: bool, size: int) -> Tensor:
        """L(values) x or L(values)^H x, [*P, size, k]; values [*B, nnz] and x [*P, n, k] broadcast."""

    def require_finite(self, name: str, t: Tensor) -> None:
        """Raises if t, an argument of that name, is not finite."""


def solve(
    source: Source, numeric: NumericFactor | None, values: Tensor, b: Tensor, vector: bool, adjoint: bool,
    failed: Tensor | None = None, check: bool = False, dual: bool = False,
) -> Tensor:  # fmt: skip
    """x = S^-1 b or S^-H b, differentiable in values and b.

    Args:
        numeric: the factor of `values`; None only under a torch.func transform.
        vector: b is [*P, n], else [*P, n, k].
        failed: bool [*P], elements whose x is to be NaN, beyond those that have no factor.
        check: refuse a b that is not finite (incoming gradients and tangents are never checked).
        dual: there may be tangents, even if `in_dual_level` denies it: compiled code enters levels without a word.
    """
    if transformed():
        memo = Memo(() if numeric is None else (numeric,))
        return Solve.apply(values, b, source, memo, vector, adjoint, check, False)
    assert numeric is not None
    if check:
        source.require_finite("b", b)
    dual = dual or in_dual_level()
    if not (dual or _requires_grad(values, b)):
        return _masked(numeric.solve(b, vector, adjoint), _either(numeric.failed, failed), vector)
    if has_torch_function(_MODE):
        values, b = seen(values, b)
    return _Solve.apply(values, b, (source, numeric, vector, adjoint, failed, dual))


def matmul(source: Source, values: Tensor, x: Tensor, vector: bool, adjoint: bool, size: int) -> Tensor:
    """S x or S^H x, differentiable in values and x; x is [*P, n] if vector, else [*P, n, k], n -> size."""
    if has_torch_function(_MODE):
        values, x = seen(values, x)
    y = Matvec.apply(values, x.unsqueeze(-1) if vector else x, source, adjoint, size)
    return y.squeeze(-1) if vector else y


def least_squares(source: LeastSquaresSource, values: Tensor, b: Tensor, vector: bool) -> Tensor:
    """x of least squares, differentiable in values and b; b is [*P, m] if vector, else [*P, m, k]."""
    if has_torch_function(_MODE):
        values, b = seen(values, b)
    b = b.unsqueeze(-1) if vector else b
    lead = torch.broadcast_shapes(b.shape[:-2], values.shape[:-1])
    b = b.expand(*lead, *b.shape[-2:])
    zero = b.new_zeros(*lead, source.shape[0 if source.wide else 1], b.shape[-1])
    f, g = (zero, b) if source.wide else (b, zero)
    r, x = LeastSquares.apply(values, f, g, source, Memo(()), True)
    x = r if source.wide else x
    return x.squeeze(-1) if vector else x


def _sum_to(t: Tensor, shape: torch.Size) -> Tensor:
    """Undoes broadcasting."""
    return t if t.shape == shape else t.sum_to_size(shape)


def _has_tangent(t: Tensor) -> bool:
    return forward_ad.unpack_dual(t, level=0).tangent is not None


def _primals(tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """Without this level's tangents. The level is named, because the compiler enters it behind `forward_ad`'s back."""
    return [forward_ad.unpack_dual(t, level=0).primal for t in tensors]


def _like_solution(mask: Tensor, vector: bool) -> Tensor:
    """[*P] -> [*P, 1] or [*P, 1, 1]"""
    return mask.unsqueeze(-1) if vector else mask[..., None, None]


def _is_zero(g: Tensor, vector: bool) -> Tensor:
    """[*P; bool] where all of g is zero."""
    return (g == 0).all(-1) if vector else (g == 0).flatten(-2).all(-1)


def _either(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """a | b, where None is False."""
    return b if a is None else a if b is None else a | b


def _masked(x: Tensor, failed: Tensor | None, vector: bool) -> Tensor:
    """NaN for the elements that failed."""
    return x if failed is None else x.masked_fill(_like_solution(failed, vector), torch.nan)


def silence(lam: Tensor, g: Tensor, failed: Tensor, vector: bool) -> Tensor:
    """The cotangent of elements that failed: zero where nothing comes in (a masked loss stays finite), else NaN."""
    silent = _is_zero(g, vector)
    lam = lam.masked_fill(_like_solution(failed, vector), torch.nan)
    return lam.masked_fill(_like_solution(failed & silent, vector), 0.0)


# --- the rules -----------------------------------------------------------------------------------------------------


def _remember(
    ctx: Any, values: Tensor, b: Tensor, x: Tensor, source: Source, vector: bool, adjoint: bool, save: bool, dual: bool
) -> None:
    if save:
        ctx.save_for_backward(values, x)
        ctx.detached = None
    else:  # the gradient of b needs the factor only: values and x may be changed in place
        ctx.detached = values.detach()
    if dual:
        ctx.save_for_forward(values, b, x)
    ctx.source, ctx.vector, ctx.adjoint, ctx.b_shape = source, vector, adjoint, b.shape


# solver(values, rhs, adjoint): the differentiable solve of a front end, with the factor that is already there
_Solver = Callable[[Tensor, Tensor, bool], Tensor]


def _adjoint_rule(
    ctx: Any, values: Tensor, x: Tensor | None, g: Tensor, solver: _Solver
) -> tuple[Tensor | None, Tensor]:
    """(grad values, grad b) by the rule (adjoint) of the derivation, itself differentiable. x: None where only b needs
    its gradient."""
    lam = solver(values, g, not ctx.adjoint)
    grad_values = None
    if ctx.needs_input_grad[0] and x is not None:
        u, w = (x, lam) if ctx.adjoint else (lam, x)
        grad_values = _sum_to(Outer.apply(u, w, ctx.source, ctx.vector, values.shape[-1]), values.shape)
    return grad_values, _sum_to(lam, ctx.b_shape)


def _tangent_rule(
    ctx: Any, values: Tensor, x: Tensor, values_dot: Tensor | None, b_dot: Tensor | None, solver: _Solver
) -> Tensor:
    """dx by the rule (tangent) of the derivation, itself differentiable."""
    rhs = None
    if values_dot is not None:
        rhs = -matmul(ctx.source, values_dot, x, ctx.vector, ctx.adjoint, x.shape[-1 if ctx.vector else -2])
    if b_dot is not None:
        rhs = b_dot if rhs is None else b_dot + rhs
    return torch.zeros_like(x) if rhs is None else solver(values, rhs.expand(x.shape), ctx.adjoint)


# --- front ends ----------------------------------------------------------------------------------------------------


# source, numeric, vector, adjoint, failed, dual, see `solve`: one argument, because each of `apply` costs time
_Rest: TypeAlias = "tuple[Source, NumericFactor, bool, bool, Tensor | None, bool]"


class _Solve(Function):
    """Eager front end. The node owns the factor for as long as it may run backward."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, b: Tensor, rest: _Rest) -> Tensor:
        source, numeric, vector, adjoint, failed, dual = rest
        failed = _either(numeric.failed, failed)
        x = _masked(numeric.solve(b, vector, adjoint), failed, vector)
        save = ctx.needs_input_grad[0] or not source.keep_factor
        _remember(ctx, values, b, x, source, vector, adjoint, save, dual)
        ctx.numeric = numeric if source.keep_factor else None
        ctx.failed, ctx.dual = failed, dual
        return x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        values, x = (ctx.detached, None) if ctx.detached is not None else ctx.saved_tensors
        numeric = ctx.numeric if ctx.numeric is not None else ctx.source.find(values, raising=False)
        grad_values: Tensor | None
        grad_b: Tensor | None
        if ctx.failed is not None or ctx.dual or _differentiated():
            if ctx.failed is not None and x is not None:
                # zeros for the NaNs, so that a zero cotangent gives a zero gradient
                x = x.masked_fill(_like_solution(ctx.failed, ctx.vector), 0.0)

            def solver(values: Tensor, g: Tensor, adjoint: bool) -> Tensor:
                lam = solve(ctx.source, numeric, values, g, ctx.vector, adjoint, dual=ctx.dual)
                return lam if ctx.failed is None else silence(lam, g, ctx.failed, ctx.vector)

            grad_values, grad_b = _adjoint_rule(ctx, values, x, g, solver)
        else:
            vector, adjoint = ctx.vector, ctx.adjoint
            grad_values = grad_b = None
            lam = numeric.solve(g, vector, not adjoint)
            if ctx.needs_input_grad[0] and x is not None:
                u, w = (x, lam) if adjoint else (lam, x)
                grad_values = _sum_to(ctx.source.convention.outer(u, w, vector), values.shape)
            if ctx.needs_input_grad[1]:
                grad_b = _sum_to(lam, ctx.b_shape)
        return grad_values, grad_b, None

    @staticmethod
    def jvp(ctx: Any, values_dot: Tensor | None, b_dot: Tensor | None, *_: Any) -> Tensor:
        values, b, x = _primals(ctx.saved_tensors)

        def solver(values: Tensor, rhs: Tensor, adjoint: bool) -> Tensor:
            numeric = ctx.numeric if ctx.numeric is not None else ctx.source.find(values, raising=False)
            return solve(ctx.source, numeric, values, rhs, ctx.vector, adjoint, dual=ctx.dual)

        if _requires_grad(values, b):
            # This early the output has no history yet: without it a backward pass through the tangent would miss
            # that x depends on values and b. One more solve gives an x that has.
            x = solver(values, b, ctx.adjoint)
        return _tangent_rule(ctx, values, x, values_dot, b_dot, solver)


class Memo(list[Any]):
    """The factors that serve a solve and its derivatives. Not a plain list: torch.func takes those apart and makes new
    ones, so that what was added would be lost.

    Attributes:
        given: it began with a factor, which must be that of the values.
    """

    def __init__(self, factors: tuple[Any, ...]):
        super().__init__(factors)
        self.given = bool(factors)


class Solve(Function):
    """Front end for torch.func and torch.compile. Inside `forward` the tensors are plain, whatever wraps them outside,
    so there the factor is found; `memo` carries it to the solves of the derivatives."""

    @staticmethod
    def forward(
        values: Tensor,
        b: Tensor,
        source: Source,
        memo: Memo,
        vector: bool,
        adjoint: bool,
        check: bool,
        cotangent: bool,
    ) -> Tensor:
        return source.run(source.recall(memo, values, b), values, b, vector, adjoint, check, cotangent)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        values, b, source, memo, vector, adjoint, _, _ = inputs
        _remember(ctx, values, b, output, source, vector, adjoint, True, True)
        ctx.memo = memo

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        values, x = ctx.saved_tensors
        if not ctx.source.checks:
            # A zero cotangent of an element that failed gives a zero gradient, see `_Solve.backward`.
            silent = _like_solution(_is_zero(g, ctx.vector), ctx.vector)
            x = torch.where(torch.isnan(x) & silent, torch.zeros_like(x), x)

        def solver(values: Tensor, g: Tensor, adjoint: bool) -> Tensor:
            return Solve.apply(values, g, ctx.source, ctx.memo, ctx.vector, adjoint, False, True)

        return *_adjoint_rule(ctx, values, x, g, solver), None, None, None, None, None, None

    @staticmethod
    @in_forward_mode
    def jvp(ctx: Any, values_dot: Tensor | None, b_dot: Tensor | None, *_: Any) -> Tensor:
        def solver(values: Tensor, rhs: Tensor, adjoint: bool) -> Tensor:
            return Solve.apply(values, rhs, ctx.source, ctx.memo, ctx.vector, adjoint, False, False)

        values, _b, x = _primals(ctx.saved_tensors)
        return _tangent_rule(ctx, values, x, values_dot, b_dot, solver)

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        values: Tensor,
        b: Tensor,
        source: Source,
        memo: Memo,
        vector: bool,
        *rest: Any,
    ) -> tuple[Tensor, int]:
        b = b.unsqueeze(-1) if vector else b
        adjoint, check, cotangent = rest
        apart = cotangent and not source.checks and in_dims[0] is None  # a factor, many b: each is silenced by itself
        x, dim = _vmap_columns(Solve, in_dims, values, b, source, memo, False, adjoint, check, cotangent and not apart)
        if apart:
            b, x, dim = b.movedim(in_dims[1] or 0, 0), x.movedim(dim, 0), 0
            silent = _like_solution(_is_zero(b, False), False)
            x = torch.where(torch.isnan(x) & silent, torch.zeros_like(x), x)
        if not vector:
            return x, dim
        return (x.squeeze(-1), 0) if dim == 0 else (x.squeeze(-2), dim - 1)


class Matvec(Function):
    """y = L(values) x or L(values)^H x; shapes as in `Source.matvec`."""

    @staticmethod
    def forward(values: Tensor, x: Tensor, source: Source, adjoint: bool, size: int) -> Tensor:
        return source.matvec(values, x, adjoint, size)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        values, x, source, adjoint, size = inputs
        ctx.source, ctx.adjoint, ctx.size = source, adjoint, size
        ctx.save_for_backward(values, x)
        ctx.save_for_forward(values, x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        values, x = ctx.saved_tensors
        grad_values = grad_x = None
        if ctx.needs_input_grad[0]:
            wide = x.expand(*g.shape[:-2], *x.shape[-2:])
            u, w = (wide, g) if ctx.adjoint else (g, wide)
            grad_values = _sum_to(-Outer.apply(u, w, ctx.source, False, values.shape[-1]), values.shape)
        if ctx.needs_input_grad[1]:
            grad_x = _sum_to(Matvec.apply(values, g, ctx.source, not ctx.adjoint, x.shape[-2]), x.shape)
        return grad_values, grad_x, None, None, None

    @staticmethod
    @in_forward_mode
    def jvp(ctx: Any, values_dot: Tensor | None, x_dot: Tensor | None, *_: Any) -> Tensor:
        values, x = _primals(ctx.saved_tensors)
        pairs = [(v, z) for v, z in ((values_dot, x), (values, x_dot)) if v is not None and z is not None]
        return sum(Matvec.apply(v, z, ctx.source, ctx.adjoint, ctx.size) for v, z in pairs)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Tensor, int]:
        return _vmap_columns(Matvec, in_dims, *args)


class Outer(Function):
    """-L*(u w^H); shapes as in `Source.outer`."""

    @staticmethod
    def forward(u: Tensor, w: Tensor, source: Source, vector: bool, nnz: int) -> Tensor:
        return source.outer(u, w, vector, nnz)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        u, w, source, vector, nnz = inputs
        ctx.source, ctx.vector, ctx.nnz = source, vector, nnz
        ctx.save_for_backward(u, w)
        ctx.save_for_forward(u, w)

    @staticmethod
    def backward(ctx: Any, t: Tensor) -> Any:
        u, w = ctx.saved_tensors
        m, n = u.shape[-1 if ctx.vector else -2], w.shape[-1 if ctx.vector else -2]
        grad_u = -matmul(ctx.source, t, w, ctx.vector, False, m) if ctx.needs_input_grad[0] else None
        grad_w = -matmul(ctx.source, t, u, ctx.vector, True, n) if ctx.needs_input_grad[1] else None
        return grad_u, grad_w, None, None, None

    @staticmethod
    @in_forward_mode
    def jvp(ctx: Any, u_dot: Tensor | None, w_dot: Tensor | None, *_: Any) -> Tensor:
        u, w = _primals(ctx.saved_tensors)
        pairs = [(a, z) for a, z in ((u_dot, w), (u, w_dot)) if a is not None and z is not None]
        return sum(Outer.apply(a, z, ctx.source, ctx.vector, ctx.nnz) for a, z in pairs)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], u: Tensor, w: Tensor, *rest: Any) -> tuple[Tensor, int]:
        front = (
            t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
            for t, dim in zip((u, w), in_dims, strict=False)
        )
        return _apply(Outer, *front, *rest), 0


class LeastSquaresSource(Protocol):
    """Operations of least squares; outer and matvec as in `Source`."""

    convention: Convention
    wide: bool  # B is A^H
    shape: tuple[int, int]  # of B

    def recall(self, memo: Memo, values: Tensor) -> Any:
        """What `run` needs of these values, from memo or made now."""

    def run(self, factor: Any, values: Tensor, f: Tensor, g: Tensor, check: bool) -> tuple[Tensor, Tensor]:
        """(r, x) of the system (augmented). With check, f and g must be finite."""

    def outer(self, u: Tensor, w: Tensor, vector: bool, nnz: int) -> Tensor: ...

    def matvec(self, values: Tensor, x: Tensor, adjoint: bool, size: int) -> Tensor: ...


class LeastSquares(Function):
    """(r, x) with r + B x = f, B^H r - mu^2 x = g; f and r are [*P, p, k], g and x [*P, q, k], values [*B, nnz] whose
    batch broadcasts to P."""

    @staticmethod
    def forward(
        values: Tensor, f: Tensor, g: Tensor, source: LeastSquaresSource, memo: Memo, check: bool
    ) -> tuple[Tensor, Tensor]:
        return source.run(source.recall(memo, values), values, f, g, check)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        values, f, g, source, memo, _ = inputs
        ctx.source, ctx.memo = source, memo
        ctx.save_for_backward(values, *output)
        ctx.save_for_forward(values, f, g, *output)

    @staticmethod
    def backward(ctx: Any, grad_r: Tensor, grad_x: Tensor) -> Any:
        values, r, x = ctx.saved_tensors
        source = ctx.source
        rho, xi = LeastSquares.apply(values, grad_r, grad_x, source, ctx.memo, False)
        grad_values = None
        if ctx.needs_input_grad[0]:
            pairs = ((x, rho), (xi, r)) if source.wide else ((rho, x), (r, xi))
            first, second = (Outer.apply(u, w, source, False, values.shape[-1]) for u, w in pairs)
            grad_values = _sum_to(first + second, values.shape)
        return grad_values, rho, xi, None, None, None

    @staticmethod
    @in_forward_mode
    def jvp(
        ctx: Any, values_dot: Tensor | None, f_dot: Tensor | None, g_dot: Tensor | None, *_: Any
    ) -> tuple[Tensor, Tensor]:
        source = ctx.source
        values, f, g, r, x = _primals(ctx.saved_tensors)
        if not transformed() and torch.is_grad_enabled() and any(t.requires_grad for t in (values, f, g)):
            r, x = LeastSquares.apply(values, f, g, source, ctx.memo, False)  # which have a history, see `_Solve.jvp`
        f_dot = torch.zeros_like(r) if f_dot is None else f_dot
        g_dot = torch.zeros_like(x) if g_dot is None else g_dot
        if values_dot is not None:
            p, q = source.shape
            f_dot = f_dot - Matvec.apply(values_dot, x, source, source.wide, p)
            g_dot = g_dot - Matvec.apply(values_dot, r, source, not source.wide, q)
        return LeastSquares.apply(values, f_dot, g_dot, source, ctx.memo, False)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], values: Tensor, f: Tensor, g: Tensor, *rest: Any
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        def front(t: Tensor, dim: int | None) -> Tensor:
            return t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)

        f, g = front(f, in_dims[1]), front(g, in_dims[2])
        if in_dims[0] is None:  # one matrix, many right-hand sides: more columns, [V, *P, p, k] -> [*P, p, k V]
            columns = [t.movedim(0, -1).flatten(-2) for t in (f, g)]
            r, x = (t.unflatten(-1, (-1, info.batch_size)) for t in LeastSquares.apply(values, *columns, *rest))
            return (r, x), (r.dim() - 1, x.dim() - 1)
        values = values.movedim(in_dims[0], 0)  # batch dimensions align from the right
        values = values.reshape(values.shape[0], *[1] * (f.dim() - 1 - values.dim()), *values.shape[1:])
        return LeastSquares.apply(values, f, g, *rest), (0, 0)


def _apply(function: type[Function], a: Tensor, b: Tensor, *rest: Any) -> Tensor:
    """function.apply; at the bottom of the transforms, where nothing needs a derivative, at a tenth of its cost."""
    if transformed() or _requires_grad(a, b) or _has_tangent(a) or _has_tangent(b):
        return function.apply(a, b, *rest)
    return function.forward(a, b, *rest)


def _vmap_columns(
    function: type[Function], in_dims: tuple[int | None, ...], values: Tensor, b: Tensor, *rest: Any
) -> tuple[Tensor, int]:
    """vmap of a function of matrices, values [*B, nnz], and columns, b [*P, n, k], as one call."""
    values_dim, b_dim = in_dims[:2]
    if values_dim is None:
        # One matrix, many right-hand sides: more columns, [*P, n, k] x V -> [*P, n, k V].
        assert b_dim is not None
        b = b.movedim(b_dim, -1)
        x = _apply(function, values, b.flatten(-2), *rest)
        return x.unflatten(-1, b.shape[-2:]), x.dim()
    values = values.movedim(values_dim, 0)
    if b_dim is not None:
        b = b.movedim(b_dim, 0)
    # Batch dimensions align from the right: fill up the shorter of the two behind the new one.
    missing = (values.dim() - 2) - (b.dim() - 2 - (b_dim is not None))
    values = values.reshape(values.shape[0], *[1] * -missing, *values.shape[1:])
    if b_dim is not None:
        b = b.reshape(b.shape[0], *[1] * missing, *b.shape[1:])
    return _apply(function, values, b, *rest), 0


for _function in (_Solve, Solve, Matvec, Outer, LeastSquares):
    hide(_function, "backward")
for _function in (
    Solve,
    Matvec,
    Outer,
    LeastSquares,
):  # torch asks for it at every call, and Python would make it anew: 15 us
    _function.forward.__signature__ = inspect.signature(_function.forward)  # type: ignore[union-attr]
