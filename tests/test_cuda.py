"""On a CUDA device, through cuDSS: the promises of the CPU kept by tensors that never leave the device."""

import os
from dataclasses import replace
from functools import partial

import pytest
import torch
from cases import (
    GENERAL,
    SPD,
    every_case,
    every_double_case,
    find_case,
    grid_problem,
    make,
    relative_error,
    scaled_residual,
)  # fmt: skip
from test_solve import MATRICES, VECTORS
from test_threads import in_threads
from torch.autograd import gradcheck, gradgradcheck
from torch.func import jacfwd, jacrev, jvp, vmap
from torch.utils.checkpoint import checkpoint

import spcache
from spcache import EngineUnavailableError, NotPositiveDefiniteError, SingularMatrixError, SparseSystem
from spcache.compat.sparse_solver import SparseSolver
from spcache.compat.torchsparsegradutils import sparse_mm
from spcache.engines import cudss

DEVICE = torch.device(os.environ.get("SPCACHE_TEST_DEVICE", "cuda"))  # "cpu" tries the tests, not the engine
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex:UserWarning"),
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
]
needs_streams = pytest.mark.skipif(DEVICE.type != "cuda", reason="streams are CUDA's")

LOWER, HERMITIAN = find_case("spd", torch.float64, "lower"), find_case("hermitian", torch.complex128)
SYMMETRIC = find_case("symmetric")
some_cases = pytest.mark.parametrize("case", [LOWER, SPD, SYMMETRIC, HERMITIAN, GENERAL, find_case("auto")], ids=str)
C = 20  # tolerated scaled residual, in units of eps


def problem_of(case, n=12, batch=(), **options):
    """A row of the table, its tensors on the device."""
    return moved(make(case, n, batch, **options))


def moved(problem):
    return replace(problem, indices=problem.indices.to(DEVICE), values=problem.values.to(DEVICE))


def rhs(problem, *shape, seed=1):
    return problem.rhs(*shape, seed=seed).to(DEVICE)


def leaf(t):
    return t.detach().clone().requires_grad_()


def close(actual, expected, tolerance=1e-10):
    if isinstance(expected, tuple | list):
        for a, e in zip(actual, expected, strict=True):
            close(a, e, tolerance)
    else:
        assert (actual.device.type, actual.dtype) == (expected.device.type, expected.dtype)
        assert relative_error(actual, expected) < tolerance


def gradients(solve, values, b, g):
    values, b = leaf(values), leaf(b)
    return torch.autograd.grad(solve(values, b), (values, b), g)


def wide(t):
    return t.to(torch.complex128 if t.is_complex() else torch.float64)


# --- the table --------------------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("adjoint", [False, True], ids=["", "adjoint"])
def test_solution(case, adjoint):
    for n in (1, 2, 12, 45):
        problem = problem_of(case, n, seed=n)
        system, A = problem.system(), problem.matrix(wide(problem.values))
        A = A.mH if adjoint else A
        for shape in [(n,), (n, 1), (n, 3), (n, 17)]:
            b = rhs(problem, *shape)
            x = system.solve(problem.values, b, adjoint=adjoint)
            assert (x.shape, x.dtype, x.device, x.requires_grad) == (b.shape, b.dtype, b.device, False)
            assert scaled_residual(A, x.view(n, -1), b.view(n, -1)) <= C * case.eps
            assert relative_error(x, torch.linalg.solve(A, wide(b))) <= 500 * case.eps
        assert (system.stats.factorizations, system.stats.reuses) == (1, 3)
        if DEVICE.type == "cuda":
            assert system.stats.engine == "cudss"


@every_case
def test_values_that_change(case):
    """The second and third factorizations take the structures of the first."""
    problem = problem_of(case, 30, (3,))
    system, b = problem.system(), rhs(problem, 30, 2)
    for values in problem.values:
        x = system.solve(values, b)
        assert scaled_residual(problem.matrix(wide(values)), x, b) <= C * case.eps
    stats = system.stats
    assert (stats.analyses, stats.factorizations, stats.refactorizations) == (1, 3, 2)


