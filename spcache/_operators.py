"""`solve_operator`: A x = b for an operator that can only be applied, differentiable in b and in all A depends on.

Derivation. A(theta) x = b. For a real loss with cotangent g of x (see autograd.py),

    lam = A^-H g,    grad b = lam,    grad theta = -d/dtheta Re <lam, A(theta) x>,    x held fixed.

So a backward pass needs the adjoint of A and one vector-Jacobian product of A(x) with the cotangent -lam. Both are had
from one evaluation y = A(z), which the forward pass makes at z = x and keeps:

    A^H v = VJP of y with respect to z,    grad theta = VJP of y with respect to theta, cotangent -lam.

Derivatives are those of y, so what A depends on, tracked or not, cannot have changed in between: autograd looks at the
versions of the tensors that the graph of y saved, and raises. Only where the solver is for Hermitian A does a backward
pass apply A again, in place of its VJP, which costs more; and only if both agree on a probe, as they do while A is what
it was.

Stand-ins. While y is evaluated, every tensor with a history that A reads is replaced by a detached alias, a leaf. The
graph of y then ends at A's own tensors, be they leaves or results: these become the inputs of the autograd node. So
hooks run once, a gradient may be asked for an intermediate result, and no graph but our own is run through or freed.
A torch function mode puts them in place; the Functions of spcache, which torch shows to no mode, show themselves
(`autograd.seen`).

Higher derivatives. lam is itself a solve, with the operator A^H, whose evaluation is a VJP of y. The VJP for theta is a
function of stand-ins (z, theta', lam'); `_Graft` gives its value the history of what they stand for (x, theta, lam),
and its backward is a VJP of the same graph, grafted likewise. So all orders follow from the two rules below.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function, forward_ad
from torch.overrides import TorchFunctionMode

from . import iterative
from .autograd import seen
from .dynamo import hide
from .functional import system_of
from .matrices import entries_of
from .torch_private import in_dual_level, transformed

__all__ = ["solve_operator"]

_Apply = Callable[[Tensor], Tensor]

SOLVERS = ("cg", "minres", "bicgstab", "gmres", "lsmr")
HERMITIAN_SOLVERS = ("cg", "minres")
SPARSE = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc)


def solve_operator(
    A: Any,
    b: Tensor,
    *,
    solver: str | Callable[..., Any] = "cg",
    adjoint: _Apply | None = None,
    adjoint_options: dict[str, Any] | None = None,
    **options: Any,
) -> Tensor:
    """x with A(x) = b by an iterative solver, differentiable (reverse mode, any order) in b and in what A depends on.

    What A depends on is found, not declared: every tensor that requires grad and is read while A is applied, whether
    leaf or intermediate result, parameter of a module or variable of a closure. Memory does not grow with iterations.

    Args:
        A: linear, maps tensors of the shape and dtype of b to the same: a function, an `nn.Module`, a matrix, or an
            object with `matmul`, `matvec` or `@`, and perhaps `rmatvec`, `adjoint`, `mH`, `H` or `T`. The gradient of a
            sparse COO, CSR or CSC matrix is sparse, in its layout, at its stored entries.
        b: any shape; float32, float64, complex64 or complex128, any device. The solver sees one vector [N].
        solver: a name in `spcache.iterative` (cg and minres only for Hermitian A), or a function
            `solver(apply, b, **options)` that returns x or (x, ...), with `apply` and b, x on vectors [N]
            (`apply.rmatvec` is the adjoint); its attribute `hermitian = True`, if any, says that it is for such A.
        adjoint: v -> A^H v, if that is cheaper than the derivative of A. Checked against it in every backward pass.
        adjoint_options: the options of the solves with A^H, whose right-hand sides have norm one; default `options`,
            without x0 and callback, with the adjoint of M, and with atol / ||b|| for the atol of a named solver (where
            that is not below one, with the solver's own tolerances). A function gets its tolerances as they are: an
            absolute one that is right for b may be wrong for norm one, and needs adjoint_options.
        options: for the solver: rtol, atol, maxiter, x0, M, callback, check, ... With a named solver x0 has the shape
            of b, and a function M takes and returns that shape; matrices, factors and the preconditioners of
            `spcache.iterative` are for vectors [N]. An M without derivative or adjoint needs adjoint_options. The damp
            of lsmr must be 0: x would solve another problem.

    Returns:
        x: shape, dtype and device of b.

    Raises:
        ValueError, TypeError: an argument is not as described; adjoint is not the adjoint of A.
        NotImplementedError: under a torch.func transform, or with forward-mode tangents.
        What the solver raises where it does not converge (`check=False`: nothing), in backward passes too.
        RuntimeError: in backward, where something that A depends on was changed in place.

    Cost:
        Forward: the solver's, one application of A, and for a function `solver` one copy of b. Backward: a solve with
        A^H, whose cotangent is scaled to norm one, and one vector-Jacobian product of A. A zero cotangent needs no
        solve.

    Note:
        A tensor that A hands to a custom `autograd.Function` (spcache's own excepted) before any torch function has
        seen it cannot be replaced by a stand-in. Its gradient goes straight to the leaves behind it, whose hooks run
        twice: a hook that changes the gradient does so twice. An intermediate result gets none. To be seen is enough:
        `Function.apply(w.view_as(w), x)`.

    Example:
        >>> import torch, spcache
        >>> d = torch.tensor([2.0, 4.0], requires_grad=True)
        >>> x = solve_operator(lambda x: d * x, torch.tensor([2.0, 2.0]))
        >>> torch.autograd.grad(x.sum(), d)
        (tensor([-0.5000, -0.1250]),)
    """
    return _solve_operator(A, b, solver, adjoint, adjoint_options, options)


def _solve_operator(
    A: Any,
    b: Tensor,
    solver: str | Callable[..., Any],
    adjoint: _Apply | None,
    adjoint_options: dict[str, Any] | None,
    options: dict[str, Any],
) -> Tensor:
    if not isinstance(b, Tensor) or b.layout is not torch.strided or not (b.is_floating_point() or b.is_complex()):
        what = f"{b.layout} {b.dtype}" if isinstance(b, Tensor) else type(b).__name__
        raise TypeError(f"b must be a dense real or complex torch.Tensor, got {what}")
    if b.is_meta:
        raise TypeError("b must be on a device with numbers, got meta: an iteration has to look at them")
    if transformed():
        raise NotImplementedError("solve_operator does not work under torch.func transforms; use torch.autograd")
    apply, given = _functions(A, adjoint)
    if in_dual_level() and (_has_tangent(b) or _has_tangent(apply(torch.zeros_like(b)))):
        raise NotImplementedError("solve_operator has no forward-mode derivative; use reverse mode")
    if b.numel() == 0:
        return b.clone()
    hermitian = solver in HERMITIAN_SOLVERS if isinstance(solver, str) else getattr(solver, "hermitian", False)
    root = _Operator(apply, given or (apply if hermitian else None), apply, given is not None)
    method = _Method(solver, hermitian, options, adjoint_options)
    return _solve(root, method, b)


# --- operators -----------------------------------------------------------------------------------------------------


def _functions(A: Any, adjoint: _Apply | None = None) -> tuple[_Apply, _Apply | None]:
    """x -> A x, and v -> A^H v as the caller has it, or None. Functions, modules and tensors have their derivative."""
    if adjoint is not None and not callable(adjoint):
        raise TypeError(f"adjoint must be a callable v -> A^H v, got {type(adjoint).__name__}")
    if isinstance(A, torch.nn.Module) or inspect.isroutine(A):
        return A, adjoint
    if isinstance(A, Tensor) and A.requires_grad and A.layout in SPARSE:  # torch's gradient would be dense
        entries = entries_of(A)
        system = system_of(entries)
        return lambda x: system.matmul(entries.values, x), adjoint
    found = iterative.as_operator(A)
    if adjoint is not None or isinstance(A, Tensor):
        return found.apply, adjoint
    method = getattr(A, "adjoint", None)
    if found.adjoint is not None or not callable(method):
        return found.apply, found.adjoint
    try:  # a method v -> A^H v, or () -> A^H
        inspect.signature(method).bind(None)
    except TypeError:
        return found.apply, iterative.as_operator(method()).apply
    return found.apply, method


@dataclass(frozen=True)
class _Operator:
    """A linear operator on tensors of one shape.

    Attributes:
        apply: x -> A x, for its numbers.
        adjoint: v -> A^H v, for its numbers; None: a VJP. In a backward pass it is compared with the VJP first.
        graph: x -> A x, for its history.
        checked: adjoint is a promise of the caller's: to differ is an error. Else it is A itself, whose solver is for
            Hermitian A: where it differs, the VJP is used.
    """

    apply: _Apply
    adjoint: _Apply | None
    graph: _Apply
    checked: bool = False


class _Flat:
    """The operator as solvers see it: on vectors [N], without history."""

    def __init__(self, operator: _Operator, like: Tensor):
        self._operator, self.like = operator, like
        self._pull: _Apply | None = operator.adjoint
        self.shape = (like.numel(), like.numel())
        self.dtype, self.device = like.dtype, like.device

    def matvec(self, x: Tensor) -> Tensor:
        return self._run(self._operator.apply, x)

    def rmatvec(self, v: Tensor) -> Tensor:
        return self._run(self.pull(), v)

    __call__ = __matmul__ = matvec

    def pull(self) -> _Apply:
        if self._pull is None:
            at = _evaluate(self._operator.graph, torch.zeros_like(self.like))
            at.require_differentiable()
            self._pull = at.vjp
        return self._pull

    def _run(self, function: _Apply, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = function(x.reshape(self.like.shape))
        _require_like(y, self.like)
        return y.reshape(-1)


def _require_like(y: Any, like: Tensor) -> None:
    if not isinstance(y, Tensor):
        raise TypeError(f"A must return a tensor, got {type(y).__name__}")
    if y.shape != like.shape or y.dtype != like.dtype:
        raise ValueError(
            f"A must keep shape and dtype: expected {tuple(like.shape)} {like.dtype}, got {tuple(y.shape)} {y.dtype}"
        )


@dataclass
class _Method:
    """How to solve, and with which options.

    Attributes:
        norm_b: of the user's b, which an atol is for.
    """

    solver: str | Callable[..., Any]
    hermitian: bool
    options: dict[str, Any]
    adjoint_options: dict[str, Any] | None
    run: Callable[..., Any] = field(init=False)
    norm_b: float = field(init=False, default=0.0)

    def __post_init__(self) -> None:
        if callable(self.solver):
            self.run = self.solver
        elif self.solver in SOLVERS:
            self.run = getattr(iterative, self.solver)
        else:
            raise ValueError(f"solver must be one of {', '.join(SOLVERS)} or a callable, got {self.solver!r}")
        damp = self.options.get("damp") or (self.adjoint_options or {}).get("damp")
        if self.solver == "lsmr" and damp:
            raise ValueError(
                f"damp must be 0, got {damp}: x would not solve A x = b, whose derivative is taken; for a damped x "
                f"solve A^H A x + damp^2 x = A^H b"
            )

    def __call__(self, A: _Flat, b: Tensor, transposed: bool, cotangent: bool) -> Tensor:
        """x [N] with A x = b; transposed: A is the adjoint of the user's operator; cotangent: b is no user's b."""
        options = self.options
        if cotangent:
            options = self._for_cotangents()
        if transposed and self.adjoint_options is not None:
            options, transposed = self.adjoint_options, False
        if isinstance(self.solver, str):
            options = self._flattened(options, A, transposed and not self.hermitian)
        own = cotangent or isinstance(self.solver, str)  # else b is the user's, whom a function must not overwrite
        found = self.run(A, b if own else b.clone(), **options)
        if not cotangent and options.get("atol"):
            self.norm_b = _norm(b)
        x = found[0] if isinstance(found, tuple) else found
        if x.numel() != b.numel() or x.dtype != b.dtype:
            raise ValueError(f"the solver must return {b.numel()} numbers of {b.dtype}, got {x.numel()} of {x.dtype}")
        return x.detach().clone()  # it may be the solver's, x0 or b

    def _for_cotangents(self) -> dict[str, Any]:
        """The options for a right-hand side of norm one: atol as the same share of it as of the user's b. One that lets
        x = 0 pass says nothing of the accuracy of gradients: then the method's own tolerances serve."""
        options = {key: value for key, value in self.options.items() if key not in ("x0", "callback")}
        if isinstance(self.solver, str) and self.solver != "lsmr" and options.get("atol"):  # lsmr's is relative
            atol = options.pop("atol")
            if atol < self.norm_b:
                options["atol"] = atol / self.norm_b
            elif not options.get("rtol"):
                options.pop("rtol", None)
        return options

    @staticmethod
    def _flattened(options: dict[str, Any], A: _Flat, transposed: bool) -> dict[str, Any]:
        options = dict(options)
        if options.get("x0") is not None:
            options["x0"] = options["x0"].detach().reshape(-1)
        if options.get("M") is not None:
            options["M"] = _preconditioner(options["M"], A, transposed)
        return options


def _preconditioner(M: Any, A: _Flat, transposed: bool) -> Any:
    """M, or its adjoint, on vectors [N]. Tensors, factors and those of `spcache.iterative` are for them already."""
    if isinstance(M, Tensor):
        return M.detach().mH if transposed else M.detach()
    if hasattr(M, "solve"):
        return (lambda r: M.solve(r, adjoint=True)) if transposed else M
    ours = isinstance(M, iterative.diagonal | iterative.block_diagonal | iterative.incomplete)
    apply, adjoint = _functions(M)
    flat = _Flat(_Operator(apply, adjoint, apply), A.like.reshape(-1) if ours else A.like)
    if not transposed:
        return flat.matvec
    try:
        flat.pull()
    except (RuntimeError, TypeError) as error:
        raise RuntimeError(
            "M has no derivative, hence no adjoint for the solves with A^H of the backward pass: pass adjoint_options, "
            "the options of these solves, with an M for A^H or with none"
        ) from error
    return flat.rmatvec


def _norm(v: Tensor) -> float:
    """Also of what is tiny or huge, whose squares would underflow or overflow."""
    largest = v.abs().max()
    return float(largest) * float(torch.linalg.vector_norm(v / largest)) if largest else 0.0


def _numbers(operator: _Operator, method: _Method, b: Tensor, transposed: bool, cotangent: bool) -> Tensor:
    """x without history. A cotangent is scaled to norm one, so that tolerances mean what they mean for a user's b."""
    with torch.no_grad():
        b = b.detach()
        flat, rhs = _Flat(operator, b), b.reshape(-1)
        if not cotangent:
            return method(flat, rhs, transposed, False).reshape(b.shape)
        largest = rhs.abs().max()
        if largest == 0:
            return torch.zeros_like(b)
        if not torch.isfinite(largest):
            return torch.full_like(b, torch.nan)
        rhs = rhs / largest  # the norm of what is tiny or huge would underflow or overflow
        norm = torch.linalg.vector_norm(rhs)
        return (method(flat, rhs / norm, transposed, True) * norm * largest).reshape(b.shape)


# --- one evaluation, kept ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _At:
    """y = A(z), with history.

    Attributes:
        z: a leaf.
        leaves: where else the history of y ends: stand-ins, or tensors that could not be replaced.
        originals: what the leaves stand for.
        differentiable: whether there is a path from y to z.
    """

    z: Tensor
    y: Tensor
    leaves: Sequence[Tensor]
    originals: Sequence[Tensor]
    differentiable: bool

    def vjp(self, v: Tensor) -> Tensor:
        """A^H v, without history."""
        return self._vjp(v, False)

    def vjp_graph(self, v: Tensor) -> Tensor:
        return self._vjp(v, True)

    def _vjp(self, v: Tensor, create_graph: bool) -> Tensor:
        self.require_differentiable()
        return torch.autograd.grad(self.y, self.z, v, retain_graph=True, create_graph=create_graph)[0]

    def require_differentiable(self) -> None:
        if not self.differentiable:
            raise TypeError("A(x) has no derivative in x, hence no adjoint: pass adjoint=, a callable v -> A^H v")


def _evaluate(graph: _Apply, x: Tensor) -> _At:
    z = _stand_in(x)
    with torch.enable_grad(), _Cut() as cut:
        y = graph(z)
    _require_like(y, x)
    leaves = _leaves(y)
    others = [t for t in leaves if t is not z]
    return _At(z, y, others, [cut.originals.get(id(t), t) for t in others], len(others) < len(leaves))


def _stand_in(t: Tensor) -> Tensor:
    """A leaf with the numbers and the version of t."""
    leaf = t.detach().requires_grad_()
    leaf.stand_in = True  # type: ignore[attr-defined]
    return leaf


class _Cut(TorchFunctionMode):
    """Replaces tensors with a history from outside by stand-ins, in whatever torch is asked to do."""

    def __init__(self) -> None:
        super().__init__()
        self._stand_ins: dict[int, tuple[Tensor, Tensor]] = {}  # id(t): t, which keeps the id, and its stand-in
        self._inside: set[Any] = set()  # nodes with a stand-in behind them
        self._outside: set[Any] = set()  # nodes without
        self.originals: dict[int, Tensor] = {}  # id(stand-in): t

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._leave_alone(function, args, kwargs):
            return function(*args, **kwargs)
        return function(*self._replace(args), **self._replace(kwargs))

    def _leave_alone(self, function: Any, args: Any, kwargs: Any) -> bool:
        """Where a history from outside is itself differentiated: by torch.func, by autograd.grad."""
        if function is not torch.autograd.grad:
            return function is torch.autograd.backward or function is Tensor.backward or transformed()
        outputs = args[0] if args else kwargs["outputs"]
        outputs = [outputs] if isinstance(outputs, Tensor) else outputs
        return any(isinstance(t, Tensor) and not self._is_inside(t) for t in outputs)

    def _replace(self, a: Any) -> Any:
        if isinstance(a, Tensor):
            return self._of(a) if a.requires_grad and not self._is_inside(a) else a
        if type(a) in (list, tuple):
            return type(a)(self._replace(item) for item in a)
        if type(a) is dict:
            return {key: self._replace(value) for key, value in a.items()}
        return a

    def _of(self, t: Tensor) -> Tensor:
        if id(t) not in self._stand_ins:
            leaf = _stand_in(t)
            self._stand_ins[id(t)] = t, leaf
            self.originals[id(leaf)] = t
        return self._stand_ins[id(t)][1]

    def _is_inside(self, t: Tensor) -> bool:
        """Whether t was computed from a stand-in: ours, or that of a solve inside of A."""
        if t.grad_fn is None:
            return hasattr(t, "stand_in")
        seen = []
        for node in _nodes(t.grad_fn, self._outside):
            if node in self._inside or hasattr(getattr(node, "variable", None), "stand_in"):
                self._inside.add(t.grad_fn)
                return True
            seen.append(node)
        self._outside.update(seen)
        return False


def _nodes(root: Any, known: Any = ()) -> Iterable[Any]:
    """The nodes behind root, each once, without those known and what is behind them."""
    seen, stack = {root}, [root]
    while stack:
        node = stack.pop()
        if node in known:
            continue
        yield node
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                stack.append(parent)


def _leaves(y: Tensor) -> list[Tensor]:
    if y.grad_fn is None:
        return [y] if y.requires_grad else []
    return [node.variable for node in _nodes(y.grad_fn) if hasattr(node, "variable")]


def _has_tangent(t: Any) -> bool:
    return isinstance(t, Tensor) and forward_ad.unpack_dual(t).tangent is not None


# --- the rules -----------------------------------------------------------------------------------------------------


def _solve(
    operator: _Operator,
    method: _Method,
    b: Tensor,
    transposed: bool = False,
    cotangent: bool = False,
    leaves: Sequence[Tensor] = (),
    originals: Sequence[Tensor] = (),
) -> Tensor:
    """x, where grad mode is on with its history.

    Args:
        transposed: the operator is the adjoint of the caller's.
        cotangent: b is an incoming gradient; then the operator depends on leaves, which stand for originals.
    """
    x = _numbers(operator, method, b, transposed, cotangent)
    if not torch.is_grad_enabled():
        return x
    if cotangent:
        z = _stand_in(x)
        y = operator.graph(z)
        at = _At(z, y, leaves, originals, any(t is z for t in _leaves(y)))
    else:
        at = _evaluate(operator.graph, x)
    if not any(t.requires_grad for t in (b, *at.originals)):
        return x
    if operator.adjoint is None:
        at.require_differentiable()
    return _Solve.apply(at, operator, method, transposed, *seen(b, *at.originals))


class _Solve(Function):
    """x = A^-1 b, from an evaluation at x. Inputs with derivatives: b, and the originals of the evaluation."""

    @staticmethod
    def forward(
        ctx: Any, at: _At, operator: _Operator, method: _Method, transposed: bool, b: Tensor, *originals: Tensor
    ) -> Tensor:
        x = at.z.detach()
        ctx.save_for_backward(x, *originals)
        ctx.at, ctx.operator, ctx.method, ctx.transposed = at, operator, method, transposed
        return x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        if transformed():
            raise NotImplementedError("solve_operator's backward pass cannot be batched (is_grads_batched, vmap)")
        at, (x, *originals) = ctx.at, ctx.saved_tensors
        adjoint = _adjoint_operator(ctx.operator, at)
        lam = _solve(adjoint, ctx.method, g, not ctx.transposed, True, at.leaves, originals)
        grads: Sequence[Tensor | None] = ()
        if originals:
            grads = _pull([at.y], [at.z, *at.leaves], range(1, 1 + len(originals)), [x, *originals], [-lam])
        return None, None, None, None, lam, *grads


def _adjoint_operator(operator: _Operator, at: _At) -> _Operator:
    if not at.differentiable:  # then there is an adjoint: `_solve` saw to it
        assert operator.adjoint is not None
        return _Operator(operator.adjoint, operator.apply, operator.adjoint)
    if operator.adjoint is None:
        return _Operator(at.vjp, None, at.vjp_graph)
    i = torch.arange(1, at.z.numel() + 1, device=at.z.device, dtype=torch.float64)
    probe = torch.cos(i * i).to(at.z.dtype).reshape(at.z.shape)  # no direction of its own
    with torch.no_grad():
        expected, promised = at.vjp(probe), operator.adjoint(probe)
    _require_like(promised, probe)
    error, scale = float((promised.detach() - expected).norm()), float(expected.norm())
    eps = torch.finfo(probe.dtype).eps
    if operator.checked and not error <= scale * eps**0.5:
        raise ValueError(f"adjoint is not the adjoint of A: relative difference {error / scale:.1e}")
    if operator.checked or error <= 100 * scale * eps:
        return _Operator(operator.adjoint, None, at.vjp_graph)  # cheaper than a VJP
    return _Operator(at.vjp, None, at.vjp_graph)


def _pull(
    outs: Sequence[Tensor],
    leaves: Sequence[Tensor],
    wanted: Sequence[int],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
) -> list[Tensor | None]:
    """The VJP of outs, whose history ends at leaves, for the leaves wanted. Inputs are what the leaves stand for: with
    grad mode on the VJP has a history, and it ends at inputs and cotangents."""
    targets = [leaves[i] for i in wanted]
    if not torch.is_grad_enabled():
        return list(torch.autograd.grad(outs, targets, cotangents, retain_graph=True, allow_unused=True))
    stand_ins = [_stand_in(c) for c in cotangents]
    found = torch.autograd.grad(outs, targets, stand_ins, create_graph=True, allow_unused=True)
    there = [grad for grad in found if grad is not None]
    grafted = iter(_Graft.apply(there, [*leaves, *stand_ins], *inputs, *cotangents) if there else ())
    return [None if grad is None else next(grafted) for grad in found]


class _Graft(Function):
    """The numbers of outs, whose history ends at leaves, with one that ends at what the leaves stand for: inputs."""

    @staticmethod
    def forward(ctx: Any, outs: Sequence[Tensor], leaves: Sequence[Tensor], *inputs: Tensor) -> Any:
        ctx.save_for_backward(*inputs)
        ctx.outs, ctx.leaves = outs, leaves
        return tuple(out.detach() for out in outs)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        inputs: Sequence[Tensor] = ctx.saved_tensors
        grads: list[Tensor | None] = [None] * len(inputs)
        live = [i for i, out in enumerate(ctx.outs) if out.requires_grad]
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[2:]) if needed]
        if live and wanted:
            found = _pull([ctx.outs[i] for i in live], ctx.leaves, wanted, inputs, [cotangents[i] for i in live])
            for i, grad in zip(wanted, found, strict=True):
                grads[i] = grad
        return None, None, *grads


hide(sys.modules[__name__], "_solve_operator")
for _function in (_Solve, _Graft):
    hide(_function, "backward")
