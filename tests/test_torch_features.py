"""What torch offers around a solve, in eager mode: checkpoints, contexts, hooks, modules, optimizers, workers, threads,
and torch.func around modules. Counters show what each costs."""

import contextlib
import copy
import io
import itertools
import weakref

import pytest
import torch
from cases import CASES, GENERAL, SPD, every_double_case, find_case, make, relative_error
from test_threads import in_threads
from torch.autograd.graph import allow_mutation_on_saved_tensors, save_on_cpu, saved_tensors_hooks
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, stack_module_state, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import CheckpointError, checkpoint

import spcache
from spcache import SparseSystem

HERMITIAN = find_case("hermitian", torch.complex128)
each_engine = pytest.mark.parametrize("case", [SPD, GENERAL], ids=str)
some_cases = pytest.mark.parametrize("case", [SPD, GENERAL, find_case("auto"), HERMITIAN], ids=str)
each_mode = pytest.mark.parametrize("use_reentrant", [False, True], ids=["saved-tensors", "reentrant"])
LOWER = find_case("spd", torch.float64, "lower")  # steps of an optimizer would leave the pairs of SPD unequal
trainable = pytest.mark.parametrize("case", [LOWER, GENERAL], ids=str)


def leaf(t):
    return t.detach().clone().requires_grad_()


def close(actual, expected, tolerance=1e-10):
    """Tensors, or tuples of them, agree in shape and number."""
    if isinstance(expected, tuple | list):
        assert len(actual) == len(expected)
        for a, e in zip(actual, expected, strict=True):
            close(a, e, tolerance)
    else:
        assert actual.dtype == expected.dtype and relative_error(actual, expected) < tolerance


def counts(system):
    """(factorizations, reuses, solves) so far."""
    stats = system.stats
    return stats.factorizations, stats.reuses, stats.solves


def square(x):
    """A loss whose derivatives of all orders matter."""
    return x.abs().pow(2).sum() + x.abs().pow(4).sum()


class Net(torch.nn.Module):
    """A right-hand side in, a solution out; the values are the parameter."""

    def __init__(self, problem, values=None, system=None):
        super().__init__()
        self.values = torch.nn.Parameter((problem.values if values is None else values).clone())
        self.system = problem.system() if system is None else system

    def forward(self, b):
        return self.system.solve(self.values, b)


# --- checkpoint -----------------------------------------------------------------------------------------------------------


@each_engine
@each_mode
def test_a_checkpoint_finds_equal_values_again(case, use_reentrant):
    """The recomputation compares the values and solves; it does not factorize."""
    problem = make(case, 7)
    system, values, b, g = problem.system(), leaf(problem.values), leaf(problem.rhs(7)), problem.rhs(7, seed=3)
    x = checkpoint(system.solve, values, b, use_reentrant=use_reentrant)
    assert counts(system) == (1, 0, 1)
    x.backward(g)
    assert counts(system) == (1, 1, 3)
    close((values.grad, b.grad), torch.autograd.grad(problem.reference(values, b), (values, b), g))


@each_mode
def test_a_checkpoint_of_two_systems(use_reentrant):
    """Each holds its own latest factor, so that neither takes the other's away."""
    first, second = make(SPD, 7), make(GENERAL, 7)
    systems = one, two = first.system(), second.system()
    u, v, b, g = leaf(first.values), leaf(second.values), leaf(first.rhs(7)), first.rhs(7, seed=3)
    checkpoint(lambda u, v, b: two.solve(v, one.solve(u, b)), u, v, b, use_reentrant=use_reentrant).backward(g)
    assert [counts(s) for s in systems] == [(1, 1, 3)] * 2
    close((u.grad, v.grad, b.grad), torch.autograd.grad(second.reference(v, first.reference(u, b)), (u, v, b), g))


@each_engine
@each_mode
def test_nested_checkpoints(case, use_reentrant):
    problem = make(case, 7, (2,))
    systems = inner, outer = problem.system(), problem.system()
    (u, v), b, g = map(leaf, problem.values), leaf(problem.rhs(7)), problem.rhs(7, seed=3)

    def chain(u, v, b):
        return outer.solve(v, checkpoint(inner.solve, u, b, use_reentrant=use_reentrant))

    checkpoint(chain, u, v, b, use_reentrant=use_reentrant).backward(g)
    close((u.grad, v.grad, b.grad), torch.autograd.grad(problem.reference(v, problem.reference(u, b)), (u, v, b), g))
    # The inner one is found once more for each level that recomputes it.
    assert [counts(s) for s in systems] == [(1, 2, 4), (1, 1, 3)]


@each_engine
def test_second_derivatives_through_a_checkpoint(case):
    problem = make(case, 5)
    values, b = leaf(problem.values), leaf(problem.rhs(5))

    def second(solve):
        first = torch.autograd.grad(square(solve(values, b)), (values, b), create_graph=True)
        return torch.autograd.grad(sum(t.pow(2).sum() for t in first), (values, b))

    system = problem.system()
    close(second(lambda v, b: checkpoint(system.solve, v, b, use_reentrant=False)), second(problem.reference))
    assert system.stats.factorizations == 1


@each_engine
def test_a_checkpoint_sees_what_a_solve_saves(case):
    """torch compares what the recomputation saves with what the first pass saved, by shape and dtype."""
    problem = make(case, 5)
    system, values, b = problem.system(), leaf(problem.values), problem.rhs(5, 1)
    widths = iter([1, 1, 1, 2])

    def solve(values):
        return system.solve(values, b.expand(-1, next(widths))).sum()

    checkpoint(solve, values, use_reentrant=False, determinism_check="default").backward()
    close(values.grad, torch.autograd.grad(problem.reference(values, b).sum(), values)[0])
    with pytest.raises(CheckpointError, match="different metadata"):
        checkpoint(solve, values, use_reentrant=False, determinism_check="default").backward()


@each_engine
@each_mode
def test_a_checkpoint_with_keep_factor_false_holds_nothing(case, use_reentrant):
    """Between the passes there is no factor at all, which is what a checkpoint is for."""
    problem = make(case, 7)
    system, values, b = problem.system(keep_factor=False), leaf(problem.values), problem.rhs(7)
    x = checkpoint(system.solve, values, b, use_reentrant=use_reentrant)
    assert counts(system) == (1, 0, 1)
    assert all(pool._latest() is None for pool in system._factorizer._pools.values())
    x.sum().backward()
    assert counts(system) == (3, 0, 3)  # forward, again, backward
    close(values.grad, torch.autograd.grad(problem.reference(values, b).sum(), values)[0])


# --- saved tensors --------------------------------------------------------------------------------------------------------


