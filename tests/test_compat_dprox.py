"""`spcache.compat.dprox`, point by point: K what is kept of ∇-Prox, F what was wrong there, and its tutorial's checks."""

import dataclasses
import inspect
import itertools

import pytest
import torch
from cases import relative_error
from torch.autograd import gradcheck, gradgradcheck

from spcache._operators import solve_operator
from spcache.compat import dprox
from spcache.compat.dprox import LinearSolve, LinearSolveConfig, linear_solve, pcg

pytestmark = pytest.mark.usefixtures("one_thread")

D = torch.float64
SYMMETRIC = ("cg", "cg2", "pcg", "minres")
GENERAL = ("plss", "plssw")
EVERY = (*SYMMETRIC, *GENERAL)


def vector(*shape, dtype=D, seed=0):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def spd(n, seed=1, dtype=D):
    A = vector(n, n, seed=seed)
    return (A @ A.T / n + torch.eye(n, dtype=D)).to(dtype)


class Matrix(torch.nn.Module):
    """x -> K x over all of x, K = 2 theta; counts. `unused` is read by nobody."""

    def __init__(self, theta):
        super().__init__()
        self.theta = torch.nn.Parameter(theta.detach().clone())
        self.unused = torch.nn.Parameter(torch.ones(2, dtype=theta.dtype))
        self.frozen = torch.nn.Parameter(torch.tensor(2.0, dtype=theta.dtype), requires_grad=False)
        self.calls = 0

    @property
    def K(self):
        return self.frozen * self.theta

    def forward(self, x):
        self.calls += 1
        return (self.K @ x.reshape(-1)).reshape(x.shape)


def config(solver_type, rtol=1e-13, max_iters=200, like=None, **kwargs):
    """Tolerances that all solvers take to the same accuracy; weights where they are needed."""
    options = dict(kwargs.pop("solver_kwargs", {}))
    if solver_type == "plssw":
        options.setdefault("Wh", torch.linspace(1, 2, like.numel(), dtype=like.real.dtype).reshape(like.shape))
    if solver_type == "cg2":
        rtol = rtol**2
    return LinearSolveConfig(rtol, max_iters, solver_type=solver_type, solver_kwargs=options, **kwargs)


def matrix_for(solver_type, n, dtype=D):
    """theta with K = 2 theta of the kind that the solver is for."""
    if solver_type in SYMMETRIC:
        return spd(n, dtype=dtype) / 2
    return (torch.eye(n, dtype=D) + 0.4 * vector(n, n, seed=2) / n**0.5).to(dtype) / 2


def residuals(seen, A, b):
    return [float((b - A @ x).norm()) for x in seen]


# --- names ---------------------------------------------------------------------------------------------------------


def test_names_and_defaults():
    """K: LinearSolveConfig, linear_solve, LinearSolve, pcg, their arguments and defaults."""
    assert dataclasses.is_dataclass(LinearSolveConfig)
    assert dataclasses.asdict(LinearSolveConfig()) == {
        "rtol": 1e-6, "max_iters": 100, "verbose": False, "solver_type": "cg", "solver_kwargs": {}, "use_analytic_grad": True,
    }  # fmt: skip
    assert LinearSolveConfig().solver_kwargs is not LinearSolveConfig().solver_kwargs
    parameters = inspect.signature(linear_solve).parameters
    assert list(parameters) == ["A", "b", "config"] and parameters["config"].default == LinearSolveConfig()
    parameters = inspect.signature(pcg).parameters
    assert [(p.name, p.default) for p in parameters.values()][2:-1] == [
        ("rtol", 1e-6),
        ("max_iters", 100),
        ("verbose", False),
    ]
    assert set(dprox.__all__) == {"LinearSolve", "LinearSolveConfig", "linear_solve", "pcg"}


def test_solver_types():
    """K: cg, cg2, pcg, plss, plssw, minres; another name is a KeyError."""
    assert set(dprox.SOLVERS) == {"cg", "cg2", "pcg", "plss", "plssw", "minres"}
    for analytic in (True, False):
        with pytest.raises(KeyError, match="gmres"):
            linear_solve(Matrix(spd(3)), vector(3), LinearSolveConfig(solver_type="gmres", use_analytic_grad=analytic))
    with pytest.raises(TypeError, match="Minv"):
        linear_solve(Matrix(spd(3)), vector(3), LinearSolveConfig(solver_kwargs={"Minv": lambda r: r}))


