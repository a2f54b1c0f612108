"""The contract of torchsparsegradutils 0.2.7, point by point. K: kept exactly. F: the original is wrong, this is right. D:
decided here. Their own tests run by benchmarks/predecessor_tests.py."""

import importlib
import inspect
import logging
import math
from functools import partial

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import spcache
from spcache import plan_cache
from spcache.compat import torchsparsegradutils as tsgu
from spcache.compat.torchsparsegradutils import (
    sparse_generic_lstsq,
    sparse_generic_solve,
    sparse_mm,
    sparse_triangular_solve,
    utils,
)
from spcache.compat.torchsparsegradutils.utils import (
    BICGSTABSettings,
    LinearCGSettings,
    MINRESSettings,
    bicgstab,
    convert_coo_to_csr,
    convert_coo_to_csr_indices_values,
    linear_cg,
    lsmr,
    minres,
    sparse_block_diag,
    sparse_block_diag_split,
    sparse_eye,
    stack_csr,
)

pytestmark = pytest.mark.usefixtures("one_thread")

LAYOUTS = {"coo": torch.sparse_coo, "csr": torch.sparse_csr}
short = {"ids": lambda t: str(t).removeprefix("torch.")}
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], **short)
every_index = pytest.mark.parametrize("index", [torch.int32, torch.int64], **short)
every_batch = pytest.mark.parametrize("batch", [(), (3,)], ids=["single", "batch"])

OLD = torch.__version__ < "2.11"


def half(*shape, dtype=torch.float64):
    """Half of the entries are zero, in a batch different ones in each, but as many."""
    *batch, m, n = shape
    order = torch.rand(*batch, m * n).argsort(-1).view(shape)
    return torch.randn(shape, dtype=dtype) * (order < (m * n + 1) // 2)


def well(n, *batch, dtype=torch.float64):
    """Unsymmetric, dominated by its diagonal."""
    return (
        half(*batch, n, n, dtype=dtype).tril(-1) / n
        + half(*batch, n, n, dtype=dtype).triu(1) / n
        + 2 * torch.eye(n, dtype=dtype)
    )


def definite(n, dtype=torch.float64):
    D = well(n, dtype=dtype)
    return D @ D.T


def sparse(D, layout, index=torch.int64):
    """COO has int64 indices whatever it is made of."""
    A = D.to_sparse_coo().coalesce()
    if layout == "csr":
        if D.dim() == 3:
            everywhere = (D != 0).any(0).expand_as(D).to_sparse_coo().indices()
            A = torch.sparse_coo_tensor(everywhere, D[tuple(everywhere)], D.shape, is_coalesced=True)
        A = convert_coo_to_csr(A)
        A = torch.sparse_csr_tensor(A.crow_indices().to(index), A.col_indices().to(index), A.values(), A.shape)
    return A


def indices_of(A):
    return (A.coalesce().indices(),) if A.layout is torch.sparse_coo else (A.crow_indices(), A.col_indices())


def stored(A):
    ones = torch.ones_like(A.values())
    if A.layout is torch.sparse_coo:
        return torch.sparse_coo_tensor(A.indices(), ones, A.shape).to_dense() != 0
    return torch.sparse_csr_tensor(*indices_of(A), ones, A.shape).to_dense() != 0


def close(actual, expected, c=1000):
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    assert (actual - expected).abs().max() <= c * torch.finfo(expected.dtype).eps * expected.abs().max().clamp(min=1)


def agrees(f, reference, A, B, c=1000):
    """f(A, B) and its gradients are those of reference(dense A, B). A's gradient has A's layout and indices."""
    A, B = A.detach().requires_grad_(), B.detach().requires_grad_()
    D, C = A.detach().to_dense().requires_grad_(), B.detach().requires_grad_()
    y, expected = f(A, B), reference(D, C)
    close(y, expected, c)
    g = torch.randn_like(expected)
    (dA, dB), (dD, dC) = torch.autograd.grad(y, (A, B), g), torch.autograd.grad(expected, (D, C), g)
    close(dB, dC, c)
    assert dA.layout is A.layout
    for mine, theirs in zip(indices_of(dA), indices_of(A), strict=True):
        assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)
    assert (dD * ~stored(A)).abs().max() > 0 or bool(stored(A).all())  # there is something to leave out
    close(dA.to_dense(), dD * stored(A), c)


def of_values(f, D, layout):
    """f as a function of the stored values of D and of B, and those values."""
    A = sparse(D, layout)
    make = partial(torch.sparse_coo_tensor, is_coalesced=True) if layout == "coo" else torch.sparse_csr_tensor
    values = A.values().clone().requires_grad_()
    return (lambda v, B: f(make(*indices_of(A), v, D.shape), B)), values


def dense_solve(A, B):
    return torch.linalg.solve(A.to_dense(), B)


def dense_transpose_solve(A, B):
    return torch.linalg.solve(A.to_dense().mT, B)


def refuses(f, cases):
    """Each case breaks its own rule and, where it can, all that come after."""
    for arguments, error, message in cases:
        with pytest.raises(error) as caught:
            f(*arguments)
        assert str(caught.value) == message


# --- sparse_mm -----------------------------------------------------------------------------------------------------


@every_layout
@every_dtype
@every_index
@every_batch
def test_mm(layout, dtype, index, batch):
    """K: COO or CSR, one or a batch; grad A at its stored entries in its layout; grad B = A^T G."""
    agrees(
        sparse_mm,
        torch.matmul,
        sparse(half(*batch, 5, 7, dtype=dtype), layout, index),
        torch.randn(*batch, 7, 2, dtype=dtype),
    )


def test_mm_computes_what_is_needed(monkeypatch):
    """K: only that."""
    calls = []
    for name in "outer", "matvec":
        original = getattr(spcache.convention.Convention, name)
        monkeypatch.setattr(
            spcache.convention.Convention, name,
            lambda *args, name=name, original=original: calls.append(name) or original(*args),
        )  # fmt: skip
    A, B = sparse(half(4, 4), "csr"), torch.ones(4, 2).double()
    sparse_mm(A.detach().requires_grad_(), B).sum().backward()
    assert calls == ["matvec", "outer"]
    calls.clear()
    sparse_mm(A, B.detach().requires_grad_()).sum().backward()
    assert calls == ["matvec", "matvec"]


