"""Solutions: against dense ones, in every shape, type and convention; `matmul` as the inverse of `solve`."""

import pytest
import torch
from cases import (
    CASES,
    DTYPES,
    GENERAL,
    SPD,
    every_case,
    every_double_case,
    every_single_case,
    find_case,
    make,
    numbers,
    relative_error,
    scaled_residual,
)  # fmt: skip

import spcache
from spcache import SparseSystem

ENGINES = [case for case in CASES if case.kind in ("spd", "general") and not case.triangle]  # each engine, each dtype


def wide(t):
    return t.to(torch.complex128 if t.is_complex() else torch.float64)


@every_case
@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("n", [1, 2, 12, 45])
def test_solution(case, adjoint, n):
    problem = make(case, n, seed=n)
    system = problem.system()
    exact = problem.matrix(wide(problem.values))
    exact = exact.mH if adjoint else exact
    for shape in [(n,), (n, 1), (n, 3)]:
        b = problem.rhs(*shape)
        x = system.solve(problem.values, b, adjoint=adjoint)
        assert x.shape == b.shape and x.dtype == case.dtype and x.device == b.device and not x.requires_grad
        assert scaled_residual(exact, x.view(n, -1), b.view(n, -1)) <= case.tolerance
        expected = torch.linalg.solve(exact, wide(b))
        assert relative_error(x, expected) <= 50 * case.eps
    assert system.stats.engine == case.engine
    assert system.stats.factorizations == 1 and system.stats.reuses == 2


@pytest.mark.parametrize("case", ENGINES, ids=str)
def test_every_number_of_right_hand_sides(case):
    """Widths around every multiple of a register, one factor; each column is its own solution."""
    problem = make(case, 37, density=0.1)
    system = problem.system()
    exact = problem.matrix(wide(problem.values))
    B = problem.rhs(37, 40)
    single = torch.stack([system.solve(problem.values, b) for b in B.T], 1)
    for k in range(1, 41):
        for adjoint in (False, True):
            x = system.solve(problem.values, B[:, :k], adjoint=adjoint)
            assert scaled_residual(exact.mH if adjoint else exact, x, B[:, :k]) <= case.tolerance
            if not adjoint:
                assert relative_error(x, single[:, :k]) <= 20 * case.eps
    assert system.stats.factorizations == 1


@pytest.mark.parametrize("case", ENGINES, ids=str)
def test_memory_layouts(case):
    """Strided, expanded, conjugated and negated views are read as the numbers they stand for, and never written."""
    problem = make(case, 9, (2,))
    system = problem.system()
    values, b = problem.values[0], problem.rhs(9, 3)
    expected = system.solve(values, b)
    strided = torch.stack([values, values], 1)[:, 0]
    for v in (strided, values.conj().resolve_conj().conj(), (-values)._neg_view()):
        assert torch.equal(system.solve(v, b), expected)
    for rhs in (b.T.contiguous().T, torch.stack([b, b], -1)[..., 1], b.conj().resolve_conj().conj(), (-b)._neg_view()):
        kept = rhs.clone()
        x = system.solve(values, rhs)
        assert torch.equal(x, expected) and torch.equal(rhs, kept)
    column = b[:, :1]
    assert (
        relative_error(system.solve(values, column.expand(9, 4)), system.solve(values, column).expand(9, 4))
        < 20 * case.eps
    )
    pair = system.solve(values.expand(2, -1), b.expand(2, 9, 3))
    assert torch.equal(pair[0], pair[1]) and relative_error(pair[0], expected) == 0


# --- ranks and broadcasting: (batch of values, shape of b, shape of x); n = 4, and so are many other sizes --------------

