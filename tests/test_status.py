"""`solve_ex`, `Factor.info`, `check=False`, and what kind "auto" chooses."""

import pytest
import torch
from cases import CASES, GENERAL, SPD, find_case, make, relative_error

import spcache
from spcache import SparseSystem

# Each engine in each type, and every convention once.
SOME = [c for c in CASES if c.kind in ("spd", "general") and not c.triangle] + [
    find_case("auto"), find_case("hermitian", torch.complex128), find_case("symmetric", torch.complex64, "lower"),
]  # fmt: skip
some_cases = pytest.mark.parametrize("case", SOME, ids=str)
each_engine = pytest.mark.parametrize("case", [SPD, GENERAL], ids=str)


def spoiled(problem, *elements):
    """The values with singular matrices at these places of the batch: column 2 has nothing but zeros."""
    values = problem.values.clone()
    where = problem.indices if problem.case.symmetric_pattern else problem.indices[1:]
    in_two = (where == 2).any(0).nonzero().flatten()
    for e in elements:
        values[e, in_two] = 0
    return values


# --- solve_ex -------------------------------------------------------------------------------------------------------------


@some_cases
@pytest.mark.parametrize("columns", [(), (3,)], ids=["vector", "matrix"])
def test_a_batch_of_which_some_fail(case, columns):
    problem = make(case, 6, (4,))
    system, b = problem.system(), problem.rhs(4, 6, *columns)
    values = spoiled(problem, 1, 3)
    x, info = system.solve_ex(values, b)
    assert info.dtype == torch.int32 and info.tolist() == [0, 3, 0, 3]  # column 2, counted from 1
    assert x[[1, 3]].isnan().all() and x.dtype == case.dtype
    assert relative_error(x[[0, 2]], problem.reference(values[[0, 2]], b[[0, 2]])) < 100 * case.eps
    assert torch.equal(system.factorize(values[[0, 2]]).info, torch.zeros(2, dtype=torch.int32))
    error = spcache.NotPositiveDefiniteError if case.kind == "spd" else spcache.SingularMatrixError
    with pytest.raises(error, match=r"column 2 .*batch element \(1,\)"):
        system.solve_ex(values, b, check_errors=True)
    with pytest.raises(error, match=r"column 2 .*batch element \(1,\)"):
        system.solve(values, b)
    x, info = system.solve_ex(problem.values, b, check_errors=True)  # the system is as good as before
    assert not info.any() and relative_error(x, problem.reference(problem.values, b)) < 100 * case.eps


@some_cases
@pytest.mark.parametrize("columns", [(), (2,)], ids=["vector", "matrix"])
def test_a_masked_loss_stays_finite(case, columns):
    problem = make(case, 6, (3,))
    system = problem.system()
    values, b = spoiled(problem, 1).requires_grad_(), problem.rhs(3, 6, *columns).requires_grad_()
    x, info = system.solve_ex(values, b)
    loss = x[info == 0].abs().pow(2).sum()
    gradients = torch.autograd.grad(loss, (values, b), retain_graph=True)
    twice = torch.autograd.grad(loss, (values, b), create_graph=True)
    healthy = values[[0, 2]].detach().requires_grad_(), b[[0, 2]].detach().requires_grad_()
    expected = torch.autograd.grad(problem.reference(*healthy).abs().pow(2).sum(), healthy)
    for actual in (gradients, twice):
        for gradient, reference in zip(actual, expected, strict=True):
            assert (gradient[1] == 0).all()  # exactly
            assert relative_error(gradient[[0, 2]], reference) < 300 * case.eps
    second = torch.autograd.grad(sum(g.abs().sum() for g in twice), (values, b))
    assert all(s.isfinite().all() and (s[1] == 0).all() for s in second)
    # where something comes in, nothing finite can be said
    for gradient in torch.autograd.grad(system.solve_ex(values, b)[0][:, 0].sum().real, (values, b)):
        assert gradient[1].isnan().any() and gradient[[0, 2]].isfinite().all()


@each_engine
def test_a_masked_loss_with_a_shared_right_hand_side(case):
    problem = make(case, 6, (3,))
    values, b = spoiled(problem, 0).requires_grad_(), problem.rhs(6).requires_grad_()
    x, info = problem.system().solve_ex(values, b)
    torch.where(info[:, None] == 0, x, 0).sum().backward()
    expected = problem.reference(values[1:].detach(), b).sum()
    assert relative_error(b.grad, torch.autograd.grad(expected, b)[0]) < 1e-12
    assert values.grad.isfinite().all() and not values.grad[0].any()