def test_mm_errors():
    """K: the words, and the order."""
    S, D = torch.ones(2, 3).to_sparse(), torch.ones(3, 1)
    refuses(sparse_mm, [
        (("A", D[0]), ValueError, "Both A and B should be instances of torch.Tensor"),
        ((torch.ones(2, 3, 4), None), ValueError, "Both A and B should be instances of torch.Tensor"),
        ((torch.ones(2, 3), torch.ones(3)), ValueError, "Both A and B should be at least 2-dimensional tensors"),
        ((torch.ones(3), torch.ones(3, 1)), ValueError, "Both A and B should be at least 2-dimensional tensors"),
        ((torch.ones(4, 2, 3), S), ValueError, "A and B must both be 2D or both be 3D tensors"),
        ((torch.ones(1, 4, 2, 3), torch.ones(1, 5, 4, 1).to_sparse()), ValueError, "A and B must both be 2D or both be 3D tensors"),
        ((torch.ones(4, 2, 3), torch.ones(5, 4, 1).to_sparse()), ValueError, "A should be in either COO or CSR sparse format"),
        ((torch.ones(2, 3).to_sparse_csc(), S), ValueError, "A should be in either COO or CSR sparse format"),
        ((torch.ones(4, 2, 3).to_sparse(), torch.ones(5, 4, 1).to_sparse()), ValueError, "B must be a dense (strided) tensor"),
        ((torch.ones(4, 2, 3).to_sparse(), torch.ones(5, 4, 1)), ValueError, "If batched, A and B must have the same batch size"),
        ((S, torch.ones(4, 1)), ValueError, "Incompatible inner dimensions: A[..., 3] vs B[..., 4]"),
    ])  # fmt: skip


# --- sparse_triangular_solve -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("transpose", [False, True], ids=["plain", "transpose"])
@pytest.mark.parametrize("unitriangular", [False, True], ids=["diagonal", "unit"])
@pytest.mark.parametrize("upper", [True, False], ids=["upper", "lower"])
@every_batch
@every_dtype
@every_layout
def test_triangular_solve(layout, dtype, batch, upper, unitriangular, transpose):
    """K: only the stated triangle is used (the other one is full here); ones are implied; `upper` describes A as
    stored; gradients at stored entries, in A's layout and with its indices."""
    index = torch.int32 if transpose else torch.int64
    D = well(6, *batch, dtype=dtype) + torch.randn(6, 6, dtype=dtype).tril(-1 if upper else -9).add(
        torch.randn(6, 6, dtype=dtype).triu(9 if upper else 1)
    )
    if unitriangular:
        D = D * (1 - torch.eye(6, dtype=dtype))

    def reference(D, B):
        T = D.triu() if upper else D.tril()
        T = T + torch.eye(6, dtype=dtype) if unitriangular else T
        return torch.linalg.solve(T.mT if transpose else T, B)

    f = partial(sparse_triangular_solve, upper=upper, unitriangular=unitriangular, transpose=transpose)
    A, B = sparse(D, layout, index), torch.randn(*batch, 6, 2, dtype=dtype)
    agrees(f, reference, A, B)
    A = A.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(f(A, B).sum(), A)
    assert (gradient.to_dense() * (D.tril(-1) if upper else D.triu(1))).abs().max() == 0


def test_triangular_solve_defaults():
    """K: upper, with its diagonal, not transposed."""
    D, B = well(5), torch.randn(5, 2).double()
    close(sparse_triangular_solve(sparse(D, "csr"), B), torch.linalg.solve_triangular(D.triu(), B, upper=True))
    names = list(inspect.signature(sparse_triangular_solve).parameters)
    assert names == ["A", "B", "upper", "unitriangular", "transpose"]


@every_layout
@every_batch
@pytest.mark.parametrize("wanted", ["A", "B"])
def test_a_stored_diagonal_of_ones(layout, batch, wanted):
    """K: unitriangular=True with a diagonal stored gives a solution, of which backward raises."""
    D = well(4, *batch)
    A, B = (
        sparse(D, layout).requires_grad_(wanted == "A"),
        torch.ones(*batch, 4, 1).double().requires_grad_(wanted == "B"),
    )
    X = sparse_triangular_solve(A, B, unitriangular=True)
    close(X, torch.linalg.solve_triangular(D, B, upper=True, unitriangular=True))
    with pytest.raises(
        ValueError, match=r"^First input should be strictly triangular \(i.e. unit diagonals is implicit\)$"
    ):
        X.sum().backward()
    sparse_triangular_solve(A, B).sum().backward()


def test_triangular_solve_errors():
    """K: the words, and the order: square, then inner dimensions, the batch last. A B of one dimension is refused."""
    inner = "Incompatible inner dimensions: A[..., 3] vs B[..., 4]"
    refuses(sparse_triangular_solve, [
        ((None, torch.ones(3)), ValueError, "Both A and B should be instances of torch.Tensor"),
        ((torch.eye(3), torch.ones(3)), ValueError, "Both A and B should be at least 2-dimensional tensors"),
        ((torch.ones(4, 2, 3), torch.ones(2, 3).to_sparse()), ValueError, "A and B must both be 2D or both be 3D tensors"),
        ((torch.ones(4, 2, 3), torch.ones(5, 4, 1).to_sparse()), ValueError, "A should be in either COO or CSR sparse format"),
        ((torch.ones(4, 2, 3).to_sparse(), torch.ones(5, 4, 1).to_sparse()), ValueError, "B must be a dense (strided) tensor"),
        ((torch.ones(4, 2, 3).to_sparse(), torch.ones(5, 4, 1)), ValueError, "A must be square on its last two dimensions"),
        ((torch.ones(4, 3, 3).to_sparse(), torch.ones(5, 4, 1)), ValueError, inner),
        ((torch.ones(4, 3, 3).to_sparse(), torch.ones(5, 3, 1)), ValueError, "If batched, A and B must have the same batch size"),
    ])  # fmt: skip


# --- sparse_generic_solve --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("columns", [(), (1,), (3,)], ids=["vector", "column", "matrix"])
@every_index
@every_dtype
@every_layout
def test_generic_solve(layout, dtype, index, columns):
    """K: A [n, n], B [n] or [n, k], whose rank is kept; grad A at stored entries, in A's layout, same indices. F: A is
    unsymmetric and only `solve` is given."""
    A, B = sparse(well(6, dtype=dtype), layout, index), torch.randn(6, *columns, dtype=dtype)
    agrees(partial(sparse_generic_solve, solve=dense_solve), torch.linalg.solve, A, B)


ACCURATE = partial(bicgstab, settings=BICGSTABSettings(abstol=1e-15, reltol=1e-14, matvec_max=100))
GMRES = partial(spcache.iterative.gmres, rtol=1e-14)