VECTORS = [
    ((), (4,), (4,)),
    ((3,), (4,), (3, 4)),
    ((3,), (3, 4), (3, 4)),
    ((4,), (4, 4), (4, 4)),  # as many dimensions as values: four vectors, not a matrix for all
    ((3,), (1, 4), (3, 4)),
    ((1,), (3, 4), (3, 4)),
    ((2, 3), (4,), (2, 3, 4)),
    ((2, 3), (2, 3, 4), (2, 3, 4)),
    ((2, 3), (1, 3, 4), (2, 3, 4)),
    ((2, 1), (1, 3, 4), (2, 3, 4)),
    ((4, 4), (4, 4, 4), (4, 4, 4)),
]
MATRICES = [
    ((), (4, 1), (4, 1)),
    ((), (4, 4), (4, 4)),
    ((), (3, 4, 2), (3, 4, 2)),
    ((), (4, 4, 4), (4, 4, 4)),
    ((), (5, 3, 4, 2), (5, 3, 4, 2)),
    ((3,), (3, 4, 2), (3, 4, 2)),
    ((4,), (4, 4, 4), (4, 4, 4)),
    ((3,), (1, 4, 2), (3, 4, 2)),
    ((1,), (3, 4, 2), (3, 4, 2)),
    ((4,), (4, 4, 4, 4), (4, 4, 4, 4)),  # the batch of values aligns from the right
    ((3,), (5, 3, 4, 2), (5, 3, 4, 2)),
    ((3,), (5, 1, 4, 2), (5, 3, 4, 2)),
    ((2, 3), (2, 3, 4, 2), (2, 3, 4, 2)),
    ((2, 1), (1, 3, 4, 2), (2, 3, 4, 2)),
    ((2, 1), (5, 1, 3, 4, 2), (5, 2, 3, 4, 2)),
]
REFUSED = [
    ((3,), (2, 4)), ((3,), (2, 4, 2)), ((3,), (5,)), ((3,), (3, 5)), ((3,), (3, 5, 4)), ((), (5,)), ((), (5, 4)), ((), ()),
    ((2, 3), (3, 4)), ((2, 3), (4, 4)), ((2, 3), (3, 4, 2)), ((2, 3), (4, 2, 3, 4)), ((3,), ()), ((2, 3), (2, 2, 3, 4, 1, 1)),
    ((4,), (4,) * 3 + (5,) + (4,)),
]  # fmt: skip


@pytest.mark.parametrize("case", [SPD, GENERAL], ids=str)
@pytest.mark.parametrize("batch, shape, result", VECTORS + MATRICES)
def test_ranks_decide(case, batch, shape, result):
    problem = make(case, 4, batch)
    system = problem.system()
    values, b = problem.values.requires_grad_(), problem.rhs(*shape).requires_grad_()
    vector = (batch, shape, result) in VECTORS
    inverse = torch.linalg.inv(problem.matrix(values))
    expected = (inverse @ b.unsqueeze(-1)).squeeze(-1) if vector else inverse @ b
    g = problem.rhs(*result, seed=2)
    expected_gradients = torch.autograd.grad(expected, (values, b), g)
    factor = system.factorize(values)
    for x in (system.solve(values, b), factor.solve(b), system.solve_ex(values, b)[0]):
        assert x.shape == result and relative_error(x, expected) < 1e-13
        for actual, gradient in zip(torch.autograd.grad(x, (values, b), g), expected_gradients, strict=True):
            assert relative_error(actual, gradient) < 1e-12
    info = system.solve_ex(values, b)[1]
    assert info.shape == result[: -1 if vector else -2] and not info.any()
    y = system.matmul(values, b)
    A = problem.matrix(values)
    assert relative_error(y, (A @ b.unsqueeze(-1)).squeeze(-1) if vector else A @ b) < 1e-14
    assert system.stats.factorizations == 1


@pytest.mark.parametrize("batch, shape", REFUSED)
def test_other_ranks_are_refused(batch, shape):
    problem = make(SPD, 4, batch)
    system, b = problem.system(), problem.rhs(*shape)
    factor = system.factorize(problem.values)
    for call in (lambda: system.solve(problem.values, b), lambda: system.solve_ex(problem.values, b),
                 lambda: factor.solve(b), lambda: system.matmul(problem.values, b)):  # fmt: skip
        with pytest.raises(ValueError, match="of shape .* does not fit values of shape .*as many dimensions as values"):
            call()


