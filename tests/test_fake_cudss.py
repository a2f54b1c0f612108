"""The library that stands in for cuDSS (fake_cudss.py) against NumPy, and the rules that it keeps."""

import ctypes
import threading
from ctypes import byref, c_double, c_int, c_int64, c_size_t, c_void_p

import numpy as np
import pytest
import scipy.sparse as sp
from fake_cudss import build, counters, fail_next, reset
from test_cudss_library import EXPECTED, PROTOTYPES, declared, number, statuses

pytestmark = pytest.mark.fakecudss

DTYPES = [np.float32, np.float64, np.complex64, np.complex128]
TYPE = dict(zip(map(np.dtype, DTYPES), (0, 1, 4, 5), strict=True))
KINDS = ["general", "symmetric", "hermitian", "spd", "hpd"]
VIEWS = ["full", "lower", "upper"]
OK, ALLOC_FAILED, INVALID, NOT_SUPPORTED, EXECUTION_FAILED = 0, 2, 3, 4, 5
REORDERING, SYMBOLIC, ANALYSIS, FACTORIZATION, REFACTORIZATION, SOLVE = 1, 2, 3, 4, 8, 1008
SOLVE_MODE, PIVOT_EPSILON, DETERMINISTIC_MODE = 4, 9, 24
INFO, LU_NNZ, NPIVOTS, INERTIA, ROW, COL, DIAG, USER_PERM = 0, 1, 2, 3, 4, 5, 8, 9


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return build(tmp_path_factory.mktemp("fake_cudss"))


@pytest.fixture
def lib(path):
    """Nothing may be alive, and nothing have been misused, after a test that has not said so."""
    lib = declared(ctypes.CDLL(path))
    reset(lib)
    yield lib
    left = counters(lib)
    none = left._replace(handles=0, configs=0, data=0, matrices=0, bytes=0, misuses=0, collisions=0)
    assert left == none


def entries(rng, shape, dtype):
    A = rng.standard_normal(shape) + (1j * rng.standard_normal(shape) if np.dtype(dtype).kind == "c" else 0)
    return A.astype(dtype)


def matrix(rng, kind, dtype, n=7):
    """Dense, a third of it zeros."""
    A = entries(rng, (n, n), dtype) * (rng.random((n, n)) < 0.7) + n**0.5 * np.eye(n, dtype=dtype)
    if kind == "symmetric":
        A = A + A.T
    elif kind == "hermitian":
        A = A + A.conj().T - 2 * np.diag(np.arange(n) > n / 2).astype(dtype) * n
    elif kind != "general":
        A = A @ A.conj().T + np.eye(n, dtype=dtype)
    return A.astype(dtype)


