"""The contract of pytorch-sparse-solve, point by point. K: kept exactly. F: the original is wrong, this is right. D: decided
here."""

import gc
import threading
import weakref

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import spcache
from spcache import plan_cache
from spcache.compat import sparse_solver
from spcache.compat.sparse_solver import SparseSolver

EPS = torch.finfo(torch.float64).eps

OLD = torch.__version__ < "2.11"


class Graph:
    """I + the weighted Laplacian of a graph of random edges, as their minimal example has it."""

    def __init__(self, n=10, seed=0):
        generator = torch.Generator().manual_seed(seed)
        edges = torch.unique(torch.randint(0, n, (6 * n, 2), generator=generator), dim=0)
        self.n, self.edges = n, len(edges)
        diagonal, (i, j) = torch.arange(n), edges.T
        self.indices = torch.stack([torch.cat([diagonal, i, j, i, j]), torch.cat([diagonal, j, i, i, j])])
        self.weights = torch.rand(self.edges, dtype=torch.float64, generator=generator).add(0.1).requires_grad_()
        self.b = torch.randn(n, dtype=torch.float64, generator=generator)

    def matrix(self, w, dtype=torch.float64):
        values = torch.cat([torch.ones(self.n, dtype=w.dtype), -w, -w, w, w]).to(dtype)
        return torch.sparse_coo_tensor(self.indices, values, (self.n, self.n)).coalesce()


def counters(A):
    """The counters of the factorized half of a matrix's pattern."""
    found = [e for e in plan_cache._entries.values() if hasattr(e, "lower")]
    return next(e.lower.stats for e in found if e.both.shape == tuple(A.shape))


def close(actual, expected, c=1000):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= c * EPS * expected.abs().max()


def test_names():
    """K: `SparseSolver.apply(A, b)`, two positional arguments; `__version__`."""
    assert sparse_solver.__version__ == spcache.__version__
    graph = Graph()
    assert SparseSolver.apply(graph.matrix(graph.weights), graph.b).shape == (10,)


@pytest.mark.parametrize("b", ["ones", "random"])
def test_the_minimal_example(b):
    """Proof: w.grad equals that of the dense solve, for b = 1 (where it is zero) and for a random one."""
    graph = Graph()
    rhs = torch.ones(10, dtype=torch.float64) if b == "ones" else graph.b
    x = SparseSolver.apply(graph.matrix(graph.weights), rhs)
    expected = torch.linalg.solve(graph.matrix(graph.weights).to_dense(), rhs)
    close(x, expected)
    (gradient,) = torch.autograd.grad(x.pow(2).sum() / 2, graph.weights)
    (reference,) = torch.autograd.grad(expected.pow(2).sum() / 2, graph.weights)
    assert (gradient - reference).abs().max() <= 1000 * EPS
    assert (b == "ones") == (gradient.abs().max() < 1e-12)


@pytest.mark.parametrize("layout", [torch.sparse_csr, torch.sparse_csc, torch.strided])
def test_other_layouts_are_converted(layout):
    """K: by `A.to_sparse_coo()`, and the gradient flows back through that."""
    graph = Graph()
    A = graph.matrix(graph.weights.detach())
    A = (A.to_dense() if layout is torch.strided else A.to_sparse(layout=layout)).requires_grad_()
    x = SparseSolver.apply(A, graph.b)
    (gradient,) = torch.autograd.grad(x.sum(), A)
    lam = torch.linalg.solve(A.detach().to_dense(), torch.ones(10, dtype=torch.float64))
    expected = -torch.outer(lam, x.detach()) * (A.detach().to_dense() != 0)
    assert gradient.layout in (layout, torch.sparse_coo)
    close(gradient.to_dense(), expected)


def test_uncoalesced():
    """K: torch's own error."""
    A = torch.sparse_coo_tensor([[0, 0], [0, 0]], [1.0, 1.0], (1, 1))
    with pytest.raises(RuntimeError, match=r"Cannot get indices on an uncoalesced tensor, please call \.coalesce"):
        SparseSolver.apply(A, torch.ones(1))


