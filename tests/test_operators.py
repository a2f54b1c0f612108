"""`solve_operator`: solutions, derivatives of every order, and everything that could lose one in silence."""

import gc
import threading
import weakref
from contextlib import nullcontext

import pytest
import torch
from cases import relative_error
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import spcache
from spcache._operators import SOLVERS, solve_operator
from spcache.errors import NotConvergedError
from spcache.iterative import Solution, block_diagonal, incomplete

pytestmark = pytest.mark.usefixtures("one_thread")

D = torch.float64
EXACT = {"rtol": 1e-13, "atol": 0.0}
DTYPES = {torch.float32: 1e-4, torch.float64: 1e-9, torch.complex64: 1e-4, torch.complex128: 1e-9}


def matrix(n, dtype=D, hermitian=False, seed=1):
    """Diagonally dominant, Hermitian positive definite or far from symmetric."""
    random = torch.Generator().manual_seed(seed)
    A = torch.randn(n, n, dtype=dtype, generator=random)
    A = (A + A.mH) / 2 if hermitian else A
    return A / A.abs().sum(1).max() + torch.eye(n, dtype=dtype) * 1.2


def vector(*shape, dtype=D, seed=2):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def leaf(t):
    return t.detach().clone().requires_grad_()


class Dense:
    """A solver that counts: `apply` made a matrix, by columns. Records the right-hand sides."""

    def __init__(self):
        self.rhs = []
        self.options = []

    def __call__(self, apply, b, **options):
        self.rhs.append(b.clone())
        self.options.append(options)
        columns = [apply(e) for e in torch.eye(len(b), dtype=b.dtype)]
        return torch.linalg.solve(torch.stack(columns, 1), b), "status"


# --- solutions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("solver", SOLVERS)
def test_solution_and_gradients(solver, dtype):
    """By every named solver, against the dense solve."""
    A, b = leaf(matrix(12, dtype, solver in ("cg", "minres"))), leaf(vector(12, dtype=dtype))
    g = vector(12, dtype=dtype, seed=3)
    tolerance = {"atol": 1e-11, "btol": 1e-11} if solver == "lsmr" else {"rtol": DTYPES[dtype] / 100}
    if solver == "lsmr" and dtype in (torch.float32, torch.complex64):
        tolerance = {"atol": 1e-7, "btol": 1e-7}
    x = solve_operator(lambda x: A @ x, b, solver=solver, **tolerance)
    expected = torch.linalg.solve(A, b)
    assert x.dtype == dtype and relative_error(x, expected) < DTYPES[dtype]
    for ours, theirs in zip(torch.autograd.grad(x, (A, b), g), torch.autograd.grad(expected, (A, b), g), strict=True):
        assert relative_error(ours, theirs) < DTYPES[dtype]


@pytest.mark.parametrize("shape", [(), (6,), (2, 3), (2, 1, 3, 2)], ids=str)
def test_any_shape(shape):
    """A mixes all dimensions: a solver that took the first for a batch would be wrong."""
    n = max(1, torch.Size(shape).numel())
    A, b = leaf(matrix(n)), leaf(vector(*shape))
    x = solve_operator(lambda x: (A @ x.reshape(-1)).reshape(shape), b, solver="gmres", **EXACT)
    expected = torch.linalg.solve(A, b.reshape(-1)).reshape(shape)
    assert x.shape == b.shape and relative_error(x, expected) < 1e-11
    ours = torch.autograd.grad((x**2).sum(), (A, b))
    for one, other in zip(ours, torch.autograd.grad((expected**2).sum(), (A, b)), strict=True):
        assert relative_error(one, other) < 1e-11


def test_no_unknowns():
    b = torch.empty(0, 3, requires_grad=True)
    x = solve_operator(lambda x: 2 * x, b)
    assert x.shape == (0, 3)
    x.sum().backward()
    assert b.grad.shape == (0, 3)


class WithAdjoint:
    """An object that multiplies; its adjoint under any of the usual names."""

    def __init__(self, A, name, wrong=1):
        self.A = A
        if name == "rmatvec":
            self.rmatvec = lambda v: wrong * (A.mH @ v)
        elif name == "adjoint(v)":
            self.adjoint = lambda v: wrong * (A.mH @ v)
        elif name == "adjoint()":
            self.adjoint = lambda: wrong * A.mH
        elif name is not None:
            setattr(self, name, wrong * (A.T if name == "T" else A.mH))

    def matvec(self, x):
        return self.A @ x


ADJOINTS = (None, "rmatvec", "adjoint(v)", "adjoint()", "H", "mH", "T")