class System:
    """One matrix [n, n], of which the entries that are not 0 are stored, and everything that solves with it."""

    def __init__(self, lib, A, kind="general", view="full", handle=None):
        A = sp.csr_array(A)
        self.lib, self.n, self.dtype, self.owner = lib, A.shape[0], A.dtype, handle is None
        self.indptr, self.indices, self.values = A.indptr.astype(np.int32), A.indices.astype(np.int32), A.data.copy()
        self.handle, self.config, self.data = handle or c_void_p(), c_void_p(), c_void_p()
        assert not self.owner or lib.cudssCreate(byref(self.handle)) == OK
        assert lib.cudssConfigCreate(byref(self.config)) == OK
        assert lib.cudssDataCreate(self.handle, byref(self.data)) == OK
        self.A = self.describe(KINDS.index(kind), VIEWS.index(view))

    def describe(self, mtype=0, view=0, base=0, **change):
        """A matrix like this one, but for a change."""
        own = dict(n=self.n, nnz=len(self.values), indptr=self.indptr.ctypes.data, indices=self.indices.ctypes.data)
        n, nnz, indptr, indices = (own | change).values()
        status = self.lib.cudssMatrixCreateCsr(
            byref(out := c_void_p()), n, n, nnz, indptr, None, indices, self.values.ctypes.data, 10, 10,
            TYPE[self.dtype], mtype, view, base,
        )  # fmt: skip
        assert status == OK
        return out

    def __enter__(self):
        return self

    def __exit__(self, *_):
        assert self.lib.cudssDataDestroy(self.handle, self.data) == OK
        assert self.lib.cudssConfigDestroy(self.config) == OK
        assert self.lib.cudssMatrixDestroy(self.A) == OK
        assert not self.owner or self.lib.cudssDestroy(self.handle) == OK

    def execute(self, phase, b=None, x=None, A=None):
        """b, x [columns, ld], or nothing"""
        columns = [c_void_p(), c_void_p()]
        for descriptor, array in zip(columns, (x, b), strict=True):
            if array is not None:
                status = self.lib.cudssMatrixCreateDn(
                    byref(descriptor), self.n, len(array), array.shape[1], array.ctypes.data, TYPE[array.dtype], 0
                )
                assert status == OK
        status = self.lib.cudssExecute(self.handle, phase, self.config, self.data, A or self.A, *columns)
        for descriptor in columns:
            assert not descriptor or self.lib.cudssMatrixDestroy(descriptor) == OK
        return status

    def solve(self, b, phase=SOLVE):
        x = np.full_like(b, 7)
        assert self.execute(phase, b, x) == OK
        return x

    def set(self, setting, value):
        return self.lib.cudssConfigSet(self.config, setting, *number(value))

    def put(self, parameter, array):
        return self.lib.cudssDataSet(self.handle, self.data, parameter, array.ctypes.data, array.nbytes)

    def ask(self, parameter, ctype=c_int, count=1, size=None):
        """Status, and what was read: a number, a list of several, or None."""
        out, written = (ctype * count)(), c_size_t(77)
        size = ctypes.sizeof(out) if size is None else size
        status = self.lib.cudssDataGet(self.handle, self.data, parameter, out, size, byref(written))
        if status:
            assert written.value == 77
            return status, None
        assert written.value == ctypes.sizeof(out)
        return status, out[0] if count == 1 else list(out)

    def get(self, parameter, ctype=c_int, count=1):
        status, value = self.ask(parameter, ctype, count)
        assert status == OK
        return value


def assert_solves(A, x, b):
    """x, b [columns, >= n]"""
    n = len(A)
    for u, v in zip(x[:, :n], b[:, :n], strict=True):
        scale = np.linalg.norm(A, 1) * np.linalg.norm(u, np.inf) + np.linalg.norm(v, np.inf)
        assert np.linalg.norm(A @ u - v, np.inf) < 20 * np.finfo(A.dtype).eps * scale


# --- Solutions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_solutions(lib, kind, dtype, view):
    rng = np.random.default_rng(0)
    n, (A, B) = 7, (matrix(rng, kind, dtype) for _ in range(2))
    stored = {"full": np.ones_like, "lower": np.tril, "upper": np.triu}[view](np.ones((n, n), dtype))
    if view == "lower":
        stored[0, 3] = 1  # beyond the triangle: nobody may look at it
    pattern = sp.csr_array(stored)
    rows, columns = pattern.nonzero()

    def values(A):
        v = np.where((rows < columns) & (view == "lower"), np.nan, A[rows, columns]).astype(dtype)
        if v.dtype.kind == "c" and kind in ("hermitian", "hpd"):
            v[rows == columns] += 1j  # nor at this
        return v

    pattern.data = values(A)
    b = entries(rng, (3, n + 2), dtype)
    with System(lib, pattern, kind, view) as system:
        if (kind == "general" and view != "full") or (kind == "spd" and b.dtype.kind == "c"):
            assert system.execute(ANALYSIS) == (INVALID if kind == "general" else NOT_SUPPORTED)
            return
        assert system.execute(ANALYSIS) == OK and system.execute(FACTORIZATION) == OK
        system.values[:] = np.nan  # they were read; a solve has the factor
        for mode, op in enumerate((A, A.T, A.conj().T)):
            assert system.set(SOLVE_MODE, mode) == OK
            x = system.solve(b)
            assert_solves(op, x, b)
            assert (x[:, n:] == 7).all()
            assert np.array_equal(system.solve(b[1:2]), x[1:2, : n + 2])
        other = values(B)
        assert lib.cudssMatrixSetValues(system.A, other.ctypes.data) == OK
        assert system.set(SOLVE_MODE, 0) == OK
        assert_solves(A, system.solve(b), b)  # still that factor
        assert_solves(B, system.solve(b, REFACTORIZATION | SOLVE), b)
        assert system.get(INFO) == 0 and system.get(NPIVOTS) == 0 and system.get(LU_NNZ, c_int64) == n * n
        done = counters(lib)
        assert (done.analyses, done.symbolic, done.factorizations, done.refactorizations) == (1, 1, 1, 1)
        assert (done.solves, done.columns, done.set_values, done.info_reads) == (8, 3 * 5 + 3, 1, 1)
        assert done.bytes == n * n * b.itemsize + 4 * n and (done.handles, done.data, done.matrices) == (1, 1, 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["symmetric", "hermitian", "spd", "hpd"])
