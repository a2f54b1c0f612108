"""LU with pivots inside fronts: kernels of every instruction set, exchanges, row matchings, scaling, refinement, which
matrices it serves, and what happens where it cannot be trusted."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from cases import DTYPES, Problem, find_case, numbers, scaled_residual
from hypothesis import given, settings
from hypothesis import strategies as st
from protocol_driver import Driver

import spcache
from spcache import SparseSystem
from spcache.engines import _lu, lu, multifrontal
from spcache.engines.protocol import Failure, Permutation, Structure

LEVELS = multifrontal.instruction_sets()[0]
every_level = pytest.mark.parametrize("simd", LEVELS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
C = 10  # as for L D L^H: multipliers up to 10


@pytest.fixture
def always(monkeypatch):
    """This engine for every general matrix."""
    monkeypatch.setattr(lu, "in_question", lambda n, ordering: True)
    monkeypatch.setattr(lu, "pays", lambda flops, nnz, share: True)


def problem_of(A, dtype=torch.float64, mask=None):
    """A [batch, n, n], the entries that are not zero or those of a mask."""
    mask = (A != 0).any(0) if mask is None else torch.as_tensor(mask)
    indices = mask.nonzero().T
    values = A[:, indices[0], indices[1]].to(dtype).contiguous()
    return Problem(find_case("general", dtype), A.shape[-1], indices, values)


def random(mask, dtype=torch.float64, diagonal=0.0, batch=2, seed=0):
    """Random numbers at these places, more of it on the diagonal."""
    mask = torch.as_tensor(mask)
    A = numbers((batch, *mask.shape), torch.complex128 if dtype.is_complex else torch.float64, seed) * mask
    return problem_of(A + diagonal * torch.eye(len(mask)), dtype, mask | (diagonal != 0) * torch.eye(len(mask)).bool())


def convection(side, wind=0.8, dtype=torch.float64):
    """Diffusion and a wind along the axes, in the plane: [1, nnz] values."""
    one = sp.diags_array([-1 - wind, 2.0, -1 + wind], offsets=[-1, 0, 1], shape=(side, side))
    A = sp.kronsum(one, one.T).tocoo()
    indices = torch.from_numpy(np.stack(A.coords).astype(np.int64))
    return Problem(find_case("general", dtype), side * side, indices, torch.from_numpy(A.data).to(dtype)[None])


def sparse(problem, values=None):
    """The matrix as SciPy has it."""
    n, values = problem.n, problem.values[0] if values is None else values
    return sp.coo_array((values.numpy(), problem.indices.numpy()), (n, n)).tocsc()


def error(A, x, b):
    """The scaled residual of one right-hand side, in units of eps."""
    x, b = x.numpy(), b.numpy()
    scale = abs(A).sum(0).max() * abs(x).max() + abs(b).max()
    return abs(A @ x - b).max() / scale / np.finfo(x.dtype).eps


def matched(problem, ordering="amd", always=False):
    """A driver whose plan has the rows matched by the first matrix."""
    driver = Driver(problem, ordering, engine=lu)
    structure = driver.contributions.structure
    values = np.ascontiguousarray(driver.values[0])
    sizes = lu.magnitudes(driver.assembly, values.ctypes.data, driver.nnz, DTYPES.index(driver.dtype), structure)
    driver.plan = lu.analyze(structure, ordering, None, lu.pairing(structure, sizes, always))
    driver.assembly = driver.assemble()
    return driver


def worst(driver, storage, batch=2, widths=(1, 2, 9)):
    found = 0.0
    for width in widths:
        for adjoint in (False, True):
            b = driver.rhs(batch, driver.n, width)
            found = max(found, driver.residual(driver.solve(storage, b, adjoint=adjoint), b, adjoint=adjoint))
    return found


# --- kernels --------------------------------------------------------------------------------------------------------------


@every_level
@every_dtype
@pytest.mark.parametrize("diagonal", [0.0, 60.0])
def test_dense_fronts(simd, dtype, diagonal, monkeypatch):
    """One front of any size, where the diagonal will do and where rows have to be exchanged; windows are 32 and 128."""
    monkeypatch.setenv("SPCACHE_SIMD", simd)
    for n in (1, 2, 3, 4, 5, 7, 8, 9, 15, 17, 31, 32, 33, 64, 65, 127, 128, 129, 161, 290):
        driver = Driver(random(np.ones((n, n), bool), dtype, diagonal, seed=n), "natural", engine=lu)
        storage = driver.factorize()
        assert storage.failures() is None and storage.symbolic.supernodes == 1
        report = storage.report(0)
        assert report["replaced"] == 0 and report["multiplier"] <= 10.01
        assert worst(driver, storage) <= C


@every_level
@every_dtype
@pytest.mark.parametrize("diagonal", [0.0, 60.0])
@pytest.mark.parametrize("p, q", [(3, 2), (20, 30), (150, 140)])
def test_two_children(simd, dtype, diagonal, p, q, monkeypatch):
    """Fronts of p + q rows that pass update matrices to one of q."""
    monkeypatch.setenv("SPCACHE_SIMD", simd)
    mask = np.ones((2 * p + q, 2 * p + q), bool)
    mask[:p, p : 2 * p] = mask[p : 2 * p, :p] = False
    driver = Driver(random(mask, dtype, diagonal), "natural", engine=lu)
    storage = driver.factorize()
    assert storage.failures() is None and (p < 20 or storage.symbolic.supernodes > 1)
    assert worst(driver, storage, widths=(1, 5)) <= C


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.floats(0.02, 0.5), st.integers(0, 10**6), st.booleans())
def test_random_patterns(n, density, seed, with_diagonal):
    """No value is far from 1, none is where it should be; what has a factor solves, and what has none is near singular or
    not to be trusted."""
    mask = np.random.default_rng(seed).random((n, n)) < density
    mask[np.random.default_rng(seed + 1).permutation(n), np.arange(n)] = True
    for dtype in (torch.float64, torch.complex128):
        problem = random(mask, dtype, 0.5 * with_diagonal, seed=seed)
        driver = matched(problem)
        storage = driver.factorize()
        bad = storage.failures() or [None, None]
        for e in range(2):
            if bad[e] is None:
                b = driver.rhs(1, n, 2)
                x = driver.solve(storage, b, [e])
                assert driver.residual(x, b, [e]) <= C
            else:
                assert isinstance(bad[e], Failure) and np.isnan(driver.solve(storage, driver.rhs(1, n, 1), [e])).all()
        if not any(bad):
            continue
        system, b = problem.system(), problem.rhs(2, n, 2)
        if torch.linalg.cond(driver.matrices).max() < 1e8:
            assert scaled_residual(problem.matrix(), system.solve(problem.values, b), b) <= C * problem.case.eps


def test_columns_are_exchanged():
    """Where the rows of a front's pivots have nothing for its first column, but something for the second."""
    g = np.random.default_rng(0)
    n, p = 12, 4
    A = g.standard_normal((n, n))
    A[:p, p:] *= 0.01  # pivots: the first p
    A[:p, 0] *= 1e-7
    A[p:, p:] += 10 * np.eye(n - p)
    A[0:p, 0:p] += np.triu(np.full((p, p), 5.0), 1)
    mask = np.ones((n, n), bool)
    mask[p : p + 4, p + 4 :] = mask[p + 4 :, p : p + 4] = False  # so that the rest is not one front with them
    driver = Driver(problem_of(torch.from_numpy(A * mask)[None]), "natural", engine=lu)
    storage = driver.factorize()
    assert storage.failures() is None and worst(driver, storage, 1) <= C