@pytest.mark.parametrize("name", ADJOINTS)
def test_adjoints_of_objects(name):
    """H is conjugated, T is not; without any of them the derivative serves."""
    A, b = matrix(7, torch.complex128), leaf(vector(7, dtype=torch.complex128))
    x = solve_operator(WithAdjoint(A, name), b, solver="bicgstab", **EXACT)
    g = vector(7, dtype=torch.complex128, seed=4)
    (grad,) = torch.autograd.grad(x, b, g)
    assert relative_error(grad, torch.linalg.solve(A.mH, g)) < 1e-10


@pytest.mark.parametrize("name", ADJOINTS[1:])
def test_wrong_adjoints_are_found_out(name):
    b = leaf(vector(7))
    x = solve_operator(WithAdjoint(matrix(7), name, wrong=1.001), b, solver=Dense())
    with pytest.raises(ValueError, match="adjoint is not the adjoint of A: relative difference 1.0e-03"):
        x.sum().backward()


def test_an_adjoint_of_ones_own():
    A, b, calls = leaf(matrix(7)), leaf(vector(7)), []

    def adjoint(v):
        calls.append(v)
        return A.mH @ v

    x = solve_operator(lambda x: A @ x, b, solver=Dense(), adjoint=adjoint)
    assert not calls
    grads = torch.autograd.grad(x.sum(), (A, b), create_graph=True)
    assert len(calls) == 8  # seven columns, one comparison
    hvp = torch.autograd.grad(sum((t**2).sum() for t in grads), A)[0]
    reference = torch.autograd.grad(torch.linalg.solve(A, b).sum(), (A, b), create_graph=True)
    assert relative_error(hvp, torch.autograd.grad(sum((t**2).sum() for t in reference), A)[0]) < 1e-11
    with pytest.raises(TypeError, match="adjoint must be a callable"):
        solve_operator(A, b, adjoint=A)


def test_operators_that_autograd_cannot_follow():
    """Somebody else's code, by NumPy, say: the adjoint is needed as soon as a gradient is, and said to be."""
    A, b = matrix(6), leaf(vector(6))

    def opaque(x):
        return torch.from_numpy(A.numpy() @ x.detach().numpy())

    with pytest.raises(TypeError, match="pass adjoint="):
        solve_operator(opaque, b, solver="gmres", **EXACT)
    assert solve_operator(opaque, b.detach(), solver="gmres", **EXACT).shape == (6,)

    def with_adjoint(b):
        return solve_operator(opaque, b, solver="gmres", adjoint=lambda v: A.T @ v, **EXACT)

    assert gradcheck(with_adjoint, b) and gradgradcheck(with_adjoint, b)
    S = matrix(6, hermitian=True)
    x = solve_operator(lambda x: torch.from_numpy(S.numpy() @ x.detach().numpy()), b, **EXACT)  # its own
    assert relative_error(torch.autograd.grad(x.sum(), b)[0], torch.linalg.solve(S, torch.ones(6, dtype=D))) < 1e-10


def test_matrices():
    """Dense and sparse, as they are."""
    A, b = matrix(6), leaf(vector(6))
    for layout in (torch.strided, torch.sparse_coo, torch.sparse_csr):
        x = solve_operator(A if layout is torch.strided else A.to_sparse(layout=layout), b, solver="gmres", **EXACT)
        assert relative_error(x, torch.linalg.solve(A, b)) < 1e-11
        (grad,) = torch.autograd.grad(x.sum(), b)
        assert relative_error(grad, torch.linalg.solve(A.T, torch.ones(6, dtype=D))) < 1e-11


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc], ids=str)
@pytest.mark.parametrize("solver", ["gmres", "cg"])
@pytest.mark.parametrize("columns", [None, 2])
def test_gradients_of_sparse_matrices_are_sparse(layout, solver, columns):
    """In the layout of A, at its entries: nothing of n x n numbers is made."""
    dense = matrix(6, hermitian=solver == "cg") * (torch.eye(6) + torch.eye(6).roll(2, 0) + torch.eye(6).roll(-2, 0))
    A, b = dense.to_sparse(layout=layout).requires_grad_(), leaf(vector(6) if columns is None else vector(6, columns))
    x = solve_operator(A, b, solver=solver, **EXACT)
    ours = torch.autograd.grad((x**2).sum(), (A, b))
    dense.requires_grad_()
    expected = torch.autograd.grad((torch.linalg.solve(dense, b) ** 2).sum(), (dense, b))
    assert ours[0].layout is layout and ours[0]._nnz() == 18
    assert relative_error(ours[0].to_dense(), expected[0] * (dense != 0)) < 1e-10
    assert relative_error(ours[1], expected[1]) < 1e-10


def test_second_derivatives_of_sparse_matrices():
    indices = torch.tensor([[0, 1, 2, 0, 2], [0, 1, 2, 2, 1]])

    def solve(values, b):
        return solve_operator(torch.sparse_coo_tensor(indices, values, (3, 3)), b, solver="gmres", **EXACT)

    inputs = leaf(torch.tensor([3.0, 2, 4, 1, -1], dtype=D)), leaf(vector(3))
    assert gradcheck(solve, inputs) and gradgradcheck(solve, inputs)


