"""The way of CUDA tensors, without CUDA: tensors of the CPU through an imitation of cuDSS (on_fake_cudss.py)."""

import ctypes
import gc
import os
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import on_fake_cudss
import pytest
import torch
from cases import CASES, find_case, make, relative_error
from fake_cudss import build, counters, fail_next, reset
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck

from spcache import EngineUnavailableError, NotPositiveDefiniteError, SingularMatrixError, plan_cache, system
from spcache.convention import CONJUGATED, NONE, TRANSPOSED, Convention
from spcache.device import HostFactor, Pairs
from spcache.engines import cudss
from spcache.factorizer import Factorizer
from spcache.pattern import Pattern

pytestmark = pytest.mark.fakecudss
CPU = torch.device("cpu")
SPD, GENERAL = find_case("spd"), find_case("general")
both = pytest.mark.parametrize("case", [SPD, GENERAL], ids=str)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return str(build(tmp_path_factory.mktemp("fake_cudss")))


@pytest.fixture
def lib(path, monkeypatch):
    """The counters of the library that every system uses; nothing may be alive, or misused, after a test."""
    monkeypatch.setattr(cudss, "_path", lambda cuda: path)
    monkeypatch.setattr(cudss, "Device", on_fake_cudss.HostDevice)
    monkeypatch.setattr(system, "Factorizer", on_fake_cudss.OnFake)
    monkeypatch.setattr(on_fake_cudss.HostDevice, "now", 0)
    monkeypatch.setattr(on_fake_cudss.HostDevice, "waits", [])
    lib = ctypes.CDLL(path)
    reset(lib)
    yield lib
    plan_cache.clear()
    gc.collect()
    left = counters(lib)
    assert not any((left.handles, left.configs, left.data, left.matrices, left.bytes, left.misuses, left.collisions))


def leaf(t):
    return t.detach().clone().requires_grad_()


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("adjoint", [False, True])
def test_solutions(lib, case, adjoint):
    for n, batch in ((1, ()), (7, ()), (7, (2,))):
        problem = make(case, n, batch)
        solver = problem.system()
        for shape in ((*batch, n), (*batch, n, 1), (*batch, n, 3), (2, *batch, n, 2)):
            b = problem.rhs(*shape)
            x = solver.solve(problem.values, b, adjoint=adjoint)
            A = problem.matrix(problem.values.to(torch.complex128))
            A = A.mH if adjoint else A
            vector = len(shape) == len(batch) + 1
            wide = b.to(torch.complex128)
            expected = torch.linalg.solve(A, wide.unsqueeze(-1)).squeeze(-1) if vector else torch.linalg.solve(A, wide)
            assert x.shape == b.shape and x.dtype == b.dtype and x.is_contiguous()
            assert relative_error(x, expected) <= 200 * case.eps
        assert solver.stats.engine == "cudss"


@both
def test_an_optimizer_analyzes_once(lib, case):
    problem = make(case, 8)
    solver, b = problem.system(), problem.rhs(8)
    values = leaf(problem.values)
    for step in range(5):
        solver.solve(values, b).sum().backward()
        with torch.no_grad():
            values *= 1 + 1e-3 * step
    done, stats = counters(lib), solver.stats
    assert (done.analyses, done.symbolic, done.factorizations, done.refactorizations) == (1, 1, 1, 3)
    assert (stats.analyses, stats.factorizations, stats.refactorizations, stats.solves) == (1, 4, 3, 10)
    assert stats.reuses == 1 and done.columns == 10  # in the second step the values were those of the first


@both
def test_two_forwards_before_their_backwards(lib, case):
    """Each has a slot; the second is given the permutation that the first one's analysis found."""
    problem = make(case, 8, (3,))
    solver, b = problem.system(), problem.rhs(8)
    steps = [leaf(v) for v in problem.values]
    solutions = [solver.solve(v, b) for v in steps]
    done = counters(lib)
    assert done.factorizations == 3 and done.data == 3 and done.analyses == done.symbolic == 3
    for v, x in reversed(list(zip(steps, solutions, strict=True))):
        (gradient,) = torch.autograd.grad(x.sum(), v, retain_graph=True)
        reference = torch.linalg.solve(problem.matrix(v), b).sum()
        assert relative_error(gradient, torch.autograd.grad(reference, v)[0]) < 1e-12
    assert counters(lib).factorizations == 3


