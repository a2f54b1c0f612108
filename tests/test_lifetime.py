"""Who owns a factor and for how long: caching, graphs in any order, threads, checkpoints. Counters prove it."""

import gc
import itertools
import weakref

import pytest
import torch
from cases import CASES, GENERAL, SPD, find_case, make, relative_error
from torch.utils.checkpoint import checkpoint

import spcache

AUTO = find_case("auto")
each_engine = pytest.mark.parametrize("case", [SPD, GENERAL], ids=str)


def gradients(problem, values, b, g):
    """By the dense inverse."""
    values, b = values.detach().requires_grad_(), b.detach().requires_grad_()
    return torch.autograd.grad(problem.reference(values, b), (values, b), g)


def leaf(t):
    return t.detach().clone().requires_grad_()


# --- equal values are factorized once -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case", [*(c for c in CASES if c.kind in ("spd", "general") and not c.triangle), AUTO], ids=str
)
def test_equal_values_are_factorized_once(case):
    problem = make(case, 10, (2,))
    system, b = problem.system(), problem.rhs(10)
    values, others = problem.values

    def costs(values, b=b):
        """(factorizations, reuses) of one solve; and the solution is right."""
        before = system.stats
        x = system.solve(values, b)
        assert relative_error(x, problem.reference(values, b)) < 100 * case.eps
        return system.stats.factorizations - before.factorizations, system.stats.reuses - before.reuses

    assert costs(values) == (1, 0)
    assert costs(values) == (0, 1)
    assert costs(values.clone()) == (0, 1)  # other memory, equal numbers
    assert costs(values, 2 * b) == (0, 1)
    assert costs(values, problem.rhs(10, 3)) == (0, 1)
    assert costs(torch.stack([values, values], 1)[:, 0]) == (0, 1)  # strided
    for k in range(len(values)):  # any entry may be the one that differs, by a single bit
        nudged = values.clone()
        nudged.real[k] = torch.nextafter(values.real[k], torch.tensor(torch.inf, dtype=values.real.dtype))
        assert costs(nudged) == (1, 0)
    assert costs(values) == (1, 0)
    assert costs(others) == (1, 0)
    assert costs(values) == (1, 0)  # only the latest is held
    assert costs(values.unsqueeze(0), b) == (1, 0)  # a batch of one is another shape
    reused = system.stats.reuses
    system.factorize(values.unsqueeze(0))
    assert system.stats.reuses == reused + 1
    same_memory = values.clone()
    assert costs(same_memory) == (1, 0)
    same_memory *= 2
    assert costs(same_memory) == (1, 0)


def test_zeros_of_both_signs():
    """They are equal numbers, but not the same ones: 1 / -0.0 shows it. The comparison is by bits."""
    system = spcache.SparseSystem(torch.tensor([[0, 0, 1], [0, 1, 1]]), 2, kind="general")
    b = torch.tensor([1.0, 2.0])
    for k, zero in enumerate([0.0, -0.0, 0.0]):
        assert system.solve(torch.tensor([2.0, zero, 4.0]), b).tolist() == [0.5, 0.5]
        assert system.stats.factorizations == k + 1


def test_values_of_another_type_are_another_matrix():
    problem = make(SPD, 6)
    system = problem.system()
    for dtype, eps in [
        (torch.float64, 1e-13),
        (torch.float32, 1e-5),
        (torch.complex128, 1e-13),
        (torch.float64, 1e-13),
    ]:
        values, b = problem.values.to(dtype), problem.rhs(6).to(dtype)
        assert relative_error(system.solve(values, b), problem.reference(values, b)) < eps
    stats = system.stats
    assert stats.factorizations == 4 and stats.reuses == 0 and stats.analyses == 1


# --- graphs ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [SPD, GENERAL, AUTO, find_case("hermitian", torch.complex128)], ids=str)
def test_forwards_before_backwards_in_any_order(case):
    problem = make(case, 7, (4,))
    b, g = problem.rhs(7), problem.rhs(7, seed=3)
    expected = [gradients(problem, v, b, g) for v in problem.values]
    for order in itertools.permutations(range(4)):
        system = problem.system()
        steps = [(v, leaf(b)) for v in map(leaf, problem.values)]
        solutions = [system.solve(*step) for step in steps]
        for i in order:
            actual = torch.autograd.grad(solutions[i], steps[i], g)
            assert all(relative_error(a, e) < 1e-11 for a, e in zip(actual, expected[i], strict=True))
        stats = system.stats
        assert (stats.factorizations, stats.solves, stats.reuses) == (4, 8, 0)


