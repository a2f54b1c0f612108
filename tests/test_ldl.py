"""L D L^H: kernels of every instruction set, pivots inside fronts, pairs of rows, scaling, refinement, and what happens
where none of it suffices."""

import warnings

import numpy as np
import pytest
import torch
from cases import DTYPES, Problem, find_case, grid_problem, numbers, scaled_residual
from hypothesis import given, settings
from hypothesis import strategies as st
from protocol_driver import Driver

import spcache
from spcache import SparseSystem
from spcache.engines import DTYPE_CODES, _ldl, _multifrontal, ldl
from spcache.engines.protocol import Failure, Structure

LEVELS = _multifrontal.INSTRUCTION_SETS[: _multifrontal.INSTRUCTION_SETS.index(_multifrontal.best_simd()) + 1]
every_level = pytest.mark.parametrize("simd", LEVELS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_kind = pytest.mark.parametrize("kind", ["symmetric", "hermitian"])
# Factors that are not refined: stable pivots, little growth.
C = 10
TOLERABLE = 0.01  # of src/kernels/indefinite.hpp


def problem_of(A, kind, dtype, mask=None):
    """A [batch, n, n] symmetric or Hermitian, both triangles stored."""
    mask = (A != 0).any(0) if mask is None else mask
    indices = mask.nonzero().T
    return Problem(find_case(kind, dtype), A.shape[-1], indices, A[:, indices[0], indices[1]].to(dtype).contiguous())


def indefinite(mask, kind, dtype, diagonal=True, batch=2, seed=0):
    """Random numbers at these places; nothing on the diagonal, unless asked for."""
    mask = torch.as_tensor(mask)
    mask = mask | mask.T
    mask = mask | torch.eye(len(mask), dtype=torch.bool) if diagonal else mask & ~torch.eye(len(mask), dtype=torch.bool)
    A = numbers((batch, *mask.shape), torch.complex128 if dtype.is_complex else torch.float64, seed) * mask
    A = (A + (A.mT if kind == "symmetric" else A.mH)) / 2
    return problem_of(A, kind, dtype, mask)


def saddle(n, m, dtype=torch.float64, seed=0, scale=None, kind="symmetric", density=0.1):
    """[H B^H; B 0] with H of random sign, sparse; optionally D A D."""
    g = np.random.default_rng(seed)
    H = np.diag(g.choice([-1.0, 1.0], n) * (0.5 + g.random(n)))
    B = g.standard_normal((m, n)) * (g.random((m, n)) < density)
    if dtype.is_complex:
        B = B * np.exp(1j * g.random((m, n)))
    B[np.arange(m), g.permutation(n)[:m]] += 2
    A = np.block([[H, B.T if kind == "symmetric" else B.conj().T], [B, np.zeros((m, m))]])
    if scale is not None:
        A = scale[:, None] * A * scale
    return torch.from_numpy(A)[None]


def solve(A, kind="symmetric", dtype=torch.float64, order=None, **options):
    """A system of A [batch, n, n], its values, and a solution checked by the scaled residual."""
    if order is not None:
        A = A[:, order][:, :, order]
    problem = problem_of(A, kind, dtype)
    system, b = problem.system(**options), problem.rhs(len(A), problem.n, 3)
    for adjoint in (False, True):
        x = system.solve(problem.values, b, adjoint=adjoint)
        M = problem.matrix()
        assert scaled_residual(M.mH if adjoint else M, x, b) <= C * problem.case.eps
    return system, problem


# --- kernels --------------------------------------------------------------------------------------------------------------


@every_level
@every_dtype
@every_kind
def test_dense_fronts(simd, dtype, kind, monkeypatch):
    """One front of any size, with and without a diagonal; its parts are 16, 128 and 160 large."""
    monkeypatch.setenv("SPCACHE_SIMD", simd)
    for n in (1, 2, 3, 4, 5, 8, 9, 15, 16, 17, 33, 64, 127, 128, 129, 130, 161, 290):
        for diagonal in (True, False):
            if not diagonal and (n % 2 or n > 140):
                continue
            driver = Driver(indefinite(np.ones((n, n), bool), kind, dtype, diagonal, seed=n), "natural")
            storage = driver.factorize()
            assert storage.failures() is None and storage.report(0)["replaced"] == 0
            assert storage.report(0)["multiplier"] <= 10.01
            for width in (1, 2, 9):
                for adjoint in (False, True):
                    b = driver.rhs(2, n, width)
                    assert driver.residual(driver.solve(storage, b, adjoint=adjoint), b, adjoint=adjoint) <= C
            if kind == "hermitian" or not dtype.is_complex:
                eigenvalues = torch.linalg.eigvalsh(driver.matrices)
                expected = torch.stack([(eigenvalues > 0).sum(-1), (eigenvalues < 0).sum(-1)], -1)
                assert storage.inertia()[:, :2].tolist() == expected.tolist() and not storage.inertia()[:, 2].any()


@every_level
@every_dtype
@every_kind
@pytest.mark.parametrize("p, q", [(3, 2), (20, 30), (150, 140)])
def test_two_children(simd, dtype, kind, p, q, monkeypatch):
    """Fronts of p + q rows that pass update matrices to one of q."""
    monkeypatch.setenv("SPCACHE_SIMD", simd)
    mask = np.ones((2 * p + q, 2 * p + q), bool)
    mask[:p, p : 2 * p] = mask[p : 2 * p, :p] = False
    driver = Driver(indefinite(mask, kind, dtype), "natural")
    storage = driver.factorize()
    assert storage.failures() is None and (p < 20 or storage.symbolic.supernodes > 1)
    b = driver.rhs(2, driver.n, 5)
    assert driver.residual(driver.solve(storage, b), b) <= C


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.floats(0.02, 0.5), st.integers(0, 10**6), st.sampled_from(["symmetric", "hermitian"]))
def test_random_patterns(n, density, seed, kind):
    """With a diagonal that is not dominant; inertia and solutions as dense routines find them."""
    mask = np.random.default_rng(seed).random((n, n)) < density
    for dtype in (torch.float64, torch.complex128):
        problem = indefinite(mask, kind, dtype, seed=seed)
        system, b = problem.system(), problem.rhs(2, n, 2)
        if torch.linalg.cond(problem.matrix()).max() > 1e8:
            return
        assert scaled_residual(problem.matrix(), system.solve(problem.values, b), b) <= C * problem.case.eps
        if system.stats.engine == "ldl" and (kind == "hermitian" or dtype is torch.float64):
            inertia = system.factorize(problem.values).inertia
            negative = (torch.linalg.eigvalsh(problem.matrix()) < 0).sum(-1)
            assert (inertia.sum(-1) == n).all()
            assert (inertia[:, 1] <= negative).all() and (negative <= inertia[:, 1] + inertia[:, 2]).all()


