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

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from . import autograd, handles
from .convention import Convention
from .memory import plain

__all__ = ["MODIFIED", "Traced", "is_vector", "traced_matmul", "traced_solve"]

MODIFIED = (
    "values were modified in place after factorize(): this factor belongs to the old ones. "
    "Factorize again, or factorize a clone"
)


def _refuse_dual_level() -> None:
    """In compiled code an operator has no forward-mode rule any more: torch would drop the tangents in silence."""
    if autograd.in_dual_level():
        raise RuntimeError(
            "code compiled by torch.compile was called inside a forward-mode level (forward_ad.dual_level or "
            "torch.func.jvp): its tangents would be lost. Differentiate inside of the compiled function, or call the "
            "function without torch.compile"
        )


@torch.library.custom_op(
    "spcache::factor", mutates_args=(), schema="(Tensor values, Tensor system, Tensor? given, Tensor? after) -> Tensor"
)
def factor(values: Tensor, system: Tensor, given: Tensor | None, after: Tensor | None) -> Tensor:
    """The handle of the factor of values, [1; int64].

    Args:
        given: the handle of a factor that the user made of these values; None: find it, or make it.
        after: not looked at; where it is needed for the factor's sake, the factor is not made before it.
    """
    _refuse_dual_level()
    source = handles.system_of(system)
    source.check_values(values)
    if values.numel() == 0:
        return handles.factor_handle(None)
    numeric = None if given is None else handles.factor_of(given)
    if numeric is None:
        numeric = source.find(values)
    elif not numeric.same_values(plain(values.detach())):
        raise RuntimeError(MODIFIED)
    return handles.factor_handle(numeric)


@factor.register_fake
def _(values: Tensor, system: Tensor, given: Tensor | None, after: Tensor | None) -> Tensor:
    return system.new_empty(1)


@torch.library.custom_op(
    "spcache::solve", mutates_args=(),
    schema="(Tensor values, Tensor b, Tensor system, Tensor factor, bool adjoint, bool check, bool cotangent) "
    "-> Tensor",
)  # fmt: skip
def solve(
    values: Tensor, b: Tensor, system: Tensor, factor: Tensor, adjoint: bool, check: bool, cotangent: bool
) -> Tensor:
    """`Source.run`, b [*P, n, k]. A handle that is a copy, or belongs to another batch, counts as none."""
    _refuse_dual_level()
    source = handles.system_of(system)
    source.check_arguments(values, b, vector=False)
    if values.numel() == 0 or b.numel() == 0:
        return source.empty(values, b, False, check and source.options["check"])
    numeric = handles.factor_of(factor)
    if numeric is None or numeric.batch_shape != values.shape[:-1]:
        numeric = source.find(values)
    return source.run(numeric, values, b, adjoint, check, cotangent)


@solve.register_fake
def _(values: Tensor, b: Tensor, system: Tensor, factor: Tensor, adjoint: bool, check: bool, cotangent: bool) -> Tensor:
    return b.new_empty(*torch.broadcast_shapes(values.shape[:-1], b.shape[:-2]), *b.shape[-2:])


@torch.library.custom_op(
    "spcache::matvec", mutates_args=(),
    schema="(Tensor values, Tensor x, Tensor system, bool adjoint, SymInt size) -> Tensor",
)  # fmt: skip
def matvec(values: Tensor, x: Tensor, system: Tensor, adjoint: bool, size: int) -> Tensor:
    """`Source.matvec`."""
    _refuse_dual_level()
    source = handles.system_of(system)
    source.check_product(values, x, False, adjoint)
    return source.matvec(values, x, adjoint, size)


@matvec.register_fake
def _(values: Tensor, x: Tensor, system: Tensor, adjoint: bool, size: int) -> Tensor:
    return x.new_empty(*torch.broadcast_shapes(values.shape[:-1], x.shape[:-2]), size, x.shape[-1])


@torch.library.custom_op(
    "spcache::outer", mutates_args=(), schema="(Tensor u, Tensor w, Tensor system, SymInt nnz) -> Tensor"
)
def outer(u: Tensor, w: Tensor, system: Tensor, nnz: int) -> Tensor:
    """`Source.outer`."""
    _refuse_dual_level()
    return handles.system_of(system).outer(u, w, nnz)