def test_linear_solve_apply():
    """K: `LinearSolve.apply(A, b, config, *parameters)`."""
    A, b = Matrix(spd(4)), vector(4).requires_grad_()
    x = LinearSolve.apply(A, b, LinearSolveConfig(), *A.parameters())
    x.sum().backward()
    assert relative_error(x, torch.linalg.solve(A.K, b)) < 1e-5
    assert b.grad is not None and A.theta.grad is not None


def test_pcg():
    """K: `pcg(A, b, rtol, max_iters, verbose, **kwargs)` is linear_solve with that solver; Minv and x0 are its kwargs."""
    A, b = Matrix(spd(6)), vector(6)
    x = pcg(A, b, rtol=1e-3)
    same = linear_solve(A, b, LinearSolveConfig(rtol=1e-3, solver_type="pcg"))
    assert torch.equal(x, same)
    inverse = torch.linalg.inv(A.K.detach())
    A.calls = 0
    with torch.no_grad():
        x = pcg(A, b, 1e-10, 100, False, Minv=lambda r: inverse @ r, x0=torch.zeros_like(b))
    assert A.calls == 2  # the first residual and one iteration
    assert relative_error(x, inverse @ b) < 1e-12


def test_verbose(capsys):
    """K: prints; without it nothing."""
    for solver_type in EVERY:
        A, b = Matrix(matrix_for(solver_type, 4)), vector(4)
        linear_solve(A, b, config(solver_type, like=b))
        assert capsys.readouterr().out == ""
        linear_solve(A, b, config(solver_type, like=b, verbose=True))
        assert "iterations" in capsys.readouterr().out


# --- gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, D], ids=str)
@pytest.mark.parametrize("shape", [(6,), (2, 3), (1, 3, 2, 1)], ids=str)
@pytest.mark.parametrize("solver_type", EVERY)
def test_solution_and_gradients(solver_type, shape, dtype):
    """K: b of any shape; the result has its shape and dtype; grad b solves with the adjoint, grad theta is the VJP of
    -A(x) with cotangent grad b; what A does not read gets None."""
    A, b = Matrix(matrix_for(solver_type, 6, dtype)), vector(*shape, dtype=dtype).requires_grad_()
    tight, tolerance = (1e-13, 1e-9) if dtype == D else (1e-6, 1e-4)
    x = linear_solve(A, b, config(solver_type, tight, 40, b))
    assert x.shape == b.shape and x.dtype == b.dtype and x.device == b.device
    (x**2).sum().backward()
    K, reference = A.K.detach().requires_grad_(), b.detach().requires_grad_()
    expected = torch.linalg.solve(K, reference.reshape(-1))
    (expected**2).sum().backward()
    assert relative_error(x, expected.reshape(shape)) < tolerance
    assert relative_error(b.grad, reference.grad) < tolerance
    assert relative_error(A.theta.grad, 2 * K.grad) < tolerance
    with torch.enable_grad():
        vjp = torch.autograd.grad(-A(x.detach()), A.theta, b.grad)[0]
    assert relative_error(A.theta.grad, vjp) < tolerance
    assert A.unused.grad is None and A.frozen.grad is None


@pytest.mark.parametrize("solver_type", EVERY)
def test_unrolled(solver_type):
    """K: use_analytic_grad=False differentiates the iterations: in the history of x there is more for each of them."""

    def nodes(x):
        seen, stack = set(), [x.grad_fn]
        while stack:
            node = stack.pop()
            if node is not None and node not in seen:
                seen.add(node)
                stack += [parent for parent, _ in node.next_functions]
        return len(seen)

    A, b = Matrix(matrix_for(solver_type, 6)), vector(2, 3).requires_grad_()
    sizes = [
        nodes(linear_solve(A, b, config(solver_type, max_iters=k, like=b, use_analytic_grad=analytic)))
        for analytic in (True, False)
        for k in (2, 4)
    ]
    assert sizes[0] == sizes[1] < 10 and sizes[2] > 20 and sizes[3] > sizes[2] + 10
    x = linear_solve(A, b, config(solver_type, 1e-12, 7, b, use_analytic_grad=False))
    (x**2).sum().backward()
    K, reference = A.K.detach().requires_grad_(), b.detach().requires_grad_()
    (torch.linalg.solve(K, reference.reshape(-1)) ** 2).sum().backward()
    assert relative_error(b.grad, reference.grad) < 1e-4  # of iterates, not of the solution
    ours, expected = A.theta.grad, 2 * K.grad
    if solver_type in SYMMETRIC:  # iterates are right for symmetric changes of A
        ours, expected = ours + ours.T, expected + expected.T
    assert relative_error(ours, expected) < 1e-4


