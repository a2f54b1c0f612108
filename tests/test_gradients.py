"""First and second derivatives against finite differences, in reverse and forward mode; which gradients are computed."""

import pytest
import torch
from cases import GENERAL, SPD, every_double_case, find_case, make, relative_error
from torch.autograd import gradcheck, gradgradcheck

from spcache import SparseSystem

GRADCHECK = {
    "check_forward_ad": True,
    "check_batched_grad": False,
    "check_grad_dtypes": True,
    "check_batched_forward_grad": False,
}
GRADGRADCHECK = {"check_fwd_over_rev": True, "check_batched_grad": False}


def leaves(*tensors):
    return tuple(t.detach().clone().requires_grad_() for t in tensors)


@every_double_case
@pytest.mark.parametrize("shape", [(5,), (5, 2)], ids=["vector", "matrix"])
@pytest.mark.parametrize("adjoint", [False, True], ids=["", "adjoint"])
def test_finite_differences(case, shape, adjoint):
    """Entry by entry, duplicates included, whichever triangle is read."""
    problem = make(case, 5)
    assert problem.indices.shape[1] > problem.indices.unique(dim=1).shape[1]
    system = problem.system()
    inputs = leaves(problem.values, problem.rhs(*shape))

    def solve(values, b):
        return system.solve(values, b, adjoint=adjoint)

    assert gradcheck(solve, inputs, **GRADCHECK)
    assert gradgradcheck(solve, inputs, **GRADGRADCHECK)


@every_double_case
def test_finite_differences_of_batches(case):
    problem = make(case, 3, (2,))
    system = problem.system()
    for shape in [(2, 3), (3,), (1, 3), (2, 2, 3, 1)]:
        inputs = leaves(problem.values, problem.rhs(*shape))
        assert gradcheck(system.solve, inputs, **GRADCHECK)
        assert gradgradcheck(system.solve, inputs, **GRADGRADCHECK, fast_mode=True)


@every_double_case
def test_finite_differences_of_matmul(case):
    problem = make(case, 3, (2,))
    system = problem.system()
    for adjoint in (False, True):
        for shape in [(3,), (2, 3, 2)]:
            inputs = leaves(problem.values, problem.rhs(*shape))

            def matmul(values, x, adjoint=adjoint):
                return system.matmul(values, x, adjoint=adjoint)

            assert gradcheck(matmul, inputs, **GRADCHECK)
            assert gradgradcheck(matmul, inputs, **GRADGRADCHECK, fast_mode=True)


@every_double_case
def test_finite_differences_of_factor_and_solve_ex(case):
    problem = make(case, 4)
    system = problem.system()
    inputs = leaves(problem.values, problem.rhs(4, 2))
    for solve in (lambda v, b: system.factorize(v).solve(b), lambda v, b: system.factorize(v).solve(b, adjoint=True),
                  lambda v, b: system.solve_ex(v, b)[0]):  # fmt: skip
        assert gradcheck(solve, inputs, **GRADCHECK)
        assert gradgradcheck(solve, inputs, **GRADGRADCHECK, fast_mode=True)


def test_finite_differences_of_a_rectangular_matmul():
    system = SparseSystem(torch.tensor([[0, 2, 1, 0, 2], [1, 0, 1, 1, 3]]), (3, 4))
    values, x, y = torch.randn(5), torch.randn(4, 2), torch.randn(3)
    assert gradcheck(system.matmul, leaves(values.double(), x.double()), **GRADCHECK)
    assert gradcheck(lambda v, y: system.matmul(v, y, adjoint=True), leaves(values.double(), y.double()), **GRADCHECK)


@every_double_case
def test_fused_and_differentiable_backward_agree(case):
    """A backward pass that nobody differentiates takes native code, any other torch operations."""
    problem = make(case, 15, (2,))
    system = problem.system()
    for shape in [(2, 15), (15,), (3, 2, 15, 4)]:
        values, b = leaves(problem.values, problem.rhs(*shape))
        x = system.solve(values, b)
        g = torch.randn_like(x)
        fused = torch.autograd.grad(x, (values, b), g, retain_graph=True)
        differentiable = torch.autograd.grad(x, (values, b), g, create_graph=True)
        for p, q in zip(fused, differentiable, strict=True):
            assert not p.requires_grad and q.requires_grad and relative_error(p, q) < 1e-13


@pytest.mark.parametrize("case", [SPD, GENERAL], ids=str)
def test_nonlinear_loss_of_nonlinear_values(case):
    """values and b from the same parameters, b and x used twice: everything accumulates."""
    problem = make(case, 6)
    system, b = problem.system(), problem.rhs(6)

    def loss(parameters, solve):
        values = problem.values * (1 + parameters.sum() ** 2)
        x = solve(values, b * parameters[0])
        y = solve(values, x + b)
        return (x * y).sum() + y.pow(3).sum()

    parameters = leaves(torch.tensor([0.3, -0.2], dtype=torch.float64))
    actual, expected = loss(*parameters, system.solve), loss(*parameters, problem.reference)
    first, reference = (torch.autograd.grad(f, parameters, create_graph=True)[0] for f in (actual, expected))
    assert relative_error(first, reference) < 1e-12
    second = torch.autograd.grad(first.sum(), parameters)[0]
    assert relative_error(second, torch.autograd.grad(reference.sum(), parameters)[0]) < 1e-11
    assert system.stats.factorizations == 1


