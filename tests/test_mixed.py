"""precision="mixed": factors in single precision, solutions as good as in double; or a factor in double after all."""

import numpy as np
import pytest
import torch
from cases import DOUBLE, SPD, every_single_case, find_case, grid_problem, make, scaled_residual
from test_ldl import problem_of, saddle

import spcache
from spcache import SparseSystem, factorizer

C = 2  # tolerated scaled residual in units of eps: refinement ends with less
EPS = 2**-52
SYMMETRIC = find_case("symmetric")
MIXED = [case for case in DOUBLE if case.engine != "klu"]
every_mixed_case = pytest.mark.parametrize("case", MIXED, ids=str)


def graded(problem, digits):
    """A positive definite matrix of that many digits in its condition number, rows and columns scaled."""
    g = np.random.default_rng(digits)
    n = problem.n
    Q, _ = np.linalg.qr(g.standard_normal((n, n)))
    A = (Q * 10.0 ** np.linspace(0, -digits, n)) @ Q.T
    return problem_of(torch.from_numpy((A + A.T) / 2)[None], "symmetric", torch.float64)


@every_mixed_case
@pytest.mark.parametrize("batch", [(), (3,)], ids=["one", "batch"])
@pytest.mark.parametrize("adjoint", [False, True])
def test_solutions(case, batch, adjoint):
    """To double precision, by a factor in single precision, whose steps of refinement are counted."""
    problem = make(case, 40, batch)
    system = problem.system(precision="mixed")
    A = problem.matrix()
    for width in (1, 3):
        b = problem.rhs(*batch, 40, width)
        x = system.solve(problem.values, b, adjoint=adjoint)
        assert scaled_residual(A.mH if adjoint else A, x, b) <= C * EPS
    stats = system.stats
    assert (stats.factorizations, stats.repivots, stats.engine) == (1, 0, case.engine) and stats.refinements >= 4
    factor = system.factorize(problem.values)
    assert factor._numeric.storage.dtype == (0 if case.dtype == torch.float64 else 2)
    several = problem.rhs(2, *batch, 40, 2)  # one factor for several right-hand sides
    assert scaled_residual(A, factor.solve(several), several) <= C * EPS