def test_inertia(lib, kind, dtype):
    complex_ = np.dtype(dtype).kind == "c"
    if kind == "spd" and complex_:
        return
    for seed in range(5):
        A = matrix(np.random.default_rng(seed), kind, dtype)
        if kind in ("symmetric", "hermitian"):
            A = A - np.diag(np.diag(A))  # pivots of two rows and columns
        with System(lib, A, kind) as system:
            assert system.execute(ANALYSIS | FACTORIZATION) == OK
            if kind == "symmetric" and complex_:
                assert system.ask(INERTIA, count=2)[0] == NOT_SUPPORTED
            else:
                eigenvalues = np.linalg.eigvalsh(A.astype(complex))
                assert system.get(INERTIA, count=2) == [(eigenvalues > 0).sum(), (eigenvalues < 0).sum()]
                system.values[:] = np.nan
                assert system.execute(REFACTORIZATION) == OK and system.get(INERTIA, count=2) == [0, 0]


# --- Pivots, permutations, what is read -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_not_positive_definite_is_sticky(lib, dtype):
    A = 4 * np.eye(5, dtype=dtype)
    b = np.ones((1, 5), dtype)
    kind = "hpd" if b.dtype.kind == "c" else "spd"
    with System(lib, A, kind, "lower") as system:
        assert system.execute(ANALYSIS) == OK
        for bad in (-1, 0, np.nan):
            system.values[2:4] = bad
            assert system.execute(FACTORIZATION) == OK and system.get(INFO) == 3
            assert np.isnan(system.solve(b)).all()
            system.values[:2] = bad
            assert system.execute(REFACTORIZATION) == OK and system.get(INFO) == 3
            system.values[:] = 4
            assert np.array_equal(system.solve(b, REFACTORIZATION | SOLVE), b / 4)  # after a factorization that failed
            assert system.get(INFO) == 3
            assert system.put(INFO, np.zeros(1, np.int32)) == OK and system.get(INFO) == 0
        assert system.put(INFO, np.full(1, 9, np.int32)) == OK and system.get(INFO) == 9
        assert system.put(INFO, np.zeros(2, np.int32)) == INVALID
        assert counters(lib).info_reads == 13


@pytest.mark.parametrize(("dtype", "usual"), [(np.float32, 1e-5), (np.float64, 1e-13), (np.complex64, 1e-5)])
def test_small_pivots_are_replaced(lib, dtype, usual):
    A = np.diag([1, -usual / 2, 2 * usual, 1]).astype(dtype)
    b = np.ones((1, 4), dtype)
    with System(lib, A, "symmetric") as system:
        system.values[3] = 0
        x = system.solve(b, ANALYSIS | FACTORIZATION | SOLVE)
        assert system.get(NPIVOTS) == 2 and np.allclose(x, [1, -1 / usual, 0.5 / usual, 1 / usual], rtol=1e-4)
        assert system.set(PIVOT_EPSILON, 0.5) == OK
        x = system.solve(b, REFACTORIZATION | SOLVE)
        assert system.get(NPIVOTS) == 3 and np.allclose(x, [1, -2, 2, 2])
        system.values[:] = 1
        assert system.execute(REFACTORIZATION) == OK
        assert system.get(NPIVOTS) == 0 and system.get(INFO) == 0