# --- options -------------------------------------------------------------------------------------------------------


def test_a_solver_of_ones_own():
    A, b, solver = leaf(matrix(5)), leaf(vector(5, 1)), Dense()
    x = solve_operator(lambda x: A @ x, b, solver=solver, depth=3, x0=b)
    x.sum().backward()
    assert [rhs.shape for rhs in solver.rhs] == [(5,), (5,)]
    assert solver.options == [{"depth": 3, "x0": b}, {"depth": 3}]  # x0 is no start for an incoming gradient
    x = solve_operator(lambda x: A @ x, b, solver=solver, depth=3, adjoint_options={"depth": 4})
    x.sum().backward()
    assert solver.options[2:] == [{"depth": 3}, {"depth": 4}]
    with pytest.raises(ValueError, match="the solver must return 5 numbers of torch.float64, got 4"):
        solve_operator(lambda x: A @ x, b, solver=lambda apply, b: b[1:])


def test_solvers_may_ask_for_the_adjoint():
    A, b = leaf(matrix(5)), leaf(vector(5))

    def normal_equations(apply, b):
        N = torch.stack([apply.rmatvec(apply(e)) for e in torch.eye(5, dtype=D)], 1)
        return torch.linalg.solve(N, apply.rmatvec(b))

    def solve(A, b):
        return solve_operator(lambda x: A @ x, b, solver=normal_equations)

    assert gradcheck(solve, (A, b)) and gradgradcheck(solve, (A, b))


def test_b_is_not_for_solvers_to_write_into():
    b = torch.ones(3, dtype=D)
    x = solve_operator(lambda v: 2 * v, b, solver=lambda apply, c: c.div_(2))
    assert torch.equal(b, torch.ones(3, dtype=D)) and torch.equal(x, b / 2)


def test_damping_is_refused():
    """The derivative would be that of A x = b, which a damped x does not solve."""
    A, b = matrix(3), leaf(vector(3))
    with pytest.raises(ValueError, match=r"damp must be 0, got 1\.0"):
        solve_operator(A, b, solver="lsmr", damp=1.0)
    with pytest.raises(ValueError, match="damp must be 0"):
        solve_operator(A, b, solver="lsmr", adjoint_options={"damp": 1.0})
    assert solve_operator(A, b, solver="lsmr", damp=0).requires_grad


@pytest.mark.parametrize("kind", ["function", "module", "matrix", "factor", "ours"])
def test_preconditioners(kind):
    """M = A^-1: one iteration or two in each direction, with the adjoint of M in backward."""
    A, b, iterations = leaf(matrix(4)), leaf(vector(2, 2)), []
    inverse = torch.linalg.inv(A.detach())
    counted = []

    def apply(x):
        counted.append(1)
        return (A @ x.reshape(4)).reshape(2, 2)

    class Module(torch.nn.Module):
        def forward(self, r):
            return (inverse @ r.reshape(4)).reshape(2, 2)

    class Factor:
        def solve(self, r, adjoint=False):
            return (inverse.mH if adjoint else inverse) @ r

    ours = block_diagonal(A.detach(), 4)
    M = {"function": Module().forward, "module": Module(), "matrix": inverse, "factor": Factor(), "ours": ours}[kind]
    x = solve_operator(
        apply, b, solver="gmres", M=M, x0=torch.zeros(2, 2, dtype=D), callback=lambda x: iterations.append(1), **EXACT
    )
    assert 1 <= len(iterations) <= 2
    g = vector(2, 2, seed=5)
    solver_applications, forward_iterations = len(counted), len(iterations)
    (grad,) = torch.autograd.grad(x, b, g, retain_graph=True)
    assert relative_error(grad.reshape(4), torch.linalg.solve(A.T, g.reshape(4))) < 1e-11
    assert len(counted) == solver_applications  # backward runs on what forward kept
    assert len(iterations) == forward_iterations  # the callback is for forward


def test_a_preconditioner_without_derivative():
    """Says so in backward, where its adjoint is needed; with other options there it is not."""
    A, b = matrix(6), leaf(vector(6))
    M = incomplete(A.to_sparse_csr())
    for form in (lambda r: torch.from_numpy(M(r.detach()).numpy()), lambda r: torch.from_numpy(r.numpy()).clone()):
        with pytest.raises(RuntimeError, match="M has no derivative.*pass adjoint_options"):
            solve_operator(A, b, solver="gmres", M=form, **EXACT).sum().backward()
    with pytest.raises(RuntimeError, match="pass adjoint_options") if not hasattr(M, "adjoint") else nullcontext():
        solve_operator(A, b, solver="gmres", M=M, **EXACT).sum().backward()
    (grad,) = torch.autograd.grad(solve_operator(A, b, solver="gmres", M=M, adjoint_options=EXACT, **EXACT).sum(), b)
    assert relative_error(grad, torch.linalg.solve(A.T, torch.ones(6, dtype=D))) < 1e-11


