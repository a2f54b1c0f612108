"""The KLU engine alone, through the engine protocol."""

import gc
import resource
import threading

import numpy as np
import pytest
import scipy.sparse as sp

from datafiles import DataFileMissing, load_matrix, load_sequence
from spcache.engines import klu
from spcache.engines.protocol import Failure, Structure, SymbolicFactor
from spcache.engines.protocol import Storage as StorageProtocol

DTYPES = [np.float32, np.float64, np.complex64, np.complex128]
CODE = {np.dtype(dtype): code for code, dtype in enumerate(DTYPES)}
BAD = np.array([[1e-12, 1.0, 0], [1, 1, 1], [0, 1, 3]])  # its first pivot must not be the diagonal
GOOD = np.array([[1.0, 1e-3, 0], [1e-3, 1, 1e-3], [0, 1e-3, 3]])  # the same pattern, diagonal pivots


def csc(A):
    A = sp.csc_array(A)
    A.sort_indices()
    return A


class System:
    """One canonical structure, its plan, and the protocol called with arrays."""

    def __init__(self, A, ordering="auto", wide=False):
        A = csc(A)
        self.n, self.nnz, self.pattern = A.shape[0], A.nnz, A
        indptr, indices = A.indptr.astype(np.int64), A.indices.astype(np.int32)
        self.plan = klu.analyze(Structure(self.n, indptr, indices, False), ordering)
        if wide:
            self.plan = klu.SymbolicFactor(indptr, indices, self.plan.ordering, True)
        slots = np.arange(self.nnz, dtype=np.int32)
        self.assembly = self.plan.assembly(self.nnz, slots, slots, np.zeros(self.nnz, np.uint8), 1.0, False)

    def factorize(self, values, storage=None, template=None, check=True, threads=1):
        values = np.ascontiguousarray(values).reshape(-1, self.nnz)
        storage = storage or self.plan.storage(CODE[values.dtype], len(values))
        storage.factorize(self.assembly, values.ctypes.data, self.nnz, check, template, threads)
        return storage

    def solve(self, storage, b, factors=None, adjoint=False, threads=1):
        """b: [count, n, width]"""
        b = np.ascontiguousarray(b)
        x = np.full_like(b, 7)
        select = None if factors is None else np.array(factors, np.int64)
        storage.solve(
            b.ctypes.data,
            x.ctypes.data,
            len(b),
            b.shape[2],
            0 if select is None else select.ctypes.data,
            adjoint,
            threads,
        )
        return x

    def matrix(self, values):
        return sp.csc_array((values, self.pattern.indices, self.pattern.indptr), shape=(self.n, self.n))


def residual(A, x, b):
    """|Ax - b| / (|A| |x| + |b|) in units of the rounding error of x."""
    eps = np.finfo(x.dtype).eps
    scale = abs(A).sum(0).max() * abs(x).max() + abs(b).max()
    return abs(A @ x.astype(np.complex128) - b).max() / scale / eps


def numbers(rng, size, dtype):
    x = rng.standard_normal(size)
    return (x + 1j * rng.standard_normal(size) if np.issubdtype(dtype, np.complexfloating) else x).astype(dtype)


def random_system(rng, n, density=0.1, **options):
    A = sp.random_array((n, n), density=density, rng=rng) + sp.diags_array(rng.random(n) + 1)
    return System(A, **options)


def test_protocol():
    system = random_system(np.random.default_rng(0), 20)
    storage = system.plan.storage(1, 3)
    assert isinstance(system.plan, SymbolicFactor) and isinstance(storage, StorageProtocol)
    assert system.plan.engine == "klu" and system.plan.ordering == "amd"
    assert system.plan.nnz > 20 and system.plan.flops > 0 and system.plan.nbytes > 0
    assert storage.batch == 3 and storage.nnz == 0
    empty = storage.nbytes
    system.factorize(numbers(np.random.default_rng(1), (3, system.nnz), np.float64), storage)
    assert storage.nbytes > empty and storage.nnz >= 20 and storage.repivots == 0 and not storage.refactorized


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize("dtype", DTYPES)
def test_solve_agrees_with_dense(dtype, width, adjoint, wide):
    rng = np.random.default_rng(width)
    system = random_system(rng, 30, wide=wide)
    values = numbers(rng, (2, system.nnz), dtype)
    storage = system.factorize(values)
    assert storage.failures() is None
    b = numbers(rng, (2, 30, width), dtype)
    x = system.solve(storage, b, adjoint=adjoint)
    for e in range(2):
        A = system.matrix(values[e]).toarray().astype(np.complex128)
        A = A.conj().T if adjoint else A
        expected = np.linalg.solve(A, b[e].astype(np.complex128))
        tolerance = np.linalg.cond(A) * np.finfo(dtype).eps
        assert np.abs(x[e] - expected).max() <= 10 * tolerance * np.abs(expected).max()
        assert residual(A, x[e], b[e]) < 10