# --- what is computed, shown by counters ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [SPD, GENERAL], ids=str)
def test_one_step_costs_one_factorization_and_two_solves(case):
    problem = make(case, 20, (4,))
    system, b = problem.system(), problem.rhs(20)
    for step in range(4):
        values = problem.values[step].clone().requires_grad_()
        system.solve(values, b).sum().backward()
        stats = system.stats
        assert (stats.factorizations, stats.matrices, stats.solves, stats.reuses) == (
            step + 1,
            step + 1,
            2 * step + 2,
            0,
        )
    assert stats.analyses == 1 and stats.refactorizations + stats.repivots == 3


@pytest.mark.parametrize("case", [SPD, GENERAL], ids=str)
def test_only_what_is_needed_is_computed(case):
    problem = make(case, 8, (3,))
    system = problem.system()

    def count(values, b, *wanted, **options):
        """Solves of one backward pass, and the gradients."""
        x = system.solve(values, b)
        before = system.stats
        gradients = torch.autograd.grad(x, wanted, torch.ones_like(x), **options)
        assert system.stats.factorizations == before.factorizations
        return system.stats.solves - before.solves, gradients

    values, b = leaves(problem.values, problem.rhs(3, 8))
    for wanted in [(values,), (b,), (values, b)]:
        solves, gradients = count(values, b, *wanted)
        assert solves == 1 and all(g.shape == w.shape for g, w in zip(gradients, wanted, strict=True))
    only_b = system.solve(problem.values, b)
    only_b.sum().backward()
    assert b.grad is not None
    only_values = system.solve(values, problem.rhs(3, 8))
    only_values.sum().backward()
    assert values.grad is not None
    assert system.stats.factorizations == 1
    with torch.no_grad():
        before = system.stats.solves
        system.solve(values, b)
        assert system.stats.solves == before + 1


@pytest.mark.parametrize("case", [SPD, GENERAL, find_case("hermitian", torch.complex128)], ids=str)
def test_tangents_cost_one_solve(case):
    problem = make(case, 8, (2,))
    system, (values, tangent) = problem.system(), problem.values
    b = problem.rhs(8)
    with torch.autograd.forward_ad.dual_level():
        x = system.solve(torch.autograd.forward_ad.make_dual(values, tangent), b)
        assert torch.autograd.forward_ad.unpack_dual(x).tangent is not None
    assert (system.stats.factorizations, system.stats.solves) == (1, 2)


def test_duplicates_each_get_the_gradient():
    """Two entries at one place: the same gradient for both, that of one entry that held the sum."""
    indices = torch.tensor([[0, 1, 1, 0, 1], [0, 1, 1, 1, 0]])
    values = torch.tensor([2.0, 1.0, 3.0, 0.5, -0.5], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([1.0, 2.0], dtype=torch.float64)
    SparseSystem(indices, 2, kind="general").solve(values, b).sum().backward()
    summed = torch.tensor([2.0, 4.0, 0.5, -0.5], dtype=torch.float64, requires_grad=True)
    SparseSystem(indices[:, [0, 1, 3, 4]], 2, kind="general").solve(summed, b).sum().backward()
    assert values.grad[1] == values.grad[2]
    assert torch.allclose(values.grad[[0, 1, 3, 4]], summed.grad, rtol=1e-14)
    assert torch.allclose(summed.grad, torch.linalg.inv(torch.tensor([[2, 0.5], [-0.5, 4]], dtype=torch.float64)).T.sum(1)[indices[0, [0, 1, 3, 4]]]
                          * -torch.linalg.solve(torch.tensor([[2, 0.5], [-0.5, 4]], dtype=torch.float64), b)[indices[1, [0, 1, 3, 4]]])  # fmt: skip


@pytest.mark.parametrize("case", [SPD, GENERAL], ids=str)
def test_incoming_gradients_that_are_not_finite_propagate(case):
    """GradScaler reads them; nothing is raised, and the factor is as good as before."""
    problem = make(case, 8)
    system = problem.system()
    values, b = leaves(problem.values, problem.rhs(8))
    x = system.solve(values, b)
    for bad in (torch.nan, torch.inf):
        g = torch.ones_like(x)
        g[3] = bad
        for options in ({}, {"create_graph": True}):
            gv, gb = torch.autograd.grad(x, (values, b), g, retain_graph=True, **options)
            assert not gv.isfinite().all() and not gb.isfinite().all()
    clean = torch.autograd.grad(x, b, torch.ones_like(x))[0]
    assert clean.isfinite().all() and torch.equal(system.solve(values, b), x)
    assert system.stats.factorizations == 1
