"""The four operations as library operators, which `torch.compile` calls without looking inside.

Under the compiler a `SparseSystem` is its handle, a tensor (handles.py), so that no number of a system becomes a
constant of the compiled code: twelve systems share one graph. The operators find the system, check their arguments and
run what eager calls run. A factor is a tensor too, made by one operator, taken by others, saved for the backward pass
by the compiler, and freed with it.

`traced_solve` and `traced_matmul` are put into the graph as they are (`torch.compiler.allow_in_graph`): Dynamo, which
refuses custom `jvp` rules, does not trace them; AOTAutograd does, with every torch.func transform around them, and
gets the operators of all derivatives from the Functions of autograd.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

from . import autograd, handles
from .convention import Convention
from .dynamo import in_graph
from .errors import MODIFIED
from .memory import plain
from .torch_private import below_autograd, dispatch_modes, forward_mode_on, in_dual_level, traced, transformed

__all__ = [
    "Traced", "TracedLeastSquares", "is_vector", "operator", "recorded", "traced_least_squares", "traced_matmul",
    "traced_solve",
]  # fmt: skip

_F = TypeVar("_F", bound=Callable[..., Any])


def _refuse_dual_level() -> None:
    """In compiled code an operator has no forward-mode rule any more: torch would drop the tangents in silence. Inside
    the `forward` of a Function, where torch switches forward mode off, they are taken care of."""
    if in_dual_level() and forward_mode_on():
        raise RuntimeError(
            "recorded code (torch.compile, torch.export, make_fx) was called while a forward-mode level is open "
            "(forward_ad.dual_level or torch.func.jvp, in any thread): its tangents would be lost. Differentiate "
            "inside of the function that is recorded, or call the function itself"
        )


def operator(name: str, schema: str) -> Callable[[_F], _F]:
    """Defines spcache::name by the decorated function. `torch.library.custom_op` would do, at five times the cost of a
    call (12 us instead of 2.5)."""

    def define(function: _F) -> _F:
        torch.library.define(f"spcache::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(f"spcache::{name}", "default", function)
        return function

    return define


@operator("factor", "(Tensor values, Tensor system, Tensor? given, Tensor? after) -> Tensor")
def _factor(values: Tensor, system: Tensor, given: Tensor | None, after: Tensor | None) -> Tensor:
    """The handle of the factor of values, [1; int64].

    Args:
        given: the handle of a factor that the user made of these values; None: find it, or make it.
        after: not looked at; where it is needed for the factor's sake, the factor is not made before it.
    """
    _refuse_dual_level()
    source = handles.system_of(system)
    source.check_square()
    source.check_values(values)
    if values.numel() == 0:
        return handles.factor_handle(None)
    numeric = None if given is None else handles.factor_of(given)
    if numeric is None:
        numeric = source.find(values)
    elif not numeric.same_values(plain(values.detach())):
        raise RuntimeError(MODIFIED)
    return handles.factor_handle(numeric)


@torch.library.register_fake("spcache::factor")
def _(values: Tensor, system: Tensor, given: Tensor | None, after: Tensor | None) -> Tensor:
    return system.new_empty(1)


@operator(
    "solve",
    "(Tensor values, Tensor b, Tensor system, Tensor factor, bool vector, bool adjoint, bool check, bool cotangent)"
    " -> Tensor",
)
def _solve(
    values: Tensor,
    b: Tensor,
    system: Tensor,
    factor: Tensor,
    vector: bool,
    adjoint: bool,
    check: bool,
    cotangent: bool,
) -> Tensor:
    """`Source.run`. A handle that is a copy, or belongs to another batch, counts as none."""
    _refuse_dual_level()
    source = handles.system_of(system)
    numeric = handles.factor_of(factor)
    if numeric is None or numeric.batch_shape != values.shape[:-1]:
        source.check_values(values)
        numeric = None
    source.check_rhs(values, b, "b", None, vector)
    if values.numel() == 0 or b.numel() == 0:
        return source.empty(values, b, vector, check and source.checks)
    return source.run(numeric or source.find(values), values, b, vector, adjoint, check, cotangent)


@torch.library.register_fake("spcache::solve")
def _(values: Tensor, b: Tensor, system: Tensor, factor: Tensor, vector: bool, *flags: bool) -> Tensor:
    own = 1 if vector else 2
    return b.new_empty((*torch.broadcast_shapes(values.shape[:-1], b.shape[:-own]), *b.shape[-own:]))


@operator("matvec", "(Tensor values, Tensor x, Tensor system, bool adjoint, SymInt size) -> Tensor")
def _matvec(values: Tensor, x: Tensor, system: Tensor, adjoint: bool, size: int) -> Tensor:
    """`Source.matvec`."""
    _refuse_dual_level()
    source = handles.system_of(system)
    source.check_product(values, x, False, adjoint)
    return source.matvec(values, x, adjoint, size)


@torch.library.register_fake("spcache::matvec")
def _(values: Tensor, x: Tensor, system: Tensor, adjoint: bool, size: int) -> Tensor:
    return x.new_empty(*torch.broadcast_shapes(values.shape[:-1], x.shape[:-2]), size, x.shape[-1])


@operator("outer", "(Tensor u, Tensor w, Tensor system, bool vector, SymInt nnz) -> Tensor")
def _outer(u: Tensor, w: Tensor, system: Tensor, vector: bool, nnz: int) -> Tensor:
    """`Source.outer`."""
    _refuse_dual_level()
    return handles.system_of(system).outer(u, w, vector, nnz)


@torch.library.register_fake("spcache::outer")
def _(u: Tensor, w: Tensor, system: Tensor, vector: bool, nnz: int) -> Tensor:
    return u.new_empty(*u.shape[: -1 if vector else -2], nnz)


@operator(
    "least_squares",
    "(Tensor values, Tensor f, Tensor g, Tensor fitter, float damping, str method, bool check) -> (Tensor, Tensor)",
)
def _least_squares(
    values: Tensor, f: Tensor, g: Tensor, fitter: Tensor, damping: float, method: str, check: bool
) -> tuple[Tensor, Tensor]:
    """`LeastSquaresSource.run`, for values whose factor is found by exact comparison, or made."""
    _refuse_dual_level()
    return handles.system_of(fitter).run_recorded(values, f, g, damping, method, check)


@torch.library.register_fake("spcache::least_squares")
def _(
    values: Tensor, f: Tensor, g: Tensor, fitter: Tensor, damping: float, method: str, check: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(f), torch.empty_like(g)


_ops = torch.ops.spcache


class Traced:
    """A `Source` made of the operators.

    Args:
        system: its handle.
        given: the handle of a factor that the user made, or None.
        keep_factor, checks: as the system has them.
    """

    convention: Convention

    def __init__(self, system: Tensor, given: Tensor | None = None, keep_factor: bool = True, checks: bool = False):
        self.system = system
        self.given = given
        self.keep_factor = keep_factor
        self.checks = checks

    def find(self, values: Tensor, raising: bool | None = None) -> Any:
        raise NotImplementedError("under torch.compile factors are found by `recall`")

    def recall(self, memo: autograd.Memo, values: Tensor, b: Tensor) -> Tensor:
        """Calls that agree in their arguments become one in the compiler's hands, so that the backward pass finds the
        factor of the forward pass; unless it depends on the incoming gradient, which is when it is made anew."""
        return memo[0] if memo else _ops.factor(values, self.system, self.given, None if self.keep_factor else b)

    def run(
        self,
        factor: Tensor,
        values: Tensor,
        b: Tensor,
        vector: bool,
        adjoint: bool,
        check: bool,
        cotangent: bool,
    ) -> Tensor:
        return _ops.solve(values, b, self.system, factor, vector, adjoint, check, cotangent)

    def outer(self, u: Tensor, w: Tensor, vector: bool, nnz: int) -> Tensor:
        return _ops.outer(u, w, self.system, vector, nnz)

    def matvec(self, values: Tensor, x: Tensor, adjoint: bool, size: int) -> Tensor:
        return _ops.matvec(values, x, self.system, adjoint, size)

    def require_finite(self, name: str, t: Tensor) -> None:
        """The operators see to it."""


class TracedLeastSquares(Traced):
    """A `LeastSquaresSource` made of the operators.

    Args:
        fitter: its handle.
        shape: (m, n) of A.
    """

    def __init__(self, fitter: Tensor, shape: tuple[int, int], damping: float, method: str):
        super().__init__(fitter)
        self.wide = shape[0] < shape[1]
        self.shape = shape[::-1] if self.wide else shape
        self.damping, self.method = damping, method

    def recall(self, memo: autograd.Memo, values: Tensor, b: Tensor | None = None) -> Any:
        return None

    def run(self, factor: Any, values: Tensor, f: Tensor, g: Tensor, check: bool) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return _ops.least_squares(values, f, g, self.system, self.damping, self.method, check)


def _differentiable(
    name: str, function: Callable[..., Tensor], rules: Any, arguments: Callable[..., tuple[Any, ...]]
) -> None:
    """Gives an operator the derivatives of a Function, whose arguments it makes of the operator's: for those who call
    it themselves; the front ends do without."""
    operator = getattr(_ops, name).default

    def kernel(first: Tensor, second: Tensor, *rest: Any) -> Tensor:
        if torch.is_grad_enabled() and (first.requires_grad or second.requires_grad):
            return rules.apply(*arguments(first, second, *rest))
        if type(first) is Tensor and type(second) is Tensor and not dispatch_modes():
            return function(first, second, *rest)  # where the dispatcher would get to in the end
        with below_autograd():
            return operator(first, second, *rest)

    def remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        rules.setup_context(ctx, arguments(*inputs), output)

    if below_autograd is not None:
        torch.library.impl(f"spcache::{name}", "Autograd", kernel)
    else:  # the same; its kernel, through which every call goes, costs 6 us
        torch.library.register_autograd(f"spcache::{name}", rules.backward, setup_context=remember)


_differentiable(
    "solve", _solve, autograd.Solve, lambda v, b, system, f, *rest: (v, b, Traced(system), autograd.Memo((f,)), *rest)
)
_differentiable("matvec", _matvec, autograd.Matvec, lambda v, x, system, *rest: (v, x, Traced(system), *rest))
_differentiable("outer", _outer, autograd.Outer, lambda u, w, system, *rest: (u, w, Traced(system), *rest))


def recorded() -> bool:
    """Whether operations are recorded, to run later on other numbers: by torch.compile, by torch.export, by make_fx and
    with it by torch.func.linearize. What is to be recorded must be an operator.

    Raises:
        RuntimeError: by torch.jit.trace, which would record the numbers of this run.
    """
    if torch.compiler.is_dynamo_compiling():  # `is_compiling` is true in every thread while one of them compiles
        return True
    if torch.jit.is_tracing():
        raise RuntimeError("torch.jit.trace cannot record a sparse solve; use torch.compile or torch.export")
    return traced()


def is_vector(values: Tensor, b: Tensor) -> bool:
    """Whether b holds vectors; by ranks alone, which the compiler takes for constants."""
    return b.dim() == values.dim() or b.dim() == 1


def _eager(*tensors: Tensor) -> bool:
    """Whether these are no stand-ins: the "eager" backend runs the graph that Dynamo made as it is."""
    return all(type(t) in (Tensor, Parameter) for t in tensors) and not traced()


@in_graph
def traced_solve(
    system: Tensor,
    given: Tensor | None,
    values: Tensor,
    b: Tensor,
    vector: bool,
    adjoint: bool,
    keep_factor: bool,
    checks: bool,
) -> Tensor:
    """`SparseSystem.solve`, or `Factor.solve` of the factor given."""
    if _eager(system, values, b):
        numeric = None if given is None else handles.factor_of(given)
        if numeric is not None and not (transformed() or numeric.same_values(plain(values.detach()))):
            raise RuntimeError(MODIFIED)
        return handles.system_of(system).solve(values, b, adjoint, numeric, dual=True)
    source = Traced(system, given, keep_factor, checks)
    return autograd.Solve.apply(values, b, source, autograd.Memo(()), vector, adjoint, True, False)


@in_graph
def traced_matmul(system: Tensor, values: Tensor, x: Tensor, vector: bool, adjoint: bool, size: int) -> Tensor:
    """`SparseSystem.matmul`, whose result has `size` rows."""
    if _eager(system, values, x):
        return handles.system_of(system).matmul(values, x, adjoint)
    return autograd.matmul(Traced(system), values, x, vector, adjoint, size)


@in_graph
def traced_least_squares(
    fitter: Tensor, values: Tensor, b: Tensor, vector: bool, m: int, n: int, damping: float, method: str
) -> Tensor:
    """`SparseSystem.lstsq`."""
    if _eager(fitter, values, b):
        return handles.system_of(fitter).solve(values, b, damping, method, {}, vector)
    return autograd.least_squares(TracedLeastSquares(fitter, (m, n), damping, method), values, b, vector)
