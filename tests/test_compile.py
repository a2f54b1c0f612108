"""torch.compile: right results and gradients without a graph break, one graph for many systems, no tangent lost."""

import copy
import gc
import threading
import weakref
from functools import partial

import pytest
import torch
from cases import CASES, GENERAL, SPD, find_case, make
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

import spcache
from spcache import handles

COMPLEX = find_case("hermitian", torch.complex128)
LOWER = find_case("spd", triangle="lower")  # one triangle: any step keeps it symmetric
TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])

some_cases = pytest.mark.parametrize("case", [SPD, GENERAL, COMPLEX], ids=str)
one_of_each = pytest.mark.parametrize("case", [SPD, GENERAL], ids=str)
each_backend = pytest.mark.parametrize("backend", ["eager", "aot_eager"])
every_backend = pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
warm_or_not = pytest.mark.parametrize("warm", [False, True], ids=["compiled-inside", "compiled-before"])

pytestmark = [  # what torch itself says while it compiles
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:Skipping serialization of skipfiles_inline_module_allowlist:UserWarning"),
    pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex:UserWarning"),
]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def compiled(f, backend="aot_eager", **options):
    """f in one graph, or an error."""
    return torch.compile(f, backend=backend, fullgraph=True, **options)


def leaf(t):
    return t.detach().clone().requires_grad_()


def close(actual, expected, c=1000):
    """Equal up to c * eps of the largest number, tensor by tensor."""
    if isinstance(expected, tuple):
        for a, e in zip(actual, expected, strict=True):
            close(a, e, c)
    else:
        assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
        assert (actual - expected).abs().max() <= c * torch.finfo(expected.dtype).eps * expected.abs().max()


def same(f, reference, inputs, c=1000):
    """f gives what the reference gives, and the same gradients of every input."""
    inputs = tuple(leaf(t) for t in inputs)
    y, expected = f(*inputs), reference(*inputs)
    close(y, expected, c)
    g = torch.randn_like(expected)
    close(torch.autograd.grad(y, inputs, g), torch.autograd.grad(expected, inputs, g), c)


def twelve():
    """Twelve problems of different kinds, orders and numbers of entries."""
    kinds = ["spd", "general", "symmetric", "hermitian", "auto"]
    return [make(find_case(kinds[i % 5]), 6 + 3 * i, seed=i) for i in range(12)]


def rectangular(m, n):
    """A system of m x n, its values, and its dense matrix as a function of them."""
    mask = torch.rand(m, n, generator=torch.Generator().manual_seed(m)) < 0.5
    mask[0, 0] = True
    indices = mask.nonzero().T
    values = torch.randn(indices.shape[1], dtype=torch.float64)

    def matrix(v):
        return v.new_zeros(m * n).index_add(0, indices[0] * n + indices[1], v).view(m, n)

    return spcache.SparseSystem(indices, (m, n), kind="general"), values, matrix


def factors_alive(system):
    """Of the factors that the system's pools made last, those that somebody still holds."""
    latest = [pool._latest() for pool in system._factorizer._pools.values()]
    return [numeric for numeric in latest if numeric is not None]


# --- the four operations ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "shape"),
    [((), (9,)), ((), (9, 2)), ((2,), (9,)), ((2,), (2, 9)), ((2,), (2, 9, 3)), ((), (2, 9, 3))],
    ids=["vector", "matrix", "one-vector", "vectors", "matrices", "batch-of-b"],
)
@pytest.mark.parametrize(
    ("case", "adjoint"), [(SPD, False), (GENERAL, True), (COMPLEX, False), (COMPLEX, True)], ids=str
)
@each_backend
def test_solve(backend, case, adjoint, batch, shape):
    problem = make(case, 9, batch)
    system, b = problem.system(), problem.rhs(*shape)

    def reference(v, b):
        return problem.reference(v, b, adjoint)

    f = compiled(lambda v, b: system.solve(v, b, adjoint=adjoint), backend)
    x = f(problem.values, b)
    assert not x.requires_grad
    close(x, reference(problem.values, b))
    same(f, reference, (problem.values, b))
    assert (system.stats.factorizations, system.stats.solves) == (1, 3)


@pytest.mark.parametrize("case", [c for c in CASES if c.kind == "auto"], ids=str)
def test_every_dtype_and_engine(case):
    problem = make(case, 7)
    same(compiled(problem.system().solve), problem.reference, (problem.values, problem.rhs(7)), 5000)


@some_cases
def test_generated_code(case):
    """Everything at once, with things for inductor to fuse between."""
    problem = make(case, 9)
    system = problem.system()

    def f(v, b):
        factor = system.factorize(v.exp().log())
        x = factor.solve(b.sin())
        return factor.solve(x.cos(), adjoint=True) + system.matmul(v, x) * 2

    def reference(v, b):
        v, b = v.exp().log(), b.sin()
        x = problem.reference(v, b)
        return problem.reference(v, x.cos(), adjoint=True) + problem.matrix(v) @ x * 2

    values = problem.values / problem.values.abs().max()
    same(compiled(f, "inductor"), reference, (values, problem.rhs(9, 3)), 1e5)
    assert system.stats.factorizations == 1


def test_generated_code_without_a_gradient():
    problem = make(GENERAL, 9, (2,))
    system, v, b = problem.system(), problem.values, problem.rhs(2, 9, 3)
    f = compiled(lambda v, b: system.solve(v, b + 1, adjoint=True) * 2, "inductor")
    close(f(v, b), problem.reference(v, b + 1, adjoint=True) * 2)