def test_preconditioners_are_transposed(monkeypatch):
    """What the solver gets in backward is M^H, or M itself where A is Hermitian."""
    from spcache import iterative

    got, real = [], iterative.gmres

    def spy(A, b, x0=None, *, M=None, **options):
        I = torch.eye(len(b), dtype=b.dtype)
        got.append(M if isinstance(M, torch.Tensor) else torch.stack([M(e) for e in I], 1))
        return real(A, b, x0, **options)

    monkeypatch.setattr(iterative, "gmres", spy)
    monkeypatch.setattr(iterative, "cg", spy)
    A, M = matrix(4, torch.complex128), matrix(4, torch.complex128, seed=7)
    for form in (M, lambda r: M @ r):
        for solver in ("gmres", "cg"):
            got.clear()
            b = leaf(vector(4, dtype=torch.complex128))
            torch.autograd.backward(solve_operator(A, b, solver=solver, M=form, **EXACT), b.detach())
            torch.testing.assert_close(got[0], M)
            torch.testing.assert_close(got[1], M if solver == "cg" else M.mH)
    got.clear()
    options = {"M": 2 * M, **EXACT}  # for the adjoint already
    torch.autograd.backward(solve_operator(A, b, solver="gmres", M=M, adjoint_options=options, **EXACT), b.detach())
    torch.testing.assert_close(got[1], 2 * M)


def test_not_converged():
    """Raises in forward, and in backward; check=False returns what there is."""
    A, b = leaf(matrix(30)), leaf(vector(30))
    with pytest.raises(NotConvergedError):
        solve_operator(lambda x: A @ x, b, solver="bicgstab", rtol=1e-12, maxiter=2)
    x = solve_operator(lambda x: A @ x, b, solver="bicgstab", rtol=1e-12, maxiter=2, check=False)
    x.sum().backward()
    x = solve_operator(lambda x: A @ x, b, solver="bicgstab", adjoint_options={"rtol": 1e-12, "maxiter": 2})
    with pytest.raises(NotConvergedError):
        x.sum().backward()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: solve_operator(3, torch.ones(2)), TypeError, "A must be"),
        (lambda: solve_operator(abs, [1.0]), TypeError, "b must be a dense real or complex torch.Tensor, got list"),
        (lambda: solve_operator(abs, torch.ones(2, dtype=torch.int64)), TypeError, "torch.int64"),
        (lambda: solve_operator(abs, torch.eye(2).to_sparse()), TypeError, "torch.sparse_coo"),
        (lambda: solve_operator(abs, torch.ones(2, device="meta")), TypeError, "b must be on a device .* got meta"),
        (lambda: solve_operator(abs, torch.ones(2), solver="cq"), ValueError, "one of cg, minres.* got 'cq'"),
        (lambda: solve_operator(lambda x: x[1:], torch.ones(2)), ValueError, r"expected \(2,\) .* got \(1,\)"),
        (lambda: solve_operator(lambda x: x.double(), torch.ones(2)), ValueError, "got .* torch.float64"),
        (lambda: solve_operator(lambda x: None, torch.ones(2)), TypeError, "A must return a tensor, got NoneType"),
        (lambda: solve_operator(lambda x: x, torch.ones(2), rtoll=1), TypeError, "rtoll"),
    ],
)
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


# --- derivatives ---------------------------------------------------------------------------------------------------


def by_matrix(A, b):
    return solve_operator(lambda x: A @ x, b, solver="gmres", **EXACT)


def by_function_of_parameters(theta, b):
    """Not linear in theta, and K is no leaf; theta is also read directly: two ways lead to it."""
    K = theta**2
    return solve_operator(lambda x: K @ x + theta.T @ x + 2 * x, b, solver="gmres", **EXACT)


def by_symmetric(theta, b):
    K = theta @ theta.mH
    return solve_operator(lambda x: K @ x + x, b, solver="cg", **EXACT)


def by_minres(theta, b):
    return solve_operator(lambda x: (theta + theta.mH) @ x, b, solver="minres", **EXACT)


def inside_each_other(theta, b):
    """A Schur complement: A itself solves, with a matrix that depends on theta too."""
    C = theta @ theta.T
    inner = {"solver": "cg", **EXACT}
    return solve_operator(
        lambda x: 5 * x + theta @ solve_operator(lambda y: C @ y + y, theta.T @ x, **inner), b, solver="cg", **EXACT
    )