@every_layout
@pytest.mark.parametrize(
    ("solve", "transpose_solve"),
    [
        (dense_solve, None),
        (dense_solve, dense_solve),
        (None, dense_solve),
        (dense_solve, dense_transpose_solve),
        ("bicgstab", None),
        ("bicgstab", "bicgstab"),
        (None, "bicgstab"),
        (dense_solve, "bicgstab"),
        ("bicgstab", dense_transpose_solve),
        (spcache.solve, None),
        (spcache.solve, dense_transpose_solve),
        (None, spcache.solve),
        (spcache.solve, spcache.solve),
        (dense_solve, spcache.solve),
        (partial(spcache.solve, kind="general"), partial(spcache.solve)),
        (ACCURATE, partial(ACCURATE)),
        (None, ACCURATE),
        (dense_solve, ACCURATE),
        (spcache.solve, ACCURATE),
        (ACCURATE, spcache.solve),
        (GMRES, None),
        (None, GMRES),
        (dense_solve, GMRES),
        (GMRES, partial(spcache.iterative.bicgstab, rtol=1e-14)),
        (partial(spcache.iterative.lsmr, atol=1e-14, btol=1e-14), ACCURATE),
        (GMRES, dense_transpose_solve),
    ],
)
def test_whose_transpose(layout, solve, transpose_solve):
    """K: one given serves for both. F: every pair gives the gradient of an unsymmetric matrix. A `transpose_solve` of the
    user gets A as it is."""
    settings = BICGSTABSettings(abstol=1e-15, reltol=1e-14, matvec_max=100)
    accurate = partial(bicgstab, settings=settings)
    if transpose_solve == "bicgstab" == solve or (solve is None and transpose_solve == "bicgstab"):
        f = partial(sparse_generic_solve, transpose_solve=bicgstab, settings=settings, solve=solve and bicgstab)
    elif transpose_solve == "bicgstab":

        def own(A, B, settings):
            return dense_solve(A, B)

        f = partial(sparse_generic_solve, solve=own, transpose_solve=bicgstab, settings=settings)
    else:
        f = partial(
            sparse_generic_solve, solve=accurate if solve == "bicgstab" else solve, transpose_solve=transpose_solve
        )
    agrees(f, torch.linalg.solve, sparse(well(6), layout), torch.randn(6, 2).double(), 1e5)


def test_each_solver_is_called_where_it_should(monkeypatch):
    """K: `solve(A, B, **kwargs)` with detached tensors, kwargs in both passes; one given is used for both."""
    calls = []

    def solve(A, B, name="solve", **kwargs):
        assert not A.requires_grad and not B.requires_grad and not torch.is_grad_enabled()
        calls.append((name, A.to_dense(), kwargs))
        return torch.linalg.solve(A.to_dense().mT if name == "transposed" else A.to_dense(), B)

    def transposed(A, B, **kwargs):
        return solve(A, B, "transposed", **kwargs)

    def ours(A, B, **kwargs):
        return solve(A, B, "ours", **kwargs)

    monkeypatch.setattr(tsgu, "_OWN", (ours,))
    D = well(4)
    A, B = sparse(D, "coo").requires_grad_(), torch.ones(4).double().requires_grad_()
    sparse_generic_solve(A.detach(), B.detach(), solve)
    for given, expected in [
        ({"solve": solve}, [("solve", D), ("solve", D.mT)]),
        ({"solve": solve, "transpose_solve": transposed}, [("solve", D), ("transposed", D)]),
        ({"solve": solve, "transpose_solve": ours}, [("solve", D), ("ours", D.mT)]),
        ({"transpose_solve": solve}, [("solve", D), ("solve", D.mT)]),
        ({"solve": solve, "transpose_solve": solve}, [("solve", D), ("solve", D.mT)]),
    ]:
        calls.clear()
        sparse_generic_solve(A, B, **given, option=7).sum().backward()
        assert [name for name, _, _ in calls] == [name for name, _ in expected]
        for (_, matrix, kwargs), (_, wanted) in zip(calls, expected, strict=True):
            assert torch.equal(matrix, wanted) and kwargs == {"option": 7}


def test_the_default_is_minres(monkeypatch):
    """K: for both passes."""
    calls = []
    monkeypatch.setattr(tsgu, "minres", lambda A, B, **kwargs: calls.append(kwargs) or minres(A, B, **kwargs))
    D = definite(6) - 4.1 * torch.eye(6).double()
    assert torch.linalg.eigvalsh(D)[0] < -0.1 and torch.linalg.eigvalsh(D)[-1] > 0.1
    settings = MINRESSettings(minres_tolerance=1e-13)
    agrees(
        partial(sparse_generic_solve, settings=settings),
        torch.linalg.solve,
        sparse(D, "csr"),
        torch.randn(6, 2).double(),
        1e5,
    )
    assert calls == [{"settings": settings}] * 2


def test_the_shape_and_dtype_of_what_a_solver_gives():
    """K: the result has A's dtype and B's rank, whatever `solve` returns."""
    A = sparse(well(4), "coo")
    for B in torch.ones(4).double(), torch.ones(4, 1).double():
        for shape in (4,), (4, 1):
            x = sparse_generic_solve(A, B, lambda A, B, shape=shape: dense_solve(A, B).view(shape).float())
            assert (x.shape, x.dtype) == (B.shape, torch.float64)


def test_different_dtypes():
    """K: a warning. D: `solve` gets B in A's dtype; B's gradient is in B's own."""
    A, B = sparse(well(4), "csr"), torch.ones(4, requires_grad=True)
    with pytest.warns(UserWarning) as caught:
        x = sparse_generic_solve(A, B, dense_solve)
    assert (
        str(caught[0].message)
        == "A and B have different dtypes: A=torch.float64, B=torch.float32. This may affect solver behavior."
    )
    assert x.dtype == torch.float64
    x.sum().backward()
    close(B.grad, dense_transpose_solve(A, torch.ones(4).double()).float())


def test_generic_solve_errors():
    """K: the words, the types, and the order."""
    S, rectangle = torch.eye(3).to_sparse(), torch.ones(2, 3)
    refuses(sparse_generic_solve, [
        ((torch.ones(1, 2, 3), None), ValueError, "Both A and B should be instances of torch.Tensor"),
        ((None, S), ValueError, "Both A and B should be instances of torch.Tensor"),
        ((torch.ones(1, 2, 3), S), TypeError, "Unsupported sparse layout: torch.strided. Only COO and CSR are supported."),
        ((S.to_sparse_csc(), S), TypeError, "Unsupported sparse layout: torch.sparse_csc. Only COO and CSR are supported."),
        ((torch.ones(1, 2, 3).to_sparse(), torch.ones(1, 1, 1)), ValueError, "A must be a 2D tensor"),
        ((rectangle.to_sparse(), torch.ones(1, 1, 1)), ValueError, "A must be square"),
        ((S, torch.ones(1, 1, 1).to_sparse()), ValueError, "B must be a 1D or 2D tensor"),
        ((S, torch.ones(())), ValueError, "B must be a 1D or 2D tensor"),
        ((S, rectangle.to_sparse()), ValueError, "Incompatible dimensions: A has shape (3, 3), B has shape (2, 3)"),
        ((S, torch.eye(3).double().to_sparse()), TypeError, "B must be a dense (strided) tensor"),
    ])  # fmt: skip