@pytest.mark.parametrize("adjoint", [False, True], ids=["plain", "adjoint"])
@some_cases
@each_backend
def test_matmul(backend, case, adjoint):
    problem = make(case, 9)
    system = problem.system()

    def reference(v, x):
        A = problem.matrix(v)
        return (A.mH if adjoint else A) @ x

    f = compiled(lambda v, x: system.matmul(v, x, adjoint=adjoint), backend)
    same(f, reference, (problem.values, problem.rhs(9)))
    same(f, reference, (problem.values, problem.rhs(9, 2)))
    assert system.stats.factorizations == 0


@each_backend
def test_matmul_of_a_rectangle(backend):
    system, values, matrix = rectangular(5, 8)
    same(compiled(system.matmul, backend), lambda v, x: matrix(v) @ x, (values, torch.randn(8, 2).double()))
    adjoint = compiled(lambda v, x: system.matmul(v, x, adjoint=True), backend)
    same(adjoint, lambda v, x: matrix(v).mH @ x, (values, torch.randn(5).double()))


@pytest.mark.parametrize(
    ("case", "backend"), [(SPD, "eager"), (GENERAL, "aot_eager"), (COMPLEX, "aot_eager"), (SPD, "inductor")], ids=str
)
def test_a_pair(case, backend):
    problem = make(case, 9, (2,))
    f = compiled(lambda i, v, b: spcache.solve((i, v), b, kind=case.kind), backend)
    f = partial(f, problem.indices)
    same(f, problem.reference, (problem.values, problem.rhs(2, 9)))
    same(f, problem.reference, (problem.values, problem.rhs(2, 9, 3)))
    assert spcache.plan_cache.info().entries == 2  # one plan, one system
    spcache.plan_cache.clear()  # compiled code does not depend on what it found
    same(f, problem.reference, (problem.values, problem.rhs(2, 9)))


@one_of_each
@each_backend
def test_inputs_of_any_layout(case, backend):
    """Transposed, conjugated, expanded; and an expanded cotangent."""
    problem = make(case.with_dtype(torch.complex128), 9)

    def through(solve):
        return lambda v, b: solve(v.conj(), b.mT.expand(2, 9, 3), adjoint=True).mT.sum()

    inputs = problem.values.conj().resolve_conj(), problem.rhs(3, 9)
    same(compiled(through(problem.system().solve), backend), through(problem.reference), inputs)


@each_backend
def test_nothing_to_solve(backend):
    problem = make(SPD, 9)
    f = compiled(problem.system().solve, backend)
    v, empty = leaf(problem.values), torch.zeros(9, 0, dtype=torch.float64, requires_grad=True)
    x = f(v, empty)
    gradients = torch.autograd.grad(x.sum(), (v, empty))
    assert x.shape == (9, 0) and [g.shape for g in gradients] == [v.shape, (9, 0)] and not gradients[0].any()
    none, b = torch.zeros(0, len(v), dtype=torch.float64, requires_grad=True), leaf(problem.rhs(9))
    x = f(none, b)
    assert x.shape == (0, 9) and not torch.autograd.grad(x.sum(), b)[0].any()
    no_entries = spcache.SparseSystem(torch.zeros(2, 0, dtype=torch.int64), 2, kind="spd")
    with pytest.raises(spcache.SingularMatrixError, match="the matrix has no entries"):
        compiled(no_entries.solve, backend)(torch.zeros(0), torch.zeros(2))


def test_no_graph_break():
    problem = make(GENERAL, 9)
    system = problem.system()
    outside = system.factorize(problem.values)

    def f(v, b):
        inside = system.factorize(v)
        x = inside.solve(b) + inside.solve(b, adjoint=True) + outside.solve(b) + system.solve(v, b)
        return system.matmul(v, x) + spcache.solve((problem.indices, v), b)

    explained = torch._dynamo.explain(f)(problem.values, problem.rhs(9))
    assert (explained.graph_break_count, explained.graph_count) == (0, 1), explained.break_reasons


# --- one graph for many systems ---------------------------------------------------------------------------------------


class Layer(torch.nn.Module):
    def __init__(self, system):
        super().__init__()
        self.system = system

    def forward(self, values, b):
        return self.system.solve(values, b)


def _argument(backend):
    return partial(partial, compiled(lambda system, v, b: system.solve(v, b), backend))


def _container(backend):
    f = compiled(lambda systems, v, b: systems["one"][0].solve(v, b), backend)
    return lambda system: partial(f, {"one": [system]})


def _closure(backend):
    def factory(system):
        return compiled(lambda v, b: system.solve(v, b), backend)

    return factory


def _module_compiled_in_place(backend):
    def form(system):
        module = Layer(system)
        module.compile(backend=backend, fullgraph=True)
        return module

    return form


def _module_as_argument(backend):
    f = compiled(lambda module, v, b: module(v, b), backend)
    return lambda system: partial(f, Layer(system))


def _factor_made_inside(backend):
    return partial(partial, compiled(lambda system, v, b: system.factorize(v).solve(b), backend))


def _factor_as_argument(backend):
    f = compiled(lambda factor, b: factor.solve(b), backend)
    return lambda system: lambda v, b: f(system.factorize(v), b)


def _factor_by_closure(backend):
    def factory(factor):
        return compiled(lambda b: factor.solve(b), backend)

    return lambda system: lambda v, b: factory(system.factorize(v))(b)


FORMS = {  # backend -> system -> compiled solve(values, b)
    "argument": _argument,
    "container": _container,
    "closure": _closure,
    "method": lambda backend: lambda system: compiled(system.solve, backend),
    "module": lambda backend: lambda system: compiled(Layer(system), backend),
    "module-compiled-in-place": _module_compiled_in_place,
    "module-as-argument": _module_as_argument,
    "factor-made-inside": _factor_made_inside,
    "factor-as-argument": _factor_as_argument,
    "factor-by-closure": _factor_by_closure,
}