def test_permutations(lib):
    A, perm = np.eye(4), np.array([2, 0, 3, 1], np.int32)
    with System(lib, A) as system:
        assert system.ask(ROW, count=4)[0] == INVALID and system.ask(USER_PERM, count=4)[0] == INVALID
        assert system.execute(REORDERING) == OK
        assert system.get(ROW, count=4) == system.get(COL, count=4) == [0, 1, 2, 3]
        for wrong in ([0, 0, 1, 2], [0, 1, 2, 4], [-1, 0, 1, 2], []):
            assert system.put(USER_PERM, np.array(wrong, np.int32)) == INVALID
        assert system.put(USER_PERM, perm) == OK
        assert system.get(ROW, count=4) == [0, 1, 2, 3]  # until the next reordering
        b = np.arange(8.0).reshape(2, 4)
        assert np.array_equal(system.solve(b, ANALYSIS | FACTORIZATION | SOLVE), b)
        assert system.get(ROW, count=4) == system.get(COL, count=4) == system.get(USER_PERM, count=4) == list(perm)
        assert system.put(USER_PERM, perm[:1] * 0) == OK
        assert system.execute(ANALYSIS) == INVALID


def test_what_cannot_be_read(lib):
    with System(lib, np.eye(3)) as system:
        assert system.ask(LU_NNZ, c_int64)[0] == system.ask(NPIVOTS)[0] == INVALID
        assert system.execute(ANALYSIS) == OK
        assert system.ask(LU_NNZ, c_int64)[0] == OK and system.ask(NPIVOTS)[0] == INVALID
        assert system.execute(FACTORIZATION) == OK
        assert system.ask(LU_NNZ, c_int64, size=4)[0] == system.ask(INFO, size=3)[0] == INVALID
        assert system.ask(ROW, count=2)[0] == INVALID
        assert system.ask(INERTIA, count=2)[0] == system.ask(DIAG, c_double, 3)[0] == system.ask(99)[0] == NOT_SUPPORTED
        assert system.put(LU_NNZ, np.zeros(1, np.int64)) == system.put(99, np.zeros(1, np.int32)) == NOT_SUPPORTED
        assert lib.cudssDataGet(system.handle, system.data, INFO, None, 4, None) == INVALID
        assert lib.cudssDataGet(system.handle, system.data, INFO, byref(c_int()), 4, None) == OK


# --- The order of calls -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("phases", "last"),
    [
        ([0], INVALID),
        ([-1], INVALID),
        ([1 << 10], INVALID),
        ([FACTORIZATION], INVALID),
        ([REFACTORIZATION], INVALID),
        ([SOLVE], INVALID),
        ([SYMBOLIC], INVALID),
        ([REORDERING, SYMBOLIC, FACTORIZATION, SOLVE], OK),
        ([REORDERING, FACTORIZATION], INVALID),
        ([ANALYSIS, REFACTORIZATION], INVALID),
        ([ANALYSIS | REFACTORIZATION], INVALID),
        ([ANALYSIS, SOLVE], INVALID),
        ([ANALYSIS | SOLVE], INVALID),
        ([ANALYSIS | FACTORIZATION | SOLVE], OK),
        ([ANALYSIS | FACTORIZATION, REFACTORIZATION | SOLVE], OK),
        ([ANALYSIS, FACTORIZATION | REFACTORIZATION], INVALID),
        ([ANALYSIS | FACTORIZATION, FACTORIZATION, REFACTORIZATION, REFACTORIZATION, SOLVE], OK),
        ([ANALYSIS | FACTORIZATION, ANALYSIS, SOLVE], INVALID),  # an analysis drops the factor
        ([ANALYSIS | FACTORIZATION, REORDERING, REFACTORIZATION], INVALID),
        ([ANALYSIS | FACTORIZATION, REORDERING, SOLVE], INVALID),
        ([ANALYSIS | FACTORIZATION, SYMBOLIC, REFACTORIZATION], INVALID),
        ([ANALYSIS | FACTORIZATION, ANALYSIS | FACTORIZATION, SOLVE], OK),
        ([ANALYSIS | FACTORIZATION, SOLVE - 512], OK),  # without refinement
        ([ANALYSIS | FACTORIZATION, 16], NOT_SUPPORTED),
    ],
)
def test_phases(lib, phases, last):
    b, x = np.ones((2, 1, 3))
    with System(lib, 2 * np.eye(3)) as system:
        for phase in phases[:-1]:
            assert system.execute(phase, b, x) == OK
        before = counters(lib)
        assert system.execute(phases[-1], b, x) == last
        assert last == OK or counters(lib) == before
        assert x[0, 0] == (0.5 if last == OK and phases[-1] & SOLVE >= SOLVE - 512 else 1)