@some_cases
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite(case, bad):
    """Wherever they stand."""
    problem = make(case, 4, (2,), density=0.5)
    system, b = problem.system(), problem.rhs(2, 4)
    good = system.solve(problem.values, b)
    for k in range(problem.values.shape[1]):
        values = problem.values.clone()
        values[0, k] = bad
        x, info = system.solve_ex(values, b)
        assert info.tolist() == [-1, 0]
        assert x[0].isnan().all() and relative_error(x[1], good[1]) < 100 * case.eps
        with pytest.raises(ValueError, match="values must be finite"):
            system.solve_ex(values, b, check_errors=True)


@each_engine
def test_right_hand_sides_that_are_not_finite(case):
    problem = make(case, 4, (3,))
    system, b = problem.system(), problem.rhs(3, 4, 2)
    b[1, 2, 0] = torch.inf
    values = problem.values.clone().requires_grad_()
    x, info = system.solve_ex(values, b)
    assert info.tolist() == [0, -1, 0] and x[1].isnan().all() and x[[0, 2]].isfinite().all()
    x[[0, 2]].sum().backward()
    assert values.grad.isfinite().all() and not values.grad[1].any()
    with pytest.raises(ValueError, match=r"b must be finite, got inf at b\[1, 2, 0\]"):
        system.solve_ex(values, b, check_errors=True)
    x, info = system.solve_ex(problem.values[0], b[:, :, 0].T)  # three columns of one matrix: one status
    assert info.shape == () and info == -1 and x.isnan().all()


def test_status_of_one_matrix():
    problem = make(SPD, 4)
    system, b = problem.system(), problem.rhs(4)
    x, info = system.solve_ex(problem.values, b)
    assert info.shape == () and info == 0
    x, info = system.solve_ex(-problem.values, b)
    assert info > 0 and x.isnan().all()
    x, info = system.solve_ex(problem.values, torch.stack([b, b * torch.nan], 1))
    assert info == -1 and x.isnan().all()
    empty = SparseSystem(torch.zeros(2, 0, dtype=torch.int64), 3)
    x, info = empty.solve_ex(torch.zeros(0), torch.ones(3))
    assert info == 1 and x.isnan().all()


# --- check=False ----------------------------------------------------------------------------------------------------------


@some_cases
def test_nothing_is_raised_without_checks(case):
    problem = make(case, 6, (3,))
    system, b = problem.system(check=False), problem.rhs(3, 6)
    values = spoiled(problem, 1)
    factor = system.factorize(values)
    assert factor.info.tolist() == [0, 3, 0]
    x = factor.solve(b)
    assert x[1].isnan().all() and torch.equal(x[[0, 2]], system.solve(values, b)[[0, 2]])
    assert relative_error(x[[0, 2]], problem.reference(values[[0, 2]], b[[0, 2]])) < 100 * case.eps
    values[0, 0] = torch.nan
    b[2, 0] = torch.inf
    x = system.solve(values, b)
    assert x[1].isnan().all() and not x[2].isfinite().all()
    x = system.solve(problem.values, problem.rhs(3, 6))
    assert relative_error(x, problem.reference(problem.values, problem.rhs(3, 6))) < 100 * case.eps


@pytest.mark.parametrize("kind", ["spd", "symmetric", "hermitian"])
def test_asymmetric_values_are_averaged_without_checks(kind):
    problem = make(find_case(kind), 6)
    values = problem.values * (1 + 0.01 * torch.rand(problem.values.shape, dtype=torch.float64))
    b = problem.rhs(6)
    with pytest.raises(ValueError, match="values are not symmetric"):
        problem.system().solve(values, b)
    assert relative_error(problem.system(check=False).solve(values, b), problem.reference(values, b)) < 1e-12


def test_info_of_a_factor_that_was_not_raised_for():
    problem = make(GENERAL, 6)
    factor = problem.system().factorize(problem.values)
    assert factor.info.dtype == torch.int32 and factor.info == 0 and factor.nnz >= 6
    assert "Factor(n=6" in repr(factor)


# --- auto -----------------------------------------------------------------------------------------------------------------