def hessian_of_something(theta, b):
    """A x is a second derivative: autograd is at work inside of A, on a graph made there."""
    point = vector(len(b), seed=9)

    def hessian(v):
        with torch.enable_grad():
            t = point.detach().requires_grad_()
            (g,) = torch.autograd.grad(((theta @ t) ** 2).sum() + (t**4).sum(), t, create_graph=True)
            return torch.autograd.grad(g, t, v, create_graph=True)[0]

    return solve_operator(hessian, b, **EXACT)


def hessian_made_before(theta, b):
    """On a graph made outside of A: its leaves are found behind it."""
    t = vector(len(b), seed=9).requires_grad_()
    (g,) = torch.autograd.grad(((theta @ t) ** 2).sum() + (t**4).sum(), t, create_graph=True)
    return solve_operator(lambda v: torch.autograd.grad(g, t, v, create_graph=True)[0], b, **EXACT)


def by_torch_func(theta, b):
    point = vector(len(b), seed=9)
    gradient = torch.func.grad(lambda t: ((theta @ t) ** 2).sum() + (t**4).sum())
    return solve_operator(lambda v: torch.func.vjp(gradient, point)[1](v)[0], b, **EXACT)


class Times(torch.autograd.Function):
    """W x, which no torch function sees."""

    @staticmethod
    def forward(ctx, W, x):
        ctx.save_for_backward(W, x)
        return W @ x

    @staticmethod
    def backward(ctx, g):
        W, x = ctx.saved_tensors
        return torch.outer(g, x.conj()), W.mH @ g


def by_a_function_of_ones_own(theta, b):
    return solve_operator(lambda x: Times.apply(theta, x) + (theta**2) @ x, b, solver="gmres", **EXACT)


FORMS = [
    by_matrix, by_function_of_parameters, by_symmetric, by_minres, inside_each_other, hessian_of_something,
    hessian_made_before, by_torch_func, by_a_function_of_ones_own,
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.__name__)
def test_finite_differences(form):
    inputs = leaf(matrix(4)), leaf(vector(4))
    assert gradcheck(form, inputs)
    assert gradgradcheck(form, inputs, atol=1e-4)


@pytest.mark.parametrize("form", [by_matrix, by_symmetric, by_minres], ids=lambda f: f.__name__)
def test_finite_differences_of_complex_numbers(form):
    inputs = leaf(matrix(3, torch.complex128)), leaf(vector(3, dtype=torch.complex128))
    assert gradcheck(form, inputs)
    assert gradgradcheck(form, inputs, atol=1e-4)


def test_third_derivatives():
    theta, b = leaf(matrix(4)), leaf(vector(4))

    def third(x):
        total = (x**3).sum()
        for _ in range(2):
            total = sum((g**3).sum() for g in torch.autograd.grad(total, (theta, b), create_graph=True))
        return torch.autograd.grad(total, (theta, b))

    dense = torch.linalg.solve(theta**2 + theta.T + 2 * torch.eye(4, dtype=D), b)
    for ours, reference in zip(third(by_function_of_parameters(theta, b)), third(dense), strict=True):
        assert relative_error(ours, reference) < 1e-9


class Scaled(torch.nn.Module):
    def __init__(self, n):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.linspace(1, 2, n, dtype=D))
        self.unused = torch.nn.Parameter(torch.ones(3, dtype=D))
        self.frozen = torch.nn.Parameter(torch.tensor(2.0, dtype=D), requires_grad=False)
        self.register_buffer("shift", torch.ones(n, dtype=D))

    def forward(self, x):
        return self.frozen * self.weight * x + self.shift * x


def test_modules():
    """Parameters that A does not read, and frozen ones, get None."""
    A, b = Scaled(3), leaf(vector(3))
    solve_operator(A, b, **EXACT).sum().backward()
    d = 2 * A.weight.detach() + 1
    torch.testing.assert_close(A.weight.grad, -2 * b.detach() / d**2)
    torch.testing.assert_close(b.grad, 1 / d)
    assert A.unused.grad is None and A.frozen.grad is None


@pytest.mark.parametrize("wanted", ["b", "theta"])
def test_only_what_is_needed(wanted):
    A, b = matrix(4), vector(4)
    (b if wanted == "b" else A).requires_grad_()
    solve_operator(lambda x: A @ x, b, solver="gmres", **EXACT).sum().backward()
    lam = torch.linalg.solve(A.detach().T, torch.ones(4, dtype=D))
    if wanted == "b":
        assert relative_error(b.grad, lam) < 1e-11 and A.grad is None
    else:
        expected = -torch.outer(lam, torch.linalg.solve(A.detach(), b))
        assert relative_error(A.grad, expected) < 1e-11 and b.grad is None