@every_dtype
def test_threads_do_not_change_bits(dtype):
    shape = (48, 48)
    grid = grid_problem(shape, torch.float64)
    values = grid.values - 1.7 * (grid.indices[0] == grid.indices[1])  # eigenvalues of both signs
    problem = Problem(find_case("symmetric", dtype, "lower"), grid.n, grid.indices, values.to(dtype)[None])
    results = []
    for threads in (1, 2, 4):
        system = SparseSystem(problem.indices, problem.n, kind="symmetric", triangle="lower", threads=threads)
        x = system.solve(problem.values[0], problem.rhs(problem.n, 3))
        assert system.stats.engine == "ldl"
        results.append(x)
    assert all(torch.equal(x, results[0]) for x in results)


@every_level
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_threads_share_large_fronts(simd, dtype, monkeypatch):
    """Two fronts of 560 rows; the first pivots have only zeros between them, a window of them no pivot at all."""
    monkeypatch.setenv("SPCACHE_SIMD", simd)
    n, both, zeros = 840, 280, 140
    mask = np.ones((n, n), bool)
    mask[:both, 2 * both :] = False  # the first front has the pivots up to here, and as many rows below
    problem = indefinite(mask & mask.T, "symmetric", dtype, batch=1)
    inside = (problem.indices < zeros).all(0)
    problem.values[:, inside] = 0
    driver = Driver(problem, "natural")
    assert driver.plan._native.largest_front >= 2 * both
    b = driver.rhs(1, n, 2)
    storages = [driver.factorize(threads=threads) for threads in (1, 2, 3)]
    solutions = [driver.solve(storage, b, threads=3) for storage in storages]
    assert driver.residual(solutions[0], b) <= C
    assert all(np.array_equal(x, solutions[0]) for x in solutions)
    assert all(storage.report(0) == storages[0].report(0) for storage in storages)