@pytest.mark.parametrize("case", [SPD, GENERAL, find_case("auto"), find_case("hermitian", torch.complex64)], ids=str)
@pytest.mark.parametrize(
    "n, batch, shape, result",
    [
        (0, (), (0,), (0,)), (0, (), (0, 3), (0, 3)), (0, (2,), (2, 0), (2, 0)), (0, (2,), (2, 0, 3), (2, 0, 3)),
        (4, (), (4, 0), (4, 0)), (4, (2,), (2, 4, 0), (2, 4, 0)), (4, (), (0, 4, 2), (0, 4, 2)),
        (4, (0,), (4,), (0, 4)), (4, (0,), (0, 4), (0, 4)), (4, (0,), (1, 4), (0, 4)), (4, (0,), (0, 4, 3), (0, 4, 3)),
        (4, (2, 0), (2, 0, 4), (2, 0, 4)), (4, (1,), (0, 4), (0, 4)),
    ],
)  # fmt: skip
def test_nothing_to_solve(case, n, batch, shape, result):
    """n, a batch or k of zero: an empty result, connected to the graph, and no work done."""
    problem = make(case, n, batch) if n else None
    indices = problem.indices if problem else torch.zeros(2, 0, dtype=torch.int64)
    values = problem.values if problem else torch.zeros(*batch, 0, dtype=case.dtype)
    system = SparseSystem(indices, n, **case.options)
    values, b = values.requires_grad_(), numbers(shape, case.dtype, 0).requires_grad_()
    x, info = system.solve_ex(values, b)
    assert info.dtype == torch.int32 and not info.any()
    for y in (system.solve(values, b), system.solve(values, b, adjoint=True), x, system.matmul(values, b)):
        assert y.shape == result and y.dtype == case.dtype and y.numel() == 0 and y.requires_grad
        y.abs().sum().backward()
        assert values.grad.shape == values.shape and b.grad.shape == b.shape
        assert not values.grad.any() and not b.grad.any()
    assert system.stats.solves == 0
    if n == 0 or 0 in batch:
        factor = system.factorize(values)
        assert factor.solve(b).shape == result and factor.info.shape == batch and factor.solve(b).requires_grad


# --- types and gradients ------------------------------------------------------------------------------------------------


@every_single_case
def test_single_precision_gradients(case):
    """Against those of the same numbers in double."""
    problem = make(case, 20, seed=3)
    b, g = problem.rhs(20, 3), problem.rhs(20, 3, seed=2)

    def gradients(*tensors):
        values, b, g = (t.clone().requires_grad_() for t in tensors)
        return torch.autograd.grad(problem.system().solve(values, b), (values, b), g)

    for single, double in zip(
        gradients(problem.values, b, g), gradients(*map(wide, (problem.values, b, g))), strict=True
    ):
        assert single.dtype == case.dtype
        assert relative_error(single, double) <= 30 * case.eps


@pytest.mark.parametrize("case", [SPD, GENERAL], ids=str)
def test_requires_grad(case):
    problem = make(case)
    system, b = problem.system(), problem.rhs(12)
    values = problem.values.clone().requires_grad_()
    for v, rhs in [(values, b), (problem.values, b.clone().requires_grad_())]:
        assert system.solve(v, rhs).requires_grad and system.factorize(v).solve(rhs).requires_grad
        assert system.matmul(v, rhs).requires_grad and system.solve_ex(v, rhs)[0].requires_grad
        assert not system.solve_ex(v, rhs)[1].requires_grad
        with torch.no_grad():
            assert not system.solve(v, rhs).requires_grad and not system.factorize(v).solve(rhs).requires_grad
    with torch.inference_mode():
        x = system.solve(problem.values, b)
        assert x.is_inference() and torch.equal(x, system.factorize(problem.values.clone()).solve(b.clone()))
    assert system.stats.factorizations == 1


# --- matmul -------------------------------------------------------------------------------------------------------------


