"""Copies, pickles, forked processes, the plan cache, and memory over many steps."""

import copy
import gc
import pickle

import pytest
import torch
from cases import GENERAL, SPD, every_double_case, find_case, grid_problem, make, relative_error

import spcache
from spcache import SparseSystem, plan_cache
from spcache.engines import multifrontal

each_engine = pytest.mark.parametrize("case", [SPD, GENERAL], ids=str)


# --- deepcopy and pickle --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [SPD, GENERAL, find_case("auto")], ids=str)
@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy], ids=["copy", "deepcopy"])
def test_copies_share_the_plan(case, duplicate):
    problem = make(case, 9, (2,))
    system, b = problem.system(), problem.rhs(9)
    x = system.solve(problem.values[0], b)
    plan_cache.clear()  # the copy must not need it
    other = duplicate(system)
    stats = other.stats
    assert (stats.analyses, stats.factorizations, stats.solves) == (0, 0, 0)
    assert torch.equal(other.solve(problem.values[0], b), x)
    other.solve(problem.values[1], b)
    assert (other.stats.analyses, other.stats.factorizations) == (0, 2)
    assert (system.stats.analyses, system.stats.factorizations) == (1, 1)  # and the original is as it was
    system.solve(problem.values[0], b)
    assert system.stats.reuses == 1
    assert other.stats.engine == case.engine and repr(other) == repr(system)


def test_deepcopy_of_a_module():
    class Net(torch.nn.Module):
        def __init__(self, problem):
            super().__init__()
            self.values = torch.nn.Parameter(problem.values)
            self.system = problem.system()

        def forward(self, b):
            return self.system.solve(self.values, b)

    problem = make(SPD, 9)
    net, b = Net(problem), problem.rhs(9)
    x = net(b)
    other = copy.deepcopy(net)
    assert torch.equal(other(b), x)
    other(b).sum().backward()
    assert net.values.grad is None and other.values.grad is not None and other.system.stats.analyses == 0


@every_double_case
def test_pickle(case):
    problem = make(case, 9)
    system, b = problem.system(check=False, keep_factor=False), problem.rhs(9)
    fresh = pickle.loads(pickle.dumps(system))  # before and after the first use
    x = system.solve(problem.values, b)
    for other in (fresh, pickle.loads(pickle.dumps(system))):
        assert torch.equal(other.solve(problem.values, b), x)
        assert repr(other) == repr(system) and other.shape == system.shape
        assert other._factorizer.options == system._factorizer.options and other.stats.factorizations == 1


@pytest.mark.parametrize("ordering", ["auto", "metis", "natural"])
def test_pickle_keeps_the_permutation(ordering, monkeypatch):
    """Where the plan is made anew the ordering is not searched again, nor forgotten which it was."""
    problem = make(SPD, 60, density=0.03)
    system, b = problem.system(ordering=ordering), problem.rhs(60)
    x = system.solve(problem.values, b)
    data = pickle.dumps(system)
    plan_cache.clear()

    def refuse(*_):
        raise AssertionError("an ordering was computed")

    monkeypatch.setattr(multifrontal, "order", refuse)
    other = pickle.loads(data)
    assert torch.equal(other.solve(problem.values, b), x)
    ours, theirs = system.stats, other.stats
    assert (theirs.nnz_factor, theirs.flops, theirs.ordering) == (ours.nnz_factor, ours.flops, ours.ordering)
    assert theirs.analyses == 1
    assert pickle.loads(pickle.dumps(other)).solve(problem.values, b) is not None


def test_pickle_is_small_and_plain():
    problem = make(SPD, 200, density=0.02)
    system = problem.system()
    system.solve(problem.values, problem.rhs(200))
    assert len(pickle.dumps(system)) < 8 * problem.values.numel() + 4 * 200 + 2000


# --- fork -----------------------------------------------------------------------------------------------------------------

FORK = """
import os, signal, sys, threading, torch, spcache
from cases import SPD, GENERAL, make, relative_error

torch.set_num_threads(1)
def child(work):
    "Runs work in a forked child; its exit status. A child that hangs is ended by its alarm."
    pid = os.fork()
    if pid == 0:
        signal.alarm(20)
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(pid, 0)[1]
"""