@pytest.mark.parametrize(
    ("form", "backend"), [*((f, "aot_eager") for f in FORMS), ("argument", "eager"), ("argument", "inductor")]
)
def test_twelve_systems_are_two_compilations(form, backend):
    """One with the sizes of the first system; one with sizes that are symbols, from the second on. Nothing else of a
    system is in the graph or in its guards, wherever the system comes from."""
    counter = CompileCounterWithBackend(backend)
    solve_of = FORMS[form](counter)
    for problem in twelve():
        system = problem.system()
        same(solve_of(system), problem.reference, (problem.values, problem.rhs(problem.n)))
        assert (system.stats.factorizations, system.stats.solves) == (1, 2)
    assert counter.frame_count == 2


def test_twelve_systems_with_symbols_from_the_start():
    counter = CompileCounterWithBackend("aot_eager")
    f = compiled(lambda system, v, b: system.solve(v, b), counter, dynamic=True)
    for problem in twelve():
        same(partial(f, problem.system()), problem.reference, (problem.values, problem.rhs(problem.n)))
    assert counter.frame_count == 1


def test_twelve_systems_in_one_graph():
    problems, b = twelve(), torch.randn(39).double()

    def total(systems, values):
        return sum(s.solve(v, b[: s.shape[0]]).sum() for s, v in zip(systems, values, strict=True))

    counter = CompileCounterWithBackend("aot_eager")
    systems = [p.system() for p in problems]
    close(
        compiled(total, counter)(systems, [p.values for p in problems]),
        sum(p.reference(p.values, b[: p.n]).sum() for p in problems),
    )
    assert counter.frame_count == 1 and [s.stats.factorizations for s in systems] == [1] * 12


@pytest.mark.parametrize("adjoint", [False, True], ids=["plain", "adjoint"])
@pytest.mark.parametrize("columns", [1, 2], ids=["square", "rectangular"])
def test_twelve_products_are_two_compilations(columns, adjoint):
    counter = CompileCounterWithBackend("aot_eager")
    f = compiled(lambda system, v, x: system.matmul(v, x, adjoint=adjoint), counter)
    for m in range(5, 17):
        system, values, matrix = rectangular(m, m * columns)

        def reference(v, x, matrix=matrix):
            return (matrix(v).mH if adjoint else matrix(v)) @ x

        same(partial(f, system), reference, (values, torch.randn(system.shape[0 if adjoint else 1]).double()))
    assert counter.frame_count == 2


def test_twelve_pairs_are_two_compilations():
    counter = CompileCounterWithBackend("aot_eager")
    f = compiled(lambda indices, v, b: spcache.solve((indices, v), b, kind="general"), counter)
    for n in range(6, 30, 2):
        problem = make(GENERAL, n)
        same(partial(f, problem.indices), problem.reference, (problem.values, problem.rhs(n)))
    assert counter.frame_count == 2


@each_backend
def test_sizes_that_change(backend):
    """Numbers of right-hand sides and batches: two compilations each."""
    problem = make(SPD, 9, (8,))
    system = problem.system()
    columns, batches = CompileCounterWithBackend(backend), CompileCounterWithBackend(backend)
    f, g = (compiled(lambda v, b: system.solve(v, b), counter) for counter in (columns, batches))
    for k in range(2, 9):
        same(f, problem.reference, (problem.values[0], problem.rhs(9, k)))
        same(g, problem.reference, (problem.values[:k], problem.rhs(k, 9)))
    assert columns.frame_count <= 2 and batches.frame_count <= 2


def test_a_copy_is_another_system():
    problem = make(GENERAL, 9)
    system, v, b = problem.system(), problem.values, problem.rhs(9)
    f = compiled(lambda system, v, b: system.solve(v, b))
    f(system, v, b)
    other = copy.deepcopy(system)
    close(f(other, v, b), problem.reference(v, b))
    assert (system.stats.factorizations, other.stats.factorizations) == (1, 1)


# --- factors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "backend"), [(SPD, "eager"), (SPD, "aot_eager"), (COMPLEX, "aot_eager"), (GENERAL, "inductor")], ids=str
)
def test_a_factor_made_outside(case, backend):
    """No further factorization, the gradient reaches its values, and values that changed are noticed."""
    problem = make(case, 9)
    system, v, b, g = problem.system(), leaf(problem.values), leaf(problem.rhs(9, 2)), problem.rhs(9, 2, seed=3)
    factor = system.factorize(v)
    system.clear()  # it is the factor itself that is used, not one found by its values
    by_closure = compiled(lambda b: factor.solve(b), backend)
    by_argument = partial(compiled(lambda factor, b: factor.solve(b, adjoint=True), backend), factor)
    for f, adjoint in (by_closure, False), (by_argument, True):
        x, expected = f(b), problem.reference(v, b, adjoint)
        close(x, expected)
        close(torch.autograd.grad(x, (v, b), g), torch.autograd.grad(expected, (v, b), g))
    assert (system.stats.factorizations, system.stats.solves) == (1, 4)
    with torch.no_grad():
        v *= 2
    for f in by_closure, by_argument:
        with pytest.raises(RuntimeError, match="values were modified after factorize"):
            f(b)
    assert system.stats.factorizations == 1


@one_of_each
@each_backend
def test_a_factor_made_inside_is_of_the_values_as_they_were(case, backend):
    problem = make(case, 9)
    system, b = problem.system(), problem.rhs(9)

    def f(v, b):
        factor = system.factorize(v)
        v.mul_(2)
        return factor.solve(b), system.solve(v, b)

    old, new = compiled(f, backend)(problem.values.clone(), b)
    close(old, problem.reference(problem.values, b))
    close(new, problem.reference(2 * problem.values, b))


