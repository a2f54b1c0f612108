"""`spcache.lstsq`: against dense least squares, its gradients, real matrices, bad input."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import spcache

pytestmark = pytest.mark.usefixtures("one_thread")

both_methods = pytest.mark.parametrize("method", ["lsmr", "direct"])
every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128], ids=str
)


def tall(m=12, n=5, dtype=torch.float64):
    """Indices, values, and the dense matrix as a function of them."""
    mask = torch.rand(m, n) < 0.6
    mask[:n] |= torch.eye(n, dtype=torch.bool)
    indices = mask.nonzero().T
    values = torch.randn(indices.shape[1], dtype=dtype) + 2 * (indices[0] == indices[1])

    def dense(v):
        return v.new_zeros(m * n).index_add(0, indices[0] * n + indices[1], v).view(m, n)

    def sparse(v):
        return torch.sparse_coo_tensor(indices, v, (m, n), is_coalesced=True)

    return values, dense, sparse


def close(actual, expected, c):
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    assert (actual - expected).abs().max() <= c * torch.finfo(expected.dtype).eps * expected.abs().max()


@every_dtype
@both_methods
def test_lstsq(method, dtype):
    values, dense, sparse = tall(dtype=dtype)
    for shape in (12,), (12, 3):
        b = torch.randn(shape, dtype=dtype)
        x = spcache.lstsq(sparse(values), b, method=method)
        expected = torch.linalg.pinv(dense(values)) @ b
        close(x, expected, 1000)


@both_methods
def test_gradients(method):
    """Golub and Pereyra (1973) hold for residuals that are not small."""
    values, dense, sparse = tall()
    values.requires_grad_()
    b = torch.randn(12, 2, dtype=torch.float64, requires_grad=True)

    def reference(v, b):
        A = dense(v)
        return torch.linalg.solve(A.mH @ A, A.mH @ b)

    x, expected = spcache.lstsq(sparse(values), b, method=method), reference(values, b)
    assert (dense(values) @ x - b).norm() > 0.1 * b.norm()
    g = torch.randn_like(expected)
    for a, e in zip(*(torch.autograd.grad(y, (values, b), g) for y in (x, expected)), strict=True):
        close(a, e, 1e5)


@both_methods
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_finite_differences(dtype, method):
    values, _, sparse = tall(4, 2, dtype)
    b = torch.randn(4, dtype=dtype, requires_grad=True)
    values.requires_grad_()

    def f(v, b):
        return spcache.lstsq(sparse(v), b, method=method)

    assert gradcheck(f, (values, b)) and gradgradcheck(f, (values, b))


@both_methods
def test_a_sparse_gradient(method):
    values, _, sparse = tall()
    A = sparse(values).to_sparse_csr().requires_grad_()
    spcache.lstsq(A, torch.randn(12).double(), method=method).sum().backward()
    assert A.grad.layout is torch.sparse_csr and torch.equal(A.grad.col_indices(), A.col_indices())


def test_direct_analyzes_once():
    values, _, sparse = tall()
    misses = []
    for k in range(1, 4):
        spcache.lstsq(sparse(values * k), torch.randn(12).double(), method="direct")
        misses.append(spcache.plan_cache.info().misses)
    assert misses[0] == misses[1] == misses[2]


def test_an_iteration_that_does_not_converge():
    values, _, sparse = tall()
    with pytest.raises(spcache.NotConvergedError):
        spcache.lstsq(sparse(values), torch.randn(12).double(), method="lsmr", maxiter=1)
    x = spcache.lstsq(sparse(values), torch.randn(12).double(), method="lsmr", maxiter=1, check=False)
    assert x.shape == (5,)


@pytest.mark.parametrize("scale", [1e-4, 1e4, 1e-8])
@pytest.mark.parametrize("residual", [1.0, 1e-6, 0.0])
def test_the_default_is_direct(scale, residual):
    """SEEDS (D): "ours is a direct least-squares solver by default". As accurate as QR, however columns are scaled."""
    A = torch.randn(200, 50).double() * (torch.rand(200, 50) < 0.2) + torch.eye(200, 50).double()
    b = A @ torch.randn(50).double() + residual * torch.randn(200).double()
    scales = torch.logspace(0, torch.tensor(scale).log10(), 50, dtype=torch.float64)
    x = spcache.lstsq((A * scales).to_sparse(), b)
    close(x * scales, torch.linalg.lstsq(A, b[:, None]).solution[:, 0], 1000)


def test_direct_of_ill_conditioned():
    """Refinement makes what loses digits as the normal equations do as good as QR, derivatives too; the augmented system
    goes on where they end. Beyond that it raises."""
    U, _, V = torch.linalg.svd(torch.randn(30, 10).double(), full_matrices=False)
    for digits, tolerance in (6, 1e-9), (7, 1e-7), (10, 1e-1):
        D = U @ torch.diag(torch.logspace(0, -digits, 10).double()) @ V
        b, g = torch.randn(30, requires_grad=True).double(), torch.randn(10).double()
        x = spcache.lstsq(D.to_sparse(), b)
        expected = torch.linalg.lstsq(D, b.detach()[:, None], driver="gelsd").solution[:, 0]
        assert (x - expected).norm() <= tolerance * expected.norm()
        (lam,) = torch.autograd.grad(x, b, g)
        assert (D.T @ lam - g).norm() <= 1e-8 * D.norm() * lam.norm()
    for digits in 14, 17:
        D = U @ torch.diag(torch.logspace(0, -digits, 10).double()) @ V
        with pytest.raises(spcache.SingularMatrixError, match="A has no full column rank, or is too near to that"):
            spcache.lstsq(D.to_sparse(), torch.randn(30).double())


def test_a_rank_that_is_not_full():
    D = torch.randn(20, 3).double()
    for last in torch.zeros(20, 1).double(), D[:, :1], D[:, :1] + D[:, 1:2] / 3:
        whole = torch.cat([D, last], 1)
        stored = torch.sparse_coo_tensor(torch.ones(20, 4).nonzero().T, whole.flatten(), (20, 4), is_coalesced=True)
        for A in stored, whole.to_sparse():
            with pytest.raises(
                spcache.SingularMatrixError, match="A has no full column rank.*damping=.*method='lsmr'"
            ) as caught:
                spcache.lstsq(A, torch.ones(20).double())
            assert caught.value.column is None or 0 <= caught.value.column < 4


@pytest.mark.parametrize("shape", [(3, 0), (0, 0)])
def test_no_unknowns(shape):
    assert spcache.lstsq(torch.zeros(shape).to_sparse(), torch.ones(shape[0])).shape == (0,)


def test_b_of_zero_and_b_beside_the_range():
    A = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0]]).double().to_sparse()
    for b in torch.zeros(3).double(), torch.tensor([1.0, -2.0, 1.0]).double():
        assert spcache.lstsq(A, b).abs().max() < 1e-15


def test_torch_func():
    values, dense, sparse = tall()
    B = torch.randn(4, 12).double()
    close(torch.vmap(lambda b: spcache.lstsq(sparse(values), b))(B), B @ torch.linalg.pinv(dense(values)).T, 1000)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((torch.eye(3).to_sparse(), torch.ones(3)), {"damping": -1.0}, ValueError, "damping must be finite and not negative, got -1.0"),
        ((torch.eye(3).to_sparse(), torch.ones(3)), {"damping": "a"}, TypeError, "damping must be a number, got 'a'"),
        ((torch.eye(3).to_sparse(), torch.ones(3)), {"damping": torch.ones(1, requires_grad=True)}, ValueError, "no derivative in it"),
        (((torch.zeros(2, 1).long(), torch.ones(1)), torch.ones(3)), {}, TypeError, r"a triple \(indices, \(m, n\), values\)"),
        (((torch.zeros(2, 1).long(), 3, torch.ones(1)), torch.ones(3)), {}, TypeError, r"a pair of integers \(m, n\), got 3"),
        (((torch.zeros(2, 1).long(), (3, 2), torch.ones(1)), torch.ones(2)), {}, ValueError, r"b of shape \(2,\) does not fit values"),
        (((torch.zeros(2, 1).long(), (3, 2), torch.full((1,), torch.inf)), torch.ones(3)), {}, ValueError, "values must be finite"),
        ((torch.eye(3), torch.ones(3)), {}, TypeError, "A must be a sparse matrix, got a dense tensor"),
        ((torch.eye(3).to_sparse(), torch.ones(2)), {}, ValueError, r"b must have shape \(3,\) or \(3, k\), got \(2,\)"),
        ((torch.eye(3).to_sparse(), [1.0]), {}, TypeError, "b must be a torch.Tensor, got list"),
        ((torch.eye(3).to_sparse(), torch.ones(3).double()), {}, TypeError, "b must have the dtype of A, torch.float32"),
        ((torch.eye(3).to_sparse(), torch.ones(3)), {"method": "qr"}, ValueError, "method must be one of 'auto', 'direct', 'normal', 'augmented', 'lsmr', got 'qr'"),
        ((torch.eye(3).to_sparse(), torch.ones(3)), {"method": "direct", "atol": 1.0}, TypeError, "options are for method='lsmr'; method='direct' has none, got atol"),
        ((torch.eye(3).to_sparse(), torch.full((3,), torch.nan)), {}, ValueError, "finite"),
    ],
)  # fmt: skip
def test_bad_input(arguments, options, error, message):
    with pytest.raises(error, match=message):
        spcache.lstsq(*arguments, **options)


@pytest.mark.parametrize("noise", [1.0, 1e-4, 1e-8, 1e-12, 0.0])
def test_lsmr_ends_where_rounding_does(noise):
    """With a small residual A^H r cannot become small against it."""
    A, x = torch.randn(60, 20, dtype=torch.float64), torch.randn(20, dtype=torch.float64)
    b = A @ x + noise * torch.randn(60, dtype=torch.float64)
    expected = torch.linalg.lstsq(A, b[:, None]).solution[:, 0]
    found = spcache.lstsq(A.to_sparse_csr(), b, method="lsmr")
    assert (found - expected).norm() < 1e-12 * expected.norm()
