"""`matmul` and `solve_triangular` of sparse matrices: against dense ones, their gradients, the cache, bad input."""

from functools import partial

import pytest
import scipy.sparse
import torch
from torch.autograd import gradcheck, gradgradcheck

import spcache
from spcache import plan_cache

DTYPES = [torch.float32, torch.float64, torch.complex64, torch.complex128]
LAYOUTS = {"coo": torch.sparse_coo, "csr": torch.sparse_csr, "csc": torch.sparse_csc}

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: str(t).removeprefix("torch."))
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def dense_matrix(*shape, dtype=torch.float64, square=False):
    """Half of the entries are zero; a square one is well-conditioned, its triangles too."""
    D = torch.randn(shape, dtype=dtype) * (torch.rand(shape) < 0.5)
    if square:
        D = D / shape[-1] + torch.eye(shape[-1], dtype=dtype) * torch.linspace(1, 2, shape[-1])
    return D


def sparse(D, layout):
    if D.dim() == 3 and layout != "coo":  # as many entries in each
        D = torch.where((D[:1] != 0).expand_as(D) & (D == 0), 1.0, D * (D[:1] != 0))
    return D.to_sparse(layout=LAYOUTS[layout]) if D.dim() == 2 or layout != "coo" else D.to_sparse_coo()


def stored(A):
    """Where entries are stored."""
    ones = torch.ones_like(A.values().detach().real)
    if A.layout is torch.sparse_coo:
        return torch.sparse_coo_tensor(A.indices(), ones, A.shape).to_dense() != 0
    if A.layout is torch.sparse_csr:
        return torch.sparse_csr_tensor(A.crow_indices(), A.col_indices(), ones, A.shape).to_dense() != 0
    return torch.sparse_csc_tensor(A.ccol_indices(), A.row_indices(), ones, A.shape).to_dense() != 0


def close(actual, expected, c=100):
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    if expected.numel():
        assert (actual - expected).abs().max() <= c * torch.finfo(expected.dtype).eps * expected.abs().max().clamp(
            min=1
        )


def agrees(f, reference, A, B, where=None):
    """f(A, B) and its gradients are those of reference(dense A, B); A's gradient has A's layout and entries."""
    A, B = A.detach().requires_grad_(), B.detach().requires_grad_()
    D, C = A.detach().to_dense().requires_grad_(), B.detach().requires_grad_()
    y, expected = f(A, B), reference(D, C)
    close(y, expected)
    g = torch.randn_like(expected)
    (dA, dB), (dD, dC) = torch.autograd.grad(y, (A, B), g), torch.autograd.grad(expected, (D, C), g)
    close(dB, dC, 1000)
    assert dA.layout is A.layout and dA.shape == A.shape and dA.values().numel() == A.values().numel()
    close(dA.to_dense(), dD * stored(A), 1000)


@every_dtype
@every_layout
@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)])
def test_matmul(layout, dtype, shape):
    A = sparse(dense_matrix(*shape, dtype=dtype), layout)
    for adjoint in False, True:
        n = shape[0 if adjoint else 1]
        for own in [(n,), (n, 3), (n, 0), (2, n, 3)]:
            if layout == "csc" and 0 in own:
                continue
            f, reference = (
                partial(spcache.matmul, adjoint=adjoint),
                (lambda D, B: D.mH @ B) if adjoint else torch.matmul,
            )
            agrees(f, reference, A, torch.randn(own, dtype=dtype))


@every_layout
def test_matmul_of_a_batch(layout):
    A = sparse(dense_matrix(3, 5, 7), layout)
    agrees(spcache.matmul, torch.matmul, A, torch.randn(3, 7, 2).double()) if layout != "csc" else None
    close(spcache.matmul(A, torch.ones(3, 5, 2).double(), adjoint=True), A.to_dense().mH @ torch.ones(3, 5, 2).double())


def test_matmul_of_scipy():
    D = dense_matrix(5, 4)
    for convert in scipy.sparse.coo_array, scipy.sparse.csr_matrix, scipy.sparse.dia_array:
        close(spcache.matmul(convert(D.numpy()), torch.ones(4).double()), D.sum(1))


def test_matmul_has_no_memory_of_the_size_of_the_product():
    """Saved for backward: the values and B, nothing of nnz x columns."""
    A, B = sparse(dense_matrix(50, 50), "csr").requires_grad_(), torch.randn(50, 64).double().requires_grad_()
    sizes = []

    def pack(t):
        sizes.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        spcache.matmul(A, B)
    assert max(sizes) == B.numel() and A.values().numel() * 64 > 10 * B.numel()