@each_backend
def test_a_factor_made_inside_and_returned(backend):
    """It has factorized nothing yet, but solves."""
    problem = make(SPD, 9)
    system, v, b = problem.system(), leaf(problem.values), problem.rhs(9)
    expected = problem.reference(v, b)
    gradient = torch.autograd.grad(expected.sum(), v)
    factor = compiled(system.factorize, backend)(v)
    with torch.no_grad():
        v *= 2
    x = factor.solve(b)
    close(x, expected)
    close(torch.autograd.grad(x.sum(), v), gradient)
    with pytest.raises(RuntimeError, match="a factor has no data to look at"):
        _ = factor.info


@one_of_each
@each_backend
def test_backward_in_any_order(case, backend):
    problem = make(case, 9, (3,))
    system, b, values = problem.system(), problem.rhs(9), [leaf(v) for v in problem.values]
    f = compiled(lambda v, b: system.solve(v, b).pow(2).sum(), backend)
    losses = [f(v, b) for v in values]
    assert system.stats.factorizations == 3
    for v, loss in reversed(list(zip(values, losses, strict=True))):
        close(torch.autograd.grad(loss, v), torch.autograd.grad(problem.reference(v, b).pow(2).sum(), v))
    assert (system.stats.factorizations, system.stats.solves) == (3, 6)


@pytest.mark.parametrize(
    ("case", "backend", "collector"),
    [(LOWER, "eager", True), (GENERAL, "eager", False), (LOWER, "aot_eager", False), (GENERAL, "aot_eager", True), (GENERAL, "inductor", False)],
    ids=str,
)  # fmt: skip
def test_a_training_loop(case, backend, collector):
    """One factorization and two solves a step; afterwards nothing is left, with or without the garbage collector."""
    problem = make(case, 9)
    system, values, b = problem.system(), leaf(problem.values), problem.rhs(9)
    step = compiled(lambda v, b: system.solve(v, b).pow(2).sum(), backend)
    losses, seen = [], []
    gc.collect()
    already = len(handles._factors)
    if not collector:
        gc.disable()
    try:
        for _ in range(20):
            loss = step(values, b)
            (gradient,) = torch.autograd.grad(loss, values)
            with torch.no_grad():
                values -= 1e-3 * gradient / gradient.norm()
            losses.append(loss.item())
            seen += [weakref.ref(numeric) for numeric in factors_alive(system)]
        del loss, gradient
        assert len(handles._factors) == already
        system.clear()
        assert len(seen) >= 20 and not any(ref() for ref in seen)
    finally:
        gc.enable()
    assert (system.stats.factorizations, system.stats.solves) == (20, 40)
    assert losses == sorted(losses, reverse=True)


@one_of_each
@each_backend
def test_keep_factor_false(case, backend):
    """Two factorizations a step, and no factor between the two."""
    problem = make(case, 9)
    system = problem.system(keep_factor=False)
    f = compiled(lambda v, b: system.solve(v, b).pow(2).sum(), backend)
    gc.collect()
    already = len(handles._factors)
    for k in range(1, 4):
        v, b = leaf(problem.values * k), leaf(problem.rhs(9))
        loss = f(v, b)
        assert len(handles._factors) == already and not factors_alive(system)
        assert system.stats.factorizations == 2 * k - 1
        close(torch.autograd.grad(loss, (v, b)), torch.autograd.grad(problem.reference(v, b).pow(2).sum(), (v, b)))
        assert len(handles._factors) == already and not factors_alive(system)
        assert system.stats.factorizations == 2 * k


def test_a_graph_holds_its_factor_and_nobody_else_does():
    problem = make(SPD, 9)
    system = problem.system()
    f = compiled(lambda v, b: system.solve(v, b))
    gc.collect()
    already = len(handles._factors)
    x = f(leaf(problem.values), problem.rhs(9))
    system.clear()
    assert len(handles._factors) == already + 1 and len(factors_alive(system)) == 1
    del x
    assert len(handles._factors) == already and not factors_alive(system)
    f(problem.values, problem.rhs(9))  # nobody will ask for a gradient
    assert len(handles._factors) == already


@each_backend
def test_a_graph_outlives_its_system(backend):
    problem = make(GENERAL, 9)
    system = problem.system()
    facade, behind = weakref.ref(system), weakref.ref(system._factorizer)
    v, b = leaf(problem.values), leaf(problem.rhs(9))
    f = compiled(lambda system, v, b: system.solve(v, b), backend)
    x = f(system, v, b)
    del system
    gc.collect()
    assert facade() is None and behind() is not None
    close(torch.autograd.grad(x.sum(), (v, b)), torch.autograd.grad(problem.reference(v, b).sum(), (v, b)))
    del x
    gc.collect()
    assert behind() is None  # the compiled function lives on and holds nothing
    same(partial(f, problem.system()), problem.reference, (v, b))


@each_backend
def test_values_changed_between_forward_and_backward(backend):
    problem = make(GENERAL, 9)
    for keep_factor in (True, False):
        f = compiled(problem.system(keep_factor=keep_factor).solve, backend)
        v, b = leaf(problem.values), leaf(problem.rhs(9))
        x = f(v, b)
        with torch.no_grad():
            v *= 2
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(x.sum(), (v, b))


# --- handles and operators --------------------------------------------------------------------------------------------

ops = torch.ops.spcache


@one_of_each
def test_a_copy_of_a_factor_handle_means_factorize_again(case):
    problem = make(case, 9)
    system, v, b = problem.system(), problem.values, problem.rhs(9)

    def solve(factor):
        close(ops.solve(v, b, system._handle, factor, True, False, True, False), problem.reference(v, b))
        return system.stats.factorizations

    handle = ops.factor(v, system._handle, None, None)
    system.clear()
    assert solve(handle) == 1
    copied = handle.clone()
    assert solve(copied) == 2
    del handle  # its memory is free for another handle, of another factor
    others = [ops.factor(v * k, system._handle, None, None) for k in range(2, 10)]
    assert solve(copied) == 11 and len(others) == 8