@both
def test_storage_comes_back(lib, case):
    problem = make(case, 8, (20,))
    solver, b = problem.system(), problem.rhs(8)
    for v in problem.values:
        solver.solve(leaf(v), b).sum().backward()
    assert counters(lib).data <= 2 and solver.stats.factorizations == 20
    solver.clear()
    gc.collect()
    assert counters(lib).data == 0 and counters(lib).bytes == 0


def test_not_positive_definite_is_raised_and_forgotten(lib):
    """cuDSS's status is sticky: it is reset before each factorization."""
    problem = make(SPD, 6)
    solver, b = problem.system(), problem.rhs(6)
    for _ in range(2):
        with pytest.raises(NotPositiveDefiniteError):
            solver.solve(-problem.values, b)
        assert relative_error(solver.solve(problem.values, b), problem.reference(problem.values, b)) < 1e-13


def test_a_failed_element_does_not_spoil_the_others(lib):
    problem = make(SPD, 6, (3,))
    values, b = problem.values.clone(), problem.rhs(3, 6)
    values[1] *= -1
    x, info = problem.system().solve_ex(values, b)
    assert info[1] > 0 and info[[0, 2]].eq(0).all() and x[1].isnan().all()
    assert relative_error(x[[0, 2]], problem.reference(values[[0, 2]], b[[0, 2]])) < 1e-13


def test_singular_matrices(lib):
    """cuDSS replaces tiny pivots and goes on; whether that was singular is found out by a solve."""
    indices = torch.tensor([[0, 1, 0, 1], [0, 1, 1, 0]])
    solver = system.SparseSystem(indices, 2, kind="general")
    singular, b = torch.tensor([0.0, 1.0, 0.0, 0.0]).double(), torch.tensor([1.0, 2.0]).double()
    with pytest.raises(SingularMatrixError, match="column 0"):
        solver.solve(singular, b)
    assert solver.solve_ex(singular, b)[1] == 1
    assert solver.solve(torch.tensor([2.0, 1.0, 0.0, 0.0]).double(), b).tolist() == [0.5, 2.0]
    empty = system.SparseSystem(torch.tensor([[0, 1], [0, 0]]), 2, kind="general")
    with pytest.raises(SingularMatrixError, match="structurally singular.*column 1"):
        empty.solve(torch.ones(2), torch.ones(2))
    missing = system.SparseSystem(torch.tensor([[0], [0]]), 2, kind="spd")
    with pytest.raises(NotPositiveDefiniteError, match="column 1"):
        missing.solve(torch.ones(1), torch.ones(2))


@pytest.mark.parametrize("adjoint", [False, True])
def test_solutions_by_perturbed_pivots_are_refined(lib, adjoint, monkeypatch):
    problem = make(find_case("general", dtype=torch.complex128), 6, (2,))
    solver, b = problem.system(), problem.rhs(2, 6, 3)
    factor = solver.factorize(problem.values)
    factor._numeric.storage.perturbed = [0, 3]
    solve = cudss.Storage.solve
    for wrong, converges in ((1e-3, True), (0.9, False)):
        monkeypatch.setattr(cudss.Storage, "solve", lambda *a, wrong=wrong: solve(*a) * (1 + wrong))
        if not converges:
            with pytest.raises(SingularMatrixError, match="3 pivots had to be replaced"):
                factor.solve(b, adjoint=adjoint)
            continue
        x = factor.solve(b, adjoint=adjoint)
        A = problem.matrix(problem.values)
        expected = torch.linalg.solve(A.mH if adjoint else A, b)
        assert relative_error(x[1], expected[1]) < 1e-12 < relative_error(x[0], expected[0])
        assert solver.stats.refinements >= 4


@both
def test_what_is_not_finite_is_refused(lib, case):
    problem = make(case, 5)
    solver, b = problem.system(), problem.rhs(5)
    for bad in (torch.nan, torch.inf):
        values, rhs = problem.values.clone(), b.clone()
        values[3], rhs[2] = bad, bad
        with pytest.raises(ValueError, match=r"values must be finite.*values\[3\]"):
            solver.solve(values, b)
        with pytest.raises(ValueError, match=r"b must be finite.*b\[2\]"):
            solver.solve(problem.values, rhs)
    assert solver.solve(problem.values, b).isfinite().all()


