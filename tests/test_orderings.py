"""Orderings: those that the caller gives, nested dissection, and structures that are hard to order."""

import copy
import pickle

import numpy as np
import pytest
import torch
from cases import CASES, SPD, find_case, make, scaled_residual
from test_multifrontal import fill, structure_of

import spcache
from spcache import SingularMatrixError, SparseSystem, plan_cache
from spcache.engines import _multifrontal, klu, multifrontal
from spcache.engines.protocol import Structure

N = 40


def shuffled(n, seed=0):
    return np.random.default_rng(seed).permutation(n)


# --- a permutation as ordering --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_given(case):
    problem = make(case, N, (2,), density=0.1)
    b = problem.rhs(2, N, 3)
    for given in (shuffled(N), torch.from_numpy(shuffled(N, 1)), shuffled(N, 2).astype(np.uint16)):
        system = problem.system(ordering=given)
        for adjoint in (False, True):
            A = problem.matrix().mH if adjoint else problem.matrix()
            assert scaled_residual(A, system.solve(problem.values, b, adjoint=adjoint), b) <= case.tolerance
        assert system.stats.ordering == "given" and system.stats.engine == case.engine
        assert system.stats.analyses == 1


def test_pivots_come_in_the_given_order():
    """Entries and work of L are those of elimination in that very order."""
    problem = make(SPD, N, density=0.08)
    mask = (problem.matrix() != 0).numpy()
    for seed in range(5):
        given = shuffled(N, seed)
        system = problem.system(ordering=given)
        system.factorize(problem.values)
        counts = fill(mask, given).sum(0)
        assert system.stats.nnz_factor == counts.sum() and system.stats.flops == (counts**2).sum()


def test_the_order_of_columns_of_lu():
    """An arrow: no fill where its tip comes last, a full factor where it comes first."""
    n = 60
    i = torch.arange(1, n)
    zero = torch.zeros_like(i)
    indices = torch.cat([torch.arange(n).expand(2, -1), torch.stack([i, zero]), torch.stack([zero, i])], 1)
    values = torch.cat([torch.full((n,), 100.0), torch.ones(2 * n - 2)]).double()
    entries = {}
    for name, given in (("last", np.roll(np.arange(n), -1)), ("first", np.arange(n))):
        system = SparseSystem(indices, n, kind="general", ordering=given)
        factor = system.factorize(values)
        entries[name] = factor._numeric.storage.nnz
    assert entries == {"last": indices.shape[1], "first": n * n}


def test_lu_without_a_diagonal():
    """Zeros on the diagonal of every matrix, some in blocks of one row: rows are exchanged as with KLU's own orderings."""
    for seed in range(20):
        problem = make(find_case("general"), 25, seed=seed, density=0.05)
        b = problem.rhs(25)
        x = problem.system(ordering=shuffled(25, seed)).solve(problem.values, b)
        assert scaled_residual(problem.matrix(), x[:, None], b[:, None]) <= problem.case.tolerance


def test_lu_that_is_structurally_singular():
    indices = torch.tensor([[0, 0, 1, 2], [0, 1, 1, 1]])
    system = SparseSystem(indices, 3, kind="general", ordering=np.array([2, 0, 1]))
    with pytest.raises(SingularMatrixError, match="structurally singular"):
        system.factorize(torch.ones(4))


def test_wide_indices_keep_the_given_order():
    n = 30
    indptr, indices = np.arange(0, n * n + 1, n), np.tile(np.arange(n, dtype=np.int32), n)
    for wide in (False, True):
        assert klu._klu.Symbolic(indptr, indices, "given", wide, shuffled(n).astype(np.int32)).n == n
        with pytest.raises(ValueError, match="permutation"):
            klu._klu.Symbolic(indptr, indices, "given", wide, np.zeros(n, np.int32))
        with pytest.raises(ValueError, match="30 numbers, got 29"):
            klu._klu.Symbolic(indptr, indices, "given", wide, np.arange(n - 1, dtype=np.int32))


def test_plans_of_given_orderings_are_shared():
    """By equal permutations, and by these only."""
    problem = make(SPD, N)
    for kind, given, analyses in [
        ("spd", shuffled(N), 1), ("spd", torch.from_numpy(shuffled(N)), 0), ("spd", shuffled(N, 1), 1),
        ("spd", "natural", 1), ("spd", np.arange(N), 1), ("general", shuffled(N), 1), ("general", shuffled(N, 1), 1),
        ("general", shuffled(N, 1), 0),
    ]:  # fmt: skip
        system = problem.system(kind=kind, ordering=given)
        system.factorize(problem.values)
        assert system.stats.analyses == analyses
    assert len(plan_cache) == 6