@outer.register_fake
def _(u: Tensor, w: Tensor, system: Tensor, nnz: int) -> Tensor:
    return u.new_empty(*u.shape[:-2], nnz)


class Traced:
    """A `Source` made of the operators.

    Args:
        system: its handle.
        given: the handle of a factor that the user made, or None.
        keep_factor: as the system has it.
    """

    convention: Convention

    def __init__(self, system: Tensor, given: Tensor | None = None, keep_factor: bool = True):
        self.system = system
        self.given = given
        self.keep_factor = keep_factor

    def find(self, values: Tensor, raising: bool | None = None) -> Any:
        raise NotImplementedError("under torch.compile factors are found by `recall`")

    def recall(self, memo: list[Any], values: Tensor, b: Tensor) -> Tensor:
        """Calls that agree in their arguments become one in the compiler's hands, so that the backward pass finds the
        factor of the forward pass; unless it depends on the incoming gradient, which is when it is made anew."""
        return memo[0] if memo else factor(values, self.system, self.given, None if self.keep_factor else b)

    def run(self, factor: Tensor, values: Tensor, b: Tensor, adjoint: bool, check: bool, cotangent: bool) -> Tensor:
        return solve(values, b, self.system, factor, adjoint, check, cotangent)

    def outer(self, u: Tensor, w: Tensor, nnz: int) -> Tensor:
        return outer(u, w, self.system, nnz)

    def matvec(self, values: Tensor, x: Tensor, adjoint: bool, size: int) -> Tensor:
        return matvec(values, x, self.system, adjoint, size)

    def require_finite(self, name: str, t: Tensor) -> None:
        """The operators see to it."""


def _setup_solve(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, b, system, factor, *flags = inputs
    autograd.Solve.setup_context(ctx, (values, b, Traced(system), [factor], *flags), output)


def _setup_matvec(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, x, system, *rest = inputs
    autograd.Matvec.setup_context(ctx, (values, x, Traced(system), *rest), output)


def _setup_outer(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    u, w, system, nnz = inputs
    autograd.Outer.setup_context(ctx, (u, w, Traced(system), nnz), output)


# For those who call the operators themselves; the arguments correspond one to one.
solve.register_autograd(autograd.Solve.backward, setup_context=_setup_solve)
matvec.register_autograd(autograd.Matvec.backward, setup_context=_setup_matvec)
outer.register_autograd(autograd.Outer.backward, setup_context=_setup_outer)


def is_vector(values: Tensor, b: Tensor) -> bool:
    """Whether b holds vectors; by ranks alone, which the compiler takes for constants."""
    return b.dim() == values.dim() or b.dim() == 1


def _eager(*tensors: Tensor) -> bool:
    """Whether these are no stand-ins: the "eager" backend runs the graph that Dynamo made as it is."""
    return all(type(t) in (Tensor, Parameter) for t in tensors)


@torch.compiler.allow_in_graph
def traced_solve(
    system: Tensor, given: Tensor | None, values: Tensor, b: Tensor, vector: bool, adjoint: bool, keep_factor: bool
) -> Tensor:
    """`SparseSystem.solve`, or `Factor.solve` of the factor given."""
    if _eager(system, values, b):
        numeric = None if given is None else handles.factor_of(given)
        if numeric is not None and not (autograd.transformed() or numeric.same_values(plain(values.detach()))):
            raise RuntimeError(MODIFIED)
        return handles.system_of(system).solve(values, b, adjoint, numeric)
    source = Traced(system, given, keep_factor)
    x = autograd.Solve.apply(values, b.unsqueeze(-1) if vector else b, source, [], adjoint, True, False)
    return x.squeeze(-1) if vector else x


@torch.compiler.allow_in_graph
def traced_matmul(system: Tensor, values: Tensor, x: Tensor, vector: bool, adjoint: bool, size: int) -> Tensor:
    """`SparseSystem.matmul`, whose result has `size` rows."""
    if _eager(system, values, x):
        return handles.system_of(system).matmul(values, x, adjoint)
    return autograd.matmul(Traced(system), values, x, vector, adjoint, size)