@every_layout
@pytest.mark.parametrize("solve", [dense_solve, spcache.solve], ids=["dense", "spcache"])
def test_generic_solve_twice(layout, solve):
    """K: second derivatives."""
    f, values = of_values(partial(sparse_generic_solve, solve=solve), well(3), layout)
    for B in torch.randn(3, 2).double().requires_grad_(), torch.randn(3).double().requires_grad_():
        assert gradcheck(f, (values, B)) and gradgradcheck(f, (values, B))


def test_generic_solve_of_complex_numbers():
    f, values = of_values(partial(sparse_generic_solve, solve=dense_solve), well(3, dtype=torch.complex128), "coo")
    B = torch.randn(3, 2, dtype=torch.complex128).requires_grad_()
    assert gradcheck(f, (values, B)) and gradgradcheck(f, (values, B))


@pytest.mark.skipif(OLD, reason="torch 2.6 takes sparse tensors for dense ones inside of torch.func")
def test_generic_solve_in_torch_func():
    A, B = sparse(well(4), "coo"), torch.randn(3, 4).double()
    gradient = torch.func.grad(lambda b: sparse_generic_solve(A, b, dense_solve).pow(2).sum() / 2)
    expected = dense_transpose_solve(A, dense_solve(A, B.T)).T
    close(gradient(B[0]), expected[0])
    close(torch.vmap(gradient)(B), expected)


def test_a_matrix_changed_in_place():
    """The backward pass is that of the matrix as it was."""
    A, B = sparse(well(4), "csr"), torch.ones(4).double().requires_grad_()
    expected = dense_transpose_solve(A, torch.ones(4).double())
    x = sparse_generic_solve(A, B, dense_solve)
    A.values().mul_(2)
    x.sum().backward()
    close(B.grad, expected)


@pytest.mark.parametrize("solve", [utils.bicgstab, dense_solve, spcache.solve, spcache.iterative.bicgstab])
def test_a_tiny_cotangent(solve):
    """F: it is scaled to norm one, column by column, for the solve; bicgstab's abstol=1e-8 took it for nothing. Zero
    costs no solve. The user's own B is not scaled."""
    A, B = sparse(well(5), "csr"), torch.randn(5, 3).double().requires_grad_()
    seen = []

    def counted(A, B):
        seen.append(B.norm(dim=0))
        return solve(A, B)

    g = torch.randn(5, 3).double() * torch.tensor([1e-9, 0, 1e-200], dtype=torch.float64)
    x = sparse_generic_solve(A, B, counted)
    (gradient,) = torch.autograd.grad(x, B, g, retain_graph=True)
    expected = dense_transpose_solve(A, g)
    assert ((gradient - expected).norm(dim=0) <= 1e-4 * expected.norm(dim=0)).all()
    assert torch.equal(seen[0], B.norm(dim=0)) and torch.allclose(seen[1], torch.tensor([1.0, 0, 1]).double())
    (gradient,) = torch.autograd.grad(x, B, torch.zeros(5, 3).double())
    assert len(seen) == 2 and not gradient.any()


def test_what_a_solver_gives_is_not_the_users():
    """F: x is new memory, also where the solver gives its B or part of A."""
    I = sparse_eye((3, 3), layout=torch.sparse_csr)
    B = torch.ones(3).double()
    for f in sparse_generic_solve, sparse_generic_lstsq:
        f(I, B, lambda A, B: B).zero_()
        f(I, B, lambda A, B: A.values()).zero_()
    assert torch.equal(B, I.values()) and B.all()


def test_what_has_no_data():
    A, B = torch.eye(2).to_sparse(), torch.ones(2, 1)
    for f in sparse_mm, sparse_triangular_solve, sparse_generic_solve, sparse_generic_lstsq:
        for arguments, name in ((A.to("meta"), B), "A"), ((A, B.to("meta")), "B"):
            with pytest.raises(TypeError, match=f"^{name} must have data, got a tensor on the meta device"):
                f(*arguments)
    for f in sparse_mm, sparse_triangular_solve, sparse_generic_lstsq:
        with pytest.raises(TypeError, match=r"^B must have the dtype of A, torch.float32, got torch.float64"):
            f(A, B.double())


# --- sparse_generic_lstsq --------------------------------------------------------------------------------------------


def dense_lstsq(A, B):
    return torch.linalg.pinv(A.to_dense()) @ B


def dense_transpose_lstsq(A, B):
    return torch.linalg.pinv(A.to_dense().mT) @ B


def golub_pereyra(D, B):
    return torch.linalg.solve(D.mT @ D, D.mT @ B)


def tall(layout, dtype=torch.float64, index=torch.int64):
    D = half(7, 4, dtype=dtype)
    return sparse(torch.cat([2 * torch.eye(4, dtype=dtype), D[4:]]), layout, index)


@pytest.mark.parametrize("columns", [(), (1,), (3,)], ids=["vector", "column", "matrix"])
@every_index
@every_dtype
@every_layout
def test_lstsq(layout, dtype, index, columns):
    """K: grad A and grad B are those of Golub and Pereyra, at stored entries, in A's layout, with its indices."""
    A, B = tall(layout, dtype, index), torch.randn(7, *columns, dtype=dtype)
    agrees(partial(sparse_generic_lstsq, lstsq=dense_lstsq, transpose_lstsq=dense_transpose_lstsq), golub_pereyra, A, B)


@every_layout
@pytest.mark.parametrize("columns", [(), (3,)], ids=["vector", "matrix"])
def test_lstsq_by_default(layout, columns, monkeypatch):
    """K, D: LSMR in this namespace, with its own tolerance."""
    calls = []
    monkeypatch.setattr(tsgu, "lsmr", lambda *args: calls.append(args[3]) or lsmr(*args))
    agrees(sparse_generic_lstsq, golub_pereyra, tall(layout), torch.randn(7, *columns).double(), 1e11)
    assert calls == [4, 7, 4]  # forward; backward: A^T, then A


def test_lstsq_gets_the_matrix_as_it_is():
    """K: also `transpose_lstsq`."""
    A, B, calls = tall("csr").requires_grad_(), torch.ones(7).double(), []

    def record(f):
        return lambda A, B: calls.append((f, A.shape, A.requires_grad)) or f(A, B)

    sparse_generic_lstsq(A, B, record(dense_lstsq), record(dense_transpose_lstsq)).sum().backward()
    assert [f for f, *_ in calls] == [dense_lstsq, dense_transpose_lstsq, dense_lstsq]
    assert all(shape == (7, 4) and not graph for _, shape, graph in calls)


@pytest.mark.parametrize(
    ("lstsq", "transpose_lstsq"),
    [
        (spcache.lstsq, None),
        (*[partial(spcache.iterative.lsmr, atol=1e-14, btol=1e-14)] * 2,),
        (dense_lstsq, partial(utils.lsmr, atol=1e-14, btol=1e-14)),
        (spcache.lstsq, dense_transpose_lstsq),
    ],
)
def test_lstsq_by_what_is_at_hand(lstsq, transpose_lstsq):
    """D: also solvers that give (x, status), and those that solve with what they get."""
    f = partial(sparse_generic_lstsq, lstsq=lstsq, transpose_lstsq=transpose_lstsq)
    agrees(f, golub_pereyra, tall("csr"), torch.randn(7, 2).double(), 1e5)


