"""Sparse matrices of torch and SciPy: `from_matrix`, `values_of`, and `spcache.solve`."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from cases import DTYPES, GENERAL, SPD, find_case, make, numbers, relative_error

import spcache
from spcache import SparseSystem, plan_cache

LAYOUTS = {
    "coo": lambda A: A.coalesce(),
    "csr": lambda A: A.to_sparse_csr(),
    "csc": lambda A: A.to_sparse_csc(),
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def sparse(problem, values=None):
    """The problem's entries as an uncoalesced torch COO matrix."""
    values = problem.values if values is None else values
    return torch.sparse_coo_tensor(problem.indices, values, (problem.n, problem.n), check_invariants=True)


# --- from_matrix and values_of --------------------------------------------------------------------------------------------


@every_layout
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_from_torch(layout, dtype):
    problem = make(find_case("general", dtype), 9)
    A = LAYOUTS[layout](sparse(problem))
    system, b = SparseSystem.from_matrix(A, kind="general"), problem.rhs(9)
    values = system.values_of(A)
    assert values.dtype == dtype and torch.equal(values, A.values())
    assert relative_error(system.solve(values, b), problem.reference(problem.values, b)) < 100 * problem.case.eps
    other = LAYOUTS[layout](sparse(problem, 2 * problem.values))
    assert torch.equal(system.values_of(other), 2 * values)


@pytest.mark.parametrize("format", ["coo", "csr", "csc", "bsr", "dia", "lil", "dok"])
@pytest.mark.parametrize("container", ["array", "matrix"])
def test_from_scipy(format, container):
    problem = make(SPD, 9)
    row, column = problem.indices.numpy()
    A = sp.coo_array((problem.values.numpy(), (row, column)), shape=(9, 9)).tocsr().asformat(format)
    if container == "matrix":
        A = getattr(sp, f"{format}_matrix")(A)
    system, b = SparseSystem.from_matrix(A, kind="spd"), problem.rhs(9)
    values = system.values_of(A)
    assert isinstance(values, torch.Tensor) and values.dtype == torch.float64
    assert relative_error(system.solve(values, b), problem.reference(problem.values, b)) < 1e-13
    assert relative_error(spcache.solve(A, b, kind="spd"), problem.reference(problem.values, b)) < 1e-13


def test_from_scipy_keeps_duplicates():
    A = sp.coo_array(([1.0, 2.0, 3.0], ([0, 0, 1], [0, 0, 1])), shape=(2, 2))
    system = SparseSystem.from_matrix(A)
    assert system.nnz == 3
    x = system.solve(system.values_of(A), torch.tensor([3.0, 3.0]).double())
    assert torch.allclose(x, torch.ones(2).double())


def test_uncoalesced_is_coalesced():
    problem = make(GENERAL, 9)
    A = sparse(problem)
    assert not A.is_coalesced()
    system = SparseSystem.from_matrix(A, kind="general")
    assert system.nnz == A.coalesce().values().numel() < problem.values.numel()
    assert torch.equal(system.values_of(A), A.coalesce().values())


@pytest.mark.parametrize("made_from", LAYOUTS)
@every_layout
def test_values_in_the_order_of_the_system(made_from, layout):
    """A matrix in another layout, or the same entries permuted: its values arrive where the system expects them."""
    problem = make(GENERAL, 9)
    system = SparseSystem.from_matrix(LAYOUTS[made_from](sparse(problem)), kind="general")
    leaf = problem.values.clone().requires_grad_()
    values = system.values_of(LAYOUTS[layout](sparse(problem, leaf)))
    b = problem.rhs(9)
    x = system.solve(values, b)
    expected = problem.reference(leaf, b)
    assert relative_error(x, expected) < 1e-13
    actual, reference = (torch.autograd.grad(y.sum(), leaf)[0] for y in (x, expected))
    assert relative_error(actual, reference) < 1e-12