def test_no_history_where_none_is_asked_for():
    A, b, calls = leaf(matrix(4)), vector(4), []
    with torch.no_grad():
        assert not solve_operator(lambda x: A @ x, leaf(b), solver="gmres").requires_grad

    def apply(x):
        calls.append(x.requires_grad)
        return A.detach() @ x

    assert not solve_operator(apply, b, solver=Dense()).requires_grad
    assert calls == [False] * 4 + [True]  # four columns, and one look for what A depends on


def test_results_in_between():
    """A gradient may be asked for what is no leaf, and stops there."""
    theta, b = leaf(matrix(4)), leaf(vector(4))
    K = theta**2 + torch.eye(4, dtype=D)
    x = solve_operator(lambda x: K @ x, b, solver="gmres", **EXACT)
    (inner,) = torch.autograd.grad(x.sum(), K, retain_graph=True)
    assert relative_error(inner, torch.autograd.grad(torch.linalg.solve(K, b).sum(), K, retain_graph=True)[0]) < 1e-11
    K.retain_grad()
    x.sum().backward()
    torch.testing.assert_close(K.grad, inner)
    torch.testing.assert_close(theta.grad, 2 * theta.detach() * inner)


def test_other_uses_of_the_same_graph():
    """The history of K is autograd's: run through once, by it, whatever else ends there."""
    theta, b = leaf(matrix(4)), vector(4)

    def loss(solve):
        K = theta**2 + torch.eye(4, dtype=D)
        return solve(K).sum() + (K**2).sum() + solve(K)[0] ** 2

    ours = torch.autograd.grad(loss(lambda K: by_matrix(K, b)), theta)[0]
    assert relative_error(ours, torch.autograd.grad(loss(lambda K: torch.linalg.solve(K, b)), theta)[0]) < 1e-11


def test_hooks_run_once():
    w, calls = leaf(vector(4).abs() + 1), []
    w.register_hook(lambda g: (calls.append(1), -g)[1])
    (grad,) = torch.autograd.grad(solve_operator(lambda x: w * x, torch.ones(4, dtype=D)).sum(), w)
    torch.testing.assert_close(grad, 1 / w.detach() ** 2)
    assert len(calls) == 1


def by_matmul(system, values):
    return lambda x: system.matmul(values, x)


def by_solve(system, values):
    return lambda x: system.solve(values, x)


def by_factor(system, values):
    factor = system.factorize(values)
    return lambda x: factor.solve(x)


def by_lstsq(system, values):
    A = torch.sparse_coo_tensor([[0, 1], [0, 1]], values, (2, 2))
    return lambda x: spcache.lstsq(A, x, method="lsmr")


def by_solve_operator(system, values):
    return lambda x: solve_operator(lambda y: values * y, x, **EXACT)


@pytest.mark.parametrize(
    ("form", "power"), [(by_matmul, -1), (by_solve, 1), (by_factor, 1), (by_lstsq, 1), (by_solve_operator, 1)]
)
def test_operations_of_spcache_in_an_operator(form, power):
    """Their Functions go past torch functions, and yet hooks run once and results in between have their gradients."""
    u, calls = leaf(torch.tensor([2.0, 3.0], dtype=D)), []
    u.register_hook(lambda g: (calls.append(1), 2 * g)[1])
    v = 3 * u
    system = spcache.SparseSystem(torch.tensor([[0, 1], [0, 1]]), 2)
    for values in (u, v):
        x = solve_operator(form(system, values), torch.ones(2, dtype=D), solver="gmres", **EXACT)
        (grad,) = torch.autograd.grad(x.sum(), values)
        expected = power * values.detach() ** (power - 1)
        torch.testing.assert_close(grad, 2 * expected if values is u else expected)
    assert len(calls) == 1


def test_functions_of_others_in_an_operator():
    """As documented: hooks on the leaves behind run twice, unless a torch function has seen the tensor."""
    for seen, times in ((lambda t: t, 4), (lambda t: t.view_as(t), 2)):
        W = leaf(matrix(3))
        W.register_hook(lambda g: 2 * g)
        x = solve_operator(lambda x, W=W, seen=seen: Times.apply(seen(W), x), vector(3), solver="gmres", **EXACT)
        x.sum().backward()
        reference = leaf(W)
        torch.linalg.solve(reference, vector(3)).sum().backward()
        assert relative_error(W.grad, times * reference.grad) < 1e-11


def test_nothing_of_the_iterations_is_kept():
    """Autograd records one application of A, however long the solver takes."""
    saved = []
    A, b = leaf(matrix(30)), leaf(vector(30))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(1), t)[1], lambda t: t):
        solve_operator(lambda x: A @ x, b, solver="gmres", **EXACT)
    assert 1 <= len(saved) <= 8