def test_a_copy_of_a_system_handle_finds_the_system():
    problem = make(SPD, 9)
    system = problem.system()
    ops.factor(problem.values, system._handle.clone(), None, None)
    ops.factor(problem.values, copy.deepcopy(system._handle), None, None)
    assert (system.stats.factorizations, system.stats.reuses) == (1, 1)
    handle = system._handle.clone()
    del system
    with pytest.raises(RuntimeError, match="the SparseSystem of this compiled code is gone, or belongs to another"):
        ops.factor(problem.values, handle, None, None)


@pytest.mark.parametrize("requires_grad", [False, True], ids=["plain", "requires-grad"])
@pytest.mark.parametrize(("case", "batch"), [(SPD, ()), (COMPLEX, (2,))], ids=str)
@pytest.mark.parametrize("name", ["system", "factor", "solve", "matvec", "outer"])
def test_operators(name, case, batch, requires_grad):
    """Schema, fake tensors, autograd registration and dispatch under AOTAutograd, by torch's own checks."""
    problem = make(case, 5, batch)
    holder = problem.system()
    system, v = holder._handle, problem.values.requires_grad_(requires_grad)
    b, u, w = (problem.rhs(*batch, 5, 2, seed=k).requires_grad_(requires_grad) for k in range(3))
    vector = problem.rhs(*batch, 5).requires_grad_(requires_grad)
    factor = ops.factor(v.detach(), system, None, None)
    calls = {
        "system": [(problem.indices, 5, case.kind)],
        "factor": [(v, system, None, None), (v, system, factor, None), (v, system, None, b)],
        "solve": [
            (v, *rest)
            for flags in [(False, True, False), (True, False, True), (True, True, False)]  # adjoint, check, cotangent
            for rest in [(b, system, factor, False, *flags), (vector, system, factor, True, *flags)]
        ],
        "matvec": [(v, b, system, adjoint, 5) for adjoint in (False, True)],
        "outer": [(u, w, system, False, v.shape[-1]), (vector, vector, system, True, v.shape[-1])],
    }
    for arguments in calls[name]:
        opcheck(getattr(ops, name).default, arguments)


# --- torch.func inside of compiled code -------------------------------------------------------------------------------


def loss(solve):
    return lambda v, b: solve(v, b).pow(2).sum() + solve(v, b).pow(3).sum()


def _along(f):
    """f and its derivative in a direction that does not change."""
    return lambda v, b: jvp(f, (v, b), (v.flip(0).sin(), b.cos()))


def _stacked(f):
    return lambda v, b: vmap(f)(torch.stack([v, 2 * v]), torch.stack([b, 3 * b]))


TRANSFORMS = {  # of solve(values, b)
    "grad": lambda f: grad(loss(f), (0, 1)),
    "vjp": lambda f: lambda v, b: vjp(f, v, b)[1](b),
    "jvp": _along,
    "jvp-of-values": lambda f: lambda v, b: jvp(lambda v: f(v, b), (v,), (v.flip(0),)),
    "jvp-of-b": lambda f: lambda v, b: jvp(lambda b: f(v, b), (b,), (b.flip(0),)),
    "jacrev": lambda f: jacrev(f, (0, 1)),
    "jacfwd": lambda f: jacfwd(f, (0, 1)),
    "vmap": _stacked,
    "vmap-of-b": lambda f: lambda v, b: vmap(f, (None, 0))(v, torch.stack([b, 3 * b])),
    "vmap-of-grad": lambda f: _stacked(grad(loss(f))),
    "grad-of-vmap": lambda f: grad(lambda v, b: _stacked(f)(v, b).pow(2).sum(), (0, 1)),
    "hessian": lambda f: hessian(loss(f), (0, 1)),
    "jacrev-of-jacrev": lambda f: jacrev(jacrev(f, (0, 1)), (0, 1)),
    "jvp-of-grad": lambda f: _along(grad(loss(f), (0, 1))),
    "jvp-of-jvp": lambda f: _along(lambda v, b: _along(f)(v, b)[1]),
}
# The dense reference in reverse mode: torch's forward mode of it would be no independent witness.
REFERENCES = TRANSFORMS | {
    "jacfwd": TRANSFORMS["jacrev"],
    "hessian": lambda f: jacrev(jacrev(loss(f), (0, 1)), (0, 1)),
}
# torch 2.6 and 2.11 make the bases of Jacobians out of numbers that they cannot trace; of a dense function too.
UNTRACEABLE = {"jacfwd", "hessian", "jacrev-of-jacrev"} if TORCH < (2, 12) else set()


def of_reals(case, solve):
    """The same function of real numbers, so that Jacobians and Hessians mean the same for complex cases."""
    if not case.dtype.is_complex:
        return solve
    return lambda v, b: torch.view_as_real(solve(torch.view_as_complex(v), torch.view_as_complex(b)))


@pytest.mark.parametrize(
    ("case", "backend", "transform"),
    [
        *((GENERAL, "eager", t) for t in ("grad", "jacfwd", "vmap", "jvp-of-grad")),
        *((SPD, "aot_eager", t) for t in TRANSFORMS),
        *((COMPLEX, "aot_eager", t) for t in ("vjp", "jvp", "jacrev", "vmap-of-grad", "hessian")),
    ],
    ids=str,
)
def test_transforms_inside(case, backend, transform):
    if transform in UNTRACEABLE:
        pytest.skip("this version of torch cannot trace it, whatever the function")
    problem = make(case, 3)
    system, v, b = problem.system(), problem.values, problem.rhs(3)
    if case.dtype.is_complex:
        v, b = torch.view_as_real(v), torch.view_as_real(b)
    f = compiled(TRANSFORMS[transform](of_reals(case, system.solve)), backend)
    close(f(v, b), REFERENCES[transform](of_reals(case, problem.reference))(v, b), 1e5)
    assert system.stats.factorizations == 1