@each_engine
def test_retained_graph(case):
    problem = make(case, 7, (3,))
    system, g = problem.system(), problem.rhs(7)
    values, b = leaf(problem.values[0]), leaf(problem.rhs(7))
    x = system.solve(values, b)
    for other in problem.values[1:]:
        system.solve(other, b)  # takes the system's latest factor away
        actual = torch.autograd.grad(x, (values, b), g, retain_graph=True)
        assert all(relative_error(a, e) < 1e-11 for a, e in zip(actual, gradients(problem, values, b, g), strict=True))
    assert system.stats.factorizations == 3
    second = torch.autograd.grad(x, values, g, create_graph=True)[0]
    third = torch.autograd.grad(second.sum(), values)[0]
    reference = torch.autograd.grad(problem.reference(values, b), values, g, create_graph=True)[0]
    assert relative_error(third, torch.autograd.grad(reference.sum(), values)[0]) < 1e-11
    assert system.stats.factorizations == 3


@each_engine
def test_a_graph_outlives_its_system(case):
    problem = make(case, 7)
    values, b, g = leaf(problem.values), leaf(problem.rhs(7)), problem.rhs(7)
    system = problem.system()
    x, factor = system.solve(values, b), system.factorize(values)
    system.clear()
    spcache.plan_cache.clear()
    del system
    gc.collect()
    expected = gradients(problem, values, b, g)
    for y in (x, factor.solve(b)):
        assert all(
            relative_error(a, e) < 1e-11 for a, e in zip(torch.autograd.grad(y, (values, b), g), expected, strict=True)
        )


@each_engine
def test_values_changed_in_place(case):
    problem = make(case, 7)
    system, b = problem.system(), problem.rhs(7)
    values = leaf(problem.values)
    x, factor = system.solve(values, b), system.factorize(values)
    with torch.no_grad():
        values.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        x.sum().backward()
    with pytest.raises(RuntimeError, match="values were modified after factorize.*Factorize again"):
        factor.solve(b)
    assert relative_error(system.factorize(values).solve(b), problem.reference(values, b)) < 1e-12


def test_solution_changed_in_place():
    problem = make(SPD, 7)
    values, b = leaf(problem.values), problem.rhs(7)
    x = problem.system().solve(values, b)
    with torch.no_grad():
        x += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        x.sum().backward()


@each_engine
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoint(case, use_reentrant):
    problem = make(case, 7, (2,))
    system, g = problem.system(), problem.rhs(7)
    (u, v), b = map(leaf, problem.values), leaf(problem.rhs(7))

    def chain(u, v, b):
        return system.solve(v, system.solve(u, b))

    y = checkpoint(chain, u, v, b, use_reentrant=use_reentrant)
    actual = torch.autograd.grad(y, (u, v, b), g) if not use_reentrant else None
    if use_reentrant:
        y.backward(g)
        actual = u.grad, v.grad, b.grad
    expected = torch.autograd.grad(problem.reference(v, problem.reference(u, b)), (u, v, b), g)
    assert all(relative_error(a, e) < 1e-11 for a, e in zip(actual, expected, strict=True))
    stats = system.stats
    assert stats.factorizations == 4 and stats.solves == 6  # u, v, and both once more; 2 forward, 2 again, 2 backward


@each_engine
def test_saved_tensor_hooks(case):
    problem = make(case, 7)
    values, b, g = leaf(problem.values), leaf(problem.rhs(7)), problem.rhs(7)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().numpy().copy(), torch.from_numpy):
        x = problem.system().solve(values, b)
    actual = torch.autograd.grad(x, (values, b), g)
    assert all(relative_error(a, e) < 1e-11 for a, e in zip(actual, gradients(problem, values, b, g), strict=True))


@pytest.mark.parametrize("case", [SPD, GENERAL, AUTO], ids=str)
def test_keep_factor_false(case):
    """Nobody holds the factor: each backward makes it anew, and counts it."""
    problem = make(case, 7, (2,))
    system, b, g = problem.system(keep_factor=False), leaf(problem.rhs(7)), problem.rhs(7)
    steps = [(leaf(v), b) for v in problem.values]
    solutions = [system.solve(*step) for step in steps]
    assert system.stats.factorizations == 2
    assert all(pool._latest() is None for pool in system._factorizer._pools.values())  # by weak reference
    for k in (1, 0):
        actual = torch.autograd.grad(solutions[k], steps[k], g)
        assert all(relative_error(a, e) < 1e-11 for a, e in zip(actual, gradients(problem, *steps[k], g), strict=True))
        assert system.stats.factorizations == 4 - k
    system.solve(*steps[0]).sum().backward()
    assert system.stats.factorizations == 6
    assert torch.autograd.gradcheck(system.solve, steps[0], check_forward_ad=True, check_batched_grad=False)
    assert torch.autograd.gradgradcheck(system.solve, steps[0], check_batched_grad=False)