@every_layout
def test_lstsq_of_a_wide_matrix(layout):
    """K: backward raises; forward gives the smallest solution."""
    D = half(7, 4).mT + torch.eye(4, 7)
    for wanted in "A", "B":
        A, B = sparse(D, layout).requires_grad_(wanted == "A"), torch.ones(4).double().requires_grad_(wanted == "B")
        x = sparse_generic_lstsq(A, B, dense_lstsq, dense_transpose_lstsq)
        close(x, torch.linalg.pinv(D) @ torch.ones(4).double())
        with pytest.raises(ValueError) as caught:
            x.sum().backward()
        assert str(caught.value) == "A should be a tall full-rank matrix. Got A.shape=torch.Size([4, 7])"


@pytest.mark.parametrize(
    ("layout", "dtype"), [("coo", torch.float64), ("csr", torch.float64), ("coo", torch.complex128)]
)
def test_lstsq_twice(layout, dtype):
    f = partial(sparse_generic_lstsq, lstsq=dense_lstsq, transpose_lstsq=dense_transpose_lstsq)
    f, values = of_values(f, torch.cat([2 * torch.eye(2, dtype=dtype), half(2, 2, dtype=dtype)]), layout)
    B = torch.randn(4, 2, dtype=dtype).requires_grad_()
    assert gradcheck(f, (values, B)) and gradgradcheck(f, (values, B))


# --- one analysis ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("f", "misses"),
    [
        (sparse_mm, 1),
        (sparse_triangular_solve, 2),  # the triangle, and KLU's plan of it
        (partial(sparse_generic_solve, solve=dense_solve), 1),
        (partial(sparse_generic_solve, solve=spcache.solve), 2),
        (sparse_generic_lstsq, 1),
    ],
    ids=["mm", "triangular", "generic", "spcache", "lstsq"],
)
@every_layout
def test_a_loop_analyzes_once(f, misses, layout):
    """Forward and backward of new matrices of one pattern."""
    D, B = well(6), torch.ones(6, 2).double()
    before = plan_cache.info()
    for k in range(1, 4):
        A = sparse(k * D, layout).requires_grad_()
        f(A, B).sum().backward()
        info = plan_cache.info()
        assert (info.misses - before.misses, info.entries) == (misses, misses)


def test_spcache_keeps_the_factor_for_the_backward_pass(monkeypatch):
    made = []
    original = spcache.factorizer.Factorizer._factorize
    monkeypatch.setattr(spcache.factorizer.Factorizer, "_factorize", lambda *args: made.append(1) or original(*args))
    A = sparse(well(5), "csr").requires_grad_()
    sparse_generic_solve(A, torch.ones(5).double(), spcache.solve).sum().backward()
    assert made == [1]


# --- utils -----------------------------------------------------------------------------------------------------------


def test_settings():
    """K: names, order, defaults."""
    assert LinearCGSettings()._asdict() == {
        "max_cg_iterations": 1000, "max_lanczos_quadrature_iterations": 20, "cg_tolerance": 1e-5,
        "terminate_cg_by_size": False, "verbose_linalg": False,
    }  # fmt: skip
    assert MINRESSettings()._asdict() == {"max_cg_iterations": 1000, "minres_tolerance": 1e-4, "verbose_linalg": False}
    settings = BICGSTABSettings()._asdict()
    assert isinstance(settings.pop("logger"), logging.Logger)
    assert settings == {"matvec_max": None, "abstol": 1e-8, "reltol": 1e-6, "precon": None}
    assert list(BICGSTABSettings._fields) == ["matvec_max", "abstol", "reltol", "precon", "logger"]
    defaults = {name: p.default for name, p in inspect.signature(lsmr).parameters.items()}
    empty = inspect.Parameter.empty
    assert defaults == {
        "A": empty, "b": empty, "Armat": None, "n": None, "damp": 0.0, "atol": 1e-6, "btol": 1e-6, "conlim": 1e8,
        "maxiter": None, "x0": None, "check_nonzero": True,
    }  # fmt: skip


def test_names():
    """K: where users import them from."""
    for name in "bicgstab", "linear_cg", "minres", "lsmr":
        module = importlib.import_module(f"spcache.compat.torchsparsegradutils.utils.{name}")
        assert getattr(module, name) is getattr(utils, name)
    assert {"CGInfo", "convert_coo_to_csr", "sparse_block_diag_split"} <= set(utils.__all__)


@pytest.mark.parametrize("solver", [linear_cg, minres, bicgstab, partial(lsmr, n=3)])
def test_neither_tensor_nor_callable(solver):
    """K."""
    with pytest.raises(RuntimeError, match="^matmul_closure must be a tensor, or a callable object!$"):
        solver(7, torch.ones(3))


@pytest.mark.parametrize("solver", [linear_cg, minres, bicgstab])
@pytest.mark.parametrize("columns", [(), (3,)], ids=["vector", "matrix"])
def test_solvers(solver, columns):
    """K: of a dense and a sparse tensor, and of a function."""
    D, b = definite(12), torch.randn(12, *columns).double()
    settings = {
        linear_cg: LinearCGSettings(cg_tolerance=1e-12),
        minres: MINRESSettings(minres_tolerance=1e-12),
        bicgstab: BICGSTABSettings(abstol=0, reltol=1e-12, matvec_max=100),
    }[solver]
    expected = torch.linalg.solve(D, b)
    for A in D, D.to_sparse_coo(), D.to_sparse_csr(), D.matmul:
        close(solver(A, b, settings=settings), expected, 1e5)


@pytest.mark.parametrize(
    "solver",
    [
        partial(linear_cg, max_iter=3, max_tridiag_iter=0),
        partial(minres, max_iter=3),
        partial(bicgstab, settings=BICGSTABSettings(matvec_max=4)),
        partial(lsmr, maxiter=3),
    ],
    ids=["linear_cg", "minres", "bicgstab", "lsmr"],
)
def test_what_did_not_converge_is_said(solver):
    with pytest.warns(UserWarning, match="did not (converge|get to the tolerance)|no minimum in 3 iterations"):
        solver(torch.diag(torch.logspace(0, 3, 30).double()), torch.ones(30).double())


def test_verbose(capsys):
    linear_cg(torch.eye(2), torch.ones(2), settings=LinearCGSettings(verbose_linalg=True))
    minres(torch.eye(2), torch.ones(2), settings=MINRESSettings(verbose_linalg=True))
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["linear_cg", "minres"]