def test_a_given_ordering_is_copied():
    problem, given = make(SPD, N), shuffled(N).astype(np.int32)
    system, expected = problem.system(ordering=given), problem.system(ordering=shuffled(N))
    given[:] = 0
    assert torch.equal(system.solve(problem.values, problem.rhs(N)), expected.solve(problem.values, problem.rhs(N)))
    assert system.stats.nnz_factor == expected.stats.nnz_factor


@pytest.mark.parametrize("kind", ["spd", "general", "auto"])
def test_copies_keep_a_given_ordering(kind):
    problem = make(SPD, N)
    system, b = problem.system(kind=kind, ordering=shuffled(N)), problem.rhs(N)
    expected = system.solve(problem.values, b)
    for other in (pickle.loads(pickle.dumps(system)), copy.deepcopy(system), copy.copy(system)):
        assert torch.equal(other.solve(problem.values, b), expected)
        assert other.stats.ordering == "given" and other.stats.flops == pytest.approx(system.stats.flops, nan_ok=True)


WRONG = [
    (np.arange(3.0), TypeError, "ordering must be a name or integers .*float64"),
    (np.array([True, False, True]), TypeError, "ordering must be a name or integers .*bool"),
    ([0, 1, 2], TypeError, "ordering must be a name, or a NumPy or torch array, got list"),
    (None, TypeError, "ordering must be .* got NoneType"),
    (np.arange(2), ValueError, r"ordering must have shape \(3,\), .* got \(2,\)"),
    (torch.arange(3).view(3, 1), ValueError, r"ordering must have shape \(3,\), .* got \(3, 1\)"),
    (np.array([0, 1, 3]), ValueError, r"each of 0..2 once, got ordering\[2\] = 3"),
    (np.array([0, -1, 2]), ValueError, r"each of 0..2 once, got ordering\[1\] = -1"),
    (np.array([2**33, 1, 2]), ValueError, r"each of 0..2 once, got ordering\[0\] = 8589934592"),
    (torch.tensor([1, 2, 1]), ValueError, "each of 0..2 once, got 1 2 times"),
]


@pytest.mark.parametrize("given, error, message", WRONG, ids=[str(w[0]).replace("\n", " ") for w in WRONG])
def test_no_permutations(given, error, message):
    indices = torch.arange(3).expand(2, -1)
    with pytest.raises(error, match=message):
        SparseSystem(indices, 3, ordering=given)
    with pytest.raises(ValueError, match=r"needs a square matrix, got shape \(3, 4\)"):
        SparseSystem(indices, (3, 4), ordering=np.arange(3))


# --- nested dissection ----------------------------------------------------------------------------------------------------


def separated(structure):
    """The sets of a dissection; checks that they are in an order of elimination: what lies between two sets, and only
    that, comes after both."""
    sets = _multifrontal.separate(structure.indptr, structure.indices)
    assert sets.dtype == np.int32 and sets.min() == 0
    assert np.array_equal(np.unique(sets), np.arange(sets.max() + 1))
    perm = _multifrontal.camd(structure.indptr, structure.indices, sets)
    assert np.array_equal(np.sort(perm), np.arange(structure.n)) and (np.diff(sets[perm]) >= 0).all()
    return sets


def lower_structure(n, i, j):
    """Canonical lower triangle of these entries, their mirror images and the diagonal."""
    diagonal = np.arange(n)
    pattern = spcache.pattern.Pattern(np.stack([np.concatenate([i, diagonal]), np.concatenate([j, diagonal])]), n, n)
    return pattern.lower.structure


def grid(*shape):
    i = np.arange(np.prod(shape)).reshape(shape)
    pairs = [(np.delete(i, 0, a).ravel(), np.delete(i, -1, a).ravel()) for a in range(len(shape))]
    return i.size, np.concatenate([p for p, _ in pairs]), np.concatenate([q for _, q in pairs])


def test_parts_and_separators():
    """Two neighbours are in one set, or one of them is in a set that separates: removed with all sets above it, what
    is left of the two sides is not connected."""
    n, i, j = grid(60, 60)
    sets = separated(lower_structure(n, i, j))
    assert sets.max() > 8 and np.bincount(sets).max() < 700
    import scipy.sparse as sp
    from scipy.sparse.csgraph import connected_components

    for top in range(sets.max() - 3, sets.max() + 1):
        left = (sets[i] < top) & (sets[j] < top)
        _, label = connected_components(sp.coo_matrix((np.ones(left.sum()), (i[left], j[left])), (n, n)))
        sizes = np.bincount(label, sets < top)
        assert (sizes > 0.05 * n).sum() >= 2