def test_the_lower_triangle_counts():
    """K: entries with row < column do not enter the factorization; the result is float64."""
    A = torch.tensor([[4.0, 99.0], [1.0, 3.0]]).to_sparse_coo()
    x = SparseSolver.apply(A, torch.tensor([5.0, 4.0]))
    assert x.dtype == torch.float64
    close(x, torch.ones(2, dtype=torch.float64))


def test_gradients():
    """K: at every stored entry, both triangles independently, -lam_i x_j, not symmetrized; each only if needed."""
    graph = Graph()
    A = graph.matrix(graph.weights.detach()).requires_grad_()
    b = graph.b.requires_grad_()
    x = SparseSolver.apply(A, b)
    g = torch.randn(10, dtype=torch.float64)
    x.backward(g)
    lam = torch.linalg.solve(A.detach().to_dense(), g)
    assert A.grad.layout is torch.sparse_coo and A.grad.dtype == torch.float64
    assert torch.equal(A.grad.coalesce().indices(), A.indices())
    close(A.grad.to_dense(), -torch.outer(lam, x.detach()) * (A.detach().to_dense() != 0))
    assert (A.grad.to_dense() - A.grad.to_dense().T).abs().max() > 1e-3
    close(b.grad, lam)
    for wanted in (A,), (b,):
        other = b if wanted[0] is A else A
        (gradient,) = torch.autograd.grad(
            SparseSolver.apply(*(t if t is wanted[0] else t.detach() for t in (A, b))).sum(), wanted
        )
        assert gradient is not None and other.grad is not None


def test_not_positive_definite():
    """K: the error. F: nothing is left behind."""
    graph = Graph()
    A = graph.matrix(graph.weights.detach())
    expected = SparseSolver.apply(A, graph.b)
    with pytest.raises(ValueError, match="^Matrix is not positive definite!$"):
        SparseSolver.apply(-A, graph.b)
    assert torch.equal(SparseSolver.apply(A, graph.b), expected)


def test_equal_values_are_not_factorized_again():
    """K: no factorization for equal indices and values, none in the backward pass; one analysis."""
    graph = Graph()
    for k in range(3):
        x = SparseSolver.apply(graph.matrix(graph.weights), graph.b)
        torch.autograd.grad(x.sum(), graph.weights)
        stats = counters(graph.matrix(graph.weights))
        assert (stats.analyses, stats.factorizations, stats.reuses) == (1, 1, k)
        assert stats.solves == 2 * (k + 1)


def test_a_loop_analyzes_once():
    graph = Graph()
    for k in range(1, 5):
        x = SparseSolver.apply(graph.matrix(graph.weights * k), graph.b)
        torch.autograd.grad(x.sum(), graph.weights)
        stats = counters(graph.matrix(graph.weights))
        assert (stats.analyses, stats.factorizations, stats.solves) == (1, k, 2 * k)


def test_two_forwards_before_their_backwards():
    """F: each backward pass belongs to its own matrix."""
    graph = Graph()
    matrices = [graph.matrix(graph.weights * k) for k in (1, 2)]
    xs = [SparseSolver.apply(A, graph.b) for A in matrices]
    for A, x in zip(matrices, xs, strict=True):
        (gradient,) = torch.autograd.grad(x.pow(2).sum(), graph.weights, retain_graph=True)
        expected = torch.linalg.solve(A.to_dense(), graph.b)
        close(gradient, torch.autograd.grad(expected.pow(2).sum(), graph.weights, retain_graph=True)[0])


@pytest.mark.parametrize("b", ["columns", "float32", "transposed", "expanded"])
def test_right_hand_sides(b):
    """F: of shape (n, k), float32, not contiguous."""
    graph = Graph()
    rhs = {
        "columns": torch.randn(10, 3).double(),
        "float32": torch.randn(10),
        "transposed": torch.randn(3, 10).double().T,
        "expanded": torch.randn(10, 1).double().expand(10, 2),
    }[b].requires_grad_()
    x = SparseSolver.apply(graph.matrix(graph.weights), rhs)
    expected = torch.linalg.solve(graph.matrix(graph.weights).to_dense(), rhs.double())
    assert x.dtype == torch.float64
    close(x, expected)
    for a, e in zip(*(torch.autograd.grad(y.pow(2).sum(), (graph.weights, rhs)) for y in (x, expected)), strict=True):
        assert a.dtype == e.dtype and (a - e).abs().max() <= 1000 * torch.finfo(a.dtype).eps * e.abs().max()