@every_double_case
def test_matmul_is_the_inverse_of_solve(case):
    problem = make(case, batch=(2,))
    system, values = problem.system(), problem.values
    A = problem.matrix()
    for adjoint in (False, True):
        x, y = problem.rhs(2, 12, 3), problem.rhs(2, 12, 3, seed=4)
        product = system.matmul(values, x, adjoint=adjoint)
        assert relative_error(product, (A.mH if adjoint else A) @ x) < 1e-14
        assert relative_error(system.solve(values, product, adjoint=adjoint), x) < 1e-13
        inner = (system.matmul(values, y, adjoint=not adjoint).conj() * x).sum()
        assert abs((y.conj() * product).sum() - inner) < 1e-12 * abs(inner)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matmul_of_a_rectangular_matrix(dtype):
    indices = torch.tensor([[0, 2, 1, 0, 2], [1, 0, 1, 1, 3]])
    system = SparseSystem(indices, (3, 4))
    assert system.shape == (3, 4) and system.nnz == 5
    values, x, y = (numbers(s, dtype, k) for k, s in enumerate([(5,), (4, 2), (3, 2)]))
    A = torch.zeros(3, 4, dtype=dtype).index_put(tuple(indices), values, accumulate=True)
    assert torch.allclose(system.matmul(values, x), A @ x)
    assert torch.allclose(system.matmul(values, y, adjoint=True), A.mH @ y)
    assert torch.allclose(system.matmul(values, x[:, 0]), A @ x[:, 0])
    with pytest.raises(ValueError, match="needs a square matrix"):
        system.solve(values, y)
    with pytest.raises(ValueError, match=r"x of shape \(3,\) does not fit"):
        system.matmul(values, y[:, 0])


# --- options ------------------------------------------------------------------------------------------------------------

ORDERINGS = [
    ("spd", "auto", "amd"), ("spd", "amd", "amd"), ("spd", "metis", "metis"), ("spd", "natural", "natural"),
    ("general", "auto", "amd"), ("general", "amd", "amd"), ("general", "colamd", "colamd"), ("general", "natural", "natural"),
    ("symmetric", "metis", "metis"), ("hermitian", "amd", "amd"), ("auto", "amd", "amd"), ("auto", "natural", "natural"),
]  # fmt: skip


@pytest.mark.parametrize("kind, ordering, used", ORDERINGS)
def test_orderings(kind, ordering, used):
    case = find_case(kind)
    problem = make(case, 50, density=0.05)
    system, b = problem.system(ordering=ordering), problem.rhs(50)
    x = system.solve(problem.values, b)
    assert scaled_residual(problem.matrix(), x[:, None], b[:, None]) <= case.tolerance
    assert system.stats.ordering == used and system.stats.engine == case.engine
    assert system.stats.nnz_factor > 0 and system.stats.nnz == system.nnz


def test_ordering_auto_takes_the_better_one():
    """Nested dissection wins on a large grid, and is not tried on a small one; what is taken predicts the least work."""
    for side, better in [(5, "amd"), (90, "amd"), (150, "metis")]:
        i = torch.arange(side * side).view(side, side)
        pairs = torch.cat(
            [torch.stack([i[1:].flatten(), i[:-1].flatten()]), torch.stack([i[:, 1:].flatten(), i[:, :-1].flatten()])],
            1,
        )
        indices = torch.cat([pairs, i.flatten().expand(2, -1)], 1)
        values = torch.cat([-torch.ones(pairs.shape[1]), torch.full((side * side,), 4.5)]).double()
        flops, b = {}, torch.ones(side * side, dtype=torch.float64)
        for ordering in ("auto", "amd", "metis", "natural"):
            system = SparseSystem(indices, side * side, kind="spd", triangle="lower", ordering=ordering)
            y = system.matmul(values, system.solve(values, b))
            assert relative_error(y, b) < 1e-13
            flops[ordering] = system.stats.flops
            if ordering == "auto":
                assert system.stats.ordering == better
        assert flops["auto"] == flops[better]
        assert (flops["metis"] < flops["amd"]) == (side > 5)
        assert flops["natural"] > flops["auto"]


def test_threads_and_precision_options():
    problem = make(SPD)
    assert problem.system(threads=1, precision="working").solve(problem.values, problem.rhs(12)).isfinite().all()
    assert isinstance(problem.system().stats, spcache.Stats)
    assert repr(problem.system()) == f"SparseSystem(12 x 12, nnz={problem.values.numel()}, kind='spd')"