@pytest.mark.parametrize("case", [SPD, GENERAL], ids=str)
@pytest.mark.parametrize("batch, shape, result", VECTORS + MATRICES)
def test_ranks_decide(case, batch, shape, result):
    problem = problem_of(case, 4, batch)
    system, values, b = problem.system(), leaf(problem.values), leaf(rhs(problem, *shape))
    vector, g = (batch, shape, result) in VECTORS, rhs(problem, *result, seed=2)

    def times(A, b):
        return (A @ b.unsqueeze(-1)).squeeze(-1) if vector else A @ b

    expected = times(torch.linalg.inv(problem.matrix(values)), b)
    derivatives = torch.autograd.grad(expected, (values, b), g)
    for x in (system.solve(values, b), system.factorize(values).solve(b), system.solve_ex(values, b)[0]):
        assert x.shape == result
        close(x, expected, 1e-12)
        close(torch.autograd.grad(x, (values, b), g), derivatives, 1e-11)
    info = system.solve_ex(values, b)[1]
    assert info.shape == result[: -1 if vector else -2] and info.device == values.device and not info.any()
    close(system.matmul(values, b), times(problem.matrix(values), b), 1e-13)


def test_a_grid():
    """Large enough for more than one supernode, in both precisions."""
    for dtype in (torch.float32, torch.float64):
        problem = moved(grid_problem((60, 50), dtype))
        system, b = problem.system(), rhs(problem, 3000, 2)
        x = system.solve(problem.values, b)
        r = system.matmul(problem.values, x) - b
        assert float(r.abs().max() / (10 * x.abs().max() + b.abs().max())) <= C * torch.finfo(dtype).eps


@pytest.mark.parametrize("ordering", ["auto", "amd", "natural"])
def test_orderings(ordering):
    for case in (LOWER, GENERAL):
        problem = problem_of(case, 40)
        x = problem.system(ordering=ordering).solve(problem.values, b := rhs(problem, 40))
        assert scaled_residual(problem.matrix(), x[:, None], b[:, None]) <= C * case.eps


# --- derivatives ------------------------------------------------------------------------------------------------------


@every_double_case
@pytest.mark.parametrize("shape", [(5,), (5, 2)], ids=["vector", "matrix"])
@pytest.mark.parametrize("adjoint", [False, True], ids=["", "adjoint"])
def test_finite_differences(case, shape, adjoint):
    problem = problem_of(case, 5)
    inputs = leaf(problem.values), leaf(rhs(problem, *shape))
    solve = partial(problem.system().solve, adjoint=adjoint)
    assert gradcheck(solve, inputs, check_forward_ad=True, nondet_tol=1e-10)
    assert gradgradcheck(solve, inputs, check_fwd_over_rev=True, nondet_tol=1e-10, fast_mode=True)


@some_cases
def test_transforms(case):
    problem = problem_of(case, 6, (3,))
    system, b, t = problem.system(), rhs(problem, 3, 6), rhs(problem, 3, 6, seed=2)
    values = problem.values
    along = values[0] * 0.1, t[0]
    close(jvp(system.solve, (values[0], b[0]), along), jvp(problem.reference, (values[0], b[0]), along))
    close(vmap(system.solve)(values, b), problem.reference(values, b))
    close(vmap(system.solve, (None, 0))(values[1], b), problem.reference(values[1], b[:, :, None])[..., 0])

    def loss(solve):
        return lambda b: solve(values[0], b).abs().pow(2).sum()

    if not case.dtype.is_complex:
        close(jacrev(partial(system.solve, values[0]))(b[0]), torch.linalg.inv(problem.matrix(values[0])))
        close(jacfwd(jacrev(loss(system.solve)))(b[0]), jacfwd(jacrev(loss(problem.reference)))(b[0]))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("case", [LOWER, GENERAL], ids=str)
def test_compile(case, backend):
    torch._dynamo.reset()
    problem = problem_of(case, 9)
    system, b, g = problem.system(), rhs(problem, 9), rhs(problem, 9, seed=2)

    def step(solve, values, b):
        return 2 * solve(values * 1.5, b.sin())

    compiled = torch.compile(partial(step, system.solve), fullgraph=True, backend=backend)
    for scale in (0.1, 0.2):
        values = problem.values * scale
        close(compiled(values, b), step(system.solve, values, b))
        close(gradients(compiled, values, b, g), gradients(partial(step, system.solve), values, b, g))


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved-tensors", "reentrant"])
@some_cases
def test_checkpoint(case, use_reentrant):
    problem = problem_of(case, 7)
    system, b, g = problem.system(), rhs(problem, 7), rhs(problem, 7, seed=3)
    values, b = leaf(problem.values), leaf(b)
    checkpoint(system.solve, values, b, use_reentrant=use_reentrant).backward(g)
    close((values.grad, b.grad), gradients(problem.reference, values, b, g))
    assert system.stats.factorizations == 1