def test_values_that_are_not_of_the_kind(lib):
    for kind in ("spd", "symmetric", "hermitian"):
        problem = make(find_case(kind), 6)
        values = problem.values * (1 + 0.01 * torch.rand(problem.values.shape, dtype=torch.float64))
        with pytest.raises(ValueError, match="values are not symmetric"):
            problem.system().solve(values, problem.rhs(6))


@both
def test_without_checks_nothing_is_read(lib, case):
    problem = make(case, 6)
    solver, b = problem.system(check=False), problem.rhs(6)
    values = leaf(problem.values)
    for _ in range(3):
        solver.solve(values, b).sum().backward()
    assert counters(lib).info_reads == 0 and solver.stats.reuses == 0
    assert solver.factorize(problem.values).info == 0 and counters(lib).info_reads > 0


@both
def test_equal_values_are_recognized_where_they_lie(lib, case):
    problem = make(case, 6)
    solver, values, b = problem.system(), problem.values.clone(), problem.rhs(6)
    solver.solve(values, b)
    solver.solve(values, b)
    assert solver.stats.factorizations == 1 and solver.stats.reuses == 1
    values *= 1.5  # in place: where it lies tells nothing
    x = solver.solve(values, b)
    assert solver.stats.factorizations == 2 and relative_error(x, problem.reference(values, b)) < 1e-13


def test_streams_follow_each_other(lib, monkeypatch):
    device, problem = on_fake_cudss.HostDevice, make(SPD, 6)
    solver, b = problem.system(), problem.rhs(6)
    x = solver.solve(leaf(problem.values), b)
    monkeypatch.setattr(device, "now", 7)
    x.sum().backward()
    assert device.waits == [(7, 0)] and counters(lib).stream == 7
    del x
    solver.clear()
    plan_cache.clear()
    gc.collect()
    assert device.waits[1:] == [(0, 7)]  # memory of the first stream, after the other is done with it


def test_a_graph_cannot_be_captured(lib, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="cannot be captured into a CUDA graph"):
        cudss.require_eager(SimpleNamespace(is_cuda=True))


def test_deterministic_mode_takes_columns_one_by_one(lib):
    problem = make(SPD, 6)
    torch.use_deterministic_algorithms(True)
    try:
        x = problem.system().solve(problem.values, problem.rhs(6, 4))
    finally:
        torch.use_deterministic_algorithms(False)
    assert counters(lib).solves == counters(lib).columns == 4
    assert relative_error(x, problem.reference(problem.values, problem.rhs(6, 4))) < 1e-13


@pytest.mark.parametrize(
    ("function", "status", "error"),
    [("cudssCreate", 5, RuntimeError), ("cudssDataCreate", 2, MemoryError), ("cudssExecute", 2, MemoryError),
     ("cudssExecute", 6, RuntimeError), ("cudssMatrixCreateCsr", 3, RuntimeError), ("cudssConfigSet", 4, NotImplementedError),
     ("cudssDataGet", 5, RuntimeError), ("cudssDataSet", 5, RuntimeError), ("cudssMatrixSetValues", 3, RuntimeError)],
)  # fmt: skip
def test_an_error_of_cudss_leaves_the_system_usable(lib, function, status, error):
    problem = make(GENERAL, 6)
    solver, b = problem.system(), problem.rhs(6)
    fail_next(lib, function, status)
    with pytest.raises(error, match=function):
        solver.solve(problem.values, b)
    assert relative_error(solver.solve(problem.values, b), problem.reference(problem.values, b)) < 1e-13