def test_unknowns_of_one_node_stay_together():
    """Three unknowns a node of a mesh: dissected as the mesh is, three times as heavy."""
    n, i, j = grid(20, 20)
    a, b = np.meshgrid(np.arange(3), np.arange(3))
    nodes = np.arange(n)
    i, j = np.concatenate([i, nodes]), np.concatenate([j, nodes])
    structure = lower_structure(3 * n, (3 * i[:, None] + a.ravel()).ravel(), (3 * j[:, None] + b.ravel()).ravel())
    sets = separated(structure).reshape(n, 3)
    assert sets.max() > 2 and (sets == sets[:, :1]).all()


def test_structures_that_nobody_can_dissect():
    """No entries off the diagonal, a full matrix, a star, a path, parts that do not touch, dense rows among a grid."""
    n = 3000
    k = np.arange(1, n)
    none = np.zeros(0, int)
    assert separated(lower_structure(n, none, none)).max() == 0
    assert separated(lower_structure(1, none, none)).max() == 0
    full = np.tril_indices(600, -1)
    assert separated(lower_structure(600, *full)).max() == 0
    star = separated(lower_structure(n, k, 0 * k))
    assert star[0] == 1 and (star[1:] == 0).all()
    separated(lower_structure(n, k, k - 1))
    separated(lower_structure(n, k[k % 3 != 0], k[k % 3 != 0] - 1))
    m, i, j = grid(100, 100)
    rows = np.array([0, 5000, 9999])
    dense = np.stack(np.broadcast_arrays(rows[:, None], np.arange(m)[None]), 0).reshape(2, -1)
    sets = separated(lower_structure(m, np.concatenate([i, dense[0]]), np.concatenate([j, dense[1]])))
    assert (sets[rows] == sets.max()).all() and (sets == sets.max()).sum() == 3 and sets.max() > 10


def test_nested_dissection_beats_minimum_degree_where_it_should():
    for shape, part in (((120, 120), 0.9), ((14, 14, 14), 0.75)):
        structure = lower_structure(*grid(*shape))
        flops = {name: multifrontal.analyze(structure, name).flops for name in ("auto", "amd", "metis", "natural")}
        assert flops["auto"] == flops["metis"] < part * flops["amd"] < flops["natural"]


@pytest.mark.parametrize("sets", [[0, 1], [0, 1, 2, 3], [0, 1, 3], [-1, 0, 1]], ids=str)
def test_wrong_sets(sets):
    structure = structure_of(np.eye(3, dtype=bool))
    with pytest.raises(ValueError, match=r"sets must be \[3\] numbers from 0 to 2"):
        _multifrontal.camd(structure.indptr, structure.indices, np.array(sets, np.int32))


# --- dense rows -----------------------------------------------------------------------------------------------------------


def arrow(n, tips):
    """A path and some vertices that touch all others."""
    k = np.arange(1, n)
    rows = (np.arange(tips) * n) // tips
    i = np.concatenate([k, np.repeat(rows, n)])
    return lower_structure(n, i, np.concatenate([k - 1, np.tile(np.arange(n), tips)]))


@pytest.mark.parametrize("ordering", ["auto", "amd", "metis"])
@pytest.mark.parametrize("tips", [1, 3, 20])
def test_work_on_dense_rows_is_linear(ordering, tips):
    """Memory of the plan, and what it predicts, for each entry: the same for four times the unknowns."""
    small, large = (arrow(n, tips) for n in (5_000, 20_000))
    plans = [multifrontal.analyze(s, ordering) for s in (small, large)]
    assert plans[1].nnz <= 1.6 * len(large.indices)
    for what in ("nbytes", "nnz", "flops"):
        assert getattr(plans[1], what) <= 5 * getattr(plans[0], what)


def test_a_structure_of_many_roots_and_one_of_many_leaves():
    """100,000 blocks that do not touch, and a star of as many rays, in well under a second each by every schedule."""
    n = 100_000
    k = np.arange(1, n, dtype=np.int32)
    for structure in (
        Structure(n, np.arange(n + 1), np.arange(n, dtype=np.int32), True),
        lower_structure(n, k, 0 * k),
    ):
        plan = multifrontal.analyze(structure, "auto")
        assert plan.nnz == len(structure.indices)
        for threads in (1, 2, 8):
            assert plan._native.scratch_size(threads) < 10 * n
