"""The contract of torch_sparse_solve, point by point. K: kept exactly. F: the original is wrong, this is right."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import spcache
from spcache import plan_cache
from spcache.compat.torch_sparse_solve import solve


def batch(n=5, size=4):
    """Matrices of one pattern, as dense ones."""
    pattern = torch.rand(n, n) < 0.5
    return torch.randn(size, n, n, dtype=torch.float64) * pattern + 3 * torch.eye(n, dtype=torch.float64)


def system():
    return next(e for e in plan_cache._entries.values() if isinstance(e, spcache.SparseSystem))


def test_solve():
    """K: A sparse COO [b, m, m], b [b, m, n]; LU; the gradient of A is COO [b, m, m], summed over right-hand sides."""
    D, b = batch().requires_grad_(), torch.randn(4, 5, 2, dtype=torch.float64, requires_grad=True)
    A = D.detach().to_sparse_coo().requires_grad_()
    x, expected = solve(A, b), torch.linalg.solve(D, b)
    torch.testing.assert_close(x, expected)
    (x**2).sum().backward()
    dD, db = torch.autograd.grad((expected**2).sum(), (D, b))
    assert A.grad.layout is torch.sparse_coo and A.grad.shape == (4, 5, 5)
    torch.testing.assert_close(A.grad.to_dense(), dD * (D != 0))
    torch.testing.assert_close(b.grad, db)


def test_gradcheck():
    D, b = batch(3, 2), torch.randn(2, 3, 2, dtype=torch.float64, requires_grad=True)
    indices, values = D.to_sparse_coo().indices(), D.to_sparse_coo().values().requires_grad_()

    def of_values(v, b):
        return solve(torch.sparse_coo_tensor(indices, v, D.shape, is_coalesced=True), b)

    assert gradcheck(of_values, (values, b)) and gradgradcheck(of_values, (values, b))


def test_one_analysis_one_factorization():
    """F: the analysis once for a pattern, the factor again in the backward pass."""
    A = batch().to_sparse_coo()
    for k in range(1, 4):
        b = torch.randn(4, 5, 2, dtype=torch.float64, requires_grad=True)
        solve(A * k, b).sum().backward()
        stats = system().stats
        assert (stats.analyses, stats.factorizations, stats.matrices, stats.solves) == (1, k, 4 * k, 2 * k)


def test_failures_are_reported():
    """F."""
    D = batch()
    A = D.to_sparse_coo().coalesce()
    values = A.values().clone().view(4, -1)
    values[2] = 0
    A = torch.sparse_coo_tensor(A.indices(), values.flatten(), A.shape)
    with pytest.raises(spcache.SingularMatrixError) as caught:
        solve(A, torch.ones(4, 5, 1, dtype=torch.float64))
    assert caught.value.batch == (2,)


@pytest.mark.parametrize(
    ("A", "b", "message"),
    [
        (torch.eye(2).double().to_sparse(), torch.ones(1, 2, 1).double(), "'A' must be sparse COO of shape .b, m, m."),
        (torch.ones(1, 2, 3).double().to_sparse(), torch.ones(1, 2, 1).double(), "'A' must be sparse COO of shape"),
        (torch.ones(1, 2, 2).double(), torch.ones(1, 2, 1).double(), "'A' must be sparse COO .*strided"),
        (torch.ones(1, 2, 2).to_sparse(), torch.ones(1, 2, 1).double(), "'A' must be float64, got torch.float32"),
        (torch.ones(1, 2, 2).double().to_sparse(), torch.ones(1, 2).double(), r"'b' must have shape \(1, 2, n\)"),
        (torch.ones(1, 2, 2).double().to_sparse(), torch.ones(1, 3, 1).double(), r"'b' must have shape \(1, 2, n\)"),
        (torch.ones(1, 2, 2).double().to_sparse(), torch.ones(1, 2, 1), "'b' must be float64, got torch.float32"),
        (torch.stack([torch.eye(2), torch.ones(2, 2)]).double().to_sparse(), torch.ones(2, 2, 1).double(), "same pattern"),
        (torch.stack([torch.eye(2), torch.eye(2).flip(0)]).double().to_sparse(), torch.ones(2, 2, 1).double(), "same pattern"),
    ],
)  # fmt: skip
def test_bad_input(A, b, message):
    with pytest.raises(ValueError, match=message):
        solve(A, b)