@every_dtype
def test_threads_do_not_change_bits(dtype):
    """Subtrees, and fronts above them; rows are exchanged in some, since neighbours have changed places."""
    grid = convection(60, dtype=dtype)
    to, k = torch.arange(grid.n), torch.arange(0, grid.n, 8)
    to[k], to[k + 1] = k + 1, k
    problem = Problem(grid.case, grid.n, torch.stack([to[grid.indices[0]], grid.indices[1]]), grid.values)
    results = []
    for threads in (1, 2, 4):
        system = SparseSystem(problem.indices, problem.n, kind="general", threads=threads)
        x = system.solve(problem.values[0], problem.rhs(problem.n, 3))
        stats, report = system.stats, system._factorizer._held.storage.report(0)
        assert (stats.engine, stats.repivots, report["replaced"]) == ("lu", 0, 0) and report["multiplier"] > 1
        x = torch.cat([x, system.solve(problem.values[0], problem.rhs(problem.n, 1), adjoint=True)], 1)
        assert error(sparse(problem), x[:, 0], problem.rhs(problem.n, 3)[:, 0]) <= C
        results.append(x)
    assert all(torch.equal(x, results[0]) for x in results)


@every_dtype
def test_threads_share_large_fronts(dtype):
    n = 600
    for diagonal in (0.0, 100.0):
        driver = Driver(random(np.ones((n, n), bool), dtype, diagonal, batch=1), "natural", engine=lu)
        one, b = driver.factorize(), driver.rhs(1, n, 1)
        x = driver.solve(one, b)
        assert driver.residual(x, b) <= C
        for threads in (2, 3):
            assert np.array_equal(x, driver.solve(driver.factorize(threads=threads), b, threads=threads))