@pytest.mark.parametrize("solver_type", EVERY)
def test_second_derivatives(solver_type):
    """F: second derivatives are right (there: x is a constant in them)."""
    theta, b = matrix_for(solver_type, 4), vector(2, 2).requires_grad_()

    def solve(theta, b):
        if solver_type in SYMMETRIC:
            theta = (theta + theta.T) / 2
        return linear_solve(lambda x: (2 * theta @ x.reshape(4)).reshape(2, 2), b, config(solver_type, like=b))

    assert gradcheck(solve, (theta.requires_grad_(), b))
    assert gradgradcheck(solve, (theta, b), atol=1e-4)


def test_hessian_vector_product_against_dense():
    """F: the same against torch.linalg, where the original would leave out the way through x."""
    theta = spd(5).requires_grad_()
    b, v = vector(5), vector(5, 5, seed=7)

    def hvp(x):
        (g,) = torch.autograd.grad((x**2).sum(), theta, create_graph=True)
        return torch.autograd.grad((g * v).sum(), theta)[0]

    ours = hvp(linear_solve(lambda x: theta @ x, b, config("cg")))
    assert relative_error(ours, hvp(torch.linalg.solve(theta, b))) < 1e-9


@pytest.mark.parametrize("place", ["leaf", "result", "closure"])
def test_parameters_of_the_operator_that_was_evaluated(place):
    """F: no clone is made and no registration asked for; parameters may be results, and the module uncloneable."""
    theta = spd(4).requires_grad_()
    stretched = 1.5 * theta  # K depends on this

    class Uncloneable(torch.nn.Module):
        def forward(self, x):
            return stretched @ x

        def __deepcopy__(self, memo):
            raise AssertionError("cloned")

    A = {"leaf": lambda x: 1.5 * (theta @ x), "result": Uncloneable(), "closure": lambda x: stretched @ x}[place]
    b = vector(4)
    (grad,) = torch.autograd.grad((linear_solve(A, b, config("cg")) ** 2).sum(), theta, retain_graph=True)
    (expected,) = torch.autograd.grad((torch.linalg.solve(1.5 * theta, b) ** 2).sum(), theta)
    assert relative_error(grad, expected) < 1e-9


@pytest.mark.parametrize("solver_type", EVERY)
@pytest.mark.parametrize("size", [1e-30, 1e-8, 1e8])
def test_tiny_gradients(solver_type, size):
    """F: the adjoint's right-hand side is scaled: a gradient of 1e-30 is no "already converged", one of 1e8 no "never"."""
    A, b = Matrix(matrix_for(solver_type, 5, torch.float32)), vector(5, dtype=torch.float32).requires_grad_()
    x = linear_solve(A, b, config(solver_type, 1e-6 if solver_type != "cg2" else 1e-5, 30, b))
    g = vector(5, dtype=torch.float32, seed=5)
    (grad,) = torch.autograd.grad(x, b, size * g)
    assert relative_error(grad / size, torch.linalg.solve(A.K.detach().T, g)) < 1e-4


def test_zero_gradients():
    """F: zero in, zero out, without a solve from ones."""
    A, b = Matrix(spd(5)), vector(5).requires_grad_()
    x = linear_solve(A, b, config("cg2", 1e-3))
    assert not torch.autograd.grad(x, b, torch.zeros(5, dtype=D))[0].any()


def test_two_graphs():
    """Two operators before the backward of the first."""
    first, second = Matrix(spd(4, seed=1)), Matrix(spd(4, seed=2))
    b = vector(4)
    x, y = (linear_solve(A, b, config("cg")) for A in (first, second))
    (x**2).sum().backward()
    (y**2).sum().backward()
    for A in (first, second):
        K = A.K.detach().requires_grad_()
        (torch.linalg.solve(K, b) ** 2).sum().backward()
        assert relative_error(A.theta.grad, 2 * K.grad) < 1e-9


