"""Several threads at once: one system, one plan, one factor; backward elsewhere than forward."""

import threading

import pytest
import torch
from cases import DTYPES, GENERAL, SPD, find_case, grid_problem, make, relative_error

import spcache


def leaf(t):
    return t.detach().clone().requires_grad_()


def in_threads(work, count):
    """Runs work(0), work(1), ... at the same time; passes the first exception on."""
    errors, ready = [], threading.Barrier(count)

    def run(k):
        try:
            ready.wait()
            work(k)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(k,)) for k in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    if errors:
        raise errors[0]


some_cases = pytest.mark.parametrize(
    "case", [SPD, GENERAL, find_case("auto"), find_case("hermitian", torch.complex128)], ids=str
)


@some_cases
def test_backward_in_another_thread(case):
    problem = make(case, 30, (4,))
    system, b, g = problem.system(), problem.rhs(30), problem.rhs(30, seed=2)
    leaves = [leaf(v) for v in problem.values]
    solutions = [system.solve(v, b) for v in leaves]
    results = [None] * 4

    def work(k):
        results[k] = torch.autograd.grad(solutions[k], leaves[k], g)[0]

    in_threads(work, 4)
    for result, v in zip(results, leaves, strict=True):
        assert relative_error(result, torch.autograd.grad(problem.reference(v, b), v, g)[0]) < 1e-11
    assert (system.stats.factorizations, system.stats.solves) == (4, 8)


@some_cases
def test_threads_share_a_system(case):
    """Correct results, and true counters."""
    count, rounds = 4, 25
    problem = make(case, 120, (6,), density=0.02)
    system, b = problem.system(), problem.rhs(120)
    leaves = [leaf(v) for v in problem.values]
    expected = [torch.autograd.grad(problem.reference(v, b).abs().pow(2).sum(), v)[0] for v in leaves]

    def work(k):
        for r in range(rounds):
            which = (k + r) % 6 if r % 2 else 0  # every other time the same as the others
            values = leaf(problem.values[which])
            x = system.solve(values, b)
            assert relative_error(x, problem.reference(values, b)) < 1e-11
            (gradient,) = torch.autograd.grad(x.abs().pow(2).sum(), values)
            assert relative_error(gradient, expected[which]) < 1e-10

    in_threads(work, count)
    stats = system.stats
    assert stats.factorizations + stats.reuses == count * rounds
    assert stats.matrices == stats.factorizations and stats.solves == 2 * count * rounds
    assert stats.analyses == 1 and stats.refactorizations + stats.repivots < stats.factorizations


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(150, 150), (14, 14, 14)], ids=["2-D", "3-D"])
def test_the_result_does_not_depend_on_the_number_of_threads(dtype, shape):
    """Bit for bit: solutions, gradients; whether the option says so or torch's own setting."""
    problem = grid_problem(shape, dtype, (2,))
    b, g, results = problem.rhs(problem.n), problem.rhs(2, problem.n, seed=3), []
    before = torch.get_num_threads()
    try:
        for option, setting in [(1, 2), (None, 1), (2, 1), (None, 2), (4, 1), (None, 3)]:
            torch.set_num_threads(setting)
            values = leaf(problem.values)
            x = problem.system(threads=option).solve(values, b)
            (gradient,) = torch.autograd.grad(x, values, g)  # g is given: torch's own kernels do depend on threads
            results.append((x.detach(), gradient))
    finally:
        torch.set_num_threads(before)
    for x, gradient in results[1:]:
        assert torch.equal(x, results[0][0]) and torch.equal(gradient, results[0][1])
    y = problem.system().matmul(problem.values, x)
    assert relative_error(y, b.expand(2, -1)) < 1000 * torch.finfo(dtype).eps


@some_cases
def test_threads_share_a_factor(case):
    problem = make(case, 80, density=0.05)
    system = problem.system()
    factor = system.factorize(problem.values)
    rhs = [problem.rhs(80, k + 1, seed=k) for k in range(4)]

    def work(k):
        expected = factor.solve(rhs[k])
        for _ in range(50):
            assert torch.equal(factor.solve(rhs[k]), expected)

    in_threads(work, 4)
    assert system.stats.factorizations == 1 and system.stats.solves == 4 * 51


@pytest.mark.parametrize("case", [SPD, find_case("auto"), find_case("hermitian")], ids=str)
def test_threads_meet_at_a_new_system(case):
    """One analysis, whoever comes first; nobody sees it half made."""
    problem = make(case, 200, density=0.01)
    b = problem.rhs(200)
    for _ in range(10):
        spcache.plan_cache.clear()
        system = problem.system()
        in_threads(lambda k, system=system: system.solve(problem.values, b).sum().item(), 4)
        assert system.stats.analyses == 1
        systems = [problem.system() for _ in range(4)]
        spcache.plan_cache.clear()
        in_threads(lambda k, systems=systems: systems[k].solve(problem.values, b), 4)
        assert sum(s.stats.analyses for s in systems) == 1


def test_threads_share_the_cache_of_solve():
    problem = make(GENERAL, 40, (4,))
    matrices = [torch.sparse_coo_tensor(problem.indices, v, (40, 40)).coalesce() for v in problem.values]
    b = problem.rhs(40)

    def work(k):
        for r in range(30):
            e = (k + r) % 4
            x = spcache.solve(matrices[e], b, kind="general")
            assert relative_error(x, problem.reference(problem.values[e], b)) < 1e-11
            if r % 10 == 9:
                spcache.plan_cache.clear() if k else spcache.plan_cache.trim()

    in_threads(work, 4)


def test_orderings_in_several_threads():
    """METIS may not be entered twice at a time: same ordering as alone."""
    problems = [make(SPD, 300, seed=k, density=0.01) for k in range(4)]
    alone = []
    for problem in problems:
        system = problem.system(ordering="metis")
        system.solve(problem.values, problem.rhs(300))
        alone.append((system.stats.nnz_factor, system.stats.flops))
    for _ in range(3):
        spcache.plan_cache.clear()

        def work(k):
            system = problems[k].system(ordering="metis")
            system.solve(problems[k].values, problems[k].rhs(300))
            assert (system.stats.nnz_factor, system.stats.flops) == alone[k]

        in_threads(work, 4)


def test_a_forked_child_makes_its_own_workers(run_python):
    """Also while another thread of the parent is at work with the parent's."""
    assert run_python(FORK).strip() == "5"


FORK = """
import os, threading, warnings
import torch
from spcache import SparseSystem
warnings.simplefilter("ignore")
n = 700  # one dense front, which threads share
i, j = torch.tril_indices(n, n)
indices, values = torch.stack([i, j]), torch.where(i == j, 2.0 * n, 1.0).double()
b = torch.ones(n, dtype=torch.float64)
def solve():
    return SparseSystem(indices, n, kind="spd", triangle="lower", threads=3).solve(values, b)
expected, stop = solve(), threading.Event()
def work():
    while not stop.is_set():
        solve()
busy = threading.Thread(target=work)
busy.start()
good = 0
for _ in range(5):
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(solve(), expected) else 1)
    good += os.waitpid(child, 0)[1] == 0
stop.set()
busy.join()
print(good)
"""