def test_matrices_that_are_refused(lib):
    b, x = np.ones((2, 2, 3))
    with System(lib, np.eye(3)) as system:
        for change in (
            {"n": 0}, {"n": 2}, {"nnz": 2}, {"mtype": 5}, {"view": 3}, {"view": 1}, {"base": 1}, {"indptr": None},
            {"indices": None},
        ):  # fmt: skip
            wrong = system.describe(**change)
            assert system.execute(ANALYSIS, A=wrong) == INVALID, change
            assert lib.cudssMatrixDestroy(wrong) == OK
        indptr, indices = system.indptr, system.indices
        for array, k, value in (indptr, 1, 3), (indptr, 0, 1), (indices, 1, 3), (indices, 1, -1):
            right, array[k] = array[k], value
            assert system.execute(ANALYSIS) == INVALID
            array[k] = right
        assert system.execute(ANALYSIS) == OK
        elsewhere = indptr.copy(), indices.copy()
        for change in (
            {"n": 4}, {"nnz": 2}, {"mtype": 1}, {"indptr": elsewhere[0].ctypes.data},
            {"indices": elsewhere[1].ctypes.data},
        ):  # fmt: skip
            other = system.describe(**change)
            assert system.execute(FACTORIZATION, A=other) == INVALID, change
            assert lib.cudssMatrixDestroy(other) == OK
        same = system.describe()
        assert system.execute(FACTORIZATION, A=same) == OK
        assert lib.cudssMatrixDestroy(same) == OK
        indices[[0, 1]] = 1, 0  # a pattern that changes under its analysis
        assert system.execute(SOLVE, b, x) == OK and system.execute(REFACTORIZATION) == INVALID
        assert counters(lib).misuses == 1
        reset(lib)


def test_entries_twice_are_refused(lib):
    A = sp.csr_array((np.ones(3), [0, 0, 1], [0, 2, 3]), shape=(2, 2))
    with System(lib, A) as system:
        assert system.execute(ANALYSIS) == INVALID


def test_columns_that_are_refused(lib):
    b, x = np.ones((2, 2, 3))
    with System(lib, np.eye(3)) as system:
        assert system.execute(ANALYSIS | FACTORIZATION, x, x) == OK  # not looked at
        narrow = np.ones((2, 2))
        for wrong in (
            (b, b), (b, x[:1]), (b[:0], x[:0]), (narrow, x), (b, narrow), (b.astype("f"), x), (b, x.astype("D")),
        ):  # fmt: skip
            assert system.execute(SOLVE, *wrong) == INVALID
        assert system.set(SOLVE_MODE, 3) == NOT_SUPPORTED
        assert system.execute(SOLVE, b, x) == INVALID  # it was refused, and kept
        assert system.set(SOLVE_MODE, 0) == OK and system.set(DETERMINISTIC_MODE, 1) == OK
        assert system.execute(SOLVE, b, x) == NOT_SUPPORTED
        assert system.execute(SOLVE, b[:1], x[:1]) == OK
        assert counters(lib).columns == 1


# --- Objects, memory, threads -----------------------------------------------------------------------------------------