def test_values_of_a_permuted_scipy_matrix():
    row, column, value = np.array([0, 1, 1, 2]), np.array([0, 0, 1, 2]), np.array([2.0, 1.0, 3.0, 4.0])
    system = SparseSystem.from_matrix(sp.coo_array((value, (row, column)), shape=(3, 3)))
    order = [2, 0, 3, 1]
    shuffled = sp.coo_array((value[order], (row[order], column[order])), shape=(3, 3))
    assert system.values_of(shuffled).tolist() == value.tolist()


def test_another_pattern_is_refused():
    problem = make(GENERAL, 5)
    A = sparse(problem).coalesce()
    system = SparseSystem.from_matrix(A)
    moved = A.indices().clone()
    moved[:, -1] = torch.tensor([4, 0])
    one_less = torch.sparse_coo_tensor(A.indices()[:, 1:], A.values()[1:], (5, 5))
    for other in (torch.sparse_coo_tensor(moved, A.values(), (5, 5)), one_less, one_less.to_sparse_csr()):
        with pytest.raises(ValueError, match="another sparsity pattern than the system.*from_matrix"):
            system.values_of(other)
    with pytest.raises(ValueError, match=r"A has shape \(6, 5\), the system \(5, 5\)"):
        system.values_of(torch.sparse_coo_tensor(A.indices(), A.values(), (6, 5)))
    duplicated = SparseSystem(torch.tensor([[0, 0, 1], [0, 0, 1]]), 2)
    entries = ([1.0, 1.0, 1.0], ([1, 0, 0], [1, 0, 0]))
    with pytest.raises(ValueError, match="duplicates in different orders.*coalesce"):
        duplicated.values_of(sp.coo_array(entries, shape=(2, 2)))


def test_what_is_no_sparse_matrix():
    system = make(GENERAL, 5).system()
    for call in (SparseSystem.from_matrix, system.values_of, lambda A: spcache.solve(A, torch.ones(5))):
        with pytest.raises(TypeError, match="must be a sparse matrix, got a dense tensor.*to_sparse"):
            call(torch.eye(5))
        with pytest.raises(TypeError, match="sparse matrix of torch or SciPy, got ndarray"):
            call(np.eye(5))
        with pytest.raises(ValueError, match=r"must be two-dimensional, got shape \(2, 5, 5\)"):
            call(torch.eye(5).expand(2, 5, 5).to_sparse())
        with pytest.raises(TypeError, match="COO, CSR or CSC, got layout torch.sparse_bsr"):
            call(torch.eye(4).to_sparse_bsr((2, 2)))
    with pytest.raises(TypeError, match="A must be float32, float64, complex64 or complex128, got torch.int64"):
        spcache.solve(torch.eye(3, dtype=torch.int64).to_sparse(), torch.ones(3))


def test_rectangular_matrices():
    A = numbers((3, 5), torch.float64, 0)
    system = SparseSystem.from_matrix(A.to_sparse_csr())
    assert system.shape == (3, 5)
    assert torch.allclose(system.matmul(system.values_of(A.to_sparse()), torch.ones(5).double()), A.sum(1))
    with pytest.raises(ValueError, match=r"A must be square, got shape \(3, 5\)"):
        spcache.solve(A.to_sparse(), torch.ones(3).double())


# --- spcache.solve --------------------------------------------------------------------------------------------------------