def test_nothing_outlives_its_graph():
    theta, b = leaf(matrix(4)), leaf(vector(4))
    K = theta**2
    x = by_matrix(K, b)
    (grad,) = torch.autograd.grad(x.sum(), theta, create_graph=True)
    grad.sum().backward()
    alive = weakref.ref(K), weakref.ref(x)
    theta.grad = b.grad = None
    gc.disable()  # reference counts alone: no cycles
    try:
        del K, x, grad
        assert [r() for r in alive] == [None, None]
    finally:
        gc.enable()


# --- incoming gradients --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e-300, 1e-20, 1.0, 1e20, 1e300])
def test_tiny_and_huge_gradients(size):
    """Each is solved for as if of norm one: an absolute tolerance means the same in backward as in forward."""
    A, b = leaf(matrix(6)), leaf(vector(6))
    g = vector(6, seed=3)
    x = solve_operator(lambda x: A @ x, b, solver="gmres", rtol=0.0, atol=1e-12)
    (grad,) = torch.autograd.grad(x, b, size * g)
    assert relative_error(grad / size, torch.linalg.solve(A.T, g)) < 1e-11


@pytest.mark.parametrize("size", [0.0, 1e-20, 1e-3, 1.0, 1e6, 1e100])
@pytest.mark.parametrize("solver", ["cg", "minres", "bicgstab", "gmres"])
def test_absolute_tolerances_are_for_b(solver, size):
    """The gradient is as accurate, relatively, as x was asked to be; and is there even where x = 0 was good enough."""
    A, b = matrix(30, hermitian=True), (size * vector(30)).requires_grad_()
    expected, norm = torch.linalg.solve(A, torch.ones(30, dtype=D)), float(b.detach().norm())

    def error(rtol, atol):
        x = solve_operator(A, b, solver=solver, rtol=rtol, atol=atol)
        return relative_error(torch.autograd.grad(x.sum(), b)[0], expected)

    if size:
        assert 1e-5 < error(0.0, 1e-2 * norm) < 2e-2 and 1e-12 < error(0.0, 1e-9 * norm) < 2e-9
    assert error(0.0, 2 * norm + 1e-300) < 1e-4 and error(1e-9, 2 * norm + 1e-300) < 2e-9


@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e30])
def test_tiny_and_huge_gradients_in_single_precision(size):
    """The square of the norm is no number of that type."""
    solver, b = Dense(), leaf(torch.ones(3))
    (grad,) = torch.autograd.grad(solve_operator(lambda x: 2 * x, b, solver=solver), b, torch.full((3,), size))
    torch.testing.assert_close(grad, torch.full((3,), size) / 2, rtol=1e-3, atol=0)
    torch.testing.assert_close(solver.rhs[1].norm(), torch.tensor(1.0))


def test_zero_gradients_need_no_solve():
    A, b, solver = leaf(matrix(4)), leaf(vector(4)), Dense()
    x = solve_operator(lambda x: A @ x, b, solver=solver)
    grads = torch.autograd.grad(x, (A, b), torch.zeros(4, dtype=D))
    assert len(solver.rhs) == 1 and not any(g.any() for g in grads)
    g = leaf(torch.zeros(4, dtype=D))  # and yet they depend on g
    (lam,) = torch.autograd.grad(x_of(A, b), b, g, create_graph=True)
    (again,) = torch.autograd.grad(lam, g, torch.ones(4, dtype=D))
    assert relative_error(again, torch.linalg.solve(A, torch.ones(4, dtype=D))) < 1e-11


def x_of(A, b):
    return solve_operator(lambda x: A @ x, b, solver=Dense())


def test_gradients_that_are_not_finite():
    """NaN comes out of NaN, without a solver that runs until it gives up."""
    A, b, solver = leaf(matrix(4)), leaf(vector(4)), Dense()
    x = solve_operator(lambda x: A @ x, b, solver=solver)
    for bad in (torch.nan, torch.inf):
        grads = torch.autograd.grad(x, (A, b), torch.tensor([1, bad, 0, 0], dtype=D), retain_graph=True)
        assert all(g.isnan().all() for g in grads)
    assert len(solver.rhs) == 1


# --- many graphs ---------------------------------------------------------------------------------------------------


def test_two_graphs_and_backward_out_of_order():
    problems = [(leaf(matrix(5, seed=s)), leaf(vector(5, seed=s))) for s in range(4)]
    shared = leaf(torch.tensor(0.5, dtype=D))
    solutions = [solve_operator(lambda x, A=A: A @ x + shared * x, b, solver="gmres", **EXACT) for A, b in problems]
    for i in (2, 0, 3, 1, 2, 0):
        A, b = problems[i]
        ours = torch.autograd.grad((solutions[i] ** 2).sum(), (A, b, shared), retain_graph=True)
        dense = torch.linalg.solve(A + shared * torch.eye(5, dtype=D), b)
        reference = torch.autograd.grad((dense**2).sum(), (A, b, shared))
        assert max(map(relative_error, ours, reference)) < 1e-11