@pytest.mark.parametrize("ordering", ["auto", "amd", "colamd", "natural"])
def test_orderings(ordering):
    rng = np.random.default_rng(3)
    A = sp.block_array(
        [[None, sp.eye_array(6)], [sp.random_array((9, 9), density=0.3, rng=rng) + sp.eye_array(9), None]]
    )
    system = System(A, ordering)  # zero diagonal: needs the matching, or pivots off the diagonal
    assert system.plan.ordering == ("amd" if ordering == "auto" else ordering)
    assert np.isnan(system.plan.flops) == (ordering in ("colamd", "natural"))
    b = rng.standard_normal((1, 15, 1))
    x = system.solve(system.factorize(system.pattern.data), b)
    assert residual(system.pattern, x[0], b[0]) < 10


def test_wrong_arguments():
    system = random_system(np.random.default_rng(0), 5)
    structure = Structure(1, np.array([0, 1]), np.array([0], np.int32), True)
    with pytest.raises(ValueError, match="full structure"):
        klu.analyze(structure, "auto")
    with pytest.raises(ValueError, match="metis"):
        klu.analyze(Structure(1, np.array([0, 1]), np.array([0], np.int32), False), "metis")
    for indptr, indices in (
        ([0, 1, 2], [0, 2]),
        ([0, 2, 1], [0]),
        ([0, 2, 2], [1, 1]),
        ([0, 1, 3], [0, 1]),
        ([0], []),
    ):
        with pytest.raises(ValueError):
            klu.analyze(Structure(2, np.array(indptr), np.array(indices, np.int32), False), "auto")
    storage = system.plan.storage(1, 2)
    values = np.ones((2, system.nnz))
    with pytest.raises(ValueError, match="assembly"):
        storage.factorize(system.assembly, values.ctypes.data, system.nnz - 1, True, None)
    other = random_system(np.random.default_rng(0), 5)
    with pytest.raises(ValueError, match="template"):
        storage.factorize(system.assembly, values.ctypes.data, system.nnz, True, other.plan.storage(1, 2))
    with pytest.raises(ValueError, match="template"):
        storage.factorize(system.assembly, values.ctypes.data, system.nnz, True, system.plan.storage(3, 2))
    with pytest.raises(ValueError, match="count"):
        system.solve(storage, np.ones((3, 5, 1)))
    for beyond in (-1, 2):
        with pytest.raises(ValueError, match="batch"):
            system.solve(storage, np.ones((1, 5, 1)), factors=[beyond])
    for dtype, batch in ((4, 1), (-1, 1), (1, 0)):
        with pytest.raises(ValueError):
            system.plan.storage(dtype, batch)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_unknown(dtype):
    system = System(np.array([[1.0]]))
    storage = system.factorize(np.array([4], dtype))
    assert system.solve(storage, np.full((1, 1, 1), 2, dtype)) == 0.5
    assert system.factorize(np.array([0], dtype), storage).failures() == [Failure(0, "singular")]
    assert np.isnan(system.solve(storage, np.full((1, 1, 1), 2, dtype)))
    assert system.factorize(np.array([1e-30], dtype), storage).failures() is None


def test_selected_factors_share_runs():
    rng = np.random.default_rng(5)
    system = random_system(rng, 12)
    values = numbers(rng, (3, system.nnz), np.float64)
    storage = system.factorize(values)
    select = [2, 2, 2, 0, 1, 1]
    for width in (1, 3):
        b = rng.standard_normal((6, 12, width))
        x = system.solve(storage, b, factors=select)
        for p, e in enumerate(select):
            assert residual(system.matrix(values[e]), x[p], b[p]) < 10
    one = system.factorize(values[0])
    x = system.solve(one, b)  # a batch of one serves any count
    assert all(residual(system.matrix(values[0]), x[p], b[p]) < 10 for p in range(6))
    assert system.solve(one, b[:0]).shape == (0, 12, 3)