@some_cases
@each_backend
def test_jvp_of_matmul_inside(case, backend):
    problem = make(case, 4)
    system, v, x = problem.system(), problem.values, problem.rhs(4)
    f = compiled(lambda v, x: jvp(system.matmul, (v, x), (v.flip(0), x.flip(0))), backend)
    close(f(v, x), jvp(lambda v, x: problem.matrix(v) @ x, (v, x), (v.flip(0), x.flip(0))))


@each_backend
def test_transforms_of_a_factor_inside(backend):
    problem = make(GENERAL, 4)
    system, v, b = problem.system(), problem.values, problem.rhs(4)
    outside = system.factorize(v)
    system.clear()

    def expected(v, b):
        return problem.reference(v, problem.reference(v, b).sin(), adjoint=True)

    def through(v, b):
        inside = system.factorize(v)
        return inside.solve(inside.solve(b).sin(), adjoint=True)

    def of_outside(b):
        return vmap(outside.solve)(torch.stack([b, 2 * b])), jvp(outside.solve, (b,), (b.flip(0),))[1]

    x = problem.reference(v, b)
    close(compiled(of_outside, backend)(b), (torch.stack([x, 2 * x]), problem.reference(v, b.flip(0))))
    assert system.stats.factorizations == 1
    close(compiled(_along(through), backend)(v, b), _along(expected)(v, b), 1e4)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_second_derivative_through_compiled_code_is_refused(backend):
    problem = make(SPD, 9)
    v, b = leaf(problem.values), leaf(problem.rhs(9))
    first = torch.autograd.grad(compiled(problem.system().solve, backend)(v, b).sum(), (v, b), create_graph=True)
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        torch.autograd.grad(first[0].sum(), (v, b))


def test_a_second_derivative_by_the_eager_backend():
    problem = make(SPD, 5)
    v, b = leaf(problem.values), leaf(problem.rhs(5))

    def second(solve):
        first = torch.autograd.grad(solve(v, b).pow(2).sum(), (v, b), create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in first), (v, b))

    close(second(compiled(problem.system().solve, "eager")), second(problem.reference), 1e4)


# --- no tangent is lost -----------------------------------------------------------------------------------------------


@warm_or_not
@one_of_each
def test_dual_numbers_with_the_eager_backend(case, warm):
    problem = make(case, 5)
    v, b = problem.values, problem.rhs(5)

    def results(f):
        with forward_ad.dual_level():
            both = f(forward_ad.make_dual(v, v.flip(0)), forward_ad.make_dual(b, b.flip(0)))
            one = f(v, forward_ad.make_dual(b, b.flip(0)))
            return forward_ad.unpack_dual(both).tangent, forward_ad.unpack_dual(one).tangent, f(v, b)

    f = compiled(problem.system().solve, "eager")
    if warm:
        f(v, b)
    close(results(f), results(problem.reference))


@warm_or_not
@pytest.mark.parametrize(
    ("operation", "backend"), [*((o, "aot_eager") for o in ("solve", "matmul", "pair", "factor")), ("solve", "inductor")]
)  # fmt: skip
def test_dual_numbers_are_refused_by_compiled_code(operation, backend, warm):
    problem = make(GENERAL, 5)
    system, v, b = problem.system(), problem.values, problem.rhs(5)
    operations = {
        "solve": lambda v, b: system.solve(v, b),
        "matmul": lambda v, b: system.matmul(v, b),
        "pair": lambda v, b: spcache.solve((problem.indices, v), b),
        "factor": partial(lambda factor, v, b: factor.solve(b), system.factorize(v)),
    }
    f = compiled(operations[operation], backend)
    if warm:
        f(v, b)
        f(leaf(v), leaf(b))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(b, b.flip(0))
        with pytest.raises(RuntimeError, match="its tangents would be lost"):
            f(v, dual)
        if operation != "factor":
            with pytest.raises(RuntimeError, match="its tangents would be lost"):
                f(forward_ad.make_dual(v, v.flip(0)), b)
        with pytest.raises(RuntimeError, match="jvp|its tangents would be lost"):  # torch's own refusal, or ours
            f(v, forward_ad.make_dual(leaf(b), b.flip(0)))
    close(f(v, b), operations[operation](v, b))  # outside of the level it goes on


@each_backend
@some_cases
def test_dual_numbers_inside_of_compiled_code(case, backend):
    problem = make(case, 5)
    v, b = problem.values, problem.rhs(5)

    def tangent(solve):
        def f(v, b):
            with forward_ad.dual_level():
                x = solve(forward_ad.make_dual(v, v.flip(0)), forward_ad.make_dual(b, b.flip(0)))
                return forward_ad.unpack_dual(x).tangent

        return f

    system = problem.system()
    close(compiled(tangent(system.solve), backend)(v, b), tangent(problem.reference)(v, b))
    both = torch.stack([v, 2 * v]), torch.stack([b, 3 * b])
    close(compiled(tangent(vmap(system.solve)), backend)(*both), tangent(vmap(problem.reference))(*both))


@warm_or_not
@pytest.mark.parametrize("fullgraph", [True, False], ids=["fullgraph", "breaks"])
@pytest.mark.parametrize("transform", ["grad", "jvp", "jacfwd", "vmap"])
@each_backend
def test_transforms_of_a_compiled_function_are_right_or_refused(backend, transform, fullgraph, warm):
    problem = make(GENERAL, 4)
    v, b = problem.values, problem.rhs(4)
    f = torch.compile(problem.system().solve, backend=backend, fullgraph=fullgraph)
    if warm:
        f(v, b)
    try:
        result = TRANSFORMS[transform](f)(v, b)
    except Exception as error:
        assert any(words in str(error) for words in ("functorch", "torch.func", "tangents would be lost")), error
    else:
        close(result, REFERENCES[transform](problem.reference)(v, b), 1e4)
    close(f(v, b), problem.reference(v, b))  # nothing is left behind