def dense_system(A, **options):
    n = len(A)
    return SparseSystem(torch.ones(n, n).nonzero().T, n, **options), A.flatten()


def choice(A):
    """The engine that serves a dense matrix, and what had to be factorized for it."""
    system, values = dense_system(A)
    b = torch.ones(len(A), dtype=A.dtype)
    x = system.solve(values, b)
    assert relative_error(A @ x, b) < 1e5 * torch.finfo(A.dtype).eps
    return system.stats.engine, system.stats.factorizations


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128], ids=str)
def test_auto_looks_at_the_values(dtype):
    M = torch.randn(5, 5, dtype=dtype)
    H = M @ M.mH + 5 * torch.eye(5)
    H = (H + H.mH) / 2
    eps = torch.finfo(dtype).eps
    assert choice(H) == ("multifrontal", 1)
    assert choice(-H) == ("klu", 1)
    assert choice(M) == ("klu", 1)
    indefinite = H.clone()
    indefinite[1, 4] = indefinite[4, 1] = 100
    assert choice(indefinite) == ("klu", 2)  # Cholesky was tried
    for far, expected in [(8, "multifrontal"), (200, "klu")]:  # 64 eps sqrt(a_ii a_jj) allowed away from Hermitian
        nearly = H.clone()
        nearly[1, 2] += far * eps * (H[1, 1] * H[2, 2]).sqrt()
        assert choice(nearly)[0] == expected
    if dtype.is_complex:
        assert choice((M + M.mT) / 2 + 20 * torch.eye(5))[0] == "klu"  # symmetric is not Hermitian
        tilted = H.clone()
        tilted[0, 0] += 0.1j
        assert choice(tilted)[0] == "klu"


def test_auto_judges_badly_scaled_matrices_entry_by_entry():
    scale = torch.tensor([1e-150, 1.0, 1e150], dtype=torch.float64)
    A = torch.tensor([[2.0, 1, 0.5], [1, 3, 1], [0.5, 1, 4]], dtype=torch.float64) * scale[:, None] * scale
    system, values = dense_system(A)
    x = system.solve(values, scale)
    assert system.stats.engine == "multifrontal" and x.isfinite().all()
    A[0, 1] *= 1.01  # tiny beside the largest entry, not beside its own row and column
    system, values = dense_system(A)
    system.solve_ex(values, scale)
    assert system.stats.engine == "klu"


def test_auto_where_entries_are_not_stored():
    one, two = torch.tensor([4.0, 4.0, 0.0]), torch.tensor([4.0, 4.0, 1.0])
    system = SparseSystem(torch.tensor([[0, 1, 0], [0, 1, 1]]), 2)  # (1, 0) is not stored
    assert system.solve(one, torch.ones(2)).tolist() == [0.25, 0.25] and system.stats.engine == "multifrontal"
    system.solve(two, torch.ones(2))
    assert system.stats.engine == "klu"
    swap = SparseSystem(torch.tensor([[0, 1], [1, 0]]), 2)  # no diagonal
    assert swap.solve(torch.tensor([2.0, 4.0]), torch.ones(2)).tolist() == [0.25, 0.5] and swap.stats.engine == "klu"


def test_auto_is_one_choice_for_a_batch_and_a_function_of_the_values():
    positive, general = make(find_case("auto"), 6, (3,)), make(GENERAL, 6)
    system, b = positive.system(), positive.rhs(6)
    first = system.solve(positive.values, b)
    assert system.stats.engine == "multifrontal"
    mixed = positive.values.clone()
    mixed[1] *= -1
    x = system.solve(mixed, b)
    assert system.stats.engine == "klu"
    assert relative_error(x, positive.reference(mixed, b)) < 1e-12
    assert torch.equal(system.solve(positive.values, b), first) and system.stats.engine == "multifrontal"
    assert system.stats.analyses == 2 and system.stats.factorizations == 3
    del general


def test_auto_after_a_failed_cholesky_holds_the_general_factor():
    A = torch.tensor([[1.0, 2.0], [2.0, 1.0]], dtype=torch.float64)
    system, values = dense_system(A)
    for _ in range(3):
        system.solve(values, torch.ones(2).double())
    assert system.stats.engine == "klu" and system.stats.factorizations == 2 and system.stats.reuses == 2
    with pytest.raises(spcache.SingularMatrixError, match="singular"):
        system.solve(torch.ones(4).double(), torch.ones(2).double())