@some_cases
def test_matmul(case):
    problem = problem_of(case, 8)
    system, A, x, g = problem.system(), problem.matrix(), rhs(problem, 8, 3), rhs(problem, 8, 3, seed=2)
    for adjoint in (False, True):
        close(system.matmul(problem.values, x, adjoint=adjoint), (A.mH if adjoint else A) @ x)
        solve = partial(system.matmul, adjoint=adjoint)

        def reference(values, x, adjoint=adjoint):
            A = problem.matrix(values)
            return (A.mH if adjoint else A) @ x

        close(gradients(solve, problem.values, x, g), gradients(reference, problem.values, x, g))


def test_the_default_dtype_does_not_matter():
    problem = problem_of(find_case("spd", torch.float32, "lower"), 8)
    system, b, g = problem.system(), rhs(problem, 8, 2), rhs(problem, 8, 2, seed=2)
    expected = [*gradients(system.solve, problem.values, b, g), *gradients(system.matmul, problem.values, b, g)]
    torch.set_default_dtype(torch.float64)
    try:
        found = [*gradients(system.solve, problem.values, b, g), *gradients(system.matmul, problem.values, b, g)]
    finally:
        torch.set_default_dtype(torch.float32)
    close(found, expected, 1e-5)


# --- errors: those of the CPU -----------------------------------------------------------------------------------------


def indefinite(case):
    problem = problem_of(case, 6)
    k = int(torch.argmax((problem.indices[0] == problem.indices[1]).int() * problem.values.real.sign().int()))
    problem.values[k] -= 100
    return problem.system(), problem.values, rhs(problem, 6)


def singular(case):
    problem = problem_of(case, 6)
    problem.values[(problem.indices == 2).any(0)] = 0
    return problem.system(), problem.values, rhs(problem, 6)


def rank_deficient(case):
    n = 5
    i, j = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
    u = torch.arange(1.0, n + 1).to(case.dtype)
    system = SparseSystem(torch.stack([i.flatten(), j.flatten()]), n, **case.options)
    return system, torch.outer(u, u).flatten().to(DEVICE), torch.ones(n, dtype=case.dtype, device=DEVICE)


def nan_in_values(case):
    problem = problem_of(case, 6)
    problem.values[3] = torch.nan
    return problem.system(), problem.values, rhs(problem, 6)


def nan_in_b(case):
    problem = problem_of(case, 6)
    b = rhs(problem, 6)
    b[4] = torch.nan
    return problem.system(), problem.values, b


def asymmetric(case):
    problem = problem_of(case, 6)
    problem.values[(problem.indices[0] > problem.indices[1])] *= 2
    return problem.system(), problem.values, rhs(problem, 6)


WRONG = [
    (indefinite, SPD, NotPositiveDefiniteError), (indefinite, LOWER, NotPositiveDefiniteError),
    (singular, SPD, NotPositiveDefiniteError), (rank_deficient, GENERAL, SingularMatrixError),
    *[(singular, case, SingularMatrixError) for case in (SYMMETRIC, HERMITIAN, GENERAL, find_case("auto"))],
    *[(make, case, ValueError) for make in (nan_in_values, nan_in_b) for case in (SPD, SYMMETRIC, HERMITIAN, GENERAL)],
    *[(asymmetric, case, ValueError) for case in (SPD, SYMMETRIC, HERMITIAN)],
]  # fmt: skip


@pytest.mark.parametrize("wrong, case, error", WRONG, ids=[f"{w.__name__}-{case}" for w, case, _ in WRONG])
def test_errors(wrong, case, error):
    system, values, b = wrong(case)
    with pytest.raises(error) as cpu:
        system.solve(values.cpu(), b.cpu())
    with pytest.raises(error) as device:
        system.solve(values, b)
    assert type(device.value) is type(cpu.value)
    if error is ValueError:
        assert str(device.value) == str(cpu.value)
    else:
        assert 0 <= device.value.column < 6
    if wrong is not asymmetric:
        assert system.solve_ex(values, b)[1].item() != 0
    if wrong is not rank_deficient:
        good = problem_of(case, 6)
        assert system.solve(good.values, rhs(good, 6)).isfinite().all()