@each_backend
def test_cotangents_that_are_dual_or_batched_are_right_or_refused(backend):
    problem = make(SPD, 9)
    v, b, g, g_dot = leaf(problem.values), leaf(problem.rhs(9)), problem.rhs(9, seed=3), problem.rhs(9, seed=4)
    x, y = compiled(problem.system().solve, backend)(v, b), problem.reference(v, b)

    def tangents(x):
        with forward_ad.dual_level():
            gradients = torch.autograd.grad(x, (v, b), forward_ad.make_dual(g, g_dot), retain_graph=True)
            return tuple(forward_ad.unpack_dual(t).tangent for t in gradients)

    def batched(x):
        return torch.autograd.grad(x, (v, b), torch.stack([g, g_dot]), is_grads_batched=True, retain_graph=True)

    if backend == "eager":
        close(tangents(x), tangents(y))
        with pytest.raises(TypeError, match="use torch.func"):
            batched(x)
    else:
        close(batched(x), batched(y))
        with pytest.raises(RuntimeError, match="its tangents would be lost"):
            tangents(x)


# --- errors -----------------------------------------------------------------------------------------------------------


def _spoil(t, number):
    return torch.cat([t[:3], torch.full_like(t[:1], number), t[4:]])


WRONG = {  # (values, b) made of those that are right
    "length of b": lambda v, b: (v, b[1:]),
    "rows of a matrix": lambda v, b: (v, b.expand(8, 9).mT[1:]),
    "a scalar b": lambda v, b: (v, b[0]),
    "length of values": lambda v, b: (v[1:], b),
    "dtype of b": lambda v, b: (v, b.float()),
    "dtype of values": lambda v, b: (v.half(), b.half()),
    "nan in values": lambda v, b: (_spoil(v, torch.nan), b),
    "infinite b": lambda v, b: (v, _spoil(b, torch.inf)),
    "not positive definite": lambda v, b: (-v, b),
    "one of a batch": lambda v, b: (torch.stack([v, -v]), b),
    "not symmetric": lambda v, b: (v * torch.linspace(1, 2, len(v), dtype=v.dtype), b),
}


def raised(f, *arguments):
    with pytest.raises(Exception) as caught:
        f(*arguments)
    return caught.value


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize(
    ("operation", "backend"),
    [("solve", "eager"), ("solve", "aot_eager"), ("factorize", "aot_eager")],
)
def test_errors_are_those_of_eager_code(operation, backend, wrong):
    problem = make(SPD, 9)
    v, b = problem.values, problem.rhs(9)

    def of(system):
        return system.solve if operation == "solve" else lambda v, b: system.factorize(v).solve(b)

    expected = raised(of(problem.system()), *WRONG[wrong](v, b))
    assert type(expected) in (ValueError, TypeError, spcache.NotPositiveDefiniteError)
    f = compiled(of(problem.system()), backend)
    for _ in range(2):
        error = raised(f, *WRONG[wrong](v, b))
        assert type(error) is type(expected) and vars(error) == vars(expected)  # column and batch
        assert str(error).startswith(str(expected))  # torch may add where it happened
        close(f(v, b), problem.reference(v, b))


@each_backend
def test_a_singular_matrix(backend):
    problem = make(GENERAL, 9)
    v, b = problem.values, problem.rhs(9)
    f = compiled(problem.system().solve, backend)
    with pytest.raises(spcache.SingularMatrixError, match="singular to working precision at column 4") as caught:
        f(torch.where(problem.indices[1] == 4, 0.0, v), b)
    assert caught.value.column == 4
    same(f, problem.reference, (v, b))


@each_backend
def test_what_is_found_while_tracing(backend):
    """Errors of torch, then; and nothing was done."""
    problem = make(SPD, 9, (2,))
    system = problem.system()
    f = compiled(system.solve, backend)
    with pytest.raises(Exception, match="broadcast|hape mismatch"):
        f(problem.values, problem.rhs(3, 9))
    with pytest.raises(Exception, match="dim"):
        f(problem.values, "b")
    assert system.stats.factorizations == 0
    same(f, problem.reference, (problem.values, problem.rhs(2, 9)))


@each_backend
def test_a_rectangle_is_not_solved(backend):
    for m, n in (5, 8), (8, 5):
        system, values, _ = rectangular(m, n)
        for f in system.solve, lambda v, b, system=system: system.factorize(v).solve(b):
            with pytest.raises(ValueError, match=f"needs a square matrix, this system has shape .{m}, {n}.; lstsq"):
                compiled(f, backend)(values, torch.randn(m).double())
        with pytest.raises(ValueError, match=f"x of shape .{m},.* does not fit"):
            compiled(system.matmul, backend)(values, torch.randn(m).double())


@one_of_each
@each_backend
def test_a_masked_loss_without_checks(case, backend):
    """check=False: NaN where a matrix has no factor, and no gradient where the loss does not look."""
    problem = make(case, 9, (2,))
    v, b = problem.values.clone(), leaf(problem.rhs(2, 9))
    v[1] = -v[1] if case is SPD else 0
    v = leaf(v)
    x = compiled(problem.system(check=False).solve, backend)(v, b)
    assert x[1].isnan().all()
    gradients = torch.autograd.grad(x[0].pow(2).sum(), (v, b))
    assert not gradients[0][1].any() and not gradients[1][1].any()
    v, b = leaf(v[0]), leaf(b[0])
    expected = torch.autograd.grad(problem.reference(v, b).pow(2).sum(), (v, b))
    close((gradients[0][0], gradients[1][0]), expected)


# --- graph breaks -----------------------------------------------------------------------------------------------------


