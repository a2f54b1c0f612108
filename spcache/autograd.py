"""Every derivative rule of spcache.

Derivation. Let S be the matrix that `solve` inverts and x = S^-1 b, so S x = b. Perturbing both sides,

    dx = S^-1 (db - dS x).                                                        (tangent)

For a real loss with cotangent g of x, <g, dx> = <S^-H g, db> - <S^-H g, dS x>. With lam = S^-H g:

    grad b = lam,    grad S = -lam x^H.                                           (adjoint)

For x = S^-H b the same steps give dx = S^-H (db - dS^H x), lam = S^-1 g, grad b = lam, grad S = -x lam^H.

S is linear in the stored values: entry k at (i, j) adds

    general                 v_k E_ij
    symmetric, hermitian    w_k (v_k E_ij + v~_k E_ji),   v~ = v or conj(v),

with w_k = 1/2, except 1 off the diagonal where only one triangle is stored. Hence, with G = grad S,

    grad v_k = G_ij,   or   w_k (G_ij + G~_ji).

lam comes from the differentiable solve itself and the products are torch operations, so every higher derivative
follows from the two rules above. First-order backward passes, which nobody differentiates again, take native code.

Front ends, chosen by `solve`: `_Solve` (eager; context style, the cheapest) and `_SolveTransformed` (torch.func; with
setup_context, vmap and jvp). Both share `_adjoint_rule` and `_tangent_rule`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function, forward_ad

from .engines.protocol import DTYPE_CODES
from .pattern import Pattern, lazy

if TYPE_CHECKING:
    from .factor import NumericFactor

__all__ = ["CONJUGATED", "NONE", "TRANSPOSED", "Convention", "Source", "plain", "solve", "transformed"]

NONE, TRANSPOSED, CONJUGATED = 0, 1, 2  # how an entry is mirrored across the diagonal; as in kernels/pattern.hpp

try:
    _interpreter = torch._C._functorch.peek_interpreter_stack

    def transformed() -> bool:
        """Whether a torch.func transform is active."""
        return _interpreter() is not None

except AttributeError:  # the test is private; without it everything takes the front end that transforms need

    def transformed() -> bool:
        return True


def _differentiated() -> bool:
    """Whether a backward pass may itself be differentiated, so that native shortcuts are out of place."""
    return torch.is_grad_enabled() or transformed() or getattr(forward_ad, "_current_level", 0) >= 0


def plain(t: Tensor) -> Tensor:
    """`t` as contiguous memory that holds its very numbers (no lazy conjugate or negative), fit for `data_ptr`.

    Raises:
        TypeError: t has no memory: a fake tensor, a wrapper subclass, freed storage.
    """
    if t.is_conj():
        t = t.resolve_conj()
    if t.is_neg():
        t = t.resolve_neg()
    if not t.is_contiguous():
        t = t.contiguous()
    try:
        address = t.data_ptr()
    except RuntimeError as error:
        raise TypeError(
            f"a {type(t).__name__} without memory of its own cannot be read here; under is_grads_batched=True or "
            f"vectorize=True use torch.func (vmap, jacrev, jacfwd) instead"
        ) from error
    if address == 0 and t.numel():
        if t._is_zerotensor():  # zeros that autograd did not care to write down
            return torch.zeros(t.shape, dtype=t.dtype, device=t.device)
        raise TypeError(
            f"a {type(t).__name__} of shape {tuple(t.shape)} has no memory to read: it is a wrapper, a fake tensor, or "
            f"its storage was freed; pass a plain tensor"
        )
    return t


@dataclass(frozen=True)
class Convention:
    """How stored values make up the matrix S, and therefore which gradient they get.

    Attributes:
        pattern: where the values stand.
        mirror: NONE, TRANSPOSED or CONJUGATED.
        one_triangle: only one triangle is stored, and mirrored.
    """

    pattern: Pattern
    mirror: int
    one_triangle: bool

    @lazy
    def _weight(self) -> float | np.ndarray:
        """w_k of the derivation: one number, or [nnz]."""
        if not self.one_triangle:
            return 0.5
        return np.where(self.pattern.rows == self.pattern.columns, 0.5, 1.0)

    def _weighted(self, t: Tensor) -> Tensor:
        """w_k t_k"""
        if isinstance(self._weight, float):
            return t * self._weight
        return t * torch.from_numpy(self._weight).to(t.device, t.real.dtype)

    def gradient(self, u: Tensor, w: Tensor) -> Tensor:
        """Gradient at the stored values of S's gradient -u w^H; u, w are [*P, n, k], the result [*P, nnz].

        Made of torch operations, differentiable to any order."""
        row, column = self.pattern.index_tensors(u.device)

        def product(i: Tensor, j: Tensor) -> Tensor:
            return -(u.index_select(-2, i) * w.index_select(-2, j).conj()).sum(-1)

        if self.mirror == NONE:
            return product(row, column)
        other = product(column, row)
        return self._weighted(product(row, column) + (other.conj() if self.mirror == CONJUGATED else other))

    def gradient_native(self, u: Tensor, w: Tensor, vector: bool) -> Tensor:
        """The same in one native pass, u and w [*P, n] if vector; not differentiable."""
        u, w = plain(u), plain(w)
        shape = u.shape if vector else u.shape[:-1]
        out = torch.empty((*shape[:-1], self.pattern.nnz), dtype=u.dtype, device=u.device)
        width = 1 if vector else u.shape[-1]
        if out.numel():
            self.pattern.entries.outer(
                u.data_ptr(), w.data_ptr(), out.data_ptr(), out.numel() // self.pattern.nnz, self.pattern.n,
                self.pattern.n, width, DTYPE_CODES[u.dtype], self.mirror, self.one_triangle,
            )  # fmt: skip
        return out

    def apply(self, values: Tensor, x: Tensor, adjoint: bool) -> Tensor:
        """S x, or S^H x; values [*B, nnz], x [*P, n, k] broadcast. Torch operations, differentiable to any order."""
        row, column = self.pattern.index_tensors(x.device)

        def product(v: Tensor, i: Tensor, j: Tensor, size: int) -> Tensor:
            """sum over k of v_k E_ij x"""
            terms = v.unsqueeze(-1) * x.index_select(-2, j)
            return terms.new_zeros(*terms.shape[:-2], size, terms.shape[-1]).index_add(-2, i, terms)

        m, n = self.pattern.m, self.pattern.n
        if self.mirror == NONE:
            return product(values.conj(), column, row, n) if adjoint else product(values, row, column, m)
        weighted = self._weighted(values)
        if self.mirror == CONJUGATED:  # S^H = S
            return product(weighted, row, column, n) + product(weighted.conj(), column, row, n)
        if adjoint:  # S^H = conj(S)
            weighted = weighted.conj()
        return product(weighted, row, column, n) + product(weighted, column, row, n)


class Source(Protocol):
    """What a front end needs of a system: how its values are read, and how their factor is got."""

    convention: Convention

    @property
    def keep_factor(self) -> bool:
        """Whether a node may hold on to its factor."""

    def find(self, values: Tensor, raising: bool | None = None) -> NumericFactor:
        """The factor of values that can be read, found or made; raises as `SparseSystem.solve` does, or never."""

    def require_finite(self, name: str, t: Tensor) -> None:
        """Raises if t, an argument of that name, is not finite."""


def solve(
    source: Source, numeric: NumericFactor | None, values: Tensor, b: Tensor, vector: bool, adjoint: bool,
    failed: Tensor | None = None, check: bool = False,
) -> Tensor:  # fmt: skip
    """x = S^-1 b or S^-H b, differentiable in values and b.

    Args:
        numeric: the factor of `values`; None only under a torch.func transform.
        vector: b is [*P, n], else [*P, n, k].
        failed: bool [*P], elements whose x is to be NaN, beyond those that have no factor.
        check: refuse a b that is not finite (incoming gradients and tangents are never checked).
    """
    if transformed():
        b = b.unsqueeze(-1) if vector else b
        memo = [] if numeric is None else [numeric]
        x = _SolveTransformed.apply(values, b, source, memo, adjoint, check, False)
        return x.squeeze(-1) if vector else x
    assert numeric is not None
    if check:
        source.require_finite("b", b)
    return _Solve.apply(values, b, source, numeric, vector, adjoint, failed)


def _sum_to(t: Tensor, shape: torch.Size) -> Tensor:
    """Undoes broadcasting."""
    return t if t.shape == shape else t.sum_to_size(shape)


def _remember(
    ctx: Any, values: Tensor, b: Tensor, x: Tensor, source: Source, vector: bool, adjoint: bool, save: bool
) -> None:
    if save:
        ctx.save_for_backward(values, x)
        ctx.detached = None
    else:  # the gradient of b needs the factor only: values and x may be changed in place
        ctx.detached = values.detach()
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
        u, w = (lam.unsqueeze(-1), x.unsqueeze(-1)) if ctx.vector else (lam, x)
        if ctx.adjoint:
            u, w = w, u
        grad_values = _sum_to(ctx.source.convention.gradient(u, w), values.shape)
    return grad_values, _sum_to(lam, ctx.b_shape)


def _tangent_rule(
    ctx: Any, values: Tensor, x: Tensor, values_dot: Tensor | None, b_dot: Tensor | None, solver: _Solver
) -> Tensor:
    """dx by the rule (tangent) of the derivation, itself differentiable."""
    rhs = None
    if values_dot is not None:
        rhs = -ctx.source.convention.apply(values_dot, x.unsqueeze(-1) if ctx.vector else x, ctx.adjoint)
        rhs = rhs.squeeze(-1) if ctx.vector else rhs
    if b_dot is not None:
        rhs = b_dot if rhs is None else b_dot + rhs
    return torch.zeros_like(x) if rhs is None else solver(values, rhs.expand(x.shape), ctx.adjoint)


class _Solve(Function):
    """Eager front end. The node owns the factor for as long as it may run backward."""

    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        b: Tensor,
        source: Source,
        numeric: NumericFactor,
        vector: bool,
        adjoint: bool,
        failed: Tensor | None,
    ) -> Tensor:
        x = numeric.solve(b, vector, adjoint)
        if numeric.failed is not None:
            failed = numeric.failed if failed is None else numeric.failed | failed
        if failed is not None:
            x = x.masked_fill(_like_solution(failed, vector), torch.nan)
        _remember(ctx, values, b, x, source, vector, adjoint, ctx.needs_input_grad[0] or not source.keep_factor)
        ctx.numeric = numeric if source.keep_factor else None
        ctx.failed = failed
        return x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        values, x = (ctx.detached, None) if ctx.detached is not None else ctx.saved_tensors
        numeric = ctx.numeric if ctx.numeric is not None else ctx.source.find(values, raising=False)
        grad_values: Tensor | None
        grad_b: Tensor | None
        if ctx.failed is not None or _differentiated():
            if (
                ctx.failed is not None and x is not None
            ):  # zeros for the NaNs, so that a zero cotangent gives a zero gradient
                x = x.masked_fill(_like_solution(ctx.failed, ctx.vector), 0.0)

            def solver(values: Tensor, g: Tensor, adjoint: bool) -> Tensor:
                lam = solve(ctx.source, numeric, values, g, ctx.vector, adjoint)
                return lam if ctx.failed is None else _silence(lam, g, ctx.failed, ctx.vector)

            grad_values, grad_b = _adjoint_rule(ctx, values, x, g, solver)
        else:
            vector, adjoint = ctx.vector, ctx.adjoint
            grad_values = grad_b = None
            lam = numeric.solve(g, vector, not adjoint)
            if ctx.needs_input_grad[0] and x is not None:
                u, w = (x, lam) if adjoint else (lam, x)
                grad_values = _sum_to(ctx.source.convention.gradient_native(u, w, vector), values.shape)
            if ctx.needs_input_grad[1]:
                grad_b = _sum_to(lam, ctx.b_shape)
        return grad_values, grad_b, None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, values_dot: Tensor | None, b_dot: Tensor | None, *_: Any) -> Tensor:
        values, b, x = (forward_ad.unpack_dual(t).primal for t in ctx.saved_tensors)

        def solver(values: Tensor, rhs: Tensor, adjoint: bool) -> Tensor:
            numeric = ctx.numeric if ctx.numeric is not None else ctx.source.find(values, raising=False)
            return solve(ctx.source, numeric, values, rhs, ctx.vector, adjoint)

        if torch.is_grad_enabled() and (values.requires_grad or b.requires_grad):
            # This early the output has no history yet: without it a backward pass through the tangent would miss
            # that x depends on values and b. One more solve gives an x that has.
            x = solver(values, b, ctx.adjoint)
        return _tangent_rule(ctx, values, x, values_dot, b_dot, solver)


def _like_solution(mask: Tensor, vector: bool) -> Tensor:
    """[*P] -> [*P, 1] or [*P, 1, 1]"""
    return mask.unsqueeze(-1) if vector else mask[..., None, None]


def _silence(lam: Tensor, g: Tensor, failed: Tensor, vector: bool) -> Tensor:
    """The cotangent of elements that failed: zero where nothing comes in (a masked loss stays finite), else NaN."""
    silent = (g == 0).all(-1) if vector else (g == 0).flatten(-2).all(-1)
    lam = lam.masked_fill(_like_solution(failed, vector), torch.nan)
    return lam.masked_fill(_like_solution(failed & silent, vector), 0.0)


class _SolveTransformed(Function):
    """Front end for torch.func: b is always [*P, n, k]. Inside `forward` the tensors are plain, whatever wraps them
    outside, so there the factor is found; the list `memo` carries it to the solves of the derivatives."""

    @staticmethod
    def forward(
        values: Tensor,
        b: Tensor,
        source: Source,
        memo: list[NumericFactor],
        adjoint: bool,
        check: bool,
        cotangent: bool,
    ) -> Tensor:
        if check:
            source.require_finite("b", b)
        plain_values = values.detach().resolve_conj().resolve_neg().contiguous()
        numeric = next((f for f in memo if f.same_values(plain_values)), None)
        if numeric is None:
            numeric = source.find(values)
            memo.append(numeric)
        x = numeric.solve(b, False, adjoint)
        if numeric.failed is not None and cotangent:
            x = _silence(x, b.expand(x.shape), numeric.failed, False)
        return x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        values, b, source, memo, adjoint, _, _ = inputs
        _remember(ctx, values, b, output, source, False, adjoint, True)
        ctx.memo = memo

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        values, x = ctx.saved_tensors
        # A zero cotangent of an element that failed gives a zero gradient, see `_Solve.backward`.
        silent = (g == 0).flatten(-2).all(-1)[..., None, None]
        x = torch.where(torch.isnan(x) & silent, torch.zeros_like(x), x)

        def solver(values: Tensor, g: Tensor, adjoint: bool) -> Tensor:
            return _SolveTransformed.apply(values, g, ctx.source, ctx.memo, adjoint, False, True)

        return *_adjoint_rule(ctx, values, x, g, solver), None, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, values_dot: Tensor | None, b_dot: Tensor | None, *_: Any) -> Tensor:
        def solver(values: Tensor, rhs: Tensor, adjoint: bool) -> Tensor:
            return _SolveTransformed.apply(values, rhs, ctx.source, ctx.memo, adjoint, False, False)

        # torch switches forward mode off around a jvp, which would lose the tangents of an enclosing forward-mode
        # level without an error; the primals leave this level's own tangents behind.
        with forward_ad._set_fwd_grad_enabled(True):
            values, _, x = (forward_ad.unpack_dual(t).primal for t in ctx.saved_tensors)
            return _tangent_rule(ctx, values, x, values_dot, b_dot, solver)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], values: Tensor, b: Tensor, *rest: Any) -> tuple[Tensor, int]:
        values_dim, b_dim = in_dims[:2]
        if values_dim is None:
            # One matrix, many right-hand sides: more columns, [*P, n, k] x V -> [*P, n, k V].
            assert b_dim is not None
            b = b.movedim(b_dim, -1)
            x = _SolveTransformed.apply(values, b.flatten(-2), *rest)
            return x.unflatten(-1, b.shape[-2:]), x.dim()
        values = values.movedim(values_dim, 0)
        if b_dim is not None:
            b = b.movedim(b_dim, 0)
        # Batch dimensions align from the right: fill up the shorter of the two behind the new one.
        missing = (values.dim() - 2) - (b.dim() - 2 - (b_dim is not None))
        values = values.reshape(values.shape[0], *[1] * -missing, *values.shape[1:])
        if b_dim is not None:
            b = b.reshape(b.shape[0], *[1] * missing, *b.shape[1:])
        return _SolveTransformed.apply(values, b, *rest), 0