def test_an_error_of_the_allocator_is_the_one_raised(lib, monkeypatch):
    problem = make(SPD, 6)
    solver = problem.system()

    allocate, full = on_fake_cudss.HostDevice.allocate, True

    def no_memory(self, nbytes, stream):
        if full:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return allocate(self, nbytes, stream)

    monkeypatch.setattr(on_fake_cudss.HostDevice, "allocate", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        solver.solve(problem.values, problem.rhs(6))
    full = False
    assert solver.solve(problem.values, problem.rhs(6)).isfinite().all()


def test_without_cudss_the_error_says_what_to_install(lib, monkeypatch):
    problem = make(SPD, 6)
    with monkeypatch.context() as patch:
        patch.setattr(cudss, "_path", lambda cuda: "/nowhere/libcudss.so.1")
        with pytest.raises(EngineUnavailableError, match=r"not found.*pip install 'spcache\[cuda1\d\]'.*cuda='host'"):
            problem.system().solve(problem.values, problem.rhs(6))
        patch.setattr(cudss, "_path", lambda cuda: "libc.so.6")
        with pytest.raises(EngineUnavailableError, match=r"lacks cudssGetProperty"):
            problem.system().solve(problem.values, problem.rhs(6))
    monkeypatch.setenv("FAKECUDSS_VERSION", "0.8.0")
    with pytest.raises(EngineUnavailableError, match=r"need cuDSS 1.x, found 0.8.0.*pip install"):
        problem.system().solve(problem.values, problem.rhs(6))


def test_what_is_freed_under_the_lock_is_destroyed_later(lib, monkeypatch):
    """cuDSS asks for memory under the handle's lock; collecting garbage there may free slots of the same handle."""
    problem = make(SPD, 6, (2,))
    solver, other, b = problem.system(), problem.system(), problem.rhs(6)
    garbage = [solver.factorize(problem.values[0])]
    solver.clear()
    garbage.append(garbage)  # a cycle: only the collector finds it
    allocate, left = on_fake_cudss.HostDevice.allocate, []

    def collecting(self, nbytes, stream):
        before = counters(lib).data
        gc.collect()
        left.append((before, counters(lib).data))
        return allocate(self, nbytes, stream)

    monkeypatch.setattr(on_fake_cudss.HostDevice, "allocate", collecting)
    next(iter(plan_cache._entries.values()))._handles.clear()
    garbage[0] = solver.factorize(problem.values[0])  # by a handle whose allocator collects
    solver.clear()
    gc.disable()
    try:
        del garbage, solver
        x = other.solve(problem.values[1], b)
    finally:
        gc.enable()
    assert relative_error(x, problem.reference(problem.values[1], b)) < 1e-13
    assert counters(lib).data == 1 and left[-1] == (2, 2)  # both alive then, one now


def test_a_hopeless_structure_without_checks(lib):
    empty = system.SparseSystem(torch.tensor([[0, 1], [0, 0]]), 2, kind="general", check=False)
    assert empty.solve(torch.ones(2), torch.ones(2)).isnan().all()


@both
def test_threads_share_a_system(lib, case, monkeypatch):
    monkeypatch.setenv("FAKECUDSS_SLEEP_US", "200")
    problem = make(case, 6, (4,))
    solver, b, wrong = problem.system(), problem.rhs(6), []

    def work(k):
        for _ in range(10):
            v = leaf(problem.values[k])
            x = solver.solve(v, b)
            x.sum().backward()
            if relative_error(x.detach(), problem.reference(problem.values[k], b)) > 1e-12:
                wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not wrong and counters(lib).collisions == 0


def test_the_host_path(lib):
    """cuda="host": factors of the CPU; here the copies there and back are none."""
    problem = make(SPD, 8, (2,))
    options = {**problem.system(cuda="host")._factorizer.options}
    solver = system.SparseSystem(problem.indices, 8, **options)
    solver._start(_HostPath(solver._factorizer.pattern, options))
    values, b = leaf(problem.values), leaf(problem.rhs(2, 8))
    assert isinstance(solver._factorizer.find(values), HostFactor)
    assert gradcheck(solver.solve, (values, b))
    assert solver.stats.engine == "multifrontal" and counters(lib).data == 0
    with pytest.raises(NotPositiveDefiniteError):
        solver.solve(-values, b)
    x, info = solver.solve_ex(-values, b)
    assert info.gt(0).all() and x.isnan().all()
    with pytest.raises(ValueError, match="cuda must be one of"):
        problem.system(cuda="device")


class _HostPath(Factorizer):
    inside = False

    def find(self, values, raising=None):
        if self.inside:
            return super().find(values, raising)
        self.inside = True
        try:
            return self._find_on_device(values.detach(), raising)
        finally:
            self.inside = False


@pytest.mark.parametrize("mirror", [NONE, TRANSPOSED, CONJUGATED])
@pytest.mark.parametrize("one_triangle", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128, torch.float32])
def test_products_by_torch_operations(mirror, one_triangle, dtype):
    """Against the native ones."""
    shape = (6, 6) if mirror != NONE else (6, 4)
    indices = torch.stack([torch.randint(0, size, (25,)) for size in shape])
    if one_triangle:
        if mirror == NONE:
            return
        indices = torch.stack([indices.amax(0), indices.amin(0)])
    convention = Convention(Pattern(indices, *shape), mirror, one_triangle)
    u, w = torch.randn(3, 6, 2, dtype=dtype), torch.randn(3, shape[1], 2, dtype=dtype)
    tolerance = 50 * torch.finfo(dtype).eps
    assert relative_error(convention.outer_by_torch(u, w), convention.outer(u, w)) < tolerance
    assert (
        relative_error(
            convention.outer_by_torch(u[..., 0], w[..., 0], True),
            convention.outer(u[..., 0].contiguous(), w[..., 0].contiguous(), True),
        )
        < tolerance
    )
    for values in (torch.randn(25, dtype=dtype), torch.randn(3, 25, dtype=dtype)):
        for adjoint, x in ((False, w), (True, u), (False, w[0]), (True, u[0])):
            ours, native = (f(values, x, adjoint) for f in (convention.matvec_by_torch, convention.matvec))
            assert ours.shape == native.shape and relative_error(ours, native) < tolerance