@every_dtype
def test_threads_share_a_batch(dtype):
    problem = random(np.random.default_rng(0).random((50, 50)) < 0.3, dtype, 3.0, batch=200)
    driver = Driver(problem, engine=lu)
    one, three = driver.factorize(threads=1), driver.factorize(threads=3)
    b = driver.rhs(200, 50, 2)
    x = driver.solve(one, b)
    assert np.array_equal(x, driver.solve(three, b, threads=3)) and driver.residual(x, b) <= C


# --- row matchings --------------------------------------------------------------------------------------------------------


def columns_of(A):
    """Structure and sizes of a dense array."""
    indices = np.concatenate([np.flatnonzero(column) for column in A.T] + [[]]).astype(np.int32)
    indptr = np.concatenate([[0], np.cumsum((A != 0).sum(0))]).astype(np.int64)
    return Structure(len(A), indptr, indices, False), np.abs(A.T[A.T != 0]).astype(float)


def test_pairing():
    A = np.array([[0, 3, 0, 0], [0, 0, 1, 0], [7, 0, 5, 1], [0, 0, 1, 2.0]])
    assert lu.pairing(*columns_of(np.eye(3)), always=False) is None and lu.pairing(*columns_of(np.eye(3))) is None
    assert lu.pairing(*columns_of(A)).tolist() == [2, 0, 1, 3]
    assert lu.pairing(*columns_of(A[[2, 0, 1, 3]])) is None
    small = np.array([[1e-5, 1], [1, 1.0]])
    assert lu.pairing(*columns_of(small)).tolist() == [1, 0]
    small[0, 0] = 0.01  # will do
    assert lu.pairing(*columns_of(small), False) is None and lu.pairing(*columns_of(small)).tolist() == [1, 0]
    assert lu.pairing(*columns_of(np.array([[0, 0, 1], [0, 0, 1], [1, 1, 0.0]]))) is None  # singular


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(0, 10**6))
def test_the_matching_is_the_best(n, seed):
    scipy_optimize = pytest.importorskip("scipy.optimize")
    g = np.random.default_rng(seed)
    A = np.exp(3 * g.standard_normal((n, n))) * (g.random((n, n)) < 0.6)
    with np.errstate(divide="ignore"):
        cost = np.where(A > 0, -np.log(A), 1e6)
    rows, columns = scipy_optimize.linear_sum_assignment(cost)
    best = cost[rows, columns].sum()
    structure, sizes = columns_of(A)
    row_of = _lu.match(structure.indptr, structure.indices, np.log(sizes))
    assert (row_of is None) == (best > 1e5)
    if row_of is not None:
        assert sorted(row_of) == list(range(n))
        assert abs(cost[row_of, np.arange(n)].sum() - best) <= 1e-9 * (1 + abs(best))