def test_keep_factor_false_with_failed_elements():
    problem = make(SPD, 5, (2,))
    system = problem.system(keep_factor=False)
    values = problem.values * torch.tensor([[1], [-1]])
    values, b = leaf(values), problem.rhs(5)
    x, info = system.solve_ex(values, b)
    assert info[0] == 0 and info[1] > 0
    system.clear()
    x[0].sum().backward()
    assert values.grad.isfinite().all() and not values.grad[1].any() and values.grad[0].any()


# --- who holds storage ----------------------------------------------------------------------------------------------------


def test_factors_die_with_their_last_holder():
    """By reference counts alone: the garbage collector is off."""
    problem = make(SPD, 7, (3,))
    system, b = problem.system(), problem.rhs(7)
    gc.disable()
    try:
        values = leaf(problem.values[0])
        x = system.solve(values, b)
        first = weakref.ref(system._factorizer._held)
        system.solve(problem.values[1], b)
        second = weakref.ref(system._factorizer._held)
        assert first() is not None  # the graph has it
        x.sum().backward(retain_graph=True)
        del x
        assert first() is None and second() is not None
        factor = system.factorize(problem.values[1])
        system.clear()
        assert second() is not None  # the Factor has it
        x = factor.solve(leaf(b))
        del factor
        assert second() is not None  # the graph of its solution has it
        del x
        assert second() is None
        other = weakref.ref(system)
        y = torch.func.vmap(torch.func.grad(lambda v, system=system: system.solve(v, b).sum()))(problem.values)
        del system, y
        assert other() is None
    finally:
        gc.enable()


@each_engine
def test_storage_is_lent_again(case, monkeypatch):
    """A warm loop allocates no storage; k graphs at once need at most k + 1; idle storage can be let go."""
    problem = make(case, 7, (8,))
    system, b, made = problem.system(), problem.rhs(7), []
    system.solve(problem.values[0], b)
    plan = system._factorizer._held.plan
    original = type(plan).storage
    monkeypatch.setattr(type(plan), "storage", lambda self, *a: made.append(a) or original(self, *a))
    for v in problem.values:
        system.solve(leaf(v), b).sum().backward()
    assert len(made) <= 1
    solutions = [system.solve(leaf(v), b) for v in problem.values[:3]]
    assert len(made) <= 3
    for x in solutions:
        x.sum().backward()
    del solutions, x
    count = len(made)
    for _ in range(3):
        for x in [system.solve(leaf(v), b) for v in problem.values[:3]]:
            x.sum().backward()
        del x
    assert len(made) == count
    before = system.stats.bytes
    system.trim()
    assert system.stats.bytes < before
    system.clear()
    assert system.stats.bytes < before and system._factorizer._held is None
    factorizations = system.stats.factorizations
    assert relative_error(system.solve(problem.values[2], b), problem.reference(problem.values[2], b)) < 1e-12
    assert system.stats.factorizations == factorizations + 1


def test_idle_storage_is_bounded():
    """Also where every step brings another batch size."""
    problem = make(SPD, 20)
    system, b = problem.system(), problem.rhs(20)
    for batch in range(1, 41):
        system.solve(problem.values.expand(batch, -1), b)
    one = problem.system()
    one.solve(problem.values.expand(40, -1), b)
    assert system.stats.bytes < 6 * one.stats.bytes


# --- failures -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [SPD, GENERAL, AUTO], ids=str)
def test_a_failure_leaves_the_system_usable(case):
    problem = make(case, 7, (2,))
    system, b, g = problem.system(), problem.rhs(7), problem.rhs(7)
    values = leaf(problem.values[0])
    x = system.solve(values, b)
    before = system.stats
    for _ in range(3):
        with pytest.raises(torch.linalg.LinAlgError):
            system.solve(torch.zeros_like(values), b)
    stats = system.stats
    assert stats.factorizations == stats.matrices == before.factorizations + 3  # each was tried, and counted
    assert (stats.solves, stats.reuses, stats.analyses) == (
        before.solves,
        before.reuses,
        before.analyses + (case is AUTO),
    )
    for bad in (torch.nan, torch.inf):  # refused before anything is factorized
        with pytest.raises(ValueError, match="values must be finite"):
            system.solve(values + bad, b)
        with pytest.raises(ValueError, match="b must be finite"):
            system.solve(values, b + bad)
    assert system.stats.factorizations == stats.factorizations + 1  # for the good values of the bad b
    assert relative_error(torch.autograd.grad(x, values, g)[0], gradients(problem, values, b, g)[0]) < 1e-11
    assert relative_error(system.solve(problem.values[1], b), problem.reference(problem.values[1], b)) < 1e-12