# --- where solvers start, and where they stop ----------------------------------------------------------------------


def iterates(solver_type, A, b, rtol, most=40, **kwargs):
    """x after 0, 1, 2, ... iterations, up to where it stays the same."""
    seen = []
    for k in range(1, most):
        x = linear_solve(lambda x: A @ x, b, LinearSolveConfig(rtol, k, solver_type=solver_type, solver_kwargs=kwargs))
        if seen and torch.equal(seen[-1], x):
            break
        seen.append(x)
    return seen


def first(conditions):
    return list(conditions).index(True)


def test_cg_starts_at_zero_and_stops_relatively():
    """K: cg starts at 0 and stops at ||r|| <= rtol ||b||."""
    A, b = spd(20), vector(20)
    seen = iterates("cg", A, b, 1e-3)
    ratios = [r / float(b.norm()) for r in residuals(seen, A, b)]
    assert first(r <= 1e-3 for r in ratios) == len(seen) - 1 > 2
    step = (b @ b) / (b @ A @ b)  # the first iterate is along b, from 0
    torch.testing.assert_close(seen[0], step * b)
    for scale in (1e-8, 1e8):  # relative: as many iterations whatever the size of b
        assert len(iterates("cg", A, scale * b, 1e-3)) == len(seen)


@pytest.mark.parametrize(
    ("solver_type", "rule"),
    [("cg2", lambda r, rtol: bool(r @ r < rtol)), ("pcg", lambda r, rtol: bool(r.abs().max() < rtol))],
)
def test_cg2_and_pcg_start_at_ones_and_stop_absolutely(solver_type, rule):
    """K: cg2 and pcg start at ones and stop at r.r < rtol, max|r| < rtol."""
    A, b, ones = spd(20), vector(20), torch.ones(20, dtype=D)
    seen = iterates(solver_type, A, b, 1e-3)
    assert first(rule(b - A @ x, 1e-3) for x in seen) == len(seen) - 1 > 2
    r = b - A @ ones
    torch.testing.assert_close(seen[0], ones + (r @ r) / (r @ A @ r) * r)
    assert len(iterates(solver_type, A, 1e4 * b, 1e-3)) > len(seen)  # absolute
    assert torch.equal(iterates(solver_type, A, A @ ones + 1e-6, 1e-3)[0], ones)  # good enough as it is


@pytest.mark.parametrize("solver_type", ["minres", "plss", "plssw"])
def test_the_others_stop_relatively(solver_type):
    """K: a relative tolerance, from zero."""
    A, b = spd(20), vector(20)
    options = {"Wh": torch.linspace(1, 2, 20, dtype=D)} if solver_type == "plssw" else {}
    for scale in (1e-8, 1.0, 1e8):
        with_rtol = LinearSolveConfig(1e-4, 60, solver_type=solver_type, solver_kwargs=options)
        x = linear_solve(lambda x: A @ x, scale * b, with_rtol)
        assert 1e-9 < float((b - A @ x / scale).norm() / b.norm()) <= 1e-4
    assert not linear_solve(lambda x: A @ x, 0 * b, with_rtol).any()


@pytest.mark.parametrize("solver_type", EVERY)
def test_they_stop_in_silence(solver_type):
    """K: after max_iters there is a result, converged or not; so in backward."""
    A, b = Matrix(matrix_for(solver_type, 30)), vector(30).requires_grad_()
    x = linear_solve(A, b, config(solver_type, max_iters=2, like=b))
    assert 1e-5 < float((b - A(x)).detach().norm() / b.detach().norm()) < 1
    x.sum().backward()
    assert b.grad.isfinite().all()


@pytest.mark.parametrize("solver_type", EVERY)
def test_x0(solver_type):
    """K: x0 through solver_kwargs, in the shape of b. It is the start of the forward solve only."""
    A, b = Matrix(matrix_for(solver_type, 6)), vector(2, 3).requires_grad_()
    x0 = torch.linalg.solve(A.K.detach(), b.detach().reshape(6)).reshape(2, 3)
    A.calls = 0
    with torch.no_grad():
        x = linear_solve(A, b, config(solver_type, 1e-9, like=b, solver_kwargs={"x0": x0}))
    assert torch.equal(x, x0) and A.calls <= 2
    x = linear_solve(A, b, config(solver_type, like=b, solver_kwargs={"x0": x0}))
    assert x.data_ptr() != x0.data_ptr()
    g = vector(2, 3, seed=3)
    (grad,) = torch.autograd.grad(x, b, g)
    assert relative_error(grad.reshape(6), torch.linalg.solve(A.K.detach().T, g.reshape(6))) < 1e-9