@every_dtype
def test_threads_share_a_batch(dtype):
    problem = indefinite(np.random.default_rng(0).random((50, 50)) < 0.3, "hermitian", dtype, batch=200)
    driver = Driver(problem)
    one, three = driver.factorize(threads=1), driver.factorize(threads=3)
    b = driver.rhs(200, 50, 2)
    x = driver.solve(one, b)
    assert np.array_equal(x, driver.solve(three, b, threads=3)) and driver.residual(x, b) <= C


# --- pairs of rows --------------------------------------------------------------------------------------------------------


def lower_of(A):
    """Structure and sizes of the lower triangle of a dense array."""
    mask = np.tril(A) != 0
    indices = np.concatenate([np.flatnonzero(column) for column in mask.T] + [[]]).astype(np.int32)
    structure = Structure(len(A), np.concatenate([[0], np.cumsum(mask.sum(0))]).astype(np.int64), indices, True)
    return structure, np.abs(np.tril(A).T[mask.T]).astype(float)


def test_pairing():
    A = np.array([[0, 3, 0, 0], [3, 0, 1, 0], [0, 1, 5, 1], [0, 0, 1, 0.0]])
    assert ldl.pairing(*lower_of(np.eye(3))) is None
    assert ldl.pairing(*lower_of(A)).tolist() == [1, 0, 3, 2]
    A[3, 3] = 9  # nothing but the first two needs a partner
    assert ldl.pairing(*lower_of(A)).tolist() == [1, 0, 2, 3]
    singular = np.array([[0, 0, 1], [0, 0, 1], [1, 1, 0.0]])
    assert ldl.pairing(*lower_of(singular)) is None
    ring = np.roll(np.eye(5), 1, 0) + np.roll(np.eye(5), -1, 0)  # one cycle of odd length: one row stays alone
    partner = ldl.pairing(*lower_of(ring))
    assert (partner == np.arange(5)).sum() == 1 and (partner[partner] == np.arange(5)).all()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(0, 10**6))
def test_the_matching_is_the_best(n, seed):
    """No permutation of a small matrix has a larger product; pairs are symmetric, and stand for entries."""
    scipy_optimize = pytest.importorskip("scipy.optimize")
    g = np.random.default_rng(seed)
    A = np.exp(3 * g.standard_normal((n, n))) * (g.random((n, n)) < 0.6)
    A = np.tril(A) + np.tril(A, -1).T
    with np.errstate(divide="ignore"):
        cost = np.where(A > 0, -np.log(A), 1e6)
    rows, columns = scipy_optimize.linear_sum_assignment(cost)
    best = cost[rows, columns].sum()
    structure, sizes = lower_of(A)
    partner = _ldl.pair(structure.indptr, structure.indices, sizes)
    assert (partner is None) == (best > 1e5)
    if partner is None:
        return
    assert (partner[partner] == np.arange(n)).all()
    paired = partner != np.arange(n)
    assert (A[np.flatnonzero(paired), partner[paired]] > 0).all()
    cycles, seen = [], set()
    for start in range(n):
        i, length = start, 0
        while i not in seen:
            seen.add(i)
            i, length = columns[i], length + 1
        cycles.append(length)
    if all(length < 2 or length % 2 == 0 for length in cycles):  # nothing was cut off: pairs are as good or better
        assert cost[np.arange(n), partner].sum() <= best + 1e-9 * abs(best) + 1e-9