def test_misuse(lib):
    b, x = np.ones((2, 1, 3))
    with System(lib, np.eye(3)) as system, System(lib, np.eye(3)) as other:
        dead, seen = System(lib, np.eye(3)), 0
        dead.__exit__()

        def refused(status):
            nonlocal seen
            seen += 1
            assert status == INVALID and counters(lib).misuses == seen

        refused(lib.cudssDestroy(dead.handle))
        refused(lib.cudssDestroy(None))
        refused(lib.cudssDestroy(system.config))  # of another type
        refused(lib.cudssConfigDestroy(dead.config))
        refused(lib.cudssConfigSet(dead.config, 4, *number(0)))
        refused(lib.cudssMatrixDestroy(dead.A))
        refused(lib.cudssMatrixSetValues(dead.A, b.ctypes.data))
        refused(lib.cudssSetStream(dead.handle, None))
        refused(lib.cudssSetDeviceMemHandler(dead.handle, None))
        refused(lib.cudssDataCreate(dead.handle, byref(c_void_p())))
        refused(lib.cudssDataDestroy(dead.handle, system.data))
        refused(lib.cudssDataDestroy(system.handle, dead.data))
        refused(lib.cudssDataDestroy(system.handle, other.data))  # of another handle
        refused(lib.cudssDataSet(system.handle, other.data, 0, b.ctypes.data, 4))
        refused(lib.cudssDataGet(system.handle, other.data, 0, b.ctypes.data, 4, None))
        refused(lib.cudssDataGet(system.handle, None, 0, b.ctypes.data, 4, None))
        assert system.execute(ANALYSIS | FACTORIZATION) == OK
        refused(lib.cudssExecute(dead.handle, ANALYSIS, system.config, system.data, system.A, None, None))
        refused(lib.cudssExecute(system.handle, ANALYSIS, dead.config, system.data, system.A, None, None))
        refused(lib.cudssExecute(system.handle, ANALYSIS, system.config, dead.data, system.A, None, None))
        refused(lib.cudssExecute(system.handle, ANALYSIS, system.config, other.data, system.A, None, None))
        refused(lib.cudssExecute(system.handle, ANALYSIS, system.config, system.data, dead.A, None, None))
        refused(lib.cudssExecute(system.handle, ANALYSIS, system.config, system.data, system.A, dead.A, None))
        assert system.execute(SOLVE, b) == INVALID
        assert counters(lib).misuses == seen + 1
        assert system.execute(SOLVE, b, x) == OK
        reset(lib)


def test_statuses_of_the_real_library(lib):
    """Those that test_cudss_library.py has from cuDSS itself."""
    assert all(hasattr(lib, name) for name in PROTOTYPES)
    assert statuses(lib) == EXPECTED
    reset(lib)  # it was given nulls


class Allocator:
    """A memory handler that keeps a log; while `refuse` is not 0 it says that it failed."""

    def __init__(self):
        self.live, self.log, self.refuse = {}, [], 0
        allocate = ctypes.CFUNCTYPE(c_int, c_void_p, ctypes.POINTER(c_void_p), c_size_t, c_void_p)
        release = ctypes.CFUNCTYPE(c_int, c_void_p, c_void_p, c_size_t, c_void_p)

        class Handler(ctypes.Structure):
            _fields_ = [("context", c_void_p), ("get", allocate), ("give_back", release), ("name", ctypes.c_char * 64)]

        def get(context, pointer, size, stream):
            self.log.append(("allocate", context, size, stream))
            if self.refuse:
                return self.refuse
            memory = ctypes.create_string_buffer(size)
            self.live[ctypes.addressof(memory)] = memory
            pointer[0] = ctypes.addressof(memory)
            return 0

        def give_back(context, pointer, size, stream):
            self.log.append(("release", context, size, stream))
            return self.refuse if len(self.live.pop(pointer)) == size else 1

        self.handler = Handler(5, allocate(get), release(give_back), b"test")