def test_linear_cg_gives_the_spectrum():
    """K: n_tridiag; return_info."""
    D = definite(6)
    b = torch.randn(6, 3).double()
    with pytest.warns(UserWarning, match="the tolerance 0"):
        x, T, info = linear_cg(D, b, n_tridiag=2, tolerance=0, max_iter=6, max_tridiag_iter=6, return_info=True)
    close(x, torch.linalg.solve(D, b), 1e5)
    assert T.shape == (2, 6, 6)
    close(torch.linalg.eigvalsh(T), torch.linalg.eigvalsh(D).expand(2, 6), 1e6)
    assert (info.iterations, info.matvecs, info.reason, info.tolerance) == (6, 8, "max_iter", 0)
    assert info.converged.shape == info.true_relative_residual.shape == info.recursive_relative_residual.shape == (3,)


def test_linear_cg_stops_as_told():
    """K: preconditioner, initial_guess, min_iter, terminate_cg_by_size, convergence_reduction, breakdown."""
    diagonal = torch.logspace(0, 2, 20).double()
    D, b = torch.diag(diagonal), torch.ones(20, 2).double()
    count = lambda **kwargs: linear_cg(D, b, return_info=True, max_tridiag_iter=0, **kwargs)[1]  # noqa: E731
    assert count(preconditioner=lambda r: r / diagonal[:, None]).iterations == 1
    near = diagonal[:, None] * torch.tensor([1.0, 1.1]).double().repeat(10)[:, None]  # two eigenvalues
    assert count(preconditioner=lambda r: r / near).iterations == 2
    assert count(initial_guess=b / diagonal[:, None]).iterations == 0
    assert count(initial_guess=b / diagonal[:, None], min_iter=2).iterations == 2
    with pytest.warns(UserWarning):
        assert count(tolerance=1e-30, settings=LinearCGSettings(terminate_cg_by_size=True)).iterations == 20
    b[:, 0] = 0
    with pytest.warns(UserWarning):
        early = count(convergence_reduction="mean", tolerance=1e-3)
    assert early.reason == "mean_converged" and early.iterations < count(tolerance=1e-3).iterations
    with pytest.raises(RuntimeError, match=r"p\^T A p must be finite and at least eps"):
        linear_cg(-D, b)


def test_minres_of_many_systems():
    """K: value, shifts, batches."""
    D, b = definite(5), torch.randn(5, 2).double()
    accurate = partial(minres, settings=MINRESSettings(minres_tolerance=1e-13))
    I, shifts = torch.eye(5).double(), torch.tensor([0.0, 1.0, 2.0]).double()
    expected = torch.stack([torch.linalg.solve(s * I - D, b) for s in shifts])
    close(accurate(D, b, value=-1, shifts=shifts), expected, 1e5)
    close(accurate(D.to_sparse_csr(), b[:, 0], value=-1, shifts=shifts), expected[..., 0], 1e5)
    close(accurate(D, b, shifts=2.0), torch.linalg.solve(D + 2 * I, b), 1e5)
    batch = torch.stack([D, 2 * D, D + I])
    for A in batch, batch.matmul:
        close(accurate(A, b), torch.linalg.solve(batch, b), 1e5)
    close(accurate(D, b.expand(3, 5, 2)), torch.linalg.solve(D, b).expand(3, 5, 2), 1e5)


def test_minres_with_a_preconditioner():
    diagonal, products = torch.logspace(0, 2, 30).double()[:, None], []
    x = minres(
        lambda x: products.append(1) or diagonal * x, torch.ones(30).double(), preconditioner=lambda r: r / diagonal
    )
    close(x, 1 / diagonal[:, 0], 1e5)
    assert len(products) < 6


def test_minres_has_no_eps():
    with pytest.raises(NotImplementedError, match="eps has no meaning here"):
        minres(torch.eye(2), torch.ones(2), eps=1e-10)


def test_minres_takes_as_many_iterations_as_it_needs():
    """F: the original stops after n + 3, whatever the residual is."""
    Q = torch.linalg.qr(torch.randn(60, 60, generator=torch.Generator().manual_seed(0)).double())[0]
    D = Q @ torch.diag(torch.linspace(-3, 5, 60).double() ** 3 + 0.01) @ Q.T
    b, products = torch.ones(60).double(), []
    x = minres(lambda x: products.append(1) or D @ x, b, settings=MINRESSettings(minres_tolerance=1e-8))
    assert (b - D @ x).norm() <= 1e-8 * b.norm() and len(products) > 63


def test_bicgstab_counts_products():
    """K: matvec_max counts them, for each column; None: 2 n; 0: nothing is computed."""
    products = []

    def A(x):
        products.append(1)
        return torch.diag(torch.logspace(0, 8, 30).double()) @ x

    b = torch.ones(30, 2).double()
    for most in 1, 2, 5, None:
        products.clear()
        with pytest.warns(UserWarning, match="2 of 2 right-hand sides"):
            bicgstab(A, b, settings=BICGSTABSettings(matvec_max=most, reltol=1e-15))
        assert len(products) == 2 * (most or 60)
    products.clear()
    with pytest.warns(UserWarning, match="matvec_max=0"):
        x = bicgstab(A, b, initial_guess=b, settings=BICGSTABSettings(matvec_max=0))
    assert torch.equal(x, b) and x is not b and not products
    with pytest.raises(ValueError, match="must be nonnegative"):
        bicgstab(A, b, settings=BICGSTABSettings(matvec_max=-1))
    with pytest.raises(ValueError, match=r"rhs must have shape \(n,\) or \(n, k\), got \(1, 30, 2\)"):
        bicgstab(A, b[None])


def test_bicgstab_stops_as_told():
    """K: at max(abstol, reltol ||b||), of b alone, whatever the guess; each column by itself."""
    D, products = well(20), []
    A = lambda x: products.append(1) or D @ x  # noqa: E731

    def count(b, guess=None, **settings):
        products.clear()
        x = bicgstab(A, b, guess, BICGSTABSettings(matvec_max=100, **settings))
        return len(products), x

    b = torch.randn(20).double()
    usual, x = count(b)
    assert 5 < usual < 30 and (b - D @ x).norm() <= 1e-6 * b.norm()
    assert count(1e6 * b, abstol=0)[0] == usual == count(1e-6 * b, abstol=0)[0]
    assert count(b, abstol=1e-2)[0] < usual
    assert count(1e-10 * b)[0] == 1
    expected = torch.linalg.solve(D, b)
    assert count(b, expected * (1 + 1e-8))[0] == 1
    close(count(b, 100 * expected.flip(0), abstol=0, reltol=1e-13)[1], expected, 1e5)
    assert count(torch.stack([b, 0 * b], 1))[0] == usual + 1