@every_dtype
@pytest.mark.parametrize("kind", ["symmetric", "hermitian"])
def test_saddle_points(dtype, kind):
    """A structurally zero block on the diagonal: one analysis, with pairs; permuted as well."""
    for seed in range(6):
        n = 30 + 11 * seed
        order = np.random.default_rng(seed).permutation(n + n // 3)
        A = saddle(n, n // 3, dtype, seed, kind=kind)
        system, problem = solve(A, kind, dtype, order)
        stats = system.stats
        assert (stats.engine, stats.analyses, stats.factorizations, stats.repivots) == ("ldl", 1, 1, 0)
        if kind == "hermitian" or not dtype.is_complex:
            negative = int((torch.linalg.eigvalsh(problem.matrix()[0]) < 0).sum())
            positive, found, open_ = system.factorize(problem.values[0]).inertia.tolist()
            assert found <= negative <= found + open_ and positive + found + open_ == problem.n and open_ <= 2


def arranged(problem):
    """A plan, Assembly and values of one matrix; and what the arrangement for them is."""
    driver = Driver(problem, "amd")
    what = driver.assembly, driver.values.ctypes.data, driver.nnz, DTYPE_CODES[driver.dtype]
    return driver, what, ldl.arrangement(driver.contributions.structure, *what, "amd")


@every_dtype
@pytest.mark.parametrize("kind", ["symmetric", "hermitian"])
def test_arrangement(dtype, kind):
    """Rows without a stable pivot go further up, until all have one; the factor is stable then, and was not before."""
    unstable = 0
    for seed in range(4):
        problem = problem_of(saddle(200, 100, dtype, seed, kind=kind, density=0.005), kind, dtype)
        driver, what, arrangement = arranged(problem)
        before = driver.factorize()
        unstable += before.report(0)["multiplier"] > 1 / TOLERABLE
        left_out = before.trial(*what[:3])
        assert (arrangement is None) == (not left_out.any())
        if arrangement is None:
            continue
        assert sorted(~arrangement) == list(range(300))
        plan = ldl.analyze(driver.contributions.structure, "amd", None, arrangement)
        assert plan.permutation is None and plan.ordering == "amd"
        storage = plan.storage(what[3], 1)
        assert not storage.trial(*what[:3]).any()
        storage.factorize(*what[:3], True)
        report = storage.report(0)
        assert storage.failures() is None and report["replaced"] == 0
        assert report["multiplier"] <= 1.01 / TOLERABLE
    assert unstable


def test_no_arrangement():
    """Where the diagonal serves, where no front is further up, and for values that are not finite."""
    for A in (torch.eye(3), torch.ones(3, 3) - torch.eye(3), torch.tensor([[0, torch.nan], [torch.nan, 0]])):
        problem = problem_of(A[None].double(), "symmetric", torch.float64, torch.ones(A.shape, dtype=torch.bool))
        assert arranged(problem)[2] is None


def test_lifted_rows():
    """A chain of fronts: rows come last among the pivots of the front they go to."""
    A = torch.diag(torch.arange(1.0, 401.0)) + torch.diag(torch.ones(399), 1) + torch.diag(torch.ones(399), -1)
    driver = Driver(problem_of(A[None].double(), "symmetric", torch.float64), "natural")
    marks = np.zeros(400, bool)
    marks[0] = True
    near, far = driver.plan.lift(marks, 1), driver.plan.lift(marks, 1000)
    assert sorted(near) == sorted(far) == list(range(400))
    assert 0 < list(near).index(0) < 399 and list(far).index(0) == 399
    marks[:] = False
    marks[399] = True
    assert driver.plan.lift(marks, 1) is None
    with pytest.raises(ValueError, match="400 entries"):
        driver.plan.lift(marks[:10], 1)
    with pytest.raises(ValueError, match="the assembly belongs to another plan"):
        driver.factorize().trial(driver.assembly, 0, 3)


def test_pairs_stay_when_values_change():
    A = saddle(60, 25)
    system, problem = solve(A)
    analyses = system.stats.analyses
    for k in range(4):
        values = problem.values * (1 + 0.1 * k)
        b = problem.rhs(1, problem.n)
        x = system.solve(values, b)
        assert scaled_residual(problem.matrix(values), x[..., None], b[..., None]) <= C * problem.case.eps
    assert system.stats.analyses == analyses and system.stats.repivots == 0 and system.stats.engine == "ldl"
    copy = system.__copy__()
    copy.solve(problem.values, b)
    assert copy.stats.analyses == 0 and copy.stats.engine == "ldl"


def test_pairs_are_found_anew():
    """Values turn the pairs bad: others are found, counted, and kept."""
    n = 40
    g = np.random.default_rng(0)
    S = (g.random((n, n)) < 0.08) * g.standard_normal((n, n))
    S = np.tril(S, -1) + np.tril(S, -1).T

    def values_of(pairs):
        A = 1e-9 * S
        for i, j in pairs.reshape(-1, 2):
            A[i, j] = A[j, i] = 1.0
        return A

    first, second = g.permutation(n), g.permutation(n)
    mask = torch.from_numpy((values_of(first) != 0) | (values_of(second) != 0))
    A, B = (torch.from_numpy(values_of(p))[None] for p in (first, second))
    one, two = problem_of(A, "symmetric", torch.float64, mask), problem_of(B, "symmetric", torch.float64, mask)
    system, b = one.system(), one.rhs(1, n, 1)
    for problem in (one, two, two, one):
        x = system.solve(problem.values, b)
        assert scaled_residual(problem.matrix(), x, b) <= C * problem.case.eps
    assert system.stats.engine == "ldl" and system.stats.analyses == 1 + system.stats.repivots


# --- scaling --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("span", [0, 10])
@pytest.mark.parametrize("factor", [1e-150, 1.0, 1e150])
def test_badly_scaled(span, factor):
    """f D A D with entries of D between 10^-span and 10^span, as good as A itself."""
    for seed in range(4):
        g = np.random.default_rng(seed)
        n, m = 30, 12
        A = saddle(n, m, seed=seed)
        d = torch.from_numpy(10.0 ** g.uniform(-span, span, n + m))
        problem = problem_of(factor * d[:, None] * A * d, "symmetric", torch.float64)
        system = problem.system()
        y = problem.rhs(1, n + m)
        z = factor * d * system.solve(problem.values, d * y)  # solves A z = y
        assert system.stats.engine == "ldl" and z.isfinite().all()
        assert scaled_residual(A, z[..., None], y[..., None]) <= C * problem.case.eps


# --- trust ----------------------------------------------------------------------------------------------------------------


def test_refinement_is_counted_and_repairs():
    """Pivots that had to be replaced: without refinement the residual would be 1e-8."""
    problem = indefinite(np.random.default_rng(3).random((60, 60)) < 0.1, "symmetric", torch.float64, False, 1)
    driver = Driver(problem, "amd")  # no pairs
    storage = driver.factorize()
    assert storage.report(0)["replaced"] > 0 and storage.report(0)["refined"] and storage.failures() is None
    for width in (1, 2, 4, 5, 8, 17, 33):  # which are refined some at a time
        b = np.ascontiguousarray(driver.rhs(1, 60, width))
        b[..., : width // 2] *= 1e-200
        x = np.empty_like(b)
        assert storage.solve(b.ctypes.data, x.ctypes.data, 1, width, 0, False, 1) > 0
        for c in range(width):
            assert driver.residual(x[..., [c]], b[..., [c]]) <= C
        if width > 1:  # a column that cannot be solved is said to be so, and the others are not worse for it
            b[0, 7, 0], y = np.nan, np.empty_like(b)
            assert storage.solve(b.ctypes.data, y.ctypes.data, 1, width, 0, False, 1) < 0
            assert (y[..., 1:] == x[..., 1:]).all() and np.isnan(y[..., 0]).any()


@every_kind
@every_dtype
def test_singular(kind, dtype):
    """Exactly, to rounding, and by structure; the error is that of the other engines."""
    A = indefinite(np.ones((12, 12), bool), kind, dtype, batch=1).matrix()
    A[:, 7] = 0
    A[:, :, 7] = 0
    with pytest.raises(spcache.SingularMatrixError, match="column 7"):
        problem = problem_of(A, kind, dtype, torch.ones(12, 12, dtype=torch.bool))
        problem.system().solve(problem.values, problem.rhs(1, 12))
    A[:, 7] = A[:, 3]
    A[:, :, 7] = A[:, :, 3]
    problem = problem_of(A, kind, dtype)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        x, info = problem.system().solve_ex(problem.values, problem.rhs(1, 12))
    if seen:  # as rounding has it, the matrix is regular, but hardly so
        assert all(issubclass(w.category, spcache.IllConditionedWarning) for w in seen) and info[0] == 0
    else:
        assert info[0] > 0 and x.isnan().all()
    with pytest.raises(spcache.SingularMatrixError):
        problem = problem_of(A * 0, kind, dtype, (A != 0)[0])
        problem.system().solve(problem.values, problem.rhs(1, 12))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@every_kind
def test_what_is_singular_to_rounding_is_said_to_be(kind, dtype):
    """Rows and columns that occur twice: an error, or a warning with the condition number; as rounding has it, an
    estimate may still be too large now and then. b = 1 has solutions."""
    silent = 0
    for seed in range(40):
        A = numbers((1, 12, 12), dtype, seed)
        A = (A + (A.mT if kind == "symmetric" else A.mH)) / 2
        A[:, 7] = A[:, 3]
        A[:, :, 7] = A[:, :, 3]
        problem = problem_of(A, kind, dtype)
        system, b = problem.system(), torch.ones(12, dtype=dtype)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            info = system.solve_ex(problem.values[0], b)[1]
        assert info > 0 or not seen or 0 < system.stats.rcond < 32 * problem.case.eps
        silent += info == 0 and not seen
    assert silent <= 2


@pytest.mark.filterwarnings("ignore::spcache.IllConditionedWarning")  # with 15 digits
def test_nearly_singular():
    """Condition numbers up to 1e16: an answer with a small residual, or the error."""
    for digits in (8, 12, 15):
        g = np.random.default_rng(digits)
        Q, _ = np.linalg.qr(g.standard_normal((30, 30)))
        e = g.choice([-1, 1], 30) * 10.0 ** np.linspace(0, -digits, 30)
        A = torch.from_numpy((Q * e) @ Q.T)[None]
        A = (A + A.mT) / 2
        try:
            solve(A)
        except spcache.SingularMatrixError:
            assert digits == 15


def test_untrusted_factors_end_in_lu(monkeypatch):
    """Where neither pivots nor pairs help, LU does, and says so; after some times at once."""
    monkeypatch.setattr(ldl.Storage, "failures", lambda storage: [Failure(0, "untrusted")] * storage.batch)
    A = saddle(20, 8)
    system, problem = solve(A)
    assert system.stats.engine == "klu" and system.stats.repivots >= 1
    b = problem.rhs(1, problem.n, 1)
    for k in range(4):
        values = problem.values * (1 + k)
        assert scaled_residual(problem.matrix(values), system.solve(values, b), b) <= C * problem.case.eps
    before = system.stats
    system.solve(problem.values * 7, b)
    after = system.stats
    assert after.factorizations == before.factorizations + 1 and after.repivots == before.repivots
    with pytest.raises(RuntimeError, match="no LU"):
        _ = system.factorize(problem.values).inertia


def test_stalled_refinement_ends_in_lu(monkeypatch):
    """A solve whose residual stays large is done again by LU, once factorized for all that follow; gradients too."""
    problem = problem_of(saddle(20, 8), "symmetric", torch.float64)
    system = problem.system()
    factor = system.factorize(problem.values)
    wrong = ldl.Storage.solve
    monkeypatch.setattr(ldl.Storage, "solve", lambda *arguments: ~wrong(*arguments))
    b = problem.rhs(1, problem.n).requires_grad_()
    x = factor.solve(b)
    assert system.stats.repivots == 1 and system.stats.engine == "klu"
    assert scaled_residual(problem.matrix(), x.detach()[..., None], b.detach()[..., None]) <= C * problem.case.eps
    x.sum().backward()
    ones = torch.ones_like(x)
    assert scaled_residual(problem.matrix(), b.grad[..., None], ones[..., None]) <= C * problem.case.eps
    assert system.stats.repivots == 1


def test_gradients_of_saddle_points():
    for dtype, kind in ((torch.float64, "symmetric"), (torch.complex128, "symmetric"), (torch.complex128, "hermitian")):
        problem = problem_of(saddle(7, 3, dtype, kind=kind), kind, dtype)
        system = problem.system()
        values, b = problem.values.clone().requires_grad_(), problem.rhs(1, 10).requires_grad_()
        assert torch.autograd.gradcheck(lambda v, r, s=system: s.solve(v, r), (values, b))
        assert system.stats.engine == "ldl"


def test_values_that_are_not_finite():
    problem = problem_of(saddle(20, 8), "symmetric", torch.float64)
    system, values = problem.system(), problem.values.clone()
    system.solve(values, problem.rhs(1, 28))
    values[0, 5] = torch.nan
    with pytest.raises(ValueError, match="values must be finite"):
        system.solve(values, problem.rhs(1, 28))
    _, info = system.solve_ex(values, problem.rhs(1, 28))
    assert info.tolist() == [-1]


def test_inertia():
    A = torch.diag(torch.tensor([1.0, -2.0, 3.0, -4.0, -5.0], dtype=torch.float64))
    problem = problem_of(torch.stack([A, -A]), "symmetric", torch.float64)
    assert problem.system().factorize(problem.values).inertia.tolist() == [[2, 3, 0], [3, 2, 0]]
    spd = SparseSystem(problem.indices, 5, kind="spd")
    assert spd.factorize(problem.values[0].abs()).inertia.tolist() == [5, 0, 0]
    general = SparseSystem(problem.indices, 5, kind="general")
    with pytest.raises(RuntimeError, match="signs of the eigenvalues"):
        _ = general.factorize(problem.values).inertia
    with pytest.raises(RuntimeError, match="signs of the eigenvalues"):
        _ = problem.system().factorize(problem.values.to(torch.complex128)).inertia


def test_wrong_arguments():
    structure, sizes = lower_of(np.eye(3))
    with pytest.raises(ValueError, match="sizes differ"):
        _ldl.pair(structure.indptr, structure.indices, sizes[:2])
    slots = np.arange(3, dtype=np.int32)
    for perm, where in ((slots[:2], slots), (slots, slots[::-1].copy()), (np.zeros(3, np.int32), slots)):
        with pytest.raises(ValueError, match="a permutation of 0..2|slots do not lead"):
            _ldl.Symbolic(structure.indptr, structure.indices, structure.indptr, structure.indices, where, perm, 0)
    with pytest.raises(ValueError, match="lower triangle"):
        _ldl.Symbolic(
            structure.indptr, structure.indices[::-1].copy(), structure.indptr, structure.indices, slots, slots, 0
        )


def test_an_instruction_set_that_is_not_there(monkeypatch):
    monkeypatch.setenv("SPCACHE_SIMD", "mmx")
    with pytest.raises(ValueError, match="SPCACHE_SIMD must be one of"):
        ldl.analyze(lower_of(np.eye(3))[0], "natural")