def test_allocator(lib):
    allocator, size = Allocator(), 3 * 3 * 8 + 3 * 4
    b = np.ones((1, 3))
    with System(lib, 2 * np.eye(3)) as system:
        assert lib.cudssSetDeviceMemHandler(system.handle, byref(allocator.handler)) == OK
        assert lib.cudssSetStream(system.handle, 17) == OK and counters(lib).stream == 17
        allocator.refuse = 1
        assert system.execute(ANALYSIS) == OK
        assert system.execute(FACTORIZATION) == ALLOC_FAILED and counters(lib).bytes == 0
        assert system.execute(SOLVE, b, b + 0) == INVALID
        allocator.refuse = 0
        assert np.array_equal(system.solve(b, FACTORIZATION | SOLVE), b / 2) and counters(lib).bytes == size
        assert system.execute(REFACTORIZATION) == OK and system.execute(FACTORIZATION) == OK  # in the same memory
        assert allocator.log == [("allocate", 5, size, 17)] * 2 and len(allocator.live) == 1
        assert lib.cudssSetStream(system.handle, 18) == OK
        assert lib.cudssSetDeviceMemHandler(system.handle, None) == OK  # what it gave goes back to it all the same
        assert system.execute(ANALYSIS) == OK
        assert allocator.log[2:] == [("release", 5, size, 18)] and not allocator.live
        assert system.execute(FACTORIZATION) == OK and counters(lib).bytes == size
        assert len(allocator.log) == 3 and counters(lib).stream == 18
        assert lib.cudssSetDeviceMemHandler(system.handle, byref(allocator.handler)) == OK
        assert system.execute(ANALYSIS | FACTORIZATION) == OK
        allocator.refuse = 1
        assert system.execute(ANALYSIS) == EXECUTION_FAILED and counters(lib).bytes == 0
        empty = type(allocator.handler)()
        assert lib.cudssSetDeviceMemHandler(system.handle, byref(empty)) == INVALID


def test_failures_on_request(lib):
    b, x = np.ones((2, 1, 3))
    with System(lib, np.eye(3)) as system:
        fail_next(lib, "cudssExecute", EXECUTION_FAILED)
        assert system.set(SOLVE_MODE, 0) == OK  # another function
        assert system.execute(ANALYSIS) == EXECUTION_FAILED
        assert counters(lib).analyses == 0
        assert system.execute(ANALYSIS | FACTORIZATION | SOLVE, b, x) == OK
        for name in PROTOTYPES:
            fail_next(lib, name, 6)
            function = getattr(lib, name)
            assert function(*[0] * len(function.argtypes)) == 6
        fail_next(lib, "cudssExecute", EXECUTION_FAILED)
        reset(lib)
        assert system.execute(SOLVE, b, x) == OK
        with pytest.raises(AttributeError):
            fail_next(lib, "cudssExcute", 1)


def test_version(lib, monkeypatch):
    def version():
        out = [c_int() for _ in range(3)]
        assert [lib.cudssGetProperty(k, byref(one)) for k, one in enumerate(out)] == [OK] * 3
        return [one.value for one in out]

    assert version() == [1, 0, 0]
    monkeypatch.setenv("FAKECUDSS_VERSION", "0.8.1")
    assert version() == [0, 8, 1]


def test_streams(lib):
    with System(lib, np.eye(3)) as first, System(lib, np.eye(3)) as second:
        assert lib.cudssSetStream(first.handle, 17) == lib.cudssSetStream(second.handle, 18) == OK
        for system, stream in (first, 17), (second, 18):
            assert system.execute(ANALYSIS) == OK and counters(lib).stream == stream


def test_collisions(lib, monkeypatch):
    monkeypatch.setenv("FAKECUDSS_SLEEP_US", "50000")
    with (
        System(lib, np.eye(3)) as first,
        System(lib, np.eye(3), handle=first.handle) as second,
        System(lib, np.eye(3)) as alone,
    ):

        def together(*systems):
            barrier = threading.Barrier(len(systems))

            def run(system):
                barrier.wait()
                system.execute(ANALYSIS | FACTORIZATION)

            threads = [threading.Thread(target=run, args=(system,)) for system in systems]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            return counters(lib).collisions

        assert together(first, alone) == 0
        assert together(first, second) == 1
        assert counters(lib).factorizations == 4
        reset(lib)
