"""Tensors that have no memory, contexts that change where tensors are made, and values that change meanwhile."""

import pytest
import torch
from cases import GENERAL, SPD, make, relative_error
from torch._subclasses import FakeTensorMode

CASES = pytest.mark.parametrize("case", [SPD, GENERAL], ids=str)


def freed(t):
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


def fake(t):
    return FakeTensorMode().from_tensor(t)


@CASES
@pytest.mark.parametrize("unreadable", [freed, fake])
@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
def test_no_memory_is_an_error(case, unreadable):
    problem = make(case, 9)
    system, b = problem.system(), problem.rhs(9)
    for values, rhs in ((unreadable(problem.values), b), (problem.values, unreadable(b))):
        with pytest.raises((TypeError, RuntimeError)):
            system.solve(values, rhs)
    assert relative_error(system.solve(problem.values, b), problem.reference(problem.values, b)) < 1e-12


@CASES
def test_zeros_that_nobody_wrote_down(case):
    problem = make(case, 9)
    zeros = torch._efficientzerotensor((9,), dtype=case.dtype)
    assert (problem.system().solve(problem.values, zeros) == 0).all()


@CASES
def test_default_device_does_not_matter(case):
    problem = make(case, 9, (2, 3))
    system, b = problem.system(), problem.rhs(9)
    expected = problem.system().solve(problem.values, b)
    leaf = problem.values.clone().requires_grad_()
    with torch.device("meta"):
        assert torch.equal(system.solve(leaf, b), expected)
        x, info = system.solve_ex(leaf, b)
        x.sum().backward()
        assert torch.equal(x, expected) and not info.any()
        assert system.factorize(problem.values).info.shape == (2, 3)
    assert leaf.grad.isfinite().all()


@CASES
def test_what_only_b_needs_may_change_in_place(case):
    problem = make(case, 9)
    b = problem.rhs(9).requires_grad_()
    values = problem.values.clone()
    x = problem.system().solve(values, b)
    (expected,) = torch.autograd.grad(problem.system().solve(problem.values, b).sum(), b)
    values *= 2
    x += 1
    x.sum().backward()
    assert torch.equal(b.grad, expected)


@CASES
def test_legacy_vmap_is_an_error_that_names_the_remedy(case):
    problem = make(case, 5)
    values = problem.values.clone().requires_grad_()
    x = problem.system().solve(values, problem.rhs(5))
    with pytest.raises((TypeError, RuntimeError), match="torch.func"):
        torch.autograd.grad(x, values, torch.eye(5, dtype=case.dtype), is_grads_batched=True)