@pytest.mark.parametrize("solver_type", ["pcg", "minres"])
def test_minv(solver_type):
    """K: Minv through solver_kwargs, on tensors of the shape of b; it preconditions the adjoint solve too."""
    A, b, shapes = Matrix(spd(6)), vector(2, 3).requires_grad_(), []
    inverse = torch.linalg.inv(A.K.detach())

    def Minv(r):
        shapes.append(r.shape)
        return (inverse @ r.reshape(6)).reshape(2, 3)

    A.calls = 0
    x = linear_solve(A, b, config(solver_type, 1e-10, like=b, solver_kwargs={"Minv": Minv}))
    assert A.calls <= 5 and set(shapes) == {(2, 3)}
    assert relative_error(x.reshape(6), inverse @ b.reshape(6)) < 1e-9
    forward = len(shapes)
    (grad,) = torch.autograd.grad(x.sum(), b)
    assert relative_error(grad.reshape(6), inverse.sum(0)) < 1e-9
    assert forward < len(shapes) <= 2 * forward + 2


@pytest.mark.parametrize("analytic", [True, False])
@pytest.mark.parametrize("solver_type", EVERY)
def test_no_iterations(solver_type, analytic):
    """The start: ones for cg2 and pcg, zeros for the others, or a copy of x0."""
    b, x0 = vector(4), vector(4, seed=3)
    start = torch.ones(4, dtype=D) if solver_type in ("cg2", "pcg") else torch.zeros(4, dtype=D)
    for kwargs, expected in (({}, start), ({"x0": x0}, x0)):
        options = config(solver_type, max_iters=0, like=b, use_analytic_grad=analytic, solver_kwargs=kwargs)
        x = linear_solve(lambda x: 2 * x, b, options)
        assert torch.equal(x, expected) and x.data_ptr() != x0.data_ptr()


@pytest.mark.parametrize("analytic", [True, False])
@pytest.mark.parametrize("solver_type", EVERY)
def test_arguments_are_borrowed(solver_type, analytic):
    """An x0 that solves the system is returned as a copy."""
    b, x0 = torch.full((3,), 2.0, dtype=D), torch.ones(3, dtype=D)
    options = config(solver_type, like=b, use_analytic_grad=analytic, solver_kwargs={"x0": x0})
    x = linear_solve(lambda x: 2 * x, b, options)
    assert torch.equal(x, x0)
    x.zero_()
    assert torch.equal(x0, torch.ones(3, dtype=D)) and torch.equal(b, 2 * x0)


@pytest.mark.parametrize("analytic", [True, False])
@pytest.mark.parametrize("solver_type", EVERY)
def test_no_unknowns(solver_type, analytic):
    b = torch.empty(0, 3, dtype=D, requires_grad=True)
    x = linear_solve(lambda x: 2 * x, b, config(solver_type, like=b, use_analytic_grad=analytic))
    assert x.shape == (0, 3)
    x.sum().backward()
    assert b.grad.shape == (0, 3)


@pytest.mark.parametrize("analytic", [True, False])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("solver_type", EVERY)
def test_operators_that_are_not_finite(solver_type, bad, analytic):
    """NaN, as an honest loop gives; no zeros."""
    factor = torch.tensor([1.0, bad, 1], dtype=D, requires_grad=True)
    b = torch.ones(3, dtype=D, requires_grad=True)
    for A in (lambda x: factor * x, lambda x: (1e200 * x) * 1e200):  # of which A(0) = 0 is finite
        x = linear_solve(A, b, config(solver_type, like=b, use_analytic_grad=analytic))
        assert x.isnan().any()
        (grad,) = torch.autograd.grad(x.sum(), b)
        assert grad.isnan().any()