def test_recovery():
    """A system that failed serves the next values; the failing column, where it is known."""
    n = 8
    i = torch.arange(n)
    system = SparseSystem(torch.stack([i, i]), n, kind="spd", triangle="lower")
    b = torch.ones(n, dtype=torch.float64, device=DEVICE)
    for k in range(n):
        values = b.clone()
        values[k] = -1
        with pytest.raises(NotPositiveDefiniteError) as error:
            system.solve(values, b)
        assert error.value.column == k
        close(system.solve(2 * b, b), b / 2)
        x, info = system.solve_ex(torch.stack([b, values]), b)
        assert info.tolist() == [0, k + 1] and torch.equal(x[0], b) and x[1].isnan().all()


@pytest.mark.parametrize("kind", ["general", "spd"])
def test_failures_without_checks(kind):
    """Nothing is raised, whatever x is; the status says it."""
    indices = torch.tensor([[0, 1, 2], [0, 1, 1]] if kind == "general" else [[0, 1], [0, 1]])
    system = SparseSystem(indices, 3, kind=kind, check=False)
    values = torch.arange(1.0, 1 + indices.shape[1], device=DEVICE).requires_grad_()
    x = system.solve(values, torch.ones(3, device=DEVICE))
    x.sum().backward()
    assert x.shape == (3,) and values.grad.shape == values.shape
    assert system.factorize(values).info.item() == 3
    x, status = system.solve_ex(values, torch.ones(3, device=DEVICE))
    assert status.item() == 3 and x.isnan().all()


def test_arguments_on_two_devices():
    problem = problem_of(SPD, 6)
    for values, b in [(problem.values, problem.rhs(6)), (problem.values.cpu(), rhs(problem, 6))]:
        if values.device != b.device:
            with pytest.raises(TypeError, match="b must be a dense tensor on the device of values"):
                problem.system().solve(values, b)


def test_without_cudss(monkeypatch):
    monkeypatch.delenv("SPCACHE_CUDSS", raising=False)
    monkeypatch.setattr(cudss, "_path", lambda cuda: "/nowhere/libcudss.so.1")
    remedy = (
        r"pip install 'spcache\[cuda1\d\]', or pass cuda='host' to SparseSystem to factorize CUDA tensors on the CPU"
    )
    message = rf"CUDA tensors need cuDSS, which was not found \(.*nowhere.*\): {remedy}"
    with pytest.raises(EngineUnavailableError, match=message):
        cudss.library()
    if DEVICE.type == "cuda":
        problem = problem_of(LOWER, 6)
        with pytest.raises(EngineUnavailableError, match=message):
            problem.system().solve(problem.values, rhs(problem, 6))
        assert problem.system(cuda="host").solve(problem.values, rhs(problem, 6)).isfinite().all()


# --- what is kept -----------------------------------------------------------------------------------------------------


@some_cases
def test_one_analysis_in_ten_steps(case):
    problem = problem_of(case, 20)
    system, b, g = problem.system(), rhs(problem, 20), rhs(problem, 20, seed=2)
    for step in range(10):
        gradients(system.solve, problem.values * (1 + step), b, g)
    stats = system.stats
    assert (stats.analyses, stats.factorizations, stats.refactorizations, stats.solves) == (1, 10, 9, 20)


@some_cases
def test_equal_values_in_place(case):
    problem = problem_of(case, 12)
    system, values, b = problem.system(), problem.values.clone(), rhs(problem, 12)
    first = system.solve(values, b)
    values += 0
    assert torch.equal(system.solve(values, b), first)
    assert (system.stats.factorizations, system.stats.reuses) == (1, 1)
    values *= 2
    close(system.solve(values, b), first / 2)
    assert system.stats.factorizations == 2
    factor = system.factorize(values)
    values /= 2
    with pytest.raises(RuntimeError, match="values were modified after factorize"):
        factor.solve(b)


@some_cases
def test_two_forwards_before_their_backwards(case):
    problem = problem_of(case, 12, (2,))
    system, b, g = problem.system(), rhs(problem, 12), rhs(problem, 12, seed=2)
    leaves = [leaf(v) for v in problem.values]
    solutions = [system.solve(v, b) for v in leaves]
    for v, x in zip(leaves, solutions, strict=True):
        for _ in range(2):
            close(torch.autograd.grad(x, v, g, retain_graph=True), gradients(problem.reference, v, b, g)[:1])
    assert system.stats.factorizations == 2


