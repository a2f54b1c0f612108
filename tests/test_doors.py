"""Tensors that have no memory, contexts that change where tensors are made, and values that change meanwhile."""

import copy
import pickle

import pytest
import torch
from cases import GENERAL, SPD, find_case, make, relative_error
from torch._subclasses import FakeTensorMode
from torch.func import grad, jacrev, jvp, vmap

import spcache
from spcache import SparseSystem

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


# --- values that change behind torch's back: module.to, tensor.data, NumPy ------------------------------------------------


@pytest.mark.parametrize("case", [SPD, GENERAL], ids=str)
@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
def test_values_that_were_converted(case, wide):
    """Once upon a time the memory of one type was read as that of another."""
    narrow = torch.float64 if wide is torch.float32 else torch.float32
    problem = make(case.with_dtype(narrow), 300)
    system, lazy = problem.system(), problem.system(keep_factor=False)
    parameter = torch.nn.Parameter(problem.values.clone())
    factor, x = system.factorize(parameter), lazy.solve(parameter, problem.rhs(300))
    parameter.data = parameter.data.to(wide)
    with pytest.raises(RuntimeError, match="values were modified after factorize"):
        factor.solve(problem.rhs(300).to(wide))
    with pytest.raises((RuntimeError, TypeError), match="modified after factorize|the dtype of values"):
        factor.solve(problem.rhs(300))
    with pytest.raises(RuntimeError, match="the values were converted after they were used"):
        x.sum().backward()


@pytest.mark.parametrize("change", ["data", "numpy", "shape"])
def test_a_factor_looks_at_the_numbers(change):
    problem = make(GENERAL, 7)
    system, b = problem.system(), problem.rhs(7)
    values = problem.values.clone()
    factor = system.factorize(values)
    compiled = torch.compile(lambda b: factor.solve(b), backend="aot_eager")
    if change == "data":
        values.data.mul_(2)
    elif change == "numpy":
        values.numpy()[:] *= 2
    else:
        values.data = values.data.repeat(3, 1)
    solves = [
        factor.solve,
        vmap(factor.solve),
        lambda b: jvp(factor.solve, (b,), (b,)),
        grad(lambda b: factor.solve(b).sum()),
    ]
    for solve in solves if change == "shape" else [*solves, compiled]:
        with pytest.raises((RuntimeError, ValueError), match="values were modified after factorize|does not fit"):
            solve(torch.stack([b, b]) if solve is solves[1] else b)


def test_a_factor_is_copied_but_not_pickled():
    problem = make(SPD, 7)
    system, b = problem.system(), problem.rhs(7)
    values = problem.values.clone().requires_grad_()
    factor = system.factorize(values)
    twin = copy.deepcopy(factor)
    with torch.no_grad():
        values *= 2
    assert relative_error(twin.solve(b), problem.reference(problem.values, b)) < 1e-12
    assert system.stats.factorizations == 1 and copy.copy(factor) is factor
    with pytest.raises(TypeError, match="a Factor cannot be pickled; pickle the SparseSystem and the values"):
        pickle.dumps(factor)


# --- transforms -----------------------------------------------------------------------------------------------------------


def test_a_system_is_found_and_made_inside_of_transforms():
    problem = make(GENERAL, 6)
    indices, v, b = problem.indices, problem.values, problem.rhs(6)
    A = torch.sparse_coo_tensor(indices, v, (6, 6)).coalesce()
    forms = {
        "pair": lambda v, b: spcache.solve((indices, v), b, kind="general"),
        "made inside": lambda v, b: SparseSystem(indices, 6, kind="general").solve(v, b),
        "matmul": lambda v, b: spcache.matmul(A, b),
        "matrix": lambda v, b: spcache.solve(A, b),
    }
    if torch.__version__.startswith("2.6."):
        del forms["matmul"], forms["matrix"]  # torch 2.6 cannot look at sparse tensors inside of `grad`
    for name, f in forms.items():
        reference = (lambda v, b: A.to_dense() @ b) if name == "matmul" else problem.reference
        if name == "matrix":
            reference = lambda v, b: problem.reference(problem.values, b)  # noqa: E731
        for transform in (
            lambda f: grad(lambda b: f(v, b).pow(2).sum())(b),
            lambda f: jvp(lambda b: f(v, b), (b,), (b.flip(0),))[1],
            lambda f: jacrev(jacrev(lambda b: f(v, b).sin()))(b),
            lambda f: vmap(lambda b: f(v, b))(torch.stack([b, 2 * b])),
        ):
            assert relative_error(transform(f), transform(reference)) < 1e-10, name
    for name in "pair", "made inside":
        (gradient,) = (grad(lambda v, name=name: forms[name](v, b).sum())(v),)
        assert relative_error(gradient, grad(lambda v: problem.reference(v, b).sum())(v)) < 1e-10


def test_indices_are_not_batched():
    problem = make(GENERAL, 6)
    with pytest.raises(ValueError, match="indices must not be batched by vmap"):
        vmap(lambda i: SparseSystem(i, 6).solve(problem.values, problem.rhs(6)))(problem.indices[None])


@pytest.mark.parametrize("vector", [True, False], ids=["vector", "matrix"])
def test_cotangents_of_a_failed_matrix_are_silenced_one_by_one(vector):
    problem = make(find_case("general"), 5)
    system, v = problem.system(check=False), torch.zeros_like(problem.values)
    b = problem.rhs(5) if vector else problem.rhs(5, 2)

    def gradients(v, w):
        return grad(lambda v, b: torch.where(w > 0, system.solve(v, b), 0.0).sum(), (0, 1))(v, b)

    weights = torch.tensor([0, 1, 0])
    for together, alone in zip(
        vmap(gradients, (None, 0))(v, weights), zip(*(gradients(v, w) for w in weights), strict=True), strict=True
    ):
        assert torch.equal(together.isnan(), torch.stack(alone).isnan())
        assert not together[0].any() and together[1].isnan().any() and not together[2].any()


# --- other threads, other processes ---------------------------------------------------------------------------------------


def test_another_thread_that_compiles_does_not_matter(monkeypatch):
    """torch.compiler.is_compiling() is true in all of them."""
    problem = make(GENERAL, 6)
    monkeypatch.setattr(torch.compiler, "_is_compiling_flag", True, raising=False)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    factor = problem.system().factorize(problem.values)
    assert factor.info == 0 and factor.nnz > 0
    with pytest.raises(spcache.SingularMatrixError):
        problem.system().factorize(0 * problem.values)


def test_an_exported_system_is_not_another_ones(run_python, tmp_path):
    """A program that was saved contains no system, and must not take any other for it."""
    common = f"""
import torch, warnings
from spcache import SparseSystem
from cases import GENERAL, make
warnings.simplefilter("ignore")
path = {str(tmp_path / "program.pt2")!r}
problem = make(GENERAL, 6)
class Solve(torch.nn.Module):
    def __init__(self, system):
        super().__init__()
        self.system = system
    def forward(self, v, b):
        return self.system.solve(v, b)
"""
    run_python(common + """
program = torch.export.export(Solve(problem.system()), (problem.values, problem.rhs(6)))
torch.export.save(program, path)
""")  # fmt: skip
    out = run_python(common + """
others = [SparseSystem(problem.indices.flip(0), 6, kind="general") for _ in range(20)]
try:
    torch.export.load(path).module()(problem.values, problem.rhs(6))
except RuntimeError as error:
    print(error)
""")  # fmt: skip
    assert "the SparseSystem of this compiled code is gone, or belongs to another process" in out