@pytest.mark.parametrize("unitriangular", [False, True], ids=["diagonal", "unit"])
@pytest.mark.parametrize("upper", [False, True], ids=["lower", "upper"])
@pytest.mark.parametrize("layout", ["coo", "csr"])
@every_dtype
def test_solve_triangular(dtype, layout, upper, unitriangular):
    for shape in (6, 6), (3, 6, 6):
        A = sparse(dense_matrix(*shape, dtype=dtype, square=True), layout)
        for adjoint in False, True:

            def reference(D, B, adjoint=adjoint):
                T = D.triu(int(unitriangular)) if upper else D.tril(-int(unitriangular))
                T = T + torch.eye(6, dtype=dtype) if unitriangular else T
                x = torch.linalg.solve(T.mH if adjoint else T, B if B.dim() > 1 else B[:, None])
                return x if B.dim() > 1 else x[:, 0]

            def f(A, B, adjoint=adjoint):
                return spcache.solve_triangular(A, B, upper=upper, unitriangular=unitriangular, adjoint=adjoint)

            agrees(f, reference, A, torch.randn(*shape[:-1], 2, dtype=dtype))
            if len(shape) == 2:
                agrees(f, reference, A, torch.randn(6, dtype=dtype))


def test_second_derivatives():
    D, B = dense_matrix(4, 4, square=True), torch.randn(4, 2).double().requires_grad_()
    indices = D.to_sparse().indices()
    values = D.to_sparse().values().requires_grad_()
    for f in (
        spcache.matmul,
        lambda A, B: spcache.solve_triangular(A, B, upper=False),
        lambda A, B: spcache.solve_triangular(A, B, upper=True, unitriangular=True, adjoint=True),
    ):

        def of_values(v, B, f=f):
            return f(torch.sparse_coo_tensor(indices, v, (4, 4), is_coalesced=True), B)

        assert gradcheck(of_values, (values, B)) and gradgradcheck(of_values, (values, B))


def test_a_pattern_is_validated_and_analyzed_once():
    D, B = dense_matrix(6, 6, square=True), torch.randn(6, 2).double()
    before = plan_cache.info().misses
    for k in range(1, 4):
        A = sparse(k * D, "csr")
        spcache.matmul(A, B)
        spcache.solve_triangular(A, B, upper=True)
        info = plan_cache.info()
        assert (info.entries, info.misses - before) == (3, 3)  # two systems, one plan
    spcache.solve_triangular(A, B, upper=False)
    assert plan_cache.info().misses - before == 5


def test_triangles_of_all_scales():
    """Forward substitution is as accurate as its rows are scaled badly."""
    n = 200
    D = torch.randn(n, n).double().tril(-1) * (torch.rand(n, n) < 0.05) + torch.eye(n).double()
    D = D * torch.logspace(-150, 150, n, dtype=torch.float64)[torch.randperm(n)][:, None]
    x = torch.randn(n).double()
    A, b = D.to_sparse_csr(), D @ x
    y = spcache.solve_triangular(A, b, upper=False)
    residual = (D @ y - b).abs() / (D.abs() @ y.abs())
    assert residual.max() < 100 * torch.finfo(torch.float64).eps


def test_a_singular_triangle():
    A = torch.tensor([[1.0, 0.0], [2.0, 0.0]]).to_sparse_csr()
    with pytest.raises(spcache.SingularMatrixError):
        spcache.solve_triangular(A, torch.ones(2), upper=False)
    close(spcache.solve_triangular(A, torch.ones(2), upper=False, unitriangular=True), torch.tensor([1.0, -1.0]))


@pytest.mark.parametrize(
    ("A", "B", "error", "message"),
    [
        (torch.eye(2), torch.ones(2), TypeError, "A must be a sparse matrix, got a dense tensor"),
        ("matrix", torch.ones(2), TypeError, "A must be a sparse matrix of torch or SciPy, got str"),
        (torch.eye(2).to_sparse(), torch.ones(3), ValueError, "of shape .3,. does not fit"),
        (torch.eye(2).to_sparse(), torch.ones(2).double(), TypeError, "B must have the dtype of A, torch.float32"),
        (torch.eye(2).to_sparse(), [1.0, 2.0], TypeError, "must be a torch.Tensor, got list"),
        (torch.eye(2)[None].to_sparse(), torch.ones(2, 2), ValueError, r"B must have shape \(1, 2, k\)"),
        (torch.eye(2)[None].to_sparse(), [1.0], TypeError, "B must be a torch.Tensor, got list"),
        (torch.ones(1, 1, 2, 2).to_sparse(), torch.ones(2), ValueError, "A must be two-dimensional, or a batch"),
        (torch.ones(2, 2, 2).to_sparse(2), torch.ones(2), ValueError, "A must have sparse dimensions only"),
    ],
)
def test_bad_input(A, B, error, message):
    for f in spcache.matmul, lambda A, B: spcache.solve_triangular(A, B, upper=True):
        with pytest.raises(error, match=message):
            f(A, B)