@some_cases
def test_second_derivatives_through_saved_tensor_hooks(case):
    """What a solve saves goes through the hooks, in both passes, and comes back connected to its history."""
    problem = make(case, 5)
    system, values, b, packed = problem.system(), leaf(problem.values), leaf(problem.rhs(5)), []

    def pack(t):
        packed.append(tuple(t.shape))
        return t.detach().numpy().copy()

    def second(solve):
        first = torch.autograd.grad(square(solve(values, b)), (values, b), create_graph=True)
        return torch.autograd.grad(sum(t.abs().pow(2).sum() for t in first), (values, b))

    with saved_tensors_hooks(pack, torch.from_numpy):
        x = system.solve(values, b)
        assert sorted(packed) == sorted([values.shape, x.shape])
        actual = second(system.solve)
    close(actual, second(problem.reference))
    assert system.stats.factorizations == 1


@each_engine
def test_save_on_cpu(case):
    problem = make(case, 7, (2,))
    system, values, b, g = problem.system(), leaf(problem.values), leaf(problem.rhs(2, 7)), problem.rhs(2, 7, seed=3)
    with save_on_cpu():
        x = system.solve(values, b)
        y = system.factorize(values).solve(x)
    actual = torch.autograd.grad(y, (values, b), g)
    close(actual, torch.autograd.grad(problem.reference(values, problem.reference(values, b)), (values, b), g))
    assert counts(system) == (1, 1, 4)


@each_engine
def test_mutation_of_saved_tensors(case):
    """torch clones what is changed in place; the factor is of the values as they were."""
    problem = make(case, 7)
    system, values, b, g = problem.system(), leaf(problem.values), problem.rhs(7), problem.rhs(7, seed=3)
    expected = torch.autograd.grad(problem.reference(values, b), values, g)[0]
    with allow_mutation_on_saved_tensors():
        x = system.solve(values, b)
        with torch.no_grad():
            values.mul_(2)
            x.zero_()
        close(torch.autograd.grad(x, values, g)[0], expected)
    assert system.stats.factorizations == 1


# --- grad modes -----------------------------------------------------------------------------------------------------------


@each_engine
def test_enable_grad_inside_no_grad(case):
    problem = make(case, 7)
    system, values, b = problem.system(), leaf(problem.values), problem.rhs(7)
    with torch.no_grad():
        x, factor = system.solve(values, b), system.factorize(values)
        assert not x.requires_grad and not system.matmul(values, x).requires_grad
        with torch.enable_grad():
            y, z = system.solve(values, b), factor.solve(b)  # also by a factor made without
            assert y.requires_grad and z.requires_grad
        # torch.func differentiates whatever it is told to, under no_grad too
        first = grad(lambda v: system.solve(v, b).sum())(values)
    expected = torch.autograd.grad(problem.reference(values, b).sum(), values)[0]
    for actual in (first, *(torch.autograd.grad(t.sum(), values)[0] for t in (y, z))):
        close(actual, expected)
    torch.set_grad_enabled(False)
    try:
        assert not factor.solve(b).requires_grad
    finally:
        torch.set_grad_enabled(True)
    assert system.stats.factorizations == 1


@each_engine
def test_no_grad_keeps_no_factor_but_the_latest(case):
    problem = make(case, 7, (3,))
    system, b = problem.system(), problem.rhs(7)
    for mode in (torch.no_grad, torch.inference_mode, contextlib.nullcontext):
        solutions, factors = [], []
        with mode():
            for v in problem.values:
                solutions.append(system.solve(leaf(v), b))
                factors.append(weakref.ref(system._factorizer._held))
        alive = [factor() is not None for factor in factors]
        assert alive == ([True] * 3 if mode is contextlib.nullcontext else [False, False, True])


@each_engine
def test_inference_mode(case):
    """What is made inside serves inside, and outside where torch lets it: a right-hand side, a Factor."""
    problem = make(case, 7)
    system, b, g = problem.system(), leaf(problem.rhs(7)), problem.rhs(7, seed=3)
    values = leaf(problem.values)
    with torch.inference_mode():
        made, rhs = problem.values.clone(), problem.rhs(7)
        inner = system.factorize(made)
        for x in (system.solve(made, rhs), inner.solve(rhs), system.solve_ex(made, rhs)[0]):
            assert x.is_inference() and not x.requires_grad
            close(x, problem.reference(problem.values, problem.rhs(7)))
        outer = system.factorize(values)  # values from outside: a normal Factor
    expected = torch.autograd.grad(problem.reference(values, b), (values, b), g)
    close(torch.autograd.grad(outer.solve(b), (values, b), g), expected)
    # Nothing of an inference tensor is needed for the gradient of the other argument.
    for x in (system.solve(made, b), inner.solve(b)):
        close(torch.autograd.grad(x, b, g)[0], expected[1])
    close(torch.autograd.grad(system.solve(values, rhs), values, g)[0], expected[0])
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        system.matmul(made, b)
    assert counts(system)[0] == 1


@each_engine
def test_transforms_in_inference_mode(case):
    """Right, or refused: older torch makes no gradients there, and returns zeros for functions of its own."""
    problem = make(case, 7)
    system, b = problem.system(), problem.rhs(7)
    with torch.inference_mode():
        values = problem.values.clone()
        if grad(lambda t: t.pow(2).sum())(torch.ones(1)):
            first = grad(lambda v: system.solve(v, b).sum())(values)
        else:
            with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
                grad(lambda v: system.solve(v, b).sum())(values)
            return
    values = leaf(problem.values)
    close(first, torch.autograd.grad(problem.reference(values, b).sum(), values)[0])


@each_engine
def test_a_factor_of_inference_tensors_that_changed(case):
    """They have no version counter; their numbers are compared like all others."""
    problem = make(case, 7)
    system, b = problem.system(), problem.rhs(7)
    with torch.inference_mode():
        values = problem.values.clone()
        factor = system.factorize(values)
        close(factor.solve(b), problem.reference(problem.values, b))
        values.mul_(2)
        with pytest.raises(RuntimeError, match="values were modified after factorize"):
            factor.solve(b)
        close(system.solve(values, b), problem.reference(problem.values, b) / 2)


# --- default dtype and autocast -------------------------------------------------------------------------------------------


def everything(problem, b):
    """Solutions, status, products, and derivatives by every front end."""
    system, values, b = problem.system(), leaf(problem.values), leaf(b)
    x, info = system.solve_ex(values, b)
    y = system.factorize(values).solve(system.solve(values, b), adjoint=True)
    z = system.matmul(values, x)
    first = torch.autograd.grad(square(y) + square(z), (values, b), create_graph=True)
    second = torch.autograd.grad(sum(square(t) for t in first), (values, b))
    with torch.autograd.forward_ad.dual_level():
        dual = system.solve(torch.autograd.forward_ad.make_dual(values.detach(), problem.values), b)
        tangent = torch.autograd.forward_ad.unpack_dual(dual).tangent
    out = [x, info, y, z, *first, *second, tangent]
    if not values.is_complex():
        out += [*jacrev(system.solve, (0, 1))(values.detach(), b.detach()), jacfwd(system.matmul)(values.detach(), b.detach())]  # fmt: skip
    return out