def test_single_precision_matrix():
    """F: computed in double."""
    graph = Graph()
    x = SparseSolver.apply(graph.matrix(graph.weights, torch.float32), graph.b)
    A = graph.matrix(graph.weights, torch.float32).to_dense().double()
    close(x, torch.linalg.solve(A, graph.b))


def test_no_graph_is_kept_alive():
    """F: a class attribute kept the last matrix, and with it its whole graph."""
    graph = Graph()
    A = graph.matrix(graph.weights)
    alive = weakref.ref(A)
    x = SparseSolver.apply(A, graph.b)
    del A, x
    gc.collect()
    assert alive() is None


def test_threads():
    """F: safe from several threads."""
    graph, failures = Graph(), []

    def work(k):
        try:
            for step in range(1, 30):
                A = graph.matrix(graph.weights * k * step)
                close(SparseSolver.apply(A, graph.b), torch.linalg.solve(A.to_dense(), graph.b))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(k,)) for k in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("b", [torch.ones(9).double(), torch.ones(()).double(), torch.ones(9, 2).double()])
def test_the_length_of_b_is_checked(b):
    """F."""
    graph = Graph()
    with pytest.raises(ValueError, match="does not fit"):
        SparseSolver.apply(graph.matrix(graph.weights), b)


def test_not_square_not_finite():
    with pytest.raises(ValueError, match=r"A must be square, got shape \(2, 3\)"):
        SparseSolver.apply(torch.ones(2, 3).to_sparse_coo(), torch.ones(2))
    with pytest.raises(ValueError, match="values must be finite"):
        SparseSolver.apply(torch.tensor([[torch.nan]]).to_sparse_coo(), torch.ones(1))


def test_second_derivatives():
    """D: those of the dense solve at symmetric A."""
    graph = Graph(5)
    b = graph.b.requires_grad_()
    assert gradcheck(lambda w, b: SparseSolver.apply(graph.matrix(w), b), (graph.weights, b))
    assert gradgradcheck(lambda w, b: SparseSolver.apply(graph.matrix(w), b), (graph.weights, b))


@pytest.mark.parametrize("A", [torch.zeros(2, 2).to_sparse(), torch.ones(2, 2).triu(1).to_sparse()])
def test_no_entries(A):
    """K: a matrix without entries, or without any that count, is not positive definite."""
    with pytest.raises(ValueError, match="^Matrix is not positive definite!$"):
        SparseSolver.apply(A, torch.ones(2))


def test_what_is_not_real():
    """F: torch drops imaginary parts in silence."""
    A, b = torch.eye(2).to_sparse(), torch.ones(2)
    for wrong in "complex", "meta", "list":
        convert = {"complex": lambda t: t.cfloat(), "meta": lambda t: t.to("meta"), "list": lambda t: [1.0]}[wrong]
        for arguments, name in ((convert(A), b), "A"), ((A, convert(b)), "b"):
            with pytest.raises(TypeError, match=f"^{name} must be a real torch.Tensor with data, got"):
                SparseSolver.apply(*arguments)


@pytest.mark.skipif(OLD, reason="torch 2.6 takes sparse tensors for dense ones inside of torch.func")
def test_torch_func():
    """D: vmap over b, gradients in b and in what A is made of."""
    graph = Graph()
    A, B = graph.matrix(graph.weights.detach()), torch.randn(4, 10).double()
    close(torch.vmap(lambda b: SparseSolver.apply(A, b))(B), torch.linalg.solve(A.to_dense(), B.T).T)
    gradient = torch.func.grad(lambda b: SparseSolver.apply(A, b).pow(2).sum() / 2)
    close(torch.vmap(gradient)(B), torch.linalg.solve(A.to_dense() @ A.to_dense(), B.T).T, 1e4)
    values = A.values()

    def of_values(v):
        A_of_v = torch.sparse_coo_tensor(A.indices(), v, A.shape, is_coalesced=True, check_invariants=False)
        return SparseSolver.apply(A_of_v, graph.b).pow(2).sum()

    leaf = values.clone().requires_grad_()
    close(torch.func.grad(of_values)(values), torch.autograd.grad(of_values(leaf), leaf)[0])