def test_old_pivots_are_used_again():
    rng = np.random.default_rng(6)
    system = random_system(rng, 40)
    values = system.pattern.data * (1 + 0.1 * rng.random((3, system.nnz)))
    b = rng.standard_normal((1, 40, 2))
    first = system.factorize(values[0])
    assert not first.refactorized
    system.factorize(values[1], first)
    assert first.refactorized and first.repivots == 0
    assert residual(system.matrix(values[1]), system.solve(first, b)[0], b[0]) < 10
    before = system.solve(first, b)
    second = system.factorize(values[2], template=first)  # copies the pivots, leaves the template alone
    assert second.refactorized and second.nnz == first.nnz
    assert residual(system.matrix(values[2]), system.solve(second, b)[0], b[0]) < 10
    assert np.array_equal(system.solve(first, b), before)
    batch = system.factorize(values, template=first)  # one template for a batch
    assert batch.refactorized
    x = system.solve(batch, np.repeat(b, 3, 0))
    assert all(residual(system.matrix(values[e]), x[e], b[0]) < 10 for e in range(3))
    del first
    gc.collect()
    assert np.array_equal(system.solve(second, b), system.solve(second, b))


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_new_values_with_old_pivots(dtype, wide):
    """Blocks of one row and of many, entries above them, and rows of all sizes: those of subnormal numbers too."""
    rng = np.random.default_rng(21)
    blocks = sp.block_diag([sp.random_array((k, k), density=0.3, rng=rng) for k in (25, 1, 1, 40)]).tolil()
    blocks[:25, 25:] = sp.random_array((25, 42), density=0.1, rng=rng)
    n = blocks.shape[0]
    system = System(blocks + sp.diags_array(rng.random(n) + 1), wide=wide)
    order = rng.permutation(n)
    system = System(csc(system.pattern)[order][:, rng.permutation(n)], wide=wide)
    assert system.plan.largest_block == 40
    values = (numbers(rng, 3 * system.nnz, dtype) * 0.2).reshape(3, -1) + system.pattern.data
    values = values.astype(dtype)
    b = numbers(rng, n * 3, dtype).reshape(1, n, 3)
    storage = system.factorize(values[0])
    double = np.finfo(dtype).bits == 64
    powers = (0, -1060 if double else -140, 1000 if double else 100)  # of 2
    for power, new in zip(powers, values, strict=True):
        exponents = np.where(rng.random(n) < 0.3, power, 0)
        rows, back = np.ldexp(1.0, exponents), np.ldexp(1.0, -exponents // 2)  # whose square is 1 / rows
        scaled = (rows[system.pattern.indices] * new).astype(dtype)
        c = (rows[:, None] * b).astype(dtype)
        system.factorize(scaled, storage, check=False)
        assert storage.refactorized and storage.failures() is None
        of_entries = back[system.pattern.indices]
        A = system.matrix(scaled.astype(np.complex128) * of_entries * of_entries)
        d = c[0].astype(np.complex128) * back[:, None] * back[:, None]
        assert residual(A, system.solve(storage, c)[0], d) < 1e3
        if power == 0:
            assert residual(A.conj().T, system.solve(storage, b, adjoint=True)[0], b[0]) < 1e3


def test_the_diagonal_is_preferred_while_pivots_stay_stable():
    """KLU's own tolerance keeps the fill that was predicted; where it is not stable, a strict one takes its place, and
    is kept."""
    rng = np.random.default_rng(22)
    half = sp.random_array((200, 200), density=0.01, rng=rng)
    system = System(half + half.T + sp.eye_array(200))
    diagonal = system.pattern.indices == np.repeat(np.arange(200), np.diff(system.pattern.indptr))
    values = rng.standard_normal(system.nnz)
    weak = np.where(diagonal, 0.05, values)
    good = system.factorize(np.where(diagonal, 3.0, values))
    assert good.nnz == system.plan.nnz and good.report(0)["growth"] >= 0.05
    poor = system.factorize(weak)
    assert poor.nnz > system.plan.nnz and poor.report(0)["growth"] > 1e-2
    b = rng.standard_normal((1, 200, 1))
    assert residual(system.matrix(weak), system.solve(poor, b)[0], b[0]) < 100


def test_pivots_that_save_much_fill_are_doubtful():
    """Those of a power grid, whose factor has half as many entries again with strict ones: kept as long as refinement
    works, never without checks."""
    first, second = (csc(load_matrix(f"ACTIVSg200_AC_0{k}")) for k in (1, 2))
    system = System(first)
    strict = system.plan.storage(1, 1, strict=True)
    system.factorize(first.data, strict)
    storage = system.factorize(first.data)
    assert storage.nnz < 0.7 * strict.nnz
    assert strict.report(0)["growth"] > 1e-3 and 1e-8 < storage.report(0)["growth"] < 1e-3
    assert storage.doubtful and storage.repivots == 0
    system.factorize(first.data * (1 + 1e-3 * np.random.default_rng(1).random(system.nnz)), storage)
    assert storage.doubtful and storage.refactorized
    system.factorize(second.data, storage)
    assert storage.doubtful and storage.refactorized
    system.factorize(np.random.default_rng(2).standard_normal(system.nnz), storage)  # has not lasted
    assert storage.repivots == 1 and storage.nnz > 0.9 * strict.nnz
    assert system.factorize(first.data, check=False).nnz == strict.nnz
    copied = system.plan.storage(1, 1)
    system.factorize(first.data, copied, template=strict)
    assert copied.nnz == strict.nnz and copied.refactorized


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
def test_failed_pivots_are_chosen_anew(dtype, wide):
    system = System(BAD != 0, wide=wide)
    good, bad = (csc(np.where(A, A, 0)).data.astype(dtype) for A in (GOOD, BAD))
    storage = system.factorize(good)
    system.factorize(bad, storage)
    assert storage.repivots == 1 and not storage.refactorized
    b = np.ones((1, 3, 1), dtype)
    assert residual(BAD, system.solve(storage, b)[0], b[0]) < 2
    system.factorize(bad, storage)
    assert storage.repivots == 0 and storage.refactorized
    # check=False keeps the pivots unless one is exactly zero
    storage = system.factorize(good)
    assert system.factorize(bad, storage, check=False).refactorized
    bad[0] = 0
    assert system.factorize(bad, storage, check=False).repivots == 1
    assert residual(system.matrix(bad), system.solve(storage, b)[0], b[0]) < 2


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_singular_element_of_a_batch(dtype, check):
    rng = np.random.default_rng(8)
    system = System(np.array([[2, 1, 0, 1], [1, 3, 1, 0], [0, 1, 4, 1], [1, 0, 1, 5.0]]))
    values = np.tile(system.pattern.data, (3, 1)).astype(dtype)
    values[1, system.pattern.indptr[2] : system.pattern.indptr[3]] = 0  # column 2
    storage = system.factorize(values, check=check)
    assert storage.failures() == [None, Failure(2, "singular"), None]
    b = numbers(rng, (3, 4, 2), dtype)
    x = system.solve(storage, b)
    assert np.isnan(x[1]).all() and np.isfinite(x[[0, 2]]).all()
    x = system.solve(storage, b, factors=[1, 0, 1])
    assert np.isnan(x[[0, 2]]).all() and residual(system.pattern, x[1], b[1]) < 10
    values[1] = values[0]
    assert system.factorize(values, storage, check=check).failures() is None
    x = system.solve(storage, b)
    assert all(residual(system.pattern, x[e], b[e]) < 10 for e in range(3))


def test_singular_after_refactorization():
    # Blocks of one row: klu_refactor does not look at their pivots.
    system = System(np.array([[1.0, 1, 1], [0, 1, 1], [0, 0, 1]]))
    values = np.ones(6)
    for check in (True, False):
        storage = system.factorize(values)
        assert system.factorize(np.where(np.arange(6) == 2, 0, values), storage, check=check).failures() == [
            Failure(1, "singular")
        ]
        assert storage.repivots == 1
        assert system.factorize(values, storage, check=check).failures() is None


def test_failed_factor_lends_nothing():
    system = System(BAD != 0)
    failed = system.factorize(np.zeros(system.nnz))
    assert failed.failures() is not None
    storage = system.factorize(csc(GOOD).data, template=failed)
    assert storage.failures() is None and not storage.refactorized


@pytest.mark.parametrize("ordering", ["amd", "colamd", "natural"])
@pytest.mark.parametrize(
    "pattern, columns",
    [
        ([[1, 1, 0], [0, 0, 1], [0, 0, 1]], {0, 1, 2}),
        ([[1, 0, 1], [1, 0, 1], [0, 0, 1]], {1}),
        ([[1, 1, 1], [0, 0, 0], [1, 1, 1]], {0, 1, 2}),
    ],
)
def test_structurally_singular(pattern, columns, ordering):
    system = System(np.array(pattern), ordering)
    assert system.plan.structural_rank == 2
    storage = system.factorize(np.ones((2, system.nnz)))
    (failure, same) = storage.failures()
    assert failure == same and failure.reason == "structurally singular" and failure.column in columns
    assert np.isnan(system.solve(storage, np.ones((2, 3, 1)))).all()


@pytest.mark.parametrize("dtype", [np.float64, np.complex128])
def test_singular_to_working_precision(dtype):
    rng = np.random.default_rng(9)
    X = numbers(rng, (40, 39), dtype) @ numbers(rng, (39, 40), dtype)  # rank 39, no exact zero anywhere
    system = System(np.ones((40, 40)))
    storage = system.factorize(np.ascontiguousarray(X.T).ravel())
    (failure,) = storage.failures()
    assert failure.reason == "singular"
    assert system.factorize(np.ascontiguousarray(X.T).ravel(), storage, check=False).failures() is None
    grid = sp.diags_array([-1.0, -1.0], offsets=[-1, 1], shape=(30, 30))
    grid = sp.kronsum(grid, grid)
    laplacian = csc(grid + sp.diags_array(-grid.sum(0))).multiply(0.1).tocsc()
    system = System(laplacian)
    assert system.factorize(system.pattern.data.astype(dtype)).failures() is not None
    shifted = (laplacian + 1e-9 * sp.eye_array(900)).tocsc()
    assert system.factorize(shifted.data.astype(dtype)).failures() is None


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_not_finite(dtype, check):
    system = random_system(np.random.default_rng(10), 50)
    values = np.tile(system.pattern.data, (3, 1)).astype(dtype)
    b = np.ones((3, 50, 1), dtype)
    for bad in (np.nan, np.inf):
        for storage in (system.factorize(values), system.plan.storage(CODE[values.dtype], 3)):
            broken = values.copy()
            broken[1, 20:] = bad
            system.factorize(broken, storage, check=check)
            column = np.searchsorted(system.pattern.indptr, 20, "right") - 1
            assert storage.failures() == [None, Failure(column, "singular"), None]
            assert np.isnan(system.solve(storage, b)[1]).all()
            assert system.factorize(values, storage).failures() is None
            x = system.solve(storage, b)
            assert all(residual(system.matrix(values[e]), x[e], b[e]) < 10 for e in range(3))


def test_overflow():
    values = np.array([1, 1e200, 1e-200, 1e200, 1.0, 1.0, 1, 1, 1])
    system = System(np.ones((3, 3)))
    for check in (True, False):
        storage = system.factorize(np.ones(9) + np.eye(3).ravel())
        system.factorize(values * 1e100, storage, check=check)
        system.solve(storage, np.ones((1, 3, 1)))


REAL = [
    "west0479",
    "adder_dcop_05",
    "watt_2",
    "fidap007",
    "memplus",
    "hangGlider_2",
    "ACTIVSg200_AC_01",
    "494_bus",
    "ani5_crop",
]


@pytest.mark.parametrize("name", REAL)
def test_real_matrix(name):
    system = System(load_matrix(name))
    storage = system.factorize(system.pattern.data)
    assert storage.failures() is None
    for A, adjoint in (system.pattern, False), (system.pattern.T, True):
        b = A @ np.random.default_rng(0).standard_normal((system.n, 2))
        assert residual(A, system.solve(storage, b[None], adjoint=adjoint)[0], b) < 50


def test_real_singular_matrix():
    A = csc(load_matrix("gent113"))
    storage = System(A).factorize(A.data)
    (failure,) = storage.failures()
    assert failure.reason == "singular"
    rest = np.delete(A.toarray(), failure.column, 1)  # the column depends on the others
    assert np.linalg.matrix_rank(rest) == np.linalg.matrix_rank(A.toarray()) == 107


@pytest.mark.parametrize(
    "name, most_repivots",
    [
        ("ipm_kkt_CVXQP1_M", 2),  # once from pivots that save fill to strict ones
        ("powerflow_case1354pegase", 0),
        ("skfem_ex36_hyperelastic_saddle", 0),
        ("skfem_ex10_minimal_surface", 0),
        ("ACTIVSg200_AC", 1),
    ],
)
def test_real_sequence(name, most_repivots):
    """One analysis; every matrix starts from the pivots of the one before. Where these are doubtful the engine says so:
    residuals are then larger, and refined by who asks (factor.py)."""
    if name == "ACTIVSg200_AC":
        matrices = [csc(load_matrix(f"{name}_0{k}")) for k in (1, 2)]
    else:
        try:
            sequence = load_sequence(name)
        except DataFileMissing as missing:
            pytest.skip(str(missing))
        slots = np.arange(1, len(sequence["indices"]) + 1)
        order = csc(sp.csr_array((slots, sequence["indices"], sequence["indptr"]), shape=sequence["shape"]))
        matrices = [
            sp.csc_array((d[order.data - 1], order.indices, order.indptr), shape=order.shape) for d in sequence["data"]
        ]
    system = System(matrices[0])
    expected = np.random.default_rng(1).standard_normal((system.n, 1))
    storage, repivots = system.plan.storage(1, 1), 0
    for A in matrices:
        system.factorize(A.data, storage)
        assert storage.failures() is None
        repivots += storage.repivots
        for B, adjoint in (A, False), (A.T, True):
            b = B @ expected
            doubtful = storage.report(0)["doubtful"]
            assert doubtful or residual(B, system.solve(storage, b[None], adjoint=adjoint)[0], b) < 100
            assert not doubtful or "ipm" in name or "ACTIVS" in name or "ex36" in name
    assert repivots <= most_repivots


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_share_a_batch(dtype):
    """Of so many entries that they do; results, failures and counters are those of one thread, bit by bit."""
    rng = np.random.default_rng(12)
    system = random_system(rng, 120, 0.03)
    batch = 1 + 4 * 2**15 // system.nnz
    values = numbers(rng, (batch, system.nnz), dtype)
    b = numbers(rng, (batch, 120, 2), dtype)
    one, many = (system.factorize(values, threads=threads) for threads in (1, 3))
    values[::5] *= rng.uniform(1e-9, 1, system.nnz).astype(dtype)  # new pivots for some
    values[1::7] = 0
    values[2::7, 3] = np.nan
    for storage, threads in ((one, 1), (many, 3)):
        system.factorize(values, storage, threads=threads)
    assert one.repivots == many.repivots > 0 and one.refactorized and many.refactorized
    assert one.failures() == many.failures() and sum(f is not None for f in one.failures()) >= 2 * (batch // 7)
    select = rng.integers(0, batch, 3 * batch)
    for adjoint in (False, True):
        np.testing.assert_array_equal(
            system.solve(one, b, adjoint=adjoint), system.solve(many, b, adjoint=adjoint, threads=3)
        )
        np.testing.assert_array_equal(
            system.solve(one, b[select], select, adjoint), system.solve(many, b[select], select, adjoint, 4)
        )


def test_threads_share_a_plan_and_a_factor():
    rng = np.random.default_rng(11)
    system = random_system(rng, 300, 0.02, ordering="colamd")
    values = system.pattern.data * (1 + rng.random((4, system.nnz)))
    b = rng.standard_normal((2, 300, 5))
    shared = system.factorize(values[:2])
    expected = [system.solve(shared, b, adjoint=adjoint) for adjoint in (False, True)]
    wrong = []

    def work(seed):
        own = system.plan.storage(1, 1)
        for k in range(60):
            adjoint = (k + seed) % 2
            if not np.array_equal(system.solve(shared, b, adjoint=bool(adjoint)), expected[adjoint]):
                wrong.append("solve")
            e = (k + seed) % 4
            template = shared if k % 3 else None
            own = own if k % 5 else system.plan.storage(1, 1)
            system.factorize(values[e], own, template)
            if residual(system.matrix(values[e]), system.solve(own, b[:1])[0], b[0]) > 50:
                wrong.append("factorize")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_nothing_leaks():
    rng = np.random.default_rng(12)
    system = random_system(rng, 400, 0.02)
    good = system.pattern.data * (1 + rng.random((3, system.nnz)))
    broken = good.copy()
    broken[1, : system.nnz // 2] = 0
    b = rng.standard_normal((3, 400, 3))

    def cycle():
        first = system.factorize(good)
        second = system.factorize(broken, template=first)
        system.factorize(rng.standard_normal(good.shape), second)
        system.factorize(good, second, check=False)
        system.solve(second, b)
        System(system.pattern, wide=True).factorize(good)

    peak = []
    gc.disable()
    try:
        for k in range(40):
            cycle()
            if k in (9, 39):
                peak.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    finally:
        gc.enable()
    assert peak[1] - peak[0] < 3000  # KiB; one cycle makes about 10 MB of factors