def test_backward_twice_needs_retain_graph():
    A, b = leaf(matrix(4)), leaf(vector(4))
    x = by_matrix(A, b)
    x.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        x.sum().backward()


def test_threads():
    """One operator, many threads, forward and backward; and one graph run backward by several at once."""
    A, errors = leaf(matrix(6)), []
    shared = by_matrix(A, vector(6, seed=99))
    dense = torch.linalg.solve(A, vector(6, seed=99))
    expected = torch.autograd.grad(dense.sum(), A)[0]

    def work(seed):
        try:
            for _ in range(5):
                b = leaf(vector(6, seed=seed))
                ours = torch.autograd.grad((by_matrix(A, b) ** 2).sum(), (A, b))
                reference = torch.autograd.grad((torch.linalg.solve(A, b) ** 2).sum(), (A, b))
                assert max(map(relative_error, ours, reference)) < 1e-11
                assert relative_error(torch.autograd.grad(shared.sum(), A, retain_graph=True)[0], expected) < 1e-11
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors


# --- what must not be lost in silence ------------------------------------------------------------------------------


@pytest.mark.parametrize("changed", ["parameter", "constant", "result in between", "x"])
def test_changes_in_place(changed):
    """Between forward and backward, of what is differentiated and of what is not: raises."""
    theta, C, b = leaf(matrix(4)), matrix(4, seed=5), leaf(vector(4))
    K = theta**2
    x = solve_operator(lambda x: K @ x + 3 * (C @ x) + theta @ x, b, solver="gmres", **EXACT)
    loss = x.sum()
    with torch.no_grad():
        {"parameter": theta, "constant": C, "result in between": K, "x": x}[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_is_replaced_is_not_looked_at_again():
    """The backward pass belongs to the operator that was solved with, not to what its names mean by then."""
    A, b = Scaled(3), leaf(vector(3))
    weight, x = A.weight, solve_operator(A, b, **EXACT)
    A.weight = torch.nn.Parameter(torch.full((3,), 100.0, dtype=D))
    x.sum().backward()
    torch.testing.assert_close(b.grad, 1 / (2 * weight.detach() + 1))
    assert A.weight.grad is None and weight.grad is not None


def test_transforms_raise():
    A, b = matrix(3), vector(3)
    for transform in (torch.func.grad, torch.func.vmap, torch.func.jacrev, torch.func.jacfwd):
        with pytest.raises(NotImplementedError, match="torch.func"):
            transform(lambda b: solve_operator(A, b, solver="gmres").sum())(
                b[None] if transform is torch.func.vmap else b
            )
    b = leaf(b)
    x = by_matrix(A, b)
    with pytest.raises(NotImplementedError, match="cannot be batched"):
        torch.func.vmap(lambda g: torch.autograd.grad(x, b, g))(torch.eye(3, dtype=D))
    with pytest.raises(RuntimeError):
        torch.autograd.grad(x, b, torch.eye(3, dtype=D), is_grads_batched=True)


@pytest.mark.parametrize("where", ["b", "A", "behind a leaf"])
def test_tangents_raise(where):
    A, b, t = matrix(3), vector(3), torch.ones(3, dtype=D)
    with forward_ad.dual_level():
        assert solve_operator(A, b, solver="gmres").shape == (3,)  # none there
        if where == "b":
            b = forward_ad.make_dual(b, t)
        elif where == "A":
            A = forward_ad.make_dual(A, torch.ones_like(A))
        else:
            A = forward_ad.make_dual(leaf(A), torch.ones_like(A)) * 2
        with pytest.raises(NotImplementedError, match="forward-mode"):
            solve_operator(lambda x: A @ x, b, solver="gmres")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Graph break due to unsupported builtin:UserWarning")  # torch 2.6
def test_compiled_code():
    """`torch.compile` leaves it alone; a compiled A works as well."""
    compiled = torch.compile(lambda w, b: 2 * solve_operator(lambda x: w * x, b).sum(), backend="eager")
    w, b = leaf(vector(3).abs() + 1), torch.ones(3, dtype=D)
    torch.testing.assert_close(torch.autograd.grad(compiled(w, b), w)[0], -2 / w.detach() ** 2)
    A = Scaled(3)
    x = solve_operator(torch.compile(A, backend="eager"), b, **EXACT)
    x.sum().backward()
    torch.testing.assert_close(A.weight.grad, -2 / (2 * A.weight.detach() + 1) ** 2)


def test_status_of_our_solvers_is_a_pair():
    """What `solve_operator` takes apart."""
    assert issubclass(Solution, tuple) and Solution._fields[0] == "x"