@pytest.mark.parametrize("solver_type", GENERAL)
@pytest.mark.parametrize("size", [1e-42, 1e-23, 1e-12, 1e12, 1e20, 1e37])
@pytest.mark.parametrize("of", ["b", "A"])
def test_plss_of_tiny_and_huge_numbers(solver_type, size, of):
    """Whose squares are no numbers of single precision."""
    theta = matrix_for(solver_type, 5, torch.float32)
    if of == "A" and size == 1e-42:
        return  # has no digits
    b = vector(5, dtype=torch.float32)
    A, rhs = (2 * theta * size, b) if of == "A" else (2 * theta, size * b)
    for x0 in (None, torch.zeros(5)):
        x = linear_solve(lambda x: A @ x, rhs, config(solver_type, 1e-5, 20, b, solver_kwargs={"x0": x0}))
        expected = torch.linalg.solve(2 * theta.double(), b.double()) * (1 / size if of == "A" else size)
        assert relative_error(x.double(), expected) < (1e-2 if size == 1e-42 else 1e-3)


@pytest.mark.parametrize("analytic", [True, False])
@pytest.mark.parametrize("solver_type", GENERAL)
def test_plss_of_what_is_not_finite(solver_type, analytic):
    for bad in (torch.nan, torch.inf):
        b = torch.tensor([1.0, bad, 0], dtype=D)
        assert linear_solve(lambda x: 2 * x, b, config(solver_type, like=b, use_analytic_grad=analytic)).isnan().any()


def test_a_start_that_solves_the_system():
    """F: b = A ones gives ones, where 0 / 0 was."""
    A = spd(5)
    for solver_type in ("cg2", "pcg"):
        x = linear_solve(lambda x: 2 * x, torch.full((5,), 2.0, dtype=D), LinearSolveConfig(solver_type=solver_type))
        assert torch.equal(x, torch.ones(5, dtype=D))
    assert not linear_solve(lambda x: A @ x, torch.zeros(5, dtype=D), LinearSolveConfig()).any()


def test_first_dimension_is_no_batch():
    """F: an operator that mixes all dimensions of an image is one system (the original took steps row by row)."""
    h = w = 6
    blur = torch.tensor([[0.0, 1, 0], [1, 4, 1], [0, 1, 0]], dtype=D) / 8

    def A(x):
        return torch.nn.functional.conv2d(x[None, None], blur[None, None], padding=1)[0, 0] + 0.1 * x

    dense = torch.stack([A(e.reshape(h, w)).reshape(-1) for e in torch.eye(h * w, dtype=D)], 1)
    b = vector(h, w)
    x = linear_solve(A, b, LinearSolveConfig(1e-12))
    assert relative_error(x.reshape(-1), torch.linalg.solve(dense, b.reshape(-1))) < 1e-10


# --- PLSS ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver_type", GENERAL)
def test_plss_ends_after_as_many_steps_as_there_are_unknowns(solver_type):
    """And its steps are orthogonal, in the inner product of the weights (Brust & Saunders 2023)."""
    n = 8
    A, b = torch.eye(n, dtype=D) + 0.3 * vector(n, n), vector(n)
    Wh = torch.linspace(1, 3, n, dtype=D)
    options = {"Wh": Wh} if solver_type == "plssw" else {}
    weights = Wh if options else torch.ones(n, dtype=D)

    class Recorder:
        def __init__(self):
            self.seen = []

        def __call__(self, x):
            self.seen.append(x)
            return A @ x

        def rmatvec(self, v):
            return A.T @ v

    recorder = Recorder()
    x = dprox.SOLVERS[solver_type](recorder, b, rtol=1e-10, max_iters=n, verbose=False, **options)
    assert relative_error(x, torch.linalg.solve(A, b)) < 1e-8
    steps = torch.stack(recorder.seen).diff(dim=0) * weights
    gram = steps @ steps.T
    assert float((gram - gram.diag().diag()).abs().max() / gram.diag().max()) < 1e-8
    # the first step is the shortest, in the weights' norm, that makes the residual orthogonal to b
    y = A.T @ b / weights**2
    torch.testing.assert_close(recorder.seen[1], y * (b @ b) / (b @ A @ y))


def test_plss_returns_the_best_iterate():
    """Its residual may grow before it falls."""
    n = 12
    A, b = vector(n, n, seed=4), vector(n, seed=5)
    sizes = residuals(iterates("plss", A, b, 1e-12, n - 1), A, b)
    assert all(later <= sooner for sooner, later in itertools.pairwise(sizes))