@every_dtype
def test_permuted_rows(dtype):
    """Nothing large on the diagonal: one analysis with rows matched, which stays when values change a little."""
    problem = convection(30, dtype=dtype)
    rows = torch.from_numpy(np.random.default_rng(1).permutation(problem.n))
    moved = Problem(
        problem.case, problem.n, torch.stack([rows[problem.indices[0]], problem.indices[1]]), problem.values
    )
    system = moved.system()
    for k in range(3):
        values = moved.values[0] * (1 + 0.1 * k)
        for adjoint in (False, True):
            b = moved.rhs(moved.n)
            x = system.solve(values, b, adjoint=adjoint)
            A = sparse(moved, values)
            assert error(A.conj().T if adjoint else A, x, b) <= C
    stats = system.stats
    assert (stats.engine, stats.analyses, stats.factorizations, stats.repivots) == ("lu", 1, 3, 0)
    copy = system.__copy__()
    copy.solve(values, b)
    assert copy.stats.analyses == 0 and copy.stats.engine == "lu"


def test_rows_are_matched_anew(always, monkeypatch):
    """A factor that cannot be trusted: rows are matched by these values, which is counted, and the plan kept."""
    problem = random(np.random.default_rng(0).random((60, 60)) < 0.1, diagonal=0.05, batch=1)
    failures, first = lu.Storage.failures, []

    def distrusted(self):
        first.append(self.symbolic)
        return [Failure(3, "untrusted")] if self.symbolic is first[0] else failures(self)

    monkeypatch.setattr(lu.Storage, "failures", distrusted)
    monkeypatch.setattr(lu, "_SERVES", 0)
    system, b = problem.system(), problem.rhs(1, 60, 1)
    for k in range(3):
        values = problem.values * (1 + k)
        assert scaled_residual(problem.matrix(values), system.solve(values, b), b) <= C * problem.case.eps
        stats = system.stats
        assert (stats.engine, stats.analyses, stats.repivots, stats.factorizations) == ("lu", 2, 1, k + 2)


# --- scaling --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("span", [0, 10])
@pytest.mark.parametrize("factor", [1e-150, 1.0, 1e150])
def test_badly_scaled(always, span, factor):
    """f D A E with entries of D and E between 10^-span and 10^span, as good as A itself."""
    for seed in range(4):
        g = np.random.default_rng(seed)
        n = 40
        A = torch.from_numpy(g.standard_normal((n, n)) * (g.random((n, n)) < 0.1) + np.diag(1 + g.random(n)))[None]
        d, e = (torch.from_numpy(10.0 ** g.uniform(-span, span, n)) for _ in range(2))
        problem = problem_of(factor * d[:, None] * A * e)
        system = problem.system()
        y = problem.rhs(1, n)
        z = factor * e * system.solve(problem.values, d * y)  # solves A z = y
        assert system.stats.engine == "lu" and z.isfinite().all()
        assert scaled_residual(A, z[..., None], y[..., None]) <= C * problem.case.eps


# --- trust ----------------------------------------------------------------------------------------------------------------


def test_refinement_is_counted_and_repairs():
    """Pivots that had to be replaced: without refinement the residual would be 1e-8."""
    found = 0
    for seed in range(40):
        g = np.random.default_rng(seed)
        mask = g.random((60, 60)) < 0.06
        mask[g.permutation(60), np.arange(60)] = True
        driver = Driver(random(mask, batch=1, seed=seed), "amd", engine=lu)  # no rows matched
        storage = driver.factorize()
        if storage.failures() is not None or not storage.report(0)["replaced"]:
            continue
        assert storage.report(0)["refined"]
        for adjoint in (False, True):
            b = np.ascontiguousarray(driver.rhs(1, 60, 2))
            x = np.empty_like(b)
            steps = storage.solve(b.ctypes.data, x.ctypes.data, 1, 2, 0, adjoint, 1)
            assert steps != 0 and (steps < 0 or driver.residual(x, b, adjoint=adjoint) <= C)
            found += steps > 0
    assert found > 6