def test_triangles_are_square():
    with pytest.raises(ValueError, match=r"A must be square, got shape \(2, 3\)"):
        spcache.solve_triangular(torch.ones(2, 3).to_sparse(), torch.ones(2), upper=True)


def unchecked(layout, parts, shape):
    """A matrix or a batch that torch does not look at."""
    make = {"coo": torch.sparse_coo_tensor, "csr": torch.sparse_csr_tensor, "csc": torch.sparse_csc_tensor}[layout]
    values = torch.ones(torch.tensor(parts[-1]).shape).double()
    if layout == "coo":
        return make(parts, values, shape, check_invariants=False, is_coalesced=True)
    return make(*map(torch.tensor, parts), values, shape, check_invariants=False)


@pytest.mark.parametrize(
    ("layout", "parts", "shape", "message"),
    [
        ("coo", [[0], [0], [2]], (2, 2, 2), r"entry 0 = \(0, 2\) has its column outside 0..1 \(shape is \(2, 2\)"),
        ("coo", [[1], [0], [-1]], (2, 2, 2), "has its column outside 0..1"),
        ("coo", [[0], [2], [0]], (2, 2, 2), "has its row outside 0..1"),
        ("coo", [[2], [0], [0]], (2, 2, 2), "has its row outside"),
        ("coo", [[-1], [0], [0]], (2, 2, 2), "has its row outside"),
        ("csr", [[[0, 1, 1], [0, 1, 1]], [[2], [0]]], (2, 2, 2), "has its column outside 0..1"),
        ("csr", [[[0, 1, 1], [0, 1, 1]], [[0], [-1]]], (2, 2, 2), "has its column outside 0..1"),
        ("csr", [[[0, 2, 1], [0, 1, 1]], [[0], [0]]], (2, 2, 2), "pointers of A must grow from 0 to .* entries, 1"),
        ("csr", [[[0, 2, 2], [0, 0, 0]], [[0], [0]]], (2, 2, 2), "pointers of A must grow"),
        ("csr", [[[1, 1, 1], [0, 1, 1]], [[0], [0]]], (2, 2, 2), "pointers of A must grow"),
        ("csr", [[[0, 1], [0, 1]], [[0], [0]]], (2, 2, 2), "pointers of A must grow"),
        ("csc", [[[0, 1, 1], [0, 1, 1]], [[2], [0]]], (2, 2, 2), "has its row outside 0..1"),
        ("coo", [[1], [-1]], (2, 2), "has its column outside 0..1"),
        ("csr", [[0, 0, 1], [-1]], (2, 2), "has its column outside 0..1"),
        ("csr", [[0, 2, 1], [0]], (2, 2), "pointers of A must grow"),
        ("csr", [[0, 1, 3], [0]], (2, 2), "pointers of A must grow"),
    ],
)  # fmt: skip
def test_an_index_out_of_its_block(layout, parts, shape, message):
    """It would be a place in the neighbour's, and was, when that matrix had been seen before."""
    B = torch.ones(*shape[:-2], 2, 1).double()
    with torch.sparse.check_sparse_tensor_invariants(enable=False):
        A = unchecked(layout, parts, shape)
        for _ in range(2):
            for upper in True, False:
                with pytest.raises(ValueError, match=message):
                    spcache.solve_triangular(A, B, upper=upper, unitriangular=True)
            with pytest.raises(ValueError, match=message):
                spcache.matmul(A, B)
            spcache.matmul(torch.ones(shape).double().to_sparse(), B)


def test_a_bad_block_is_not_taken_for_a_good_one_seen_before():
    good = torch.sparse_coo_tensor([[1], [0], [0]], torch.ones(1).double(), (2, 2, 2), is_coalesced=True)
    B = torch.ones(2, 2, 1).double()
    assert spcache.matmul(good, B).flatten().tolist() == [0, 0, 1, 0]
    with torch.sparse.check_sparse_tensor_invariants(enable=False), pytest.raises(ValueError, match="row outside 0..1"):
        spcache.matmul(unchecked("coo", [[0], [2], [2]], (2, 2, 2)), B)


@pytest.mark.parametrize("which", ["A", "B"])
def test_no_data(which):
    A, B = torch.eye(2).to_sparse(), torch.ones(2, 1)
    A, B = (A.to("meta"), B) if which == "A" else (A, B.to("meta"))
    for f in (
        spcache.matmul,
        partial(spcache.solve_triangular, upper=True),
        lambda A, B: spcache.solve(A, B),
        lambda A, B: spcache.lstsq(A, B),
    ):
        with pytest.raises(TypeError, match=f"(?i)^{which} must have data, got a tensor on the meta device"):
            f(A, B)