def test_two_systems_of_one_pattern():
    problem = problem_of(LOWER, 12, (2,))
    one, two = problem.system(), problem.system()
    b, (u, v) = rhs(problem, 12), problem.values
    x, y = one.solve(u, b), two.solve(v, b)
    close((one.solve(u, b), two.solve(v, b)), (x, y), 1e-15)
    close((x, y), (problem.reference(u, b), problem.reference(v, b)))
    assert (one.stats.analyses, two.stats.analyses) == (1, 0)
    assert one.stats.factorizations == two.stats.factorizations == 1


@some_cases
def test_keep_factor_false(case):
    problem = problem_of(case, 12)
    system, b, g = problem.system(keep_factor=False), rhs(problem, 12), rhs(problem, 12, seed=2)
    close(gradients(system.solve, problem.values, b, g), gradients(problem.reference, problem.values, b, g))
    assert system.stats.factorizations == 2


@some_cases
def test_cpu_and_device_alternately(case):
    problem = problem_of(case, 12, (3,))
    system, b, g = problem.system(), rhs(problem, 12), rhs(problem, 12, seed=2)
    for values in problem.values:
        expected = gradients(system.solve, values.cpu(), b.cpu(), g.cpu())
        close([t.cpu() for t in gradients(system.solve, values, b, g)], expected)
        close(system.solve(values, b).cpu(), system.solve(values.cpu(), b.cpu()))


@some_cases
def test_host(case):
    """cuda="host" factorizes on the CPU."""
    problem = problem_of(case, 12, (3,))
    system, b, g = problem.system(cuda="host"), rhs(problem, 3, 12), rhs(problem, 3, 12, seed=2)
    close(system.solve(problem.values, b), problem.reference(problem.values, b))
    close(gradients(system.solve, problem.values, b, g), gradients(problem.reference, problem.values, b, g))
    assert system.stats.factorizations == 1 and system.stats.engine == case.engine
    assert not system.solve_ex(problem.values, b)[1].any()


# --- streams and threads ----------------------------------------------------------------------------------------------


@needs_streams
def test_storage_that_another_stream_still_uses():
    """The second factorization takes the storage of the first, whose solve has not begun."""
    problem = moved(grid_problem((30, 30), batch=(2,)))
    system, b = problem.system(check=False), rhs(problem, 900)
    expected = [problem.system().solve(v, b) for v in problem.values]
    u, v = problem.values
    for _ in range(3):
        system.solve(u, b)
        streams = torch.cuda.default_stream(), torch.cuda.Stream(), torch.cuda.Stream()
        for first, second in zip(streams, [*streams[1:], streams[0]], strict=True):
            torch.cuda.synchronize()
            with torch.cuda.stream(first):
                torch.cuda._sleep(50_000_000)
                x = system.solve(u, b)
            with torch.cuda.stream(second):
                y = system.solve(v, b)
            torch.cuda.synchronize()
            close((x, y), tuple(expected), 1e-12)


def test_threads_with_a_stream_each():
    problem = moved(grid_problem((20, 20), batch=(4,)))
    system, b, g = problem.system(), rhs(problem, 400), rhs(problem, 400, seed=2)
    alone = [gradients(problem.system().solve, v, b, g) for v in problem.values]
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()

    def work(k):
        with torch.cuda.stream(torch.cuda.Stream() if DEVICE.type == "cuda" else None):
            for turn in range(10):
                e = (k + turn) % 4
                close(gradients(system.solve, problem.values[e], b, g), alone[e], 1e-12)

    in_threads(work, 4)


@needs_streams
@pytest.mark.parametrize("case", [LOWER, SPD, SYMMETRIC, HERMITIAN, GENERAL], ids=str)
def test_without_checks_nobody_waits(case):
    problem = problem_of(case, 30)
    system, b, g = problem.system(check=False), leaf(rhs(problem, 30, 3)), rhs(problem, 30, 3, seed=2)
    for turn in range(3):
        values = leaf(problem.values * (1 + turn))
        torch.cuda.set_sync_debug_mode("error" if turn else "default")
        try:
            torch.autograd.backward(system.solve(values, b), g)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert values.grad.isfinite().all()


@pytest.mark.parametrize("case", [LOWER, SYMMETRIC, HERMITIAN, GENERAL], ids=str)
def test_deterministic(case):
    """Bit by bit, in systems that know nothing of each other."""
    problem = problem_of(case, 60)
    b, g = rhs(problem, 60, 3), rhs(problem, 60, 3, seed=2)
    torch.use_deterministic_algorithms(True)
    try:
        runs = []
        for _ in range(3):
            spcache.plan_cache.clear()
            system = problem.system()
            system.solve(problem.values * 3, b)
            runs.append((system.solve(problem.values, b), *gradients(system.solve, problem.values, b, g)))
    finally:
        torch.use_deterministic_algorithms(False)
    for run in runs[1:]:
        assert all(torch.equal(t, first) for t, first in zip(run, runs[0], strict=True))