@every_dtype
def test_singular(always, dtype):
    """Exactly and to rounding; the error is that of the other engines."""
    A = numbers((1, 12, 12), torch.complex128 if dtype.is_complex else torch.float64, 0)
    A[:, :, 7] = 0
    with pytest.raises(spcache.SingularMatrixError, match="column 7"):
        problem = problem_of(A, dtype, torch.ones(12, 12, dtype=torch.bool))
        problem.system().solve(problem.values, problem.rhs(1, 12))
    A[:, :, 7] = A[:, :, 3]
    problem = problem_of(A, dtype)
    x, info = problem.system().solve_ex(problem.values, problem.rhs(1, 12))
    assert info[0] > 0 and x.isnan().all()
    rest = A.to(torch.complex128)[0].clone()
    rest[:, int(info[0]) - 1] = 0
    assert torch.linalg.matrix_rank(rest) == 11  # that column depends on the others


def test_structurally_singular():
    problem = convection(40)
    keep = problem.indices[0] != 800  # an empty row
    system = SparseSystem(problem.indices[:, keep], problem.n, kind="general")
    for _ in range(2):
        with pytest.raises(spcache.SingularMatrixError, match="structurally singular"):
            system.solve(problem.values[0, keep], problem.rhs(problem.n))


def test_singular_on_later_values():
    problem = convection(40)
    system, b = problem.system(), problem.rhs(problem.n)
    system.solve(problem.values[0], b)
    assert system.stats.engine == "lu"
    values = problem.values[0].clone()
    values[problem.indices[1] == 333] = 0
    with pytest.raises(spcache.SingularMatrixError, match="column 333"):
        system.solve(values, b)
    x = system.solve(problem.values[0], b)
    assert error(sparse(problem), x, b) <= C


def test_nearly_singular(always):
    """Condition numbers up to 1e13 are solved with a small residual, 1e19 is refused."""
    g = np.random.default_rng(0)
    n = 60
    q, r = (np.linalg.qr(g.standard_normal((n, n)))[0] for _ in range(2))
    for exponent in (4, 8, 13, 19):
        A = torch.from_numpy(q @ np.diag(10.0 ** np.linspace(0, -exponent, n)) @ r)[None]
        problem = problem_of(A)
        system, b = problem.system(), problem.rhs(1, n, 2)
        if exponent > 16:
            with pytest.raises(spcache.SingularMatrixError):
                system.solve(problem.values, b)
        else:
            assert scaled_residual(A, system.solve(problem.values, b), b) <= C * problem.case.eps


def test_one_bad_matrix_of_a_batch(always):
    problem = random(np.random.default_rng(0).random((30, 30)) < 0.3, diagonal=4.0, batch=5)
    values = problem.values.clone()
    values[2, problem.indices[1] == 11] = 0
    system, b = problem.system(), problem.rhs(5, 30)
    x, info = system.solve_ex(values, b)
    assert info.tolist() == [0, 0, 12, 0, 0] and x[2].isnan().all()
    good = [0, 1, 3, 4]
    assert scaled_residual(problem.matrix()[good], x[good][..., None], b[good][..., None]) <= C * problem.case.eps
    values[2, 5] = torch.nan
    assert system.solve_ex(values, b)[1].tolist() == [0, 0, -1, 0, 0]


def test_after_three_failures_klu_is_asked_at_once(always, monkeypatch):
    monkeypatch.setattr(lu.Storage, "failures", lambda self: [Failure(3, "untrusted")])
    problem = random(np.random.default_rng(0).random((30, 30)) < 0.3, diagonal=4.0, batch=1)
    system, b = problem.system(), problem.rhs(1, 30, 1)
    for k in range(5):
        values = problem.values * (1 + k)
        assert scaled_residual(problem.matrix(values), system.solve(values, b), b) <= C * problem.case.eps
        assert system.stats.engine == "klu"
    assert 3 <= system.stats.repivots <= 6


def test_a_solve_that_stalls_is_repeated_by_klu(always, monkeypatch):
    problem = random(np.random.default_rng(0).random((30, 30)) < 0.3, diagonal=4.0, batch=1)
    monkeypatch.setattr(lu.Storage, "solve", lambda self, *arguments: ~1)
    system, b = problem.system(), problem.rhs(1, 30, 1)
    assert scaled_residual(problem.matrix(), system.solve(problem.values, b), b) <= C * problem.case.eps
    assert (system.stats.repivots, system.stats.engine) == (1, "klu")


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_gradients(always, dtype):
    """Twice, of values and b, where rows are exchanged and where solves are refined."""
    g = np.random.default_rng(0)
    mask = (g.random((8, 8)) < 0.4) | np.roll(np.eye(8, dtype=bool), 1, 0)
    problem = random(mask, dtype, batch=2, seed=3)
    system = problem.system()
    values, b = problem.values.clone().requires_grad_(), problem.rhs(2, 8, 2).requires_grad_()
    assert torch.autograd.gradcheck(system.solve, (values, b))
    assert torch.autograd.gradgradcheck(system.solve, (values, b))
    assert system.stats.engine == "lu" and system.stats.repivots == 0