def test_bicgstab_settings(caplog):
    """K: precon as a tensor or a function; the logger."""
    D, b = torch.diag(torch.logspace(0, 8, 30).double()), torch.ones(30).double()
    inverse = D.inverse()
    with caplog.at_level(logging.INFO):
        for precon in inverse, inverse.matmul:
            close(bicgstab(D, b, settings=BICGSTABSettings(precon=precon, matvec_max=2)), inverse @ b)
        near = inverse * torch.tensor([1.0, 1.1]).double().repeat(15)  # two eigenvalues
        settings = BICGSTABSettings(precon=near, matvec_max=5, reltol=1e-12)
        close(bicgstab(D, b, settings=settings), inverse @ b, 1e5)
    assert "products, residual" in caplog.text
    with pytest.raises(RuntimeError, match=r"^settings\.precon must be a tensor, or a callable object!$"):
        bicgstab(D, b, settings=BICGSTABSettings(precon=7))


def test_bicgstab_survives_a_breakdown():
    """F: the original divides by zero and gives NaN."""
    with pytest.warns(UserWarning, match="1 of 1 right-hand sides"):
        x = bicgstab(torch.tensor([[0.0, 1.0], [-1.0, 0.0]]), torch.tensor([1.0, 0.0]))
    assert x.isfinite().all()


def test_lsmr():
    """K: tensors and functions, damp, x0, a column; (x, iterations)."""
    D, b = tall("coo").to_dense(), torch.randn(7).double()
    tight = partial(lsmr, atol=1e-14, btol=1e-14)
    x, iterations = tight(D, b)
    close(x, golub_pereyra(D, b), 1e5)
    assert isinstance(iterations, int) and 0 < iterations < 40
    close(tight(D.to_sparse_csr(), b[:, None])[0], golub_pereyra(D, b), 1e5)
    close(tight(D.matmul, b, D.mT, 4)[0], golub_pereyra(D, b), 1e5)
    products, x0 = [], torch.ones(4).double()
    close(tight(D, b, lambda y: products.append(1) or D.mT @ y, x0=x0)[0], golub_pereyra(D, b), 1e5)
    assert products
    damped = D.mT @ D + 4 * torch.eye(4).double()
    close(tight(D, b, damp=2.0)[0], torch.linalg.solve(damped, D.mT @ b), 1e5)
    close(tight(D, b, damp=2.0, x0=x0)[0], torch.linalg.solve(damped, D.mT @ b + 4 * x0), 1e5)
    hard = torch.diag(torch.logspace(0, 4, 30).double())
    with pytest.warns(UserWarning, match="no minimum"):
        assert lsmr(hard, torch.ones(30).double(), conlim=10)[1] < lsmr(hard, torch.ones(30).double(), maxiter=300)[1]
    with pytest.raises(RuntimeError, match="n needs to be provided"):
        lsmr(D.matmul, b, D.mT)


def test_stack_csr():
    """K."""
    matrices = [torch.sparse_csr_tensor([0, 1, 2], [k, 0], [1.0 + k, 2.0], (2, 3)).requires_grad_() for k in range(3)]
    stacked = stack_csr(matrices)
    assert stacked.layout is torch.sparse_csr
    assert torch.equal(stacked.to_dense(), torch.stack([A.to_dense() for A in matrices]))
    refuses(stack_csr, [
        (("matrices",), TypeError, "Expected a list of tensors, but got <class 'str'>."),
        (([],), ValueError, "Cannot stack empty list of tensors."),
        (([matrices[0], torch.ones(2, 2).to_sparse()],), ValueError, "All tensors must have the same shape."),
        (([torch.ones(2, 2).to_sparse()],), ValueError, "All tensors must be in CSR layout."),
        (([stacked],), ValueError, "All tensors must be 2D."),
        ((matrices, 1), ValueError, "dim must be 0: CSR has its batch dimensions in front, got 1"),
        (([torch.eye(2).to_sparse_csr(), torch.ones(2, 2).to_sparse_csr()],), ValueError,
         "All tensors must have the same number of entries, got [2, 4]; a batch of COO may differ"),
    ])  # fmt: skip


@every_batch
def test_convert_coo_to_csr(batch):
    """K: also of batches; entries in any order; differentiable."""
    D = half(*batch, 5, 4)
    A = D.to_sparse_coo()
    shuffle = torch.randperm(A._nnz())
    shuffled = torch.sparse_coo_tensor(A.indices()[:, shuffle], A.values()[shuffle], D.shape)
    for coo in A, shuffled:
        csr = convert_coo_to_csr(coo)
        assert csr.layout is torch.sparse_csr and torch.equal(csr.to_dense(), D)
    crow, col, order = convert_coo_to_csr_indices_values(shuffled._indices().int(), 5)
    assert crow.dtype == col.dtype == torch.int32 and torch.equal(shuffled._values()[order], csr.values())
    assert torch.equal(crow, csr.crow_indices()) and torch.equal(col, csr.col_indices())
    f = lambda v: convert_coo_to_csr(torch.sparse_coo_tensor(A.indices(), v, D.shape)).values()  # noqa: E731
    assert gradcheck(f, A.values().requires_grad_())


@pytest.mark.parametrize("shape", [(3, 2, 2), (0, 2, 2), (2, 0, 2), (2, 2)])
def test_convert_coo_to_csr_without_entries(shape):
    """F: also the elements at the end of a batch."""
    csr = convert_coo_to_csr(torch.zeros(shape).to_sparse())
    assert csr.shape == shape and csr.crow_indices().shape == (*shape[:-2], shape[-2] + 1) and not csr.values().numel()
    with pytest.raises(ValueError, match=r"equally many entries in each element, got \[1, 0, 0\]"):
        convert_coo_to_csr(torch.sparse_coo_tensor([[0], [0], [1]], [1.0], (3, 2, 2)))


def test_convert_coo_to_csr_errors():
    indices = torch.tensor([[0, 2], [1, 0]])
    convert = convert_coo_to_csr_indices_values
    refuses(convert, [
        ((indices[:1], 3), ValueError, "Indices tensor must have at least 2 rows (row and column indices). Got 1 rows."),
        ((indices.repeat(2, 1), 3), ValueError, "Indices tensor must have at most 3 rows (batch, row and column indices). Got 4 rows."),
        ((indices, 2), ValueError, "Row indices must be less than num_rows (2). Got max row index 2"),
        ((indices, 3, torch.ones(3)), ValueError, "Number of values (3) does not match number of indices (2)"),
        ((torch.tensor([[0, 0, 1], [0, 1, 0], [0, 0, 0]]), 2), ValueError, "A batch in CSR needs equally many entries in each element, got [2, 1]"),
    ])  # fmt: skip
    refuses(convert_coo_to_csr, [((torch.ones(2, 2),), ValueError, "Unsupported layout: torch.strided")])