def test_fork(run_python):
    """The child uses the parent's plan, factor and graph, and leaves the parent's alone."""
    run_python(
        FORK
        + """
for case in (SPD, GENERAL):
    problem = make(case, 30, (2,), density=0.1)
    system, b = problem.system(), problem.rhs(30)
    u, v = problem.values
    leaf = u.clone().requires_grad_()
    x = system.solve(leaf, b)
    factor = system.factorize(v)
    expected = problem.reference(v, b)

    def work():
        assert relative_error(factor.solve(b), expected) < 1e-12
        assert relative_error(system.solve(u, b), problem.reference(u, b)) < 1e-12
        assert system.stats.analyses == 1
        x.sum().backward()
        other = make(case, 31, seed=5)
        assert relative_error(other.system().solve(other.values, other.rhs(31)), other.reference(other.values, other.rhs(31))) < 1e-12
        spcache.plan_cache.clear()

    for _ in range(3):
        assert child(work) == 0
    assert len(spcache.plan_cache) == 1 + (case is GENERAL)
    assert relative_error(factor.solve(b), expected) < 1e-12 and leaf.grad is None
    x.sum().backward()
"""
    )


def test_fork_of_a_process_that_used_threads(run_python):
    run_python(
        FORK
        + """
from cases import grid_problem
problem = grid_problem((120, 120), batch=(2,))
system, b = problem.system(threads=4), problem.rhs(120 * 120, 5)
expected = [system.solve(v, b) for v in problem.values]

def work():
    for v, x in zip(problem.values, expected):
        assert torch.equal(system.solve(v, b), x)

assert [child(work) for _ in range(5)] == [0] * 5
work()
"""
    )


@pytest.mark.slow
def test_fork_while_another_thread_works(run_python):
    """Analyzing (also with METIS, which has a lock), factorizing, solving: no lock stays taken in the child."""
    run_python(
        FORK
        + """
stop = threading.Event()
problems = [make(case, 150, seed=k, density=0.02) for k, case in enumerate((SPD, GENERAL))]

def busy():
    shared = problems[0].system(ordering="metis")
    while not stop.is_set():
        spcache.plan_cache.clear()
        for problem, options in ((problems[0], {"ordering": "metis"}), (problems[1], {})):
            problem.system(**options).solve(problem.values, problem.rhs(150))
            shared.solve(problems[0].values * torch.rand(()).double(), problems[0].rhs(150))

threads = [threading.Thread(target=busy) for _ in range(2)]
for t in threads: t.start()
system = problems[0].system(ordering="metis")
expected = system.solve(problems[0].values, problems[0].rhs(150))

def work():
    assert relative_error(system.solve(problems[0].values * 2, problems[0].rhs(150)), expected / 2) < 1e-12
    for problem, options in ((problems[0], {"ordering": "metis"}), (problems[1], {})):
        x = problem.system(**options).solve(problem.values, problem.rhs(150))
        assert relative_error(x, problem.reference(problem.values, problem.rhs(150))) < 1e-11
    spcache.plan_cache.info(), spcache.plan_cache.trim(), spcache.plan_cache.clear()

statuses = [child(work) for _ in range(60)]
stop.set()
for t in threads: t.join()
assert not any(statuses), statuses
"""
    )


# --- the plan cache -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [SPD, GENERAL, find_case("symmetric", torch.float64, "lower")], ids=str)
def test_equal_structures_share_a_plan(case):
    """Also where entries are permuted, duplicated, of another integer type, or the mirror image."""
    problem = make(case, 9)
    b = problem.rhs(9)
    x = problem.system().solve(problem.values, b)
    assert plan_cache.info()[0] == 1
    order = torch.randperm(problem.values.numel())
    assert plan_cache.info().bytes > 0
    again = torch.cat([problem.indices, problem.indices[:, :2]], 1)
    halves = torch.cat([problem.values, problem.values[:2]])
    halves[:2] /= 2
    halves[-2:] /= 2
    variants = [
        (problem.indices.clone(), problem.values, {}),
        (problem.indices.int(), problem.values, {}),
        (problem.indices.numpy(), problem.values, {}),
        (problem.indices[:, order], problem.values[order], {}),
        (again, halves, {}),
        (problem.indices, problem.values, {"check": False, "keep_factor": False}),
    ]
    if case.triangle:
        variants.append((problem.indices.flip(0), problem.values, {"triangle": "upper"}))
    for indices, values, options in variants:
        system = SparseSystem(indices, 9, **{**case.options, **options})
        assert relative_error(system.solve(values, b), x) < 1e-13
        assert system.stats.analyses == 0 and len(plan_cache) == 1
    other = problem.system(ordering="natural")
    other.solve(problem.values, b)
    assert other.stats.analyses == 1 and len(plan_cache) == 2
    other = make(case, 9, seed=1)
    system = other.system()
    system.solve(other.values, b)
    assert system.stats.analyses == 1 and len(plan_cache) == 3