# --- which matrices -------------------------------------------------------------------------------------------------------


def engine_of(problem, values=None, **options):
    spcache.plan_cache.clear()
    system, b = problem.system(**options), problem.rhs(problem.n)
    x = system.solve(problem.values[0], b)
    assert error(sparse(problem), x, b) <= C and system.stats.analyses == 1
    return system.stats.engine


def test_the_engine_follows_predicted_work():
    grid = convection(40)
    assert [engine_of(grid, kind=kind) for kind in ("general", "auto")] == ["lu", "lu"]
    for ordering, expected in [("amd", "lu"), ("natural", "lu"), ("colamd", "klu")]:
        assert engine_of(grid, ordering=ordering) == expected
    given = SparseSystem(grid.indices, grid.n, kind="general", ordering=torch.arange(grid.n).flip(0))
    given.solve(grid.values[0], grid.rhs(grid.n))
    assert (given.stats.engine, given.stats.ordering) == ("lu", "given")
    assert engine_of(convection(8)) == "klu"
    n = 2000  # a tree has no fill, a triangle falls into blocks of one
    k = torch.arange(n)
    tree, own = torch.stack([k, k // 2]), torch.stack([k, k])
    indices = torch.cat([tree, tree.flip(0), own], 1)
    general = find_case("general")
    assert (
        engine_of(Problem(general, n, indices, torch.cat([torch.ones(2 * n), 9 * torch.ones(n)]).double()[None]))
        == "klu"
    )
    lower = grid.indices[:, grid.indices[0] >= grid.indices[1]]
    assert engine_of(Problem(general, grid.n, lower, torch.rand(1, lower.shape[1]).double() + 1)) == "klu"


def test_a_copy_keeps_the_choice():
    grid = convection(40)
    system = grid.system()
    system.solve(grid.values[0], grid.rhs(grid.n))
    copy = system.__copy__()
    copy.solve(grid.values[0], grid.rhs(grid.n))
    assert (copy.stats.engine, copy.stats.analyses) == ("lu", 0)
    assert isinstance(system._factorizer.pattern.stored.structure, Structure)


def test_wrong_arguments():
    structure, sizes = columns_of(np.eye(3))
    good = np.arange(3, dtype=np.int32)
    with pytest.raises(ValueError, match="logarithms differ"):
        _lu.match(structure.indptr, structure.indices, sizes[:2])
    with pytest.raises(ValueError, match="square matrix"):
        _lu.match(structure.indptr[:-1], structure.indices, sizes)
    with pytest.raises(ValueError, match="full structure"):
        lu.analyze(Structure(3, structure.indptr, structure.indices, True), "natural")

    def symbolic(rows=good, slots=good, perm=good):
        return _lu.Symbolic(
            structure.indptr, structure.indices, rows, structure.indptr, structure.indices, slots, perm, 0
        )

    assert symbolic().perm.tolist() == [0, 1, 2]
    for wrong in ({"rows": good[:2]}, {"rows": np.zeros(3, np.int32)}, {"perm": good + 1}):
        with pytest.raises(ValueError, match=r"a permutation of 0\.\.2"):
            symbolic(**wrong)
    for slots in (good[::-1].copy(), good[:2]):
        with pytest.raises(ValueError, match="slots do not lead"):
            symbolic(slots=slots)


def test_in_question():
    assert lu.in_question(10**5, "auto") and lu.in_question(10**5, Permutation(np.arange(3, dtype=np.int32)))
    assert not lu.in_question(10**5, "colamd") and not lu.in_question(100, "auto")