@every_layout
def test_block_diagonal(layout):
    """K: blocks of any shape, also without rows; there and back; differentiable."""
    blocks = [half(3, 2), torch.zeros(0, 2).double(), half(2, 4), half(1, 1)]
    A = [(D.to_sparse_coo() if layout == "coo" else D.to_sparse_csr()).requires_grad_() for D in blocks]
    whole = sparse_block_diag(*A)
    assert whole.layout is LAYOUTS[layout] and torch.equal(whole.to_dense(), torch.block_diag(*blocks))
    (gradient,) = torch.autograd.grad(whole.values().pow(2).sum(), A[2])
    close(gradient.to_dense(), 2 * blocks[2])
    back = sparse_block_diag_split(whole, *(D.shape for D in blocks))
    for D, block in zip(blocks, back, strict=True):
        assert block.layout is LAYOUTS[layout] and torch.equal(block.to_dense(), D)
    assert sparse_block_diag(A[0]) is A[0]
    first = sparse_block_diag(A[1], A[0])
    assert torch.equal(first.to_dense(), torch.block_diag(blocks[1], blocks[0]))


@every_layout
def test_block_diagonal_errors(layout):
    """K: the words. F: entries outside of the blocks are not lost in silence."""
    A = sparse(torch.ones(3, 3), layout)
    refuses(sparse_block_diag, [
        ((A, "B"), TypeError, "expected Tensor as element 1 in argument 0, but got str"),
        ((), ValueError, "At least one sparse tensor must be provided."),
        ((A, torch.eye(2)), ValueError, "Sparse tensors must either be all sparse_coo or all sparse_csr."),
        ((torch.ones(1, 1, 1).to_sparse(),), ValueError, "All sparse tensors must have exactly two sparse dimensions."),
        ((torch.ones(1, 1, 1).to_sparse(2),), ValueError, "All sparse tensors must have zero dense dimensions."),
    ])  # fmt: skip
    refuses(sparse_block_diag_split, [
        (("A",), TypeError, "Input must be a torch.Tensor."),
        ((torch.eye(2), (2, 2)), ValueError, "Input tensor layout not supported. Only sparse_coo and sparse_csr are supported."),
        ((A, (3,)), ValueError, "All shapes must be two-dimensional (rows, cols)."),
        ((A, (2, 2)), ValueError, "Sum of provided block shapes (2, 2) does not match input tensor size (3, 3)."),
        ((A, (1, 1), (2, 2)), ValueError, "The block at (0, 0) of shape (1, 1) has entries beside it in its rows."),
    ])  # fmt: skip


@every_dtype
@every_index
@every_layout
@every_batch
def test_eye(batch, layout, index, dtype):
    """K."""
    I = sparse_eye((*batch, 4, 4), layout=LAYOUTS[layout], values_dtype=dtype, indices_dtype=index, requires_grad=True)
    assert I.layout is LAYOUTS[layout] and I.requires_grad
    assert indices_of(I)[0].dtype == (torch.int64 if layout == "coo" else index)
    close(I.detach().to_dense(), torch.eye(4, dtype=dtype).expand(*batch, 4, 4).clone())


@every_layout
@pytest.mark.parametrize("shape", [(0, 0), (0, 2, 2), (2, 0, 0)])
def test_an_empty_eye(layout, shape):
    """K."""
    assert sparse_eye(shape, layout=LAYOUTS[layout]).shape == shape


def test_eye_errors():
    """K."""
    with pytest.raises(ValueError, match="must define a square matrix"):
        sparse_eye((2, 3))
    for size, message in ((2,), "at least 2"), ((1, 1, 2, 2), "at most 3"):
        with pytest.raises(ValueError, match=f"size must have {message} dimensions"):
            sparse_eye(size)
    for option in {"values_dtype": torch.int64}, {"indices_dtype": torch.int8}, {"layout": torch.sparse_csc}:
        with pytest.raises(ValueError, match="not supported"):
            sparse_eye((2, 2), **option)
    assert math.isclose(sparse_eye((2, 2)).to_dense().sum().item(), 2) and sparse_eye((2, 2)).dtype == torch.float64


@pytest.mark.parametrize("size", [1e-38, 1e-24, 1e20, 1e38])
def test_right_hand_sides_whose_square_is_no_number(size):
    """F: the original gives zero, or NaN."""
    b = torch.full((3, 2), size)
    b[:, 1] = 1
    for solver in linear_cg, minres, partial(bicgstab, settings=BICGSTABSettings(abstol=0)):
        torch.testing.assert_close(solver(2 * torch.eye(3), b), b / 2, rtol=1e-5, atol=0)
        torch.testing.assert_close(solver(2 * torch.eye(3), b[:, 0]), b[:, 0] / 2, rtol=1e-5, atol=0)
    x = linear_cg(2 * torch.eye(3), b, initial_guess=b / 2, max_iter=0, max_tridiag_iter=0)
    torch.testing.assert_close(x, b / 2, rtol=1e-6, atol=0)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_what_is_not_finite_is_said(wrong):
    b = torch.tensor([1.0, wrong, 1.0])
    with pytest.warns(UserWarning, match="did not get to the tolerance"):
        bicgstab(torch.eye(3), b)
    for solver, error in (linear_cg, RuntimeError), (minres, ValueError):
        with pytest.raises(error, match="NaN"):
            solver(torch.eye(3), b)
    for A in wrong * torch.eye(3), lambda x: wrong * x, lambda x: torch.where(x == 0, x, wrong * x):
        for solver in minres, bicgstab:
            with pytest.warns(UserWarning, match="did not get to the tolerance"):
                solver(A, torch.ones(3))


def test_bicgstab_bears_a_preconditioner_that_gives_the_same_memory_again():
    D, b = well(20), torch.randn(20).double()
    P, buffer = torch.diag(1 / D.diagonal()), torch.empty_like(b)
    settings = BICGSTABSettings(precon=lambda r: torch.mv(P, r, out=buffer))
    assert torch.equal(bicgstab(D, b, settings=settings), bicgstab(D, b, settings=settings._replace(precon=P)))


def test_bicgstab_believes_the_true_residual_only():
    """What it carries along says 1e-9 where b - A x cannot be that small in single precision."""
    D, b = torch.diag(torch.logspace(0, 2, 20)), torch.ones(20)
    with pytest.warns(UserWarning, match="1 of 1 right-hand sides"):
        x = bicgstab(D, b, settings=BICGSTABSettings(abstol=0, reltol=1e-9, matvec_max=400))
    assert (b - D @ x).norm() <= 1e-5 * b.norm()


def test_linear_cg_recorded_with_a_zero_column():
    """A column that is done does not make the gradients of the others NaN."""
    D, b = definite(6).requires_grad_(), torch.randn(6, 2).double()
    b[:, 1] = 0
    b.requires_grad_()
    gradients = [
        torch.autograd.grad(f((D + D.mT) / 2, b)[:, 0].sum(), (D, b))
        for f in (partial(linear_cg, tolerance=1e-13), torch.linalg.solve)
    ]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-10)