@pytest.mark.parametrize("case", [c for c in CASES if c.kind in ("spd", "general") and not c.triangle], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_default_dtype_does_not_matter(case, dtype):
    problem = make(case, 4, (2,))
    b = problem.rhs(2, 4)
    expected = everything(problem, b)
    torch.set_default_dtype(dtype)
    try:
        actual = everything(problem, b)
    finally:
        torch.set_default_dtype(torch.float32)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype and torch.equal(a, e)
    assert {t.dtype for t in actual} == {case.dtype, torch.int32}


@pytest.mark.parametrize("case", [c for c in CASES if c.kind in ("spd", "general") and not c.triangle], ids=str)
def test_autocast_leaves_dtypes_alone(case):
    """Everything that is a solve or a product keeps its precision, in both passes and under torch.func: same bits."""
    problem = make(case, 4)
    b = problem.rhs(4)
    expected = everything(problem, b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.bfloat16  # it is on
        actual = everything(problem, b)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype and torch.equal(a, e)


@each_engine
def test_autocast_of_a_layer_before_the_solve(case):
    """What autocast made of a layer is refused, by name and with the remedy; converted it works, both ways."""
    problem = make(case.with_dtype(torch.float32), 7)
    system, layer, data = problem.system(), torch.nn.Linear(7, 7), torch.randn(7)
    values = leaf(problem.values)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        b = layer(data)
        with pytest.raises(
            TypeError,
            match=r"b must have the dtype of values, torch.float32, got torch.bfloat16; convert it: b.to\(values.dtype\)",
        ):
            system.solve(values, b)
        with pytest.raises(TypeError, match="x must have the dtype of values, torch.float32, got torch.bfloat16"):
            system.matmul(values, b)
        with pytest.raises(TypeError, match="b must have the dtype of values, torch.float32, got torch.bfloat16"):
            grad(lambda v: system.solve(v, layer(data)).sum())(values.detach())
        x = system.solve(values, b.to(values.dtype))
        loss = square(x)
    assert b.dtype == torch.bfloat16 and x.dtype == torch.float32
    loss.backward()
    assert values.grad.dtype == torch.float32 and layer.weight.grad.dtype == torch.float32
    expected = torch.autograd.grad(square(problem.reference(values, b.detach().float())), values)[0]
    assert relative_error(values.grad, expected) < 1e-4
    for half in (torch.float16, torch.bfloat16):
        for call in (system.solve, system.solve_ex, system.matmul, lambda v, b: system.factorize(v)):
            with pytest.raises(
                TypeError, match=f"values must be float32, float64, complex64 or complex128, got {half}"
            ):
                call(problem.values.to(half), b.to(half))


# --- anomaly mode ---------------------------------------------------------------------------------------------------------

anomaly = pytest.mark.filterwarnings(
    "ignore:Anomaly Detection has been enabled:UserWarning", "ignore:Error detected in:UserWarning"
)


@anomaly
@some_cases
def test_anomaly_mode(case):
    """No false alarm in either order of derivatives, by any front end."""
    problem = make(case, 5)
    b = problem.rhs(5)
    expected = everything(problem, b)
    with torch.autograd.detect_anomaly():
        actual = everything(problem, b)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)


@anomaly
@each_engine
@pytest.mark.parametrize("keep_factor", [True, False])
def test_anomaly_mode_lets_a_masked_loss_pass(case, keep_factor):
    """The element that failed is NaN, and its gradients are zeros all the way, twice."""
    problem = make(case, 5, (2,))
    system, b = problem.system(keep_factor=keep_factor), leaf(problem.rhs(5))
    values = leaf(torch.stack([problem.values[0], torch.zeros_like(problem.values[1])]))
    with torch.autograd.detect_anomaly():
        x, info = system.solve_ex(values, b)
        assert info[0] == 0 and info[1] > 0
        first = torch.autograd.grad(square(x[0]), (values, b), create_graph=True)
        sum(square(t) for t in first).backward()
    assert not values.grad[1].any() and values.grad[0].all() and b.grad.all()
    good, rhs = leaf(problem.values[0]), leaf(b)
    first = torch.autograd.grad(square(problem.reference(good, rhs)), (good, rhs), create_graph=True)
    sum(square(t) for t in first).backward()
    close((values.grad[0], b.grad), (good.grad, rhs.grad))


@anomaly
@each_engine
def test_anomaly_mode_names_the_solve(case):
    """A gradient that is NaN is reported, with the call of this forward pass."""
    problem = make(case, 5)
    system, values, b = problem.system(), leaf(problem.values), leaf(problem.rhs(5))
    g = torch.full_like(b, torch.nan)
    with torch.autograd.detect_anomaly():
        x = system.solve(values, b)
        with pytest.raises(RuntimeError, match="Function '_SolveBackward' returned nan values in its 0th output"):
            x.backward(g)
    with torch.autograd.detect_anomaly(check_nan=False):
        system.solve(values, b).backward(g)
    assert values.grad.isnan().all() and b.grad.isnan().all()


# --- workers of a DataLoader ----------------------------------------------------------------------------------------------

DATASET = """
import os, torch
from cases import GENERAL, SPD, make, relative_error

class Matrices(torch.utils.data.Dataset):
    "Solutions and gradients, made in the worker."

    def __init__(self, problem):
        self.problem, self.system = problem, problem.system()

    def __len__(self):
        return len(self.problem.values)

    def __getitem__(self, k):
        values, b = self.problem.values[k].clone().requires_grad_(), self.problem.rhs(self.problem.n)
        x = self.system.solve(values, b)
        (gradient,) = torch.autograd.grad(x.sum(), values)
        stats = self.system.stats
        return k, x.detach(), gradient, torch.tensor([os.getpid(), stats.factorizations, stats.analyses])

def check(problem, method):
    dataset = Matrices(problem)
    dataset.system.solve(problem.values[0], problem.rhs(problem.n))  # the parent has a plan and a factor
    loader = torch.utils.data.DataLoader(dataset, batch_size=3, num_workers=2, multiprocessing_context=method)
    workers, seen = set(), []
    for ks, xs, gradients, notes in loader:
        for k, x, gradient, note in zip(ks.tolist(), xs, gradients, notes.tolist()):
            values, b = problem.values[k].clone().requires_grad_(), problem.rhs(problem.n)
            expected = problem.reference(values, b)
            assert relative_error(x, expected) < 1e-12
            assert relative_error(gradient, torch.autograd.grad(expected.sum(), values)[0]) < 1e-11
            pid, factorizations, analyses = note
            assert pid != os.getpid() and 1 <= factorizations <= 7 and analyses == 1
            workers.add(pid), seen.append(k)
    assert sorted(seen) == list(range(len(dataset))) and len(workers) == 2
    assert dataset.system.stats.factorizations == 1  # the parent's
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_data_loader(method, run_python, tmp_path):
    """A dataset that holds a system solves in its workers: with the parent's plan after a fork, with its own otherwise."""
    (tmp_path / "dataset.py").write_text(DATASET)
    names = ["SPD", "GENERAL"] if method == "fork" else ["SPD"]
    run_python(f"""
import dataset
if __name__ == "__main__":
    for name in {names}:
        dataset.check(dataset.make(getattr(dataset, name), 20, (12,), density=0.1), "{method}")
""")


# --- modules --------------------------------------------------------------------------------------------------------------


@each_engine
def test_conversions_of_a_module(case):
    """The system has no dtype and no device of its own; its factor follows the values."""
    problem = make(case, 7)
    net, b = Net(problem), problem.rhs(7)
    expected = problem.reference(problem.values, b)
    for convert, dtype, tolerance in [
        (lambda n: n.to(torch.float32), torch.float32, 1e-4),
        (lambda n: n.double(), torch.float64, 1e-5),  # what float32 left of the values
        (lambda n: n.to("cpu"), torch.float64, 1e-5),
    ]:
        net = convert(net)
        x = net(b.to(dtype))
        assert x.dtype == net.values.dtype == dtype and relative_error(x, expected) < tolerance
        square(x).backward()
        assert net.values.grad.dtype == dtype
        net.zero_grad()
    assert net.system.stats.analyses == 1 and counts(net.system) == (2, 1, 6)  # .to("cpu") changed nothing
    with pytest.raises(TypeError, match="values must be float32, .* got torch.bfloat16"):
        Net(problem).bfloat16()(b.bfloat16())
    with pytest.raises(spcache.EngineUnavailableError, match="values are on meta"):
        Net(problem).to("meta")(b)


@each_engine
def test_state_dict(case, tmp_path):
    """It has the parameters only; the pattern belongs to the code that makes the module."""
    problem = make(case, 7, (2,))
    net, other, b = Net(problem, problem.values[0]), Net(problem, problem.values[1]), problem.rhs(7)
    x = net(b)
    assert list(net.state_dict()) == ["values"] and not list(net.buffers())
    torch.save(net.state_dict(), tmp_path / "state.pt")
    other(b)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True), strict=True)
    close(other(b), x)  # the factor that it held was of other values
    assert other.system.stats.factorizations == 2
    other.load_state_dict(net.state_dict(), assign=True)
    close(other(b), x)
    assert other.system.stats.factorizations == 2