def test_complex_numbers():
    """More than dprox has: by the solvers here as well."""
    n = 5
    A = vector(n, n, dtype=torch.complex128)
    H, b = A @ A.mH / n + torch.eye(n), vector(n, dtype=torch.complex128).requires_grad_()
    G = torch.eye(n) + 0.2 * A
    g = vector(n, dtype=torch.complex128, seed=9)
    for solver_type in EVERY:
        K = H if solver_type in SYMMETRIC else G
        x = linear_solve(lambda x, K=K: K @ x, b, config(solver_type, like=b))
        assert relative_error(x, torch.linalg.solve(K, b)) < 1e-9, solver_type
        assert relative_error(torch.autograd.grad(x, b, g)[0], torch.linalg.solve(K.mH, g)) < 1e-9, solver_type


# --- the tutorial --------------------------------------------------------------------------------------------------


def tutorial(n, symmetric):
    """theta and b = K x, K = 2 theta, in single precision, with dense autograd's gradients of the mean of xhat; xhat."""
    torch.manual_seed(0)
    theta = torch.randn(n, n)
    if symmetric:
        theta = theta @ theta.T / n + torch.eye(n)
    theta.requires_grad_()
    b = (2 * theta @ torch.randn(n)).detach().requires_grad_()
    xhat = torch.linalg.solve(2 * theta, b)
    xhat.retain_grad()
    xhat.mean().backward()
    return theta, b, xhat


def tolerance_for(theta):
    """Of single precision and of rtol=1e-6: both are amplified by the condition."""
    tolerance = 10 * 1e-6 * float(torch.linalg.cond(theta.detach()))
    assert tolerance < 1e-2
    return tolerance


def dense_solver(apply, b):
    return torch.linalg.solve(torch.stack([apply(e) for e in torch.eye(len(b))], 1), b)


@pytest.mark.parametrize("n", [5, 32])
@pytest.mark.parametrize("solver", [dense_solver, "gmres"], ids=["explicit", "matrix-free"])
def test_tutorial(n, solver):
    """K: K = 2 theta, any theta: dL/db is K^-T dL/dx, dL/dtheta is dense autograd's. Its K is not symmetric, which the
    solvers of dprox do not take: by the rule behind linear_solve, with the explicit matrix and without."""
    theta, b, xhat = tutorial(n, symmetric=False)
    ours, right = (t.detach().clone().requires_grad_() for t in (theta, b))
    options = {"rtol": 1e-6, "restart": n} if solver == "gmres" else {}
    x = solve_operator(lambda x: (2 * ours) @ x, right, solver=solver, **options)
    x.mean().backward()
    tolerance = tolerance_for(theta)
    assert relative_error(x, xhat) < tolerance
    assert relative_error(right.grad, torch.linalg.solve(2 * theta.detach().T, xhat.grad)) < tolerance
    assert relative_error(right.grad, b.grad) < tolerance
    assert relative_error(ours.grad, theta.grad) < tolerance


@pytest.mark.parametrize("n", [5, 32])
@pytest.mark.parametrize("solver_type", ["cg", "pcg", "minres", "plss"])
@pytest.mark.parametrize("form", ["explicit", "matrix-free"])
def test_tutorial_by_linear_solve(n, solver_type, form):
    """K: the same checks through linear_solve with rtol=1e-6, for a positive definite theta."""
    theta, b, xhat = tutorial(n, symmetric=True)
    A, right = Matrix(theta), b.detach().clone().requires_grad_()
    if form == "explicit":  # a matrix that was made before, and is no leaf
        K = 2 * A.theta
        operator = lambda x: K @ x  # noqa: E731
    else:
        operator = A
    x = linear_solve(operator, right, LinearSolveConfig(rtol=1e-6, max_iters=4 * n, solver_type=solver_type))
    x.mean().backward()
    tolerance = tolerance_for(theta)
    assert relative_error(x, xhat) < tolerance
    assert relative_error(right.grad, torch.linalg.solve(2 * theta.detach().T, xhat.grad)) < tolerance
    assert relative_error(right.grad, b.grad) < tolerance
    assert relative_error(A.theta.grad, theta.grad) < tolerance