@every_mixed_case
def test_derivatives(case):
    problem = make(case, 7, (2,))
    system = problem.system(precision="mixed")
    values, b = problem.values.clone().requires_grad_(), problem.rhs(2, 7).requires_grad_()
    assert torch.autograd.gradcheck(system.solve, (values, b), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(system.solve, (values, b))
    assert system.stats.repivots == 0 and system.stats.refinements > 0


@every_mixed_case
def test_gradients_are_those_of_double(case):
    """Not those of single precision."""
    problem = make(case, 30)
    grads = []
    for precision in ("working", "mixed"):
        values, b = problem.values.clone().requires_grad_(), problem.rhs(30).requires_grad_()
        x = problem.system(precision=precision).solve(values, b)
        grads.append([g / g.abs().max() for g in torch.autograd.grad(x, (values, b), problem.rhs(30, seed=2))])
    for mine, theirs in zip(*grads, strict=True):
        assert (mine - theirs).abs().max() < 1e-13


@every_single_case
def test_single_precision_is_as_without(case):
    problem = make(case, 20)
    b = problem.rhs(20)
    x = problem.system(precision="mixed").solve(problem.values, b)
    assert torch.equal(x, problem.system().solve(problem.values, b))


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
@pytest.mark.parametrize("adjoint", [False, True])
def test_matrices_without_symmetry(dtype, adjoint, monkeypatch):
    """KLU computes in double and is left alone. Were it not, rows and columns would be scaled apart."""
    problem = make(find_case("general", dtype), 40, (2,))
    b = problem.rhs(2, 40, 3)
    system = problem.system(precision="mixed")
    system.solve(problem.values, b)
    assert system.stats.refinements == 0
    monkeypatch.setattr(factorizer, "_DOUBLE_ONLY", ())
    D, E = (10.0 ** torch.from_numpy(np.random.default_rng(k).uniform(-60, 60, 40)) for k in (0, 1))
    rows, columns = problem.indices
    system, values = problem.system(precision="mixed"), problem.values * D[rows] * E[columns]
    x = system.solve(values, b, adjoint=adjoint)
    left, right = (E, D) if adjoint else (D, E)
    A = problem.matrix()
    assert scaled_residual(A.mH if adjoint else A, x * right[:, None], b / left[:, None]) <= C * EPS
    assert system.stats.refinements >= 2 and system.stats.repivots == 0


@pytest.mark.parametrize("case", [SPD, SYMMETRIC], ids=str)
@pytest.mark.parametrize("size", [1e-150, 1e-40, 1.0, 1e40, 1e150])
@pytest.mark.parametrize("spread", [0, 60])
def test_scales(case, size, spread):
    """Numbers that single precision cannot hold, all of them or some."""
    problem = make(case, 30)
    D = 10.0 ** torch.from_numpy(np.random.default_rng(0).uniform(-spread, spread, 30))
    rows, columns = problem.indices
    system, values = problem.system(precision="mixed"), problem.values * size * D[rows] * D[columns]
    b = problem.rhs(30) * D
    x = system.solve(values, b)
    assert scaled_residual(problem.matrix(), (x * D * size)[:, None], (b / D)[:, None]) <= C * EPS
    assert (system.stats.repivots, system.stats.factorizations) == (0, 1)


@pytest.mark.parametrize("case", [SPD, SYMMETRIC], ids=str)
@pytest.mark.parametrize("digits", range(1, 15))
@pytest.mark.filterwarnings("ignore::spcache.IllConditionedWarning")  # from 14 digits on
def test_ill_conditioned_matrices_are_factorized_in_double(case, digits):
    """As good as a factor in double at any condition number; what did not serve is counted."""
    problem = graded(make(case, 40), digits)
    system = SparseSystem(problem.indices, 40, kind=case.kind, precision="mixed")
    b = problem.rhs(1, 40, 2)
    x = system.solve(problem.values, b)
    assert scaled_residual(problem.matrix(), x, b) <= C * EPS
    stats = system.stats
    assert stats.repivots == 0 if digits < 5 else stats.repivots == 1 if digits > 9 else stats.repivots <= 1
    assert stats.factorizations == 1 + stats.repivots


def test_what_does_not_serve_is_remembered():
    problem = graded(make(SPD, 40), 11)
    system = SparseSystem(problem.indices, 40, kind="spd", precision="mixed")
    b = problem.rhs(1, 40)
    for k in range(1, 6):
        system.solve(problem.values * k, b)
        assert system.stats.repivots == min(k, 3) and system.stats.factorizations == k + min(k, 3)
    assert system.stats.analyses == 1


def test_a_solution_that_stalls_is_computed_in_double(monkeypatch):
    """Once for a factor: what follows uses the other one, and so does the gradient."""
    monkeypatch.setattr("spcache.mixed._LARGEST", np.inf)  # no look beforehand
    problem = graded(make(SYMMETRIC, 40), 10)
    system = SparseSystem(problem.indices, 40, kind="symmetric", precision="mixed")
    values, b = problem.values.clone().requires_grad_(), problem.rhs(1, 40).requires_grad_()
    x = system.solve(values, b)
    assert scaled_residual(problem.matrix(), x.detach()[..., None], b.detach()[..., None]) <= C * EPS
    assert (system.stats.repivots, system.stats.factorizations) == (1, 2)
    x.sum().backward()
    assert scaled_residual(problem.matrix(), b.grad[..., None], torch.ones(1, 40, 1, dtype=torch.float64)) <= C * EPS
    assert (system.stats.repivots, system.stats.factorizations) == (1, 2)
    again = system.factorize(problem.values.clone()).solve(b.detach())
    assert torch.equal(again, x.detach()) and system.stats.factorizations == 2


@pytest.mark.parametrize("kind", ["spd", "symmetric", "hermitian", "auto", "general"])
def test_errors_are_those_of_double(kind):
    A = torch.from_numpy(np.diag([1.0, 2, 3, 4]))[None]
    problem = problem_of(A, "symmetric", torch.float64, torch.ones(4, 4, dtype=torch.bool))
    singular = problem.values.clone().view(4, 4)
    singular[2] = singular[:, 2] = 0
    for precision in ("working", "mixed"):
        system = SparseSystem(problem.indices, 4, kind=kind, precision=precision)
        with pytest.raises((spcache.SingularMatrixError, spcache.NotPositiveDefiniteError)) as caught:
            system.solve(singular.reshape(1, 16), problem.rhs(1, 4))
        assert caught.value.column == 2
        x, info = system.solve_ex(singular.reshape(1, 16), problem.rhs(1, 4))
        assert info.tolist() == [3] and x.isnan().all()
        broken = problem.values.clone()
        broken[0, 5] = torch.nan
        with pytest.raises(ValueError, match="values must be finite"):
            system.solve(broken, problem.rhs(1, 4))
        x, info = system.solve_ex(broken, problem.rhs(1, 4))
        assert info.tolist() == [-1]


def test_one_bad_element_of_a_batch():
    """The whole batch is factorized in double, and the others keep their solutions."""
    problem = make(SPD, 20, (3,))
    values, b = problem.values.clone(), problem.rhs(3, 20)
    values[1] *= -1
    x, info = problem.system(precision="mixed").solve_ex(values, b)
    assert (info != 0).tolist() == [False, True, False] and x[1].isnan().all()
    A = problem.matrix()[[0, 2]]
    assert scaled_residual(A, x[[0, 2]][..., None], b[[0, 2]][..., None]) <= C * EPS


def test_without_checks():
    """Refined as far as it goes, and nothing is tried instead; a factor that broke down is replaced all the same."""
    problem = graded(make(SYMMETRIC, 40), 12)
    system = SparseSystem(problem.indices, 40, kind="symmetric", precision="mixed", check=False)
    system.solve(problem.values, problem.rhs(1, 40))
    assert system.stats.factorizations == 1 and system.stats.refinements > 0
    well = make(SPD, 20)
    b = well.rhs(20)
    x = well.system(precision="mixed", check=False).solve(well.values, b)
    assert scaled_residual(well.matrix(), x[:, None], b[:, None]) <= C * EPS


def test_half_the_memory():
    grid = grid_problem((40, 40))
    sizes = []
    for precision in ("working", "mixed"):
        factor = grid.system(precision=precision).factorize(grid.values)
        sizes.append(factor._numeric.storage.nbytes)
    assert 2 * sizes[1] <= sizes[0] * 1.01


def test_saddle_points():
    """Rows are paired as in double: the plan is the same."""
    problem = problem_of(saddle(60, 25), "symmetric", torch.float64)
    system, b = problem.system(precision="mixed"), problem.rhs(1, problem.n, 2)
    for k in (1, 2):
        x = system.solve(problem.values * k, b)
        assert scaled_residual(problem.matrix() * k, x, b) <= C * EPS
    assert (system.stats.analyses, system.stats.engine, system.stats.factorizations) == (1, "ldl", 2)
    other = problem.system()
    other.solve(problem.values, b)
    assert other.stats.analyses == 0  # found in the cache


def test_copies_and_least_squares():
    problem = make(SPD, 20)
    system = problem.system(precision="mixed")
    b = problem.rhs(20)
    x = system.solve(problem.values, b)
    copy = system.__copy__()
    assert torch.equal(copy.solve(problem.values, b), x) and copy.stats.refinements > 0 and copy.stats.analyses == 0
    tall = SparseSystem(torch.tensor([[0, 1, 2, 2], [0, 1, 0, 1]]), (3, 2), precision="mixed")
    y = tall.lstsq(torch.tensor([1.0, 2, 3, 4], dtype=torch.float64), torch.ones(3, dtype=torch.float64))
    A = torch.tensor([[1.0, 0], [0, 2], [3, 4]], dtype=torch.float64)
    assert torch.allclose(y, torch.linalg.lstsq(A, torch.ones(3, 1, dtype=torch.float64)).solution[:, 0], rtol=1e-14)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="precision must be one of 'working', 'mixed', got 'half'"):
        SparseSystem(torch.zeros(2, 1, dtype=torch.int64), 1, precision="half")
