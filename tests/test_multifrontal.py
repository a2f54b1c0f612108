"""The multifrontal engine's own tests: analysis, kernels of every instruction set, fronts of every size, threads."""

import numpy as np
import pytest
import torch
from cases import DTYPES, SPD, Problem, find_case, grid_problem, make, numbers
from hypothesis import given, settings
from hypothesis import strategies as st
from protocol_driver import Driver

from spcache.engines import _multifrontal, multifrontal
from spcache.engines.protocol import Failure, Structure

LEVELS = _multifrontal.INSTRUCTION_SETS[: _multifrontal.INSTRUCTION_SETS.index(_multifrontal.best_simd()) + 1]
every_level = pytest.mark.parametrize("simd", LEVELS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
# The kernels sum over hundreds of columns: c grows a little with the size of the front.
C = 10


def structure_of(mask):
    """Lower triangle of a dense bool matrix, canonical."""
    mask = np.tril(mask)
    indices = np.concatenate([np.flatnonzero(column) for column in mask.T] + [[]]).astype(np.int32)
    return Structure(len(mask), np.concatenate([[0], np.cumsum(mask.sum(0))]).astype(np.int64), indices, True)


def problem_of(mask, dtype, seed=0, batch=2, negative=()):
    """A positive definite problem with this pattern, both triangles stored; pivots that are negative where asked."""
    case = find_case("spd", dtype)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    mask = torch.from_numpy(mask | mask.T | np.eye(len(mask), dtype=bool))
    A = numbers((batch, *mask.shape), wide, seed) * mask
    A = (A + A.mH) / 2
    A = A + torch.diag_embed(A.abs().sum(-1) + 1)
    for j in negative:
        A[:, j, j] = -1
    indices = mask.nonzero().T
    return Problem(case, len(mask), indices, A[:, indices[0], indices[1]].to(dtype).contiguous())


def two_children(p, q):
    """Two dense diagonal blocks of p, both coupled to a dense one of q: with the natural ordering fronts of p + q rows."""
    mask = np.ones((2 * p + q, 2 * p + q), bool)
    mask[:p, p : 2 * p] = mask[p : 2 * p, :p] = False
    return mask


def check(driver, storage, widths=(1, 2, 7), threads=1):
    for width in widths:
        b = driver.rhs(len(driver.values), driver.n, width)
        assert driver.residual(driver.solve(storage, b, threads=threads), b) <= C


# --- kernels --------------------------------------------------------------------------------------------------------------


def test_every_level_is_here():
    assert LEVELS[0] == "baseline" and multifrontal.variant() in LEVELS


@every_level
@every_dtype
def test_dense_fronts_of_every_size(simd, dtype, monkeypatch):
    """Rows and columns that leave a rest in every register and tile; one front and no update matrix."""
    monkeypatch.setenv("SPCACHE_SIMD", simd)
    for n in [*range(1, 50), 63, 64, 65, 95, 96, 97, 127, 128, 129, 143, 144, 145, 158, 159, 160, 161, 170]:
        driver = Driver(problem_of(np.ones((n, n), bool), dtype, seed=n, batch=1), "natural")
        assert driver.plan._native.largest_front == n and driver.plan._native.supernodes == 1
        check(driver, driver.factorize(), (1, 3))


@every_level
@every_dtype
@pytest.mark.parametrize(
    "p, q",
    [(1, 1), (2, 5), (3, 8), (5, 3), (8, 24), (17, 23), (25, 1), (31, 33), (64, 100), (130, 41), (129, 170), (40, 200)],
)
def test_fronts_with_update_matrices(simd, dtype, p, q, monkeypatch):
    monkeypatch.setenv("SPCACHE_SIMD", simd)
    driver = Driver(problem_of(two_children(p, q), dtype, seed=p), "natural")
    assert driver.plan._native.largest_front >= q
    check(driver, driver.factorize(), (1, 3, 16, 33))


@every_level
@every_dtype
def test_big_front(simd, dtype, monkeypatch):
    """Several blocks of pivots, packed kernels; and the pivot that fails is named wherever it stands."""
    monkeypatch.setenv("SPCACHE_SIMD", simd)
    n = 700 if dtype == torch.float64 else 389
    problem = problem_of(np.ones((n, n), bool), dtype, batch=1)
    driver = Driver(problem, "natural")
    storage = driver.factorize()
    check(driver, storage, (1, 5))
    if dtype == torch.float64:
        driver2 = Driver(problem_of(two_children(251, 307), dtype, batch=1), "natural")
        check(driver2, driver2.factorize(), (1, 9))
    i, j = problem.indices.numpy()
    for pivot in (0, 1, 7, 8, 126, 127, 128, 129, 255, 256, 300, n - 2, n - 1):
        values = driver.values.copy()
        values[0, (i == pivot) & (j == pivot)] = -1
        driver.factorize(values, storage)
        assert storage.failures() == [Failure(pivot, "not positive definite")]


@every_level
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
def test_matrices_side_by_side(simd, dtype, threads, monkeypatch):
    """Batches of small matrices: full groups, a rest, one more, too few; each fails alone, at its own pivot."""
    monkeypatch.setenv("SPCACHE_SIMD", simd)
    width = {"baseline": 16, "avx2": 32, "avx512": 64}[simd] // dtype.itemsize
    plan = Driver(problem_of(two_children(5, 4), dtype), "natural").plan._native
    for batch in (width - 1, width, width + 1, 3 * width + 2, 300):
        driver = Driver(problem_of(two_children(5, 4), dtype, seed=batch, batch=batch), "natural")
        storage = driver.factorize(threads=threads)
        numbers = batch * plan.stored if batch < width else -(-batch // width) * width * plan.nnz
        assert numbers * dtype.itemsize <= storage.factor.nbytes < numbers * dtype.itemsize + 128
        check(driver, storage, (1, 2, 5, 13), threads)
        values, (i, j) = driver.values.copy(), driver.problem.indices.numpy()
        bad = {0: 3, batch - 1: 13, batch // 2: 0}
        for e, pivot in bad.items():
            values[e, (i == pivot) & (j == pivot)] = -1
        before = driver.solve(storage, driver.rhs(batch, driver.n, 2))
        driver.factorize(values, storage, threads=threads)
        failures = storage.failures()
        assert {e: f.column for e, f in enumerate(failures) if f} == bad
        after = driver.solve(storage, driver.rhs(batch, driver.n, 2))
        good = [e for e in range(batch) if e not in bad]
        assert np.array_equal(before[good], after[good]) and np.isnan(after[list(bad)]).all()


def neighbours(*sizes):
    """The mask of a grid."""
    at = np.stack(np.meshgrid(*map(np.arange, sizes), indexing="ij")).reshape(len(sizes), -1)
    return np.abs(at[:, :, None] - at[:, None]).sum(0) <= 1


@pytest.mark.parametrize(
    "mask, together",
    [
        (neighbours(20, 20), True),
        (neighbours(6, 6, 6), True),
        (neighbours(30, 30), True),  # fronts of up to 47 rows
        (neighbours(47, 47), False),  # 65
        (np.ones((40, 40)), False),
    ],
    ids=lambda value: "x".join(map(str, np.shape(value))) or str(value),
)
def test_which_matrices_lie_side_by_side(mask, together):
    """Those with small fronts."""
    driver = Driver(problem_of(mask != 0, torch.float64, batch=9), "amd")
    plan, storage = driver.plan._native, driver.factorize()
    width = {"baseline": 2, "avx2": 4, "avx512": 8}[plan.simd]
    numbers = -(-9 // width) * width * plan.nnz if together else 9 * plan.stored
    assert numbers * 8 <= storage.factor.nbytes < numbers * 8 + 2**21 + 128  # or huge pages
    check(driver, storage, (1, 3, 4, 13))


def test_side_by_side_for_other_right_hand_sides():
    """Right-hand sides that do not go with the batch one by one: the factors are taken apart, once."""
    problem = problem_of(two_children(5, 4), torch.float64, batch=40)
    system = problem.system()
    factor = system.factorize(problem.values)
    A, b = problem.matrix(problem.values), problem.rhs(3, 40, problem.n, 2)
    x = factor.solve(b)
    for k in range(3):
        torch.testing.assert_close(x[k], torch.linalg.solve(A, b[k]))
    torch.testing.assert_close(factor.solve(b[0]), x[0], rtol=1e-13, atol=1e-13)
    system.factorize(2 * problem.values)
    torch.testing.assert_close(factor.solve(b), x, rtol=0, atol=0)
    torch.testing.assert_close(system.factorize(2 * problem.values).solve(b), x / 2, rtol=1e-13, atol=1e-13)


@every_level
def test_levels_agree(simd, monkeypatch):
    """The same factor to rounding: what a laptop computes is what a server computes."""
    problem = make(SPD, 300, (1,), density=0.02)
    monkeypatch.setenv("SPCACHE_SIMD", "baseline")
    driver = Driver(problem)
    b = driver.rhs(1, 300, 4)
    expected = driver.solve(driver.factorize(), b)
    monkeypatch.setenv("SPCACHE_SIMD", simd)
    driver = Driver(problem)
    assert np.abs(driver.solve(driver.factorize(), b) - expected).max() < 1e-13 * np.abs(expected).max()


def test_an_unknown_instruction_set(monkeypatch):
    structure = structure_of(np.eye(3, dtype=bool))
    monkeypatch.setenv("SPCACHE_SIMD", "avx1024")
    with pytest.raises(ValueError, match="avx1024|simd|instruction"):
        multifrontal.analyze(structure, "amd")


# --- analysis -------------------------------------------------------------------------------------------------------------


def fill(mask, perm):
    """Pattern of L of the permuted matrix, by elimination."""
    L = np.tril((mask | mask.T)[np.ix_(perm, perm)])
    np.fill_diagonal(L, True)
    for j in range(len(L)):
        below = np.flatnonzero(L[j + 1 :, j]) + j + 1
        L[np.ix_(below, below)] |= np.tril(np.ones((len(below), len(below)), bool))
    return L


@settings(max_examples=60)
@given(
    n=st.integers(1, 30),
    density=st.floats(0, 0.5),
    seed=st.integers(0, 10**6),
    ordering=st.sampled_from(("amd", "metis", "natural")),
)
def test_predictions(n, density, seed, ordering):
    """Entries and work of L are those that elimination finds; the refined permutation has the same."""
    rng = np.random.default_rng(seed)
    mask = rng.random((n, n)) < density
    mask |= mask.T | np.eye(n, dtype=bool)
    structure = structure_of(mask)
    plan = multifrontal.analyze(structure, ordering)
    perm = plan.permutation
    assert sorted(perm) == list(range(n)) and perm.dtype == np.int32
    counts = fill(mask, perm).sum(0)
    assert plan.nnz == counts.sum() and plan.flops == (counts**2).sum()
    again = _multifrontal.Elimination(structure.indptr, structure.indices, perm)
    assert (again.nnz, again.flops) == (plan.nnz, plan.flops)
    if ordering == "natural":
        counts = fill(mask, np.arange(n)).sum(0)
        assert plan.nnz == counts.sum() and plan.flops == (counts**2).sum()
    assert plan._native.stored >= plan.nnz - n * (n - 1) / 2 and plan._native.largest_front <= n


def test_a_missing_diagonal_is_a_zero():
    structure = structure_of(np.array([[0, 0, 0], [1, 1, 0], [0, 1, 1]], bool))
    plan = multifrontal.analyze(structure, "natural")
    slots = np.arange(4, dtype=np.int32)
    assembly = plan.assembly(4, slots, slots, np.array([0, 2, 0, 2], np.uint8), 1.0, True)
    storage, values = plan.storage(1, 1), np.array([1.0, 2, 1, 2])
    storage.factorize(assembly, values.ctypes.data, 4, True)
    assert storage.failures() == [Failure(0, "not positive definite")]


def test_orderings_are_the_same_every_time():
    structure = structure_of(np.random.default_rng(0).random((400, 400)) < 0.01)
    for ordering in ("amd", "metis"):
        first = multifrontal.analyze(structure, ordering).permutation
        assert all(np.array_equal(multifrontal.analyze(structure, ordering).permutation, first) for _ in range(3))


BROKEN = {
    "too few indices": ([0, 1, 2, 3], [0, 1]),
    "too many indices": ([0, 1, 2, 3], [0, 1, 2, 2]),
    "no columns": ([], []),
    "begins late": ([1, 1, 2, 3], [0, 1, 2]),
    "goes back": ([0, 2, 1, 3], [0, 1, 2]),
    "row beyond the last": ([0, 1, 2, 3], [0, 1, 3]),
    "negative row": ([0, 1, 2, 3], [-1, 1, 2]),
    "above the diagonal": ([0, 1, 2, 4], [0, 1, 1, 2]),
}


@pytest.mark.parametrize("indptr, indices", BROKEN.values(), ids=BROKEN)
def test_wrong_structures(indptr, indices):
    """Native code looks again before it touches anything."""
    structure = Structure(3, np.array(indptr, np.int64), np.array(indices, np.int32), True)
    natural = np.arange(3, dtype=np.int32)
    for call, more in [
        (_multifrontal.amd, ()), (_multifrontal.separate, ()), (_multifrontal.camd, (natural,)),
        (_multifrontal.Elimination, (natural,)),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match="indptr and indices"):
            call(structure.indptr, structure.indices, *more)
    with pytest.raises(ValueError, match="indptr and indices"):
        multifrontal.analyze(structure, "natural")


@pytest.mark.parametrize("perm", [[0, 1], [0, 1, 2, 3], [0, 1, 3], [0, 1, 1], [-1, 0, 1]], ids=str)
def test_wrong_permutations(perm):
    structure, perm = structure_of(np.eye(3, dtype=bool)), np.array(perm, np.int32)
    with pytest.raises(ValueError, match="perm"):
        multifrontal.analyze(structure, "amd", perm)


def test_more_than_2_31_entries_are_counted():
    """Three arrows that point the wrong way: 3 n (n + 1) / 2 entries by the analysis, for which nothing is allocated."""
    n = 45_000
    i = np.arange(n)
    # column 0 of each block has all its rows, the others the diagonal only
    one = [n + i, np.concatenate([i, i[1:]])]  # indptr[1:], indices
    indptr = np.concatenate([[0], *(k * (2 * n - 1) + one[0] for k in range(3))])
    indices = np.concatenate([k * n + one[1] for k in range(3)]).astype(np.int32)
    plan = multifrontal.analyze(Structure(3 * n, indptr.astype(np.int64), indices, True), "natural")
    assert plan.nnz == 3 * n * (n + 1) // 2 > 2**31
    assert plan.flops == pytest.approx(3 * sum(c * c for c in range(1, n + 1)))


# --- threads --------------------------------------------------------------------------------------------------------------


def residuals(driver, x, b):
    """Of sparse matrices; in units of eps."""
    i, j = driver.problem.indices.numpy()
    off = i != j
    worst = 0
    for e, v in enumerate(driver.values.astype(np.complex128)):
        y = np.zeros_like(b[e], dtype=np.complex128)
        np.add.at(y, i, v[:, None] * x[e][j])
        np.add.at(y, j[off], v[off, None].conj() * x[e][i[off]])
        scale = 2 * abs(v).max() * 4 * abs(x[e]).max() + abs(b[e]).max()
        worst = max(worst, abs(y - b[e]).max() / scale / driver.problem.case.eps)
    return worst


class Large(Driver):
    """A driver that makes no dense matrix."""

    def __init__(self, problem, ordering="auto"):
        matrix = Problem.matrix
        try:
            Problem.matrix = lambda self, values=None: None
            super().__init__(problem, ordering)
        finally:
            Problem.matrix = matrix


@every_dtype
@pytest.mark.parametrize("ordering", ["amd", "metis"])
@pytest.mark.parametrize("shape", [(150, 150), (13, 13, 13)], ids=["2-D", "3-D"])
def test_the_result_does_not_depend_on_threads(dtype, ordering, shape):
    """Bit for bit."""
    driver = Large(grid_problem(shape, dtype, (2,)), ordering)
    b = driver.rhs(2, driver.n, 3)
    storage = driver.factorize()
    expected = driver.solve(storage, b)
    assert residuals(driver, expected, b) < C
    for threads in (2, 3, 8):
        driver.factorize(driver.values * 2, storage, threads=threads)  # scratch memory full of other numbers
        driver.factorize(storage=storage, threads=threads)
        assert storage.failures() is None
        for solving in (1, threads):
            assert np.array_equal(driver.solve(storage, b, threads=solving), expected)
            assert np.array_equal(driver.solve(storage, b[..., :1], threads=solving), driver.solve(storage, b[..., :1]))


@every_level
@every_dtype
def test_large_fronts_are_shared(simd, dtype, monkeypatch):
    """Block by block of pivots, the rest of the front by all threads; the same bits. Solves with one right-hand side."""
    monkeypatch.setenv("SPCACHE_SIMD", simd)
    for p, q in (150, 517), (261, 390):
        driver = Driver(problem_of(two_children(p, q), dtype, batch=1), "natural")
        storage = driver.factorize(threads=2)
        b = driver.rhs(1, driver.n, 1)
        x = driver.solve(storage, b)
        assert driver.residual(x, b) <= C
        for threads in (2, 3, 5):
            assert np.array_equal(driver.solve(storage, b, threads=threads), x)
        assert np.array_equal(driver.solve(driver.factorize(threads=1), b), x)


def test_the_failure_does_not_depend_on_threads():
    """Several pivots fail in several subtrees: the same one is named."""
    driver = Large(grid_problem((150, 150), batch=(1,)), "metis")
    diagonal = np.flatnonzero(driver.problem.indices[0] == driver.problem.indices[1])
    rng = np.random.default_rng(1)
    storage, b = driver.storage(), driver.rhs(1, driver.n, 1)
    good = driver.solve(driver.factorize(storage=storage), b)
    for _ in range(10):
        values = driver.values.copy()
        values[0, rng.choice(diagonal, 5)] = -1
        failures = []
        for threads in (1, 2, 4, 4):
            driver.factorize(values, storage, threads=threads)
            failures.append(storage.failures())
            assert np.isnan(driver.solve(storage, b, threads=threads)).all()
        assert len(failures[0]) == 1 and failures == [failures[0]] * 4
        driver.factorize(storage=storage, threads=4)
        assert np.array_equal(driver.solve(storage, b, threads=4), good)