@every_layout
@pytest.mark.parametrize("kind", ["auto", "spd", "general"])
@pytest.mark.parametrize("columns", [(), (3,)], ids=["vector", "matrix"])
def test_solve(layout, kind, columns):
    case = find_case(kind, engine="multifrontal" if kind == "auto" else "")
    problem = make(case, 8)
    A, b = LAYOUTS[layout](sparse(problem)).detach().requires_grad_(), problem.rhs(8, *columns).requires_grad_()
    x = spcache.solve(A, b, kind=kind)
    D = A.detach().to_dense().requires_grad_()
    expected = torch.linalg.inv((D + D.T) / 2 if kind == "spd" else D) @ b
    assert relative_error(x, expected) < 1e-13
    g = problem.rhs(8, *columns, seed=5)
    gradient, gradient_b = torch.autograd.grad(x, (A, b), g)
    dense_gradient, dense_gradient_b = torch.autograd.grad(expected, (D, b), g)
    assert relative_error(gradient_b, dense_gradient_b) < 1e-12
    # sparse, in A's layout, at A's stored entries, and the dense gradient there
    assert gradient.layout == A.layout and gradient.shape == A.shape
    stored = A.detach().to_sparse_coo().coalesce().indices()
    assert torch.equal(gradient.to_sparse_coo().coalesce().indices(), stored)
    assert relative_error(gradient.to_dense()[tuple(stored)], dense_gradient[tuple(stored)]) < 1e-12


def test_solve_uncoalesced():
    problem = make(GENERAL, 8)
    leaf, b = problem.values.clone().requires_grad_(), problem.rhs(8)
    x = spcache.solve(sparse(problem, leaf), b, kind="general")
    expected = problem.reference(leaf, b)
    assert relative_error(x, expected) < 1e-13
    actual, reference = (torch.autograd.grad(y.sum(), leaf)[0] for y in (x, expected))
    assert relative_error(actual, reference) < 1e-12
    A = sparse(problem).requires_grad_()  # the gradient of the matrix itself
    spcache.solve(A, b, kind="general").sum().backward()
    assert A.grad.is_sparse and torch.equal(A.grad.coalesce().indices(), A.coalesce().indices())


def test_solve_finds_its_system_again():
    problem = make(SPD, 8, (3,))
    b, before = problem.rhs(8), plan_cache.info().hits
    A, same, other = (
        sparse(problem, v).coalesce() for v in (problem.values[0], problem.values[0].clone(), problem.values[1])
    )
    for matrix, hits in [(A, 0), (A, 1), (same, 2), (other, 3)]:
        spcache.solve(matrix, b, kind="spd")
        assert plan_cache.info().hits - before == hits
    (system,) = [s for s in plan_cache._entries.values() if isinstance(s, SparseSystem)]
    assert system.stats.analyses == 1 and system.stats.factorizations == 2 and system.stats.reuses == 2
    spcache.solve(A.to_sparse_csr(), b, kind="spd")  # another layout is another system, with the same plan
    systems = [s for s in plan_cache._entries.values() if isinstance(s, SparseSystem)]
    assert [s.stats.analyses for s in systems] == [1, 0]
    spcache.solve(A, b, kind="general")  # and so is another kind
    assert sum(isinstance(s, SparseSystem) for s in plan_cache._entries.values()) == 3


def test_solve_does_not_depend_on_the_life_of_its_matrix():
    """The key in the cache owns its arrays: a matrix changed in place afterwards is another one."""
    indices = torch.tensor([[0, 1, 2], [0, 1, 2]])
    A = torch.sparse_coo_tensor(indices, torch.tensor([1.0, 2.0, 4.0]), (3, 3), is_coalesced=True)
    assert spcache.solve(A, torch.ones(3)).sub(torch.tensor([1, 0.5, 0.25])).abs().max() < 1e-6
    A.indices()[1] = torch.tensor([1, 2, 0])  # now a permutation
    assert spcache.solve(A, torch.ones(3)).sub(torch.tensor([0.25, 1, 0.5])).abs().max() < 1e-6


def test_solve_passes_errors_on():
    zero = torch.sparse_coo_tensor(torch.tensor([[0, 1], [0, 0]]), torch.ones(2), (2, 2))
    with pytest.raises(spcache.SingularMatrixError, match="structurally singular"):
        spcache.solve(zero, torch.ones(2))
    with pytest.raises(ValueError, match="kind must be one of"):
        spcache.solve(zero, torch.ones(2), kind="sdp")
    with pytest.raises(ValueError, match=r"b of shape \(3,\) does not fit"):
        spcache.solve(zero, torch.ones(3))
