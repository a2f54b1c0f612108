"""Random patterns and values by Hypothesis, against dense matrices; every kind, every engine."""

import pytest
import torch
from cases import CASES, DTYPES, Problem, find_case, relative_error, scaled_residual
from hypothesis import given, settings
from hypothesis import strategies as st

import spcache
from spcache import SparseSystem

KINDS = sorted({(c.kind, c.triangle or "") for c in CASES})


def empty(n, rng):
    return torch.zeros(n, n, dtype=torch.bool)


def random(n, rng):
    return torch.rand(n, n, generator=rng) < torch.rand((), generator=rng)


def sparse(n, rng):
    return torch.rand(n, n, generator=rng) < 1.5 / n


def blocks(n, rng):
    """Disconnected: several components, some of one node."""
    part = torch.randint(0, max(1, n // 3), (n,), generator=rng)
    return part[:, None] == part


def one_row(n, rng):
    """A dense row, wherever it stands; symmetric kinds get the column too: an arrow."""
    mask = torch.zeros(n, n, dtype=torch.bool)
    mask[torch.randint(0, n, (), generator=rng)] = True
    return mask


def band(n, rng):
    i = torch.arange(n)
    return (i[:, None] - i).abs() <= torch.randint(0, 4, (), generator=rng)


def path(n, rng):
    """A path through the nodes in no order: no fill at all, if the ordering is good."""
    order = torch.randperm(n, generator=rng)
    mask = torch.zeros(n, n, dtype=torch.bool)
    mask[order[:-1], order[1:]] = True
    return mask


def full(n, rng):
    return torch.ones(n, n, dtype=torch.bool)


SHAPES = [empty, random, sparse, blocks, one_row, band, path, full]


@st.composite
def problems(draw, kinds=KINDS, dtypes=DTYPES):
    """A well-conditioned problem with a pattern of one of SHAPES, its entries in any order, some of them several
    times, some of them zero."""
    kind, triangle = draw(st.sampled_from(kinds))
    n = draw(st.integers(1, 24))
    shape = draw(st.sampled_from(SHAPES))
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    case = find_case(kind, draw(st.sampled_from(dtypes)), triangle or None)
    wide = torch.complex128 if case.dtype.is_complex else torch.float64
    mask = shape(n, rng) | torch.eye(n, dtype=torch.bool)
    symmetric = kind in ("spd", "symmetric", "hermitian") or (kind == "auto" and draw(st.booleans()))
    A = torch.randn(n, n, dtype=wide, generator=rng) * mask
    if draw(st.booleans()):
        A[torch.rand(n, n, generator=rng) < 0.2] = 0  # stored zeros
    if symmetric:
        mask = mask | mask.T
        A = A + (A.mT if kind == "symmetric" else A.mH)
    sign = torch.ones(n) if kind == "spd" else torch.randint(0, 2, (n,), generator=rng) * 2 - 1
    A = A - torch.diag(A.diagonal()) + torch.diag(sign * (A.abs().sum(-1) + 1))
    if not symmetric:  # pivots anywhere
        order = torch.randperm(n, generator=rng)
        A, mask = A[order], mask[order]
    if triangle:
        mask = mask.tril() if triangle == "lower" else mask.triu()
    indices = mask.nonzero().T
    copies = torch.randint(1, 4 if draw(st.booleans()) else 2, (indices.shape[1],), generator=rng)
    values = (A[indices[0], indices[1]] / copies).repeat_interleave(copies)
    indices = indices.repeat_interleave(copies, 1)
    order = torch.randperm(values.numel(), generator=rng)
    return Problem(case, n, indices[:, order], values[order].to(case.dtype))


@settings(max_examples=300)
@given(
    problem=problems(),
    columns=st.sampled_from([(), (1,), (2,), (5,), (16,)]),
    adjoint=st.booleans(),
    checked=st.booleans(),
)
def test_solutions(problem, columns, adjoint, checked):
    system, n = problem.system(check=checked), problem.n
    b = problem.rhs(n, *columns)
    x = system.solve(problem.values, b, adjoint=adjoint)
    A = problem.matrix(problem.values.to(torch.complex128 if problem.case.dtype.is_complex else torch.float64))
    A = A.mH if adjoint else A
    assert scaled_residual(A, x.view(n, -1), b.view(n, -1)) <= problem.case.tolerance
    y = system.matmul(problem.values, x, adjoint=adjoint)
    assert relative_error(y, b) <= 100 * problem.case.eps
    assert system.stats.factorizations <= 2


@settings(max_examples=120)
@given(
    problem=problems(dtypes=(torch.float64, torch.complex128)),
    columns=st.sampled_from([(), (3,)]),
    adjoint=st.booleans(),
)
def test_gradients(problem, columns, adjoint):
    """First and second, against the dense inverse."""
    system, n = problem.system(), problem.n
    inputs = problem.values.requires_grad_(), problem.rhs(n, *columns).requires_grad_()
    g = problem.rhs(n, *columns, seed=2)
    results = []
    for x in (system.solve(*inputs, adjoint=adjoint), problem.reference(*inputs, adjoint=adjoint)):
        first = torch.autograd.grad(x, inputs, g, create_graph=True)
        results.append((*first, *torch.autograd.grad(sum(t.abs().pow(2).sum() for t in first), inputs)))
    for actual, expected in zip(*results, strict=True):
        assert (actual - expected).abs().max() <= 1e-9 * (1 + expected.abs().max())


@settings(max_examples=80)
@given(problem=problems(dtypes=(torch.float64,)), data=st.data())
def test_a_permuted_pattern_is_the_same_matrix(problem, data):
    """Permuted entries: the very same solution, the same plan. Renumbered rows and columns: the renumbered solution."""
    system, b = problem.system(), problem.rhs(problem.n)
    x = system.solve(problem.values, b)
    order = torch.tensor(data.draw(st.permutations(range(problem.values.numel()))))
    other = Problem(problem.case, problem.n, problem.indices[:, order], problem.values[order])
    shuffled = other.system()
    assert relative_error(shuffled.solve(other.values, b), x) <= 100 * problem.case.eps
    assert shuffled.stats.analyses == 0
    if problem.case.triangle is None:
        p = torch.tensor(data.draw(st.permutations(range(problem.n))))
        moved = SparseSystem(p[problem.indices], problem.n, **problem.case.options)
        assert relative_error(moved.solve(problem.values, b[p.argsort()])[p], x) <= 1000 * problem.case.eps


@settings(max_examples=80)
@given(problem=problems(), data=st.data())
def test_an_empty_row_is_an_error(problem, data):
    """Whatever else there is; one empty column alike."""
    gone = data.draw(st.integers(0, problem.n - 1))
    symmetric = problem.case.kind in ("spd", "symmetric", "hermitian")
    which = data.draw(st.sampled_from([0, 1]))
    kept = (problem.indices != gone).all(0) if symmetric else problem.indices[which] != gone
    indices, values = problem.indices[:, kept], problem.values[kept]
    system = SparseSystem(indices, problem.n, **problem.case.options)
    b = problem.rhs(problem.n)
    with pytest.raises((spcache.SingularMatrixError, spcache.NotPositiveDefiniteError)) as caught:
        system.solve(values, b)
    assert isinstance(caught.value, torch.linalg.LinAlgError) and caught.value.column in range(problem.n)
    if problem.case.kind == "spd" and values.numel():
        assert caught.value.column == gone
    x, info = system.solve_ex(values, b)
    assert info > 0 and x.isnan().all()
    assert system.matmul(values, b).isfinite().all()


@settings(max_examples=60)
@given(problem=problems(dtypes=(torch.float64,)), seed=st.integers(0, 10**6))
def test_duplicates_get_the_gradient_of_their_sum(problem, seed):
    """Splitting an entry changes neither the solution nor, place by place, the gradient."""
    system, n, b = problem.system(), problem.n, problem.rhs(problem.n)
    values = problem.values.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(system.solve(values, b).sum(), values)
    again = torch.randint(0, values.numel(), (7,), generator=torch.Generator().manual_seed(seed))
    indices = torch.cat([problem.indices, problem.indices[:, again]], 1)
    longer = torch.cat([problem.values, torch.zeros(7, dtype=torch.float64)]).requires_grad_()
    other = SparseSystem(indices, n, **problem.case.options)
    (longer_gradient,) = torch.autograd.grad(other.solve(longer, b).sum(), longer)
    expected = torch.cat([gradient, gradient[again]])
    assert (longer_gradient - expected).abs().max() <= 1e-11 * (1 + expected.abs().max())


def test_the_smallest_systems():
    """One unknown, of every kind and type; a single entry in a corner is singular beyond that."""
    for case in CASES:
        negative = case.kind == "auto" and case.engine == "klu"
        system = SparseSystem(torch.zeros(2, 1, dtype=torch.int64), 1, **case.options)
        a = torch.tensor([-4.0 if negative else 4.0], dtype=case.dtype)
        assert system.solve(a, torch.ones(1, dtype=case.dtype)).item() == 1 / a.item()
        assert system.stats.engine == case.engine
        lonely = SparseSystem(torch.zeros(2, 1, dtype=torch.int64), 2, **case.options)
        with pytest.raises((spcache.SingularMatrixError, spcache.NotPositiveDefiniteError)):
            lonely.solve(a, torch.ones(2, dtype=case.dtype))