@needs_streams
@pytest.mark.parametrize("check", [True, False], ids=["", "unchecked"])
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_graph_capture_is_refused(warm, check):
    """And what else is captured is not spoilt."""
    problem = problem_of(LOWER, 6)
    system, b = problem.system(check=check), rhs(problem, 6)
    if warm:
        system.solve(problem.values, b)
    y, graph = torch.zeros(3, device=DEVICE), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y += 1
        with pytest.raises(RuntimeError, match="a solve cannot be captured into a CUDA graph"):
            system.solve(problem.values, b)
    graph.replay()
    assert y.tolist() == [1.0] * 3
    close(system.solve(problem.values, b), problem.reference(problem.values, b))


# --- the other doors --------------------------------------------------------------------------------------------------


def graph_matrix(n=30):
    """Positive definite, sparse COO on the device; its values need a gradient."""
    A = torch.rand(n, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    A = torch.where(A < 0.1, A, 0.0)
    A = -(A + A.T)
    A = A + torch.diag(A.abs().sum(1) + 1)
    return A.to(DEVICE), A.to(DEVICE).to_sparse_coo().coalesce().requires_grad_()


@pytest.mark.parametrize("layout", ["coalesce", "to_sparse_csr"])
def test_sparse_matrices(layout):
    dense, A = graph_matrix()
    A = getattr(A.detach(), layout)().requires_grad_()
    b = torch.ones(30, 2, dtype=torch.float64, device=DEVICE)
    close(spcache.solve(A, b), torch.linalg.solve(dense, b))
    close(spcache.matmul(A, b), dense @ b)
    spcache.solve(A, b).sum().backward()
    dense.requires_grad_()
    torch.linalg.solve(dense, b).sum().backward()
    close(A.grad.to_dense(), torch.where(A.detach().to_dense() != 0, dense.grad, 0.0))
    system = SparseSystem.from_matrix(A.detach(), kind="spd")
    close(system.solve(system.values_of(A.detach()), b), torch.linalg.solve(dense.detach(), b))


def test_pytorch_sparse_solve():
    dense, A = graph_matrix()
    b = torch.ones(30, dtype=torch.float64, device=DEVICE)
    x = SparseSolver.apply(A, b)
    close(x, torch.linalg.solve(dense, b))
    x.sum().backward()
    lam = torch.linalg.solve(dense, torch.ones_like(b))
    close(A.grad.to_dense(), torch.where(dense != 0, -torch.outer(lam, x.detach()), 0.0))
    with pytest.raises(ValueError, match="not positive definite"):
        SparseSolver.apply((-A).coalesce(), b)


def test_torchsparsegradutils():
    dense, A = graph_matrix()
    B = torch.arange(60.0, dtype=torch.float64, device=DEVICE).view(30, 2).requires_grad_()
    y = sparse_mm(A, B)
    close(y, dense @ B)
    y.sum().backward()
    close(B.grad, dense.T @ torch.ones_like(B))
    close(A.grad.to_dense(), torch.where(dense != 0, torch.ones_like(B) @ B.detach().T, 0.0))


def test_iterative():
    dense, A = graph_matrix()
    b = torch.ones(30, dtype=torch.float64, device=DEVICE)
    system = SparseSystem.from_matrix(A.detach(), kind="spd")
    factor = system.factorize(system.values_of(A.detach()))
    for M in (None, factor):
        x, status = spcache.iterative.cg(A.detach(), b, rtol=1e-12, M=M)
        assert x.device == b.device and bool(status.converged.all())
        close(x, torch.linalg.solve(dense, b))


def test_solve_operator():
    dense, A = graph_matrix()
    b = torch.ones(30, dtype=torch.float64, device=DEVICE, requires_grad=True)
    x = spcache.solve_operator(A, b, rtol=1e-13)
    close(x, torch.linalg.solve(dense, b))
    x.sum().backward()
    close(b.grad, torch.linalg.solve(dense, torch.ones_like(b.detach())))
    close(A.grad.to_dense(), torch.where(dense != 0, -torch.outer(b.grad, x.detach()), 0.0))