@each_backend
def test_solve_ex_breaks_the_graph(backend):
    """What is right in eager code stays right, and Dynamo looks at nothing inside: what it compiles is what is around,
    for twelve systems as often as for two."""
    counter = CompileCounterWithBackend(backend)

    def f(system, v, b):
        x, info = system.solve_ex(v * 2, b)
        return torch.where(info[:, None] == 0, x, 0.0).pow(2).sum(), x, info

    g = torch.compile(f, backend=counter)
    for k in range(12):
        problem = make(SPD, 6 + 2 * k, (2,))
        system, v, b = problem.system(), problem.values.clone(), leaf(problem.rhs(2, 6 + 2 * k))
        v[1] *= -1
        v = leaf(v)
        (loss, x, info), (expected_loss, expected_x, expected_info) = g(system, v, b), f(problem.system(), v, b)
        assert info.tolist() == expected_info.tolist() and info[0] == 0 < info[1]
        assert x[1].isnan().all()
        close(x[0], expected_x[0])
        close(torch.autograd.grad(loss, (v, b)), torch.autograd.grad(expected_loss, (v, b)))
    assert counter.frame_count <= 4
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(f, backend)(system, v, b)


@each_backend
def test_a_sparse_matrix_breaks_the_graph(backend):
    f = torch.compile(lambda A, b: spcache.solve(A, b * 2, kind="general").sin(), backend=backend)
    for n in 6, 8, 10:
        problem = make(GENERAL, n)
        b = leaf(problem.rhs(n))
        A = torch.sparse_coo_tensor(problem.indices, problem.values, (n, n)).coalesce()
        x, expected = f(A, b), problem.reference(problem.values, b * 2).sin()
        close(x, expected)
        close(torch.autograd.grad(x.sum(), b), torch.autograd.grad(expected.sum(), b))


@pytest.mark.parametrize("where", ["compiled", "eager"])
@each_backend
def test_backward_inside_of_compiled_code(where, backend):
    """A whole step is compiled. Dynamo follows the engine into the rules of nodes made by eager code, and must not look
    into ours."""
    counter = CompileCounterWithBackend(backend)

    def forward(system, v, b):
        return system.solve(v, b).pow(2).sum() + system.matmul(v, b).pow(2).sum()

    inner = torch.compiler.disable(forward) if where == "eager" else forward

    def step(system, v, b):
        value = inner(system, v, b * 1.0)
        value.backward()
        return value

    f = torch.compile(step, backend=counter)
    for problem in twelve():
        system, v, b = problem.system(), leaf(problem.values), problem.rhs(problem.n)
        for k in 1, 2:
            v.grad = None
            value, w = f(system, v, b), leaf(v)
            expected = problem.reference(w, b).pow(2).sum() + (problem.matrix(w) @ b).pow(2).sum()
            close(value, expected)
            close((v.grad,), torch.autograd.grad(expected, w))
            assert (system.stats.factorizations, system.stats.solves) == (k, 2 * k)
            with torch.no_grad():
                v *= 1.5
    assert counter.frame_count <= 4


# --- contexts ---------------------------------------------------------------------------------------------------------


@every_backend
def test_checkpoint(backend):
    """Recomputed values are found again, not factorized."""
    problem = make(GENERAL, 9)
    system = problem.system()

    def through(solve):
        return lambda v, b: solve(v.sin(), b).cos()

    def f(v, b):
        return checkpoint(through(system.solve), v, b, use_reentrant=False).pow(2).sum()

    v = torch.asin(problem.values / problem.values.abs().max() / 1.1)
    same(compiled(f, backend), lambda v, b: through(problem.reference)(v, b).pow(2).sum(), (v, problem.rhs(9)), 1e5)
    assert system.stats.factorizations == 1 and system.stats.solves == 3 - (backend == "eager" and TORCH < (2, 12))


@each_backend
def test_no_grad_and_inference_mode(backend):
    problem = make(SPD, 9)
    system, v, b = problem.system(), leaf(problem.values), leaf(problem.rhs(9))
    expected = problem.reference(v, b)
    f = compiled(lambda v, b: system.solve(v, b), backend)
    with torch.no_grad():
        x = f(v, b)
    assert not x.requires_grad
    close(x, expected)
    with torch.inference_mode():
        x = f(v, b)
        assert x.is_inference()
        close(x, expected)
        inference = v.clone()
        close(f(inference, b.clone()), expected)
        factor = system.factorize(inference)
        close(compiled(lambda b: factor.solve(b), backend)(b), expected)
    same(f, problem.reference, (v, b))  # the modes left nothing behind
    assert system.stats.factorizations == 1

    def switched_off_inside(v, b):
        with torch.no_grad():
            x = system.solve(v, b)
        return x + system.solve(v, b)

    x = compiled(switched_off_inside, backend)(v, b)
    close(torch.autograd.grad(x.sum(), (v, b)), torch.autograd.grad(expected.sum(), (v, b)))


@each_backend
def test_other_threads(backend):
    """Compiled here, run by several threads at once, each with a system of its own; and compiled in a thread."""
    problems = [make(GENERAL, n) for n in (6, 8, 10, 12, 14)]
    f = compiled(lambda system, v, b: system.solve(v, b), backend)
    for problem in problems[:2]:
        same(partial(f, problem.system()), problem.reference, (problem.values, problem.rhs(problem.n)))
    failures, counts = [], []

    def work(f, problem):
        try:
            system = problem.system()
            for k in range(1, 11):
                same(partial(f, system), problem.reference, (problem.values * k, problem.rhs(problem.n)))
            counts.append((system.stats.factorizations, system.stats.solves))
        except BaseException as error:
            failures.append(error)

    def run(*jobs):
        threads = [threading.Thread(target=work, args=job) for job in jobs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    run(*((f, problem) for problem in problems[2:]))
    run((compiled(lambda system, v, b: system.solve(v, b * 2) / 2, backend), problems[0]))
    assert not failures and counts == [(10, 20)] * 4