@some_cases
def test_a_module_is_saved_and_loaded_whole(case):
    problem = make(case, 7)
    net, b, file = Net(problem), problem.rhs(7), io.BytesIO()
    x = net(b)
    torch.save(net, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    assert torch.equal(other(b), x) and counts(other.system) == (1, 0, 1)
    square(other(b)).backward()
    assert net.values.grad is None
    close(other.values.grad, torch.autograd.grad(square(problem.reference(net.values, b)), net.values)[0])


@every_double_case
def test_a_system_is_loaded_as_weights_only(case):
    """Its state is tensors, strings and numbers: nothing but the class has to be declared safe."""
    problem = make(case, 9)
    system, b, file = problem.system(keep_factor=False), problem.rhs(9), io.BytesIO()
    x = system.solve(problem.values, b)
    torch.save({"system": system, "values": problem.values}, file)
    file.seek(0)
    with pytest.raises(Exception, match="Weights only load failed(.|\n)*add_safe_globals(.|\n)*SparseSystem"):
        torch.load(file, weights_only=True)
    file.seek(0)
    spcache.plan_cache.clear()
    with torch.serialization.safe_globals([SparseSystem]):
        loaded = torch.load(file, weights_only=True)
    other = loaded["system"]
    assert torch.equal(other.solve(loaded["values"], b), x)
    assert other._factorizer.options == system._factorizer.options and repr(other) == repr(system)
    assert other.stats.ordering == system.stats.ordering and other.stats.nnz_factor == system.stats.nnz_factor


def test_a_file_that_lies_is_refused():
    """What is loaded is validated as what is constructed: native code never sees a wrong index or ordering."""
    problem = make(SPD, 9)
    system = problem.system()
    system.solve(problem.values, problem.rhs(9))
    good = system.__getstate__()
    ordering = good["orderings"]["spd"][1]
    bad = [
        ({"indices": good["indices"][:-4]}, ValueError, "reshape"),
        ({"indices": good["indices"][:-1]}, ValueError, "size"),
        ({"shape": (4, 4)}, ValueError, "outside"),
        ({"options": {**good["options"], "kind": "lu"}}, ValueError, "kind must be one of"),
        ({"orderings": {"spd": ("amd", ordering[:-4])}}, ValueError, "perm"),
        ({"orderings": {"spd": ("amd", ordering[:-4] + ordering[:4])}}, ValueError, "not a permutation"),
        ({"orderings": {"spd": ("amd", ordering[:-4] + b"\xff" * 4)}}, ValueError, "not a permutation"),
    ]
    for change, error, message in bad:
        spcache.plan_cache.clear()
        other = object.__new__(SparseSystem)
        with pytest.raises(error, match=message):
            other.__setstate__({**good, **change})
            other.solve(problem.values, problem.rhs(9))
    other = object.__new__(SparseSystem)
    other.__setstate__(good)
    close(other.solve(problem.values, problem.rhs(9)), problem.reference(problem.values, problem.rhs(9)))


def test_values_are_a_parameter_or_a_subclass():
    """A subclass of Tensor without behaviour of its own is a Tensor; what comes out is of one of the two kinds."""

    class Named(torch.Tensor):
        pass

    problem = make(GENERAL, 5)
    system, b = problem.system(), problem.rhs(5)
    inputs = leaf(problem.values), leaf(b)
    expected = torch.autograd.grad(square(problem.reference(*inputs)), inputs)
    for kind in (torch.nn.Parameter, lambda t: leaf(t).as_subclass(Named)):
        for values, rhs in (
            (kind(problem.values), leaf(b)),
            (leaf(problem.values), kind(b)),
            (kind(problem.values), kind(b)),
        ):
            for x in (system.solve(values, rhs), system.factorize(values).solve(rhs), system.solve_ex(values, rhs)[0]):
                assert type(x) in (torch.Tensor, Named)
                close(torch.autograd.grad(square(x), (values, rhs), create_graph=True), expected)
            close(system.matmul(values, rhs), problem.matrix() @ b)
    stack = torch.stack([problem.values, 2 * problem.values]).as_subclass(Named)
    close(vmap(system.solve, (0, None))(stack, b)[1], problem.reference(problem.values, b) / 2)
    close(grad(lambda v: square(system.solve(v, b)))(problem.values.as_subclass(Named)), expected[0])


# --- optimizers -----------------------------------------------------------------------------------------------------------


def fit(optimizer, case, steps=20, **options):
    """Fits values to a solution. (losses, changes of the values between calls of the closure, calls, system)."""
    problem = make(case, 8)
    net, b = Net(problem), problem.rhs(8, 3)
    target = problem.reference(problem.values * (1.5 + torch.rand_like(problem.values)), b)
    chosen, losses, seen = optimizer(net.parameters(), **options), [], []

    def closure():
        chosen.zero_grad()
        loss = (net(b) - target).pow(2).sum()
        loss.backward()
        seen.append(net.values.detach().clone())
        return loss

    for _ in range(steps):
        losses.append(chosen.step(closure).item())
    changes = sum(not torch.equal(u, v) for u, v in itertools.pairwise(seen))
    return losses, changes, len(seen), net.system


@trainable
def test_adam(case):
    losses, changes, calls, system = fit(torch.optim.Adam, case, lr=1e-2)
    assert losses[-1] < 0.7 * losses[0] and all(b < a for a, b in itertools.pairwise(losses))
    assert calls == 20 and changes == 19
    assert counts(system) == (20, 0, 40) and system.stats.analyses == 1


@trainable
@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
def test_lbfgs(case, line_search):
    """Its closure is called several times a step; where the values are those of the call before nothing is factorized."""
    losses, changes, calls, system = fit(
        torch.optim.LBFGS, case, lr=1 if line_search else 0.1, max_iter=5, line_search_fn=line_search
    )
    assert losses[-1] < 0.1 * losses[0]
    assert calls > 40
    assert counts(system) == (1 + changes, calls - 1 - changes, 2 * calls) and system.stats.analyses == 1


# --- threads --------------------------------------------------------------------------------------------------------------


@each_engine
def test_replicas_in_threads(case):
    """As DataParallel has them: each thread with a copy of the module and its share of the data."""
    problem = make(case, 40, density=0.05)
    net, data = Net(problem), problem.rhs(4, 40)
    net(data[0])
    replicas = [copy.deepcopy(net) for _ in range(4)]

    def work(k):
        for _ in range(10):
            replicas[k].zero_grad()
            square(replicas[k](data[k])).backward()

    in_threads(work, 4)
    for replica, b in zip(replicas, data, strict=True):
        values = leaf(problem.values)
        close(replica.values.grad, torch.autograd.grad(square(problem.reference(values, b)), values)[0])
        assert counts(replica.system) == (1, 9, 20) and replica.system.stats.analyses == 0
    assert net.values.grad is None and counts(net.system) == (1, 0, 1)


@trainable
def test_replicas_in_threads_share_a_system(case):
    """Each with values of its own, and steps that change them."""
    problem = make(case, 40, (4,), density=0.05)
    system, b = problem.system(), problem.rhs(40)
    replicas = [Net(problem, v, system) for v in problem.values]
    optimizers = [torch.optim.SGD(r.parameters(), lr=1e-3) for r in replicas]

    def work(k):
        for _ in range(10):
            optimizers[k].zero_grad()
            square(replicas[k](b)).backward()
            optimizers[k].step()

    in_threads(work, 4)
    for replica, values in zip(replicas, problem.values, strict=True):
        alone = Net(problem, values)
        optimizer = torch.optim.SGD(alone.parameters(), lr=1e-3)
        for _ in range(10):
            optimizer.zero_grad()
            square(alone(b)).backward()
            optimizer.step()
        assert torch.equal(replica.values, alone.values) or relative_error(replica.values, alone.values) < 1e-12
    assert counts(system) == (40, 0, 80)


@each_engine
def test_backward_from_several_threads(case):
    """Graphs that share a leaf, and one node that several threads go through."""
    problem = make(case, 40, density=0.05)
    system, values, weights = problem.system(), leaf(problem.values), problem.rhs(4, 40)
    shared = system.solve(values, problem.rhs(40))
    losses = [(shared * w).sum() + square(system.solve(values, w)) for w in weights]
    in_threads(lambda k: losses[k].backward(retain_graph=True), 4)
    v = leaf(problem.values)
    x = problem.reference(v, problem.rhs(40))
    expected = torch.autograd.grad(sum((x * w).sum() + square(problem.reference(v, w)) for w in weights), v)[0]
    close(values.grad, expected)
    assert counts(system) == (1, 4, 5 + 8)


DDP = """
import os, pathlib, signal, time, torch
from cases import GENERAL, find_case, make, relative_error
from torch.nn.parallel import DistributedDataParallel

class Net(torch.nn.Module):
    def __init__(self, problem):
        super().__init__()
        self.values, self.system = torch.nn.Parameter(problem.values.clone()), problem.system()

    def forward(self, b):
        return self.system.solve(self.values, b)

def work(rank, path):
    signal.alarm(60)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    for case in (find_case("spd", triangle="lower"), GENERAL):
        problem = make(case, 7)
        data, net = problem.rhs(2, 7), Net(problem)
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-2)
        model, values = DistributedDataParallel(net), problem.values.clone()
        for _ in range(3):
            optimizer.zero_grad()
            model(data[rank]).pow(2).sum().backward()
            values.requires_grad_()
            loss = sum(problem.reference(values, b).pow(2).sum() for b in data) / 2
            (gradient,) = torch.autograd.grad(loss, values)
            assert relative_error(net.values.grad, gradient) < 1e-10
            values = (values - 1e-2 * gradient).detach()
            optimizer.step()
        assert net.system.stats.factorizations == 3 and net.system.stats.analyses == 1
        assert relative_error(net.values, values) < 1e-12
    pathlib.Path(f"done{rank}").touch()
    while not pathlib.Path(f"done{1 - rank}").exists():
        time.sleep(0.01)
    os._exit(0)  # a DistributedDataParallel that dies may wait for a thread of gloo that waits for Python
"""


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_distributed_data_parallel(run_python, tmp_path):
    """Two processes average their gradients over gloo; they meet at a file."""
    (tmp_path / "ddp.py").write_text(DDP)
    run_python(f"""
import ddp, torch
torch.set_num_threads(1)
torch.multiprocessing.start_processes(ddp.work, ({str(tmp_path / "store")!r},), nprocs=2, start_method="fork")
""")  # fmt: skip
    assert (tmp_path / "done0").exists() and (tmp_path / "done1").exists()


# --- hooks and the graph --------------------------------------------------------------------------------------------------


@each_engine
def test_tensor_hooks(case):
    """On the values, on b, on the solution; what they return is what goes on."""
    problem = make(case, 7)
    system, values, b, seen = problem.system(), leaf(problem.values), leaf(problem.rhs(7)), {}
    x = system.solve(values, b)
    x.retain_grad()
    x.register_hook(lambda g: seen.update(x=g.clone()) or 2 * g)
    values.register_hook(lambda g: seen.update(values=g.clone()) or -g)
    b.register_post_accumulate_grad_hook(lambda t: seen.update(b=t.grad.clone()))
    x.grad_fn.register_prehook(lambda gs: (3 * gs[0],))
    square(x).backward()
    y = problem.reference(u := leaf(problem.values), c := leaf(problem.rhs(7)))
    g = torch.autograd.grad(square(y), y, retain_graph=True)[0]
    close((seen["x"], x.grad), (g, 2 * g))
    expected = torch.autograd.grad(y, (u, c), 6 * g)
    close((seen["values"], values.grad, seen["b"], b.grad), (expected[0], -expected[0], expected[1], expected[1]))


@each_engine
def test_module_hooks(case):
    problem = make(case, 7)
    net, b, seen = Net(problem), leaf(problem.rhs(7)), {}
    net.register_full_backward_pre_hook(lambda module, g: (2 * g[0],))
    net.register_full_backward_hook(lambda module, into, out: seen.update(into=into, out=out) or (-into[0],))
    net.register_forward_hook(lambda module, arguments, x: x + 0)
    net(b).sum().backward()
    values, rhs = leaf(problem.values), leaf(problem.rhs(7))
    expected = torch.autograd.grad(2 * problem.reference(values, rhs).sum(), (values, rhs))
    close((net.values.grad, b.grad), (expected[0], -expected[1]))
    close((*seen["into"], *seen["out"]), (expected[1], torch.full_like(b, 2)))


@each_engine
def test_what_is_asked_of_the_graph(case):
    """retain_graph, a second backward pass without it, allow_unused, materialize_grads, inputs=."""
    problem = make(case, 7)
    system, values, b, unused = problem.system(), leaf(problem.values), leaf(problem.rhs(7)), leaf(problem.values)
    expected = torch.autograd.grad(problem.reference(values, b).sum(), (values, b))
    x = system.solve(values, b)
    with pytest.raises(RuntimeError, match="appears to not have been used in the graph"):
        torch.autograd.grad(x.sum(), (values, unused), retain_graph=True)
    first, nothing = torch.autograd.grad(x.sum(), (values, unused), retain_graph=True, allow_unused=True)
    assert nothing is None
    close(first, expected[0])
    _, zeros = torch.autograd.grad(x.sum(), (b, unused), retain_graph=True, materialize_grads=True)
    assert zeros.shape == unused.shape and not zeros.any()
    x.sum().backward(retain_graph=True, inputs=[b])
    assert values.grad is None
    close(b.grad, expected[1])
    x.sum().backward()
    close((values.grad, b.grad), (expected[0], 2 * expected[1]))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        x.sum().backward()
    assert counts(system) == (1, 0, 6)  # the backward pass that failed did not get so far


@each_engine
def test_multithreading_of_autograd_may_be_off(case):
    problem = make(case, 7)
    system, values, b = problem.system(), leaf(problem.values), problem.rhs(7)
    with torch.autograd.set_multithreading_enabled(False):
        square(system.solve(values, b)).backward()
    close(values.grad, torch.autograd.grad(square(problem.reference(values, b)), values)[0])


# --- torch.autograd.functional --------------------------------------------------------------------------------------------


@each_engine
def test_functional_derivatives(case):
    """Without vectorize, which is the legacy vmap; every product and every full matrix."""
    problem = make(case, 4)
    system, values, b = problem.system(), problem.values, problem.rhs(4)
    v_dot, b_dot, g = torch.randn_like(values), torch.randn_like(b), torch.randn_like(b)

    def results(solve):
        f = torch.autograd.functional

        def loss(v, b):
            return square(solve(v, b))

        return [
            *f.jacobian(solve, (values, b)),
            *f.jacobian(solve, (values, b), create_graph=True),
            *(t for row in f.hessian(loss, (values, b)) for t in row),
            *f.jvp(solve, (values, b), (v_dot, b_dot)),
            *_flat(f.vjp(solve, (values, b), g)),
            *_flat(f.hvp(loss, (values, b), (v_dot, b_dot))),
            *_flat(f.vhp(loss, (values, b), (v_dot, b_dot))),
            f.jacobian(lambda v: solve(v, b), values, strict=True),
        ]

    close(results(system.solve), results(problem.reference))
    close(results(lambda v, b: system.factorize(v).solve(b)), results(problem.reference))
    assert system.stats.factorizations == 1


def _flat(pair):
    return pair[0], *pair[1]


# --- views ----------------------------------------------------------------------------------------------------------------

VIEWS = {  # name -> (the leaf, the view of it), which holds the very numbers of the vector t
    "slice": lambda t: ((z := leaf(torch.stack([t, t + 1], -1).flatten())), z[::2]),
    "transposed": lambda t: ((z := leaf(torch.stack([t + 1, t], -1))), z.T[1]),
    "reshaped": lambda t: ((z := leaf(t.view(1, -1))), z.view(-1)),
    "conjugated": lambda t: ((z := leaf(t.conj().resolve_conj())), z.conj()),
    "negated": lambda t: ((z := leaf(torch.complex(t + 1, -t))), z.conj().imag),
    "real part": lambda t: ((z := leaf(torch.complex(t, t + 1))), z.real),
}


@pytest.mark.parametrize(
    "case, view",
    [(c, v) for c in (SPD, GENERAL) for v in VIEWS if v != "conjugated"]
    + [(c, v) for c in (HERMITIAN, find_case("general", torch.complex128)) for v in list(VIEWS)[:4]],
    ids=str,
)
def test_gradients_through_views(case, view):
    """Of the values and of b, of first and second order; and of incoming gradients that are views too."""
    problem = make(case, 5)
    b = problem.rhs(5)

    def derivatives(solve, matmul):
        (u, values), (c, rhs) = VIEWS[view](problem.values), VIEWS[view](b)
        assert torch.equal(values, problem.values) and torch.equal(rhs, b)
        assert values._is_view() and (values.is_conj(), values.is_neg()) == (view == "conjugated", view == "negated")
        out = []
        for y in (solve(values, rhs), matmul(values, rhs)):
            first = torch.autograd.grad(square(y), (u, c), create_graph=True)
            out += [y, *first, *torch.autograd.grad(sum(square(t) for t in first), (u, c), retain_graph=True)]
            for g in (torch.stack([b, 2 * b], -1)[:, 1].conj(), (-b)._neg_view(), b[0].expand(5)):
                out += torch.autograd.grad(y, (u, c), g, retain_graph=True)
        return out

    system = problem.system()
    close(derivatives(system.solve, system.matmul), derivatives(problem.reference, lambda v, x: problem.matrix(v) @ x))
    assert system.stats.factorizations == 1


@some_cases
def test_gradients_through_expanded_tensors(case):
    """One number for all of b or of the values, one matrix for the batch."""
    problem, diagonal = make(case, 5), torch.arange(5).expand(2, -1)
    equal = SparseSystem(diagonal, 5, **case.options)

    def derivatives(solve, solve_equal):
        values, number, row = leaf(problem.values), leaf(problem.rhs(1).real + 2.0), leaf(problem.rhs(5, 1))
        number = leaf(number.to(case.dtype))
        out = []
        for v, b in [
            (values, number.expand(5)),
            (values.expand(3, -1), number.expand(5)),
            (values.expand(3, -1), number.expand(3, 5)),
            (values.expand(3, -1), row.expand(3, 5, 2)),
            (values.expand(2, 3, -1), row.expand(2, 3, 5, 4)),
        ]:
            x = solve(v, b)
            first = torch.autograd.grad(square(x), (values, number if b.shape[-1] == 5 else row), create_graph=True)
            out += [x, *first, torch.autograd.grad(sum(square(t) for t in first), values)[0]]
        x = solve_equal(number.expand(5), row.squeeze(-1))
        first = torch.autograd.grad(square(x), (number, row), create_graph=True)
        return [*out, x, *first, torch.autograd.grad(sum(square(t) for t in first), number)[0]]

    def solve_equal(values, b):
        return b / (values.real if case is HERMITIAN else values)

    close(derivatives(problem.system().solve, equal.solve), derivatives(problem.reference, solve_equal))


# --- torch.func around modules --------------------------------------------------------------------------------------------


@each_engine
def test_functional_call(case):
    """Other values through the same module; the module's own are not looked at."""
    problem = make(case, 6, (2,))
    net, b = Net(problem, problem.values[0]), problem.rhs(6)
    values = leaf(problem.values[1])
    x = functional_call(net, {"values": values}, (b,))
    close(x, problem.reference(values, b))
    expected = torch.autograd.grad(square(x), values)[0]
    close(expected, torch.autograd.grad(square(problem.reference(values, b)), values)[0])
    assert net.values.grad is None
    by_func = grad(lambda p: square(functional_call(net, p, (b,))))({"values": values.detach()})
    close(by_func["values"], expected)
    assert counts(net.system) == (1, 1, 4)


@some_cases
def test_an_ensemble_is_one_batch(case):
    """Modules that share a system, stacked: one native call factorizes for all of them, two solve."""
    count = 5
    problem = make(case, 6, (count,))
    system, data = problem.system(), problem.rhs(count, 6)
    members = [Net(problem, v, system) for v in problem.values]
    parameters, buffers = stack_module_state(members)
    assert list(parameters) == ["values"] and not buffers
    base = copy.deepcopy(members[0]).to("meta")
    base.system = system

    def loss(parameters, buffers, b):
        return square(functional_call(base, (parameters, buffers), (b,)))

    def spent(call):
        """(factorizations, matrices, solves)"""
        system.clear()
        before = system.stats
        result = call()
        after = system.stats
        return result, tuple(getattr(after, k) - getattr(before, k) for k in ("factorizations", "matrices", "solves"))

    losses, cost = spent(lambda: vmap(loss)(parameters, buffers, data))
    assert cost == (1, count, 1)
    close(losses, torch.stack([square(problem.reference(v, b)) for v, b in zip(problem.values, data, strict=True)]))
    expected = torch.autograd.grad(square(problem.reference(v := leaf(problem.values), data)), v)[0]
    gradients, cost = spent(lambda: vmap(grad(loss))(parameters, buffers, data))
    assert cost == (1, count, 2)
    close(gradients["values"], expected)
    _, cost = spent(lambda: vmap(loss)(parameters, buffers, data).sum().backward())  # stacked parameters are leaves
    assert cost == (1, count, 2)
    close(parameters["values"].grad, expected)
    assert all(m.values.grad is None for m in members)


# --- torch.func, what the nestings cost -----------------------------------------------------------------------------------

N = 4
# name -> (a transform of f(v, b), matrices that it factorizes, where more than one from 3 values; native solves)
NESTINGS = {
    "grad": (lambda f: grad(lambda v, b: square(f(v, b)), (0, 1)), 1, 2),
    "vjp": (lambda f: lambda v, b: vjp(f, v, b)[1](b), 1, 2),
    "jvp": (lambda f: lambda v, b: jvp(f, (v, b), (v.sin(), b.cos())), 1, 2),
    "jacrev": (lambda f: jacrev(f, (0, 1)), 1, 2),
    "jacfwd": (lambda f: jacfwd(f, (0, 1)), 1, 2),
    "jacrev of jacrev": (lambda f: jacrev(jacrev(f)), 1, None),
    "hessian": (lambda f: hessian(lambda v, b: square(f(v, b)), (0, 1)), 1, None),
    "grad of jvp": (lambda f: grad(lambda v, b: square(jvp(f, (v, b), (v.sin(), b.cos()))[1]), (0, 1)), 1, None),
    "jvp of vjp": (lambda f: lambda v, b: jvp(lambda v: vjp(f, v, b)[1](b), (v,), (v.sin(),)), 1, None),
    "vjp of jvp": (lambda f: lambda v, b: vjp(lambda v: jvp(f, (v, b), (v.sin(), b.cos()))[1], v)[1](b), 1, None),
    "vmap": (lambda f: vmap(f), 3, 1),
    "vmap of grad": (lambda f: vmap(grad(lambda v, b: square(f(v, b)), (0, 1))), 3, 2),
    "vmap of jvp": (lambda f: vmap(lambda v, b: jvp(f, (v, b), (v.sin(), b.cos()))), 3, 2),
    "vmap of vjp": (lambda f: vmap(lambda v, b: vjp(f, v, b)[1](b)), 3, 2),
    "vmap of jacrev": (lambda f: vmap(jacrev(f, (0, 1))), 3, 2),
    "vmap of jacfwd": (lambda f: vmap(jacfwd(f, (0, 1))), 3, 2),
    "vmap of jacrev of jacrev": (lambda f: vmap(jacrev(jacrev(f))), 3, None),
    "vmap of hessian": (lambda f: vmap(hessian(lambda v, b: square(f(v, b)))), 3, None),
    "vmap of vmap of grad": (lambda f: lambda v, b: vmap(vmap(grad(lambda v, b: square(f(v, b)))), (0, None))(torch.stack([v, 2 * v]), b), 6, 2),
    "grad of vmap": (lambda f: grad(lambda v, b: square(vmap(f)(v, b)), (0, 1)), 3, 2),
    "jacrev of vmap": (lambda f: jacrev(vmap(f), (0, 1)), 3, 2),
    "jacfwd of vmap": (lambda f: jacfwd(vmap(f), (0, 1)), 3, 2),
    "hessian of vmap": (lambda f: hessian(lambda v, b: square(vmap(f)(v, b))), 3, None),
    "vmap of grad of vmap": (lambda f: lambda v, b: vmap(grad(lambda v, b: square(vmap(f, (None, 0))(v, b))), (0, None))(v, b), 3, 2),
}  # fmt: skip


def _tensors(t):
    return [t] if isinstance(t, torch.Tensor) else [leaf for part in t for leaf in _tensors(part)]


def nest(nesting, case, **options):
    """(system, results by it, results by the dense inverse)"""
    transform, matrices, _ = NESTINGS[nesting]
    batch = (3,) if matrices > 1 else ()
    problem = make(case, N, batch)
    system, b = problem.system(**options), problem.rhs(*batch, N)
    return (system, *(_tensors(transform(solve)(problem.values, b)) for solve in (system.solve, problem.reference)))


@pytest.mark.parametrize("nesting", NESTINGS)
@each_engine
def test_every_nesting_is_one_factorization(case, nesting):
    """Whatever is nested: one native call factorizes all matrices, and one solve serves all tangents or cotangents."""
    system, actual, expected = nest(nesting, case)
    close(actual, expected)
    stats, (_, matrices, solves) = system.stats, NESTINGS[nesting]
    assert (stats.factorizations, stats.matrices) == (1, matrices)
    assert solves is None or stats.solves == solves


@pytest.mark.parametrize("nesting", NESTINGS)
@each_engine
def test_every_nesting_without_keeping_factors(case, nesting):
    """keep_factor=False: nothing is held, so that each solve makes its factor; the results are the same."""
    system, actual, expected = nest(nesting, case, keep_factor=False)
    assert system._factorizer._held is None
    assert all(pool._latest() is None for pool in system._factorizer._pools.values())
    close(actual, expected)
    stats, (_, matrices, solves) = system.stats, NESTINGS[nesting]
    assert stats.factorizations == stats.solves and stats.reuses == 0
    assert solves is None or (stats.solves, stats.matrices) == (solves, solves * matrices)


@each_engine
@pytest.mark.parametrize("keep_factor", [True, False])
def test_what_a_pullback_holds(case, keep_factor):
    """The factor of its own values, whatever is factorized before it is called; twice in one graph it is two factors."""
    problem = make(case, 6, (2,))
    system, (u, v), (b, g) = problem.system(keep_factor=keep_factor), problem.values, problem.rhs(2, 6)
    _, pullback = vjp(system.solve, u, b)
    system.solve(v, b)
    close(pullback(g), vjp(problem.reference, u, b)[1](g))
    assert system.stats.factorizations == (2 if keep_factor else 3)
    system = problem.system(keep_factor=keep_factor)
    gradients = grad(lambda u, v: square(system.solve(v, system.solve(u, b))), (0, 1))(u, v)
    close(gradients, grad(lambda u, v: square(problem.reference(v, problem.reference(u, b))), (0, 1))(u, v))
    assert system.stats.factorizations == (2 if keep_factor else 4)


# --- recorded operations --------------------------------------------------------------------------------------------------

RECORDED = {  # name -> a function of values, b and (system, factor of other values)
    "solve": lambda v, b, system, factor: system.solve(v, b),
    "matmul": lambda v, b, system, factor: system.matmul(v, b, adjoint=True),
    "factorize": lambda v, b, system, factor: system.factorize(v).solve(b, adjoint=True),
    "Factor": lambda v, b, system, factor: factor.solve(b) * v.sum(),
    "gradient": lambda v, b, system, factor: grad(lambda v: square(system.solve(v, b)))(v),
    "tangent": lambda v, b, system, factor: jvp(system.solve, (v, b), (v.sin(), b.cos()))[1],
    "vmap": lambda v, b, system, factor: vmap(system.solve, (0, None))(torch.stack([v, 2 * v]), b),
    "function": lambda v, b, system, factor: spcache.solve((INDICES, v), b, kind="general"),
}
INDICES = make(GENERAL, 5).indices


# torch itself records no custom Function under torch.func before dispatch.
@pytest.mark.parametrize(
    "name, pre_dispatch",
    [(k, False) for k in RECORDED] + [(k, True) for k in RECORDED if k not in ("gradient", "tangent", "vmap")],
)
def test_make_fx(name, pre_dispatch):
    """What is recorded are operators: run on other numbers it gives their results."""
    problem = make(GENERAL, 5, (2,))
    system, b = SparseSystem(INDICES, 5, kind="general"), problem.rhs(2, 5)
    values = make(GENERAL, 5).values * torch.tensor([[1.0], [2.0]], dtype=torch.float64).cos()
    factor = system.factorize(values[0] * 3)

    def f(v, b):
        return RECORDED[name](v, b, system, factor)

    graph = make_fx(f, pre_dispatch=pre_dispatch)(values[0], b[0])
    close(graph(values[1], b[1]), f(values[1], b[1]))
    close(graph(values[0], b[0]), f(values[0], b[0]))
    assert any(str(node.target).startswith("spcache.") for node in graph.graph.nodes)


@each_engine
def test_make_fx_refuses_what_reads_numbers(case):
    """They would become constants of the recorded code."""
    problem = make(case, 5)
    system, b = problem.system(), problem.rhs(5)
    for f in (lambda v: system.solve_ex(v, b)[0], lambda v: system.solve_ex(problem.values, v[:5])[1]):
        with pytest.raises(RuntimeError, match="trying to get value out of a tracing tensor"):
            make_fx(f)(problem.values)
    with pytest.raises(RuntimeError, match="a factor has no data to look at"):
        make_fx(lambda v: system.factorize(v).info)(problem.values)


@each_engine
@pytest.mark.parametrize("keep_factor", [True, False])
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")  # for functions of torch too
def test_linearize(case, keep_factor):
    """A tangent costs one solve."""
    problem = make(case, 5, (2,))
    system, (v, v_dot), (b, b_dot) = problem.system(keep_factor=keep_factor), problem.values, problem.rhs(2, 5)
    for f, reference in [
        (system.solve, problem.reference),
        (lambda v, b: system.factorize(v).solve(b), problem.reference),
        (grad(lambda v, b: square(system.solve(v, b))), grad(lambda v, b: square(problem.reference(v, b)))),
        (system.matmul, lambda v, b: problem.matrix(v) @ b),
    ]:
        x, tangent = linearize(f, v, b)
        expected = jvp(reference, (v, b), (v_dot, b_dot))
        close((x, tangent(v_dot, b_dot)), expected)
        close(tangent(2 * v_dot, b_dot), jvp(reference, (v, b), (2 * v_dot, b_dot))[1])
    x, tangent = linearize(system.solve, v, b)
    tangent(v_dot, b_dot)
    before = counts(system)
    tangent(b_dot[0] * v_dot, b_dot)
    assert counts(system)[2] == before[2] + 1 and counts(system)[0] == before[0] + (not keep_factor)


@pytest.mark.filterwarnings("ignore:.torch.jit.trace. is deprecated:DeprecationWarning")
def test_jit_trace_is_refused():
    """It would record the numbers of the one run that it sees."""
    problem = make(SPD, 4)
    system, x = problem.system(), problem.rhs(4)
    for f in (system.solve, system.matmul, lambda v, b: system.factorize(v).solve(b)):
        with pytest.raises(RuntimeError, match="torch.jit.trace cannot record a sparse solve; use torch.compile"):
            torch.jit.trace(f, (problem.values, x))
    assert relative_error(system.solve(problem.values, x), problem.reference(problem.values, x)) < 1e-12