def test_symmetry_by_torch_operations():
    """Against the native tests."""
    for case in (find_case("hermitian", dtype=torch.complex128), SPD, GENERAL, find_case("symmetric")):
        for scale in (0.0, 1e-13, 1e-3):
            problem = make(case, 7)
            pattern = Pattern(problem.indices, 7, 7)
            values = problem.values * (1 + scale * torch.rand(problem.values.shape, dtype=torch.float64))
            pairs, code = Pairs(pattern, CPU), 3 if values.is_complex() else 1
            for hermitian in (False, True):
                ours = [float(t) for t in pairs.asymmetry(values, hermitian)]
                native = pattern.paired.asymmetry(values.data_ptr(), pattern.nnz, code, hermitian)
                assert ours == pytest.approx(native, rel=1e-10, abs=1e-15)
            for tolerance in (0.0, 1e-15, 1e-10, 1e-1):
                native = pattern.paired.positive_hermitian(values.data_ptr(), pattern.nnz, code, tolerance)
                assert pairs.positive_hermitian(values, tolerance) == native


def test_the_compiler_is_told_the_device():
    """Shapes and devices that the operators promise for CUDA tensors."""
    handle, ops = make(SPD, 5).system()._handle, torch.ops.spcache
    with FakeTensorMode(allow_non_fake_inputs=True):
        values, b = torch.empty(2, 13, device="cuda"), torch.empty(2, 5, 3, device="cuda")
        factor = ops.factor(values, handle, None, None)
        x = ops.solve(values, b, handle, factor, False, False, True, False)
        y = ops.matvec(values, x, handle, False, 5)
        gradient = ops.outer(y, x, handle, False, 13)
    assert factor.device.type == "cpu" and all(t.device.type == "cuda" for t in (x, y, gradient))
    assert x.shape == y.shape == b.shape and gradient.shape == values.shape


SUITES = [
    ("test_gradients.py", "not only_what_is_needed"),
    ("test_transforms.py", ""),
    ("test_patterns.py", ""),
]


@pytest.mark.slow
@pytest.mark.parametrize(("file", "which"), SUITES, ids=[file for file, _ in SUITES])
def test_suites_of_the_cpu(path, file, which):
    """The same tests as on the CPU."""
    tests = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "on_fake_cudss", "-m", "not slow", "-k", which, tests / file],
        capture_output=True, text=True, timeout=600, cwd=tests.parent,
        env={**os.environ, "SPCACHE_CUDSS": path, "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)])},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