def test_the_cache_is_bounded():
    b = torch.ones(9, dtype=torch.float64)

    def use(seed):
        problem = make(SPD, 9, seed=seed)
        system = problem.system()
        system.solve(problem.values, b)
        return system.stats.analyses

    plan_cache.max_entries = 2
    assert [use(seed) for seed in (0, 1, 0, 2)] == [1, 1, 0, 1]  # 1 was used least recently
    assert len(plan_cache) == 2
    assert [use(seed) for seed in (0, 2, 1)] == [0, 0, 1]
    size = plan_cache.info().bytes
    plan_cache.max_entries, plan_cache.max_bytes = 100, size
    for seed in range(10):
        use(seed)
        assert plan_cache.info().bytes <= 1.5 * size
    assert len(plan_cache) < 5
    plan_cache.max_bytes = 0  # the newest stays, whatever its size
    assert [use(11), use(11), len(plan_cache)] == [1, 0, 1]
    plan_cache.clear()
    assert plan_cache.info()[:2] == (0, 0) and use(11) == 1


def test_what_is_evicted_lives_on_where_it_is_used():
    problem = make(SPD, 9, (2,))
    system, b = problem.system(), problem.rhs(9)
    system.solve(problem.values[0], b)
    plan_cache.clear()
    assert relative_error(system.solve(problem.values[1], b), problem.reference(problem.values[1], b)) < 1e-12
    assert system.stats.analyses == 1 and len(plan_cache) == 0


@each_engine
def test_trim(case):
    problem = make(case, 9, (3,))
    A = torch.sparse_coo_tensor(problem.indices, problem.values[0], (9, 9))
    b = problem.rhs(9)
    solutions = [spcache.solve(A * k, b, kind=case.kind) for k in (1.0, 2.0)]
    before = plan_cache.info()
    plan_cache.trim()
    after = plan_cache.info()
    assert after.entries == before.entries and 0 < after.bytes <= before.bytes
    assert relative_error(spcache.solve(A, b, kind=case.kind), solutions[0]) < 1e-13


# --- memory ---------------------------------------------------------------------------------------------------------------


def resident():
    """Bytes of this process in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["spd", "general", "auto"])
def test_memory_does_not_grow(kind):
    """With the garbage collector off; each step's factor alone takes 0.8 MB or more."""
    side = 60
    lower = grid_problem((side, side)).indices
    indices = torch.cat([lower, lower[:, lower[0] != lower[1]].flip(0)], 1)
    values = torch.where(indices[0] == indices[1], 4.5, -1.0).double()
    system, b = SparseSystem(indices, side * side, kind=kind), torch.ones(side * side, dtype=torch.float64)

    def step(k):
        v = (values * (1 + k / 1000)).requires_grad_()
        x = system.solve(v, b)
        x.sum().backward()
        y = system.solve((values * (2 + k / 1000)).requires_grad_(), b)
        (gradient,) = torch.autograd.grad(system.factorize(v).solve(y).sum(), v, create_graph=True)
        gradient.sum().backward()
        torch.func.grad(lambda v: system.solve(v, b).sum())(v.detach())
        with pytest.raises(torch.linalg.LinAlgError):
            system.solve(torch.zeros_like(values), b)
        if k % 10 == 0:
            spcache.solve(torch.sparse_coo_tensor(indices, v.detach(), (side * side,) * 2), b, kind=kind)

    gc.collect()
    gc.disable()
    try:
        for k in range(30):
            step(k)
        before = resident()
        for k in range(90):
            step(k)
        assert resident() - before < 8e6
    finally:
        gc.enable()
    assert system.stats.bytes < 40e6
