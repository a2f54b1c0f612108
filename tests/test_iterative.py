"""Iterative methods: right answers of every shape and dtype, the stopping rule, honest failure, preconditioners, arguments."""

import pickle

import numpy as np
import pytest
import scipy.sparse as sp
import scipy.sparse.linalg as spla
import torch
from cases import DTYPES, numbers

import spcache
from datafiles import load_matrix, load_rhs, load_sequence
from spcache import SingularMatrixError, SparseSystem
from spcache.compat import dprox
from spcache.compat.torchsparsegradutils import utils
from spcache.errors import NotConvergedError, SpcacheError
from spcache.iterative import (
    as_operator,
    bicgstab,
    block_diagonal,
    cg,
    diagonal,
    gmres,
    incomplete,
    lsmr,
    minres,
    recorded,
)

pytestmark = pytest.mark.usefixtures("one_thread")

N = 30
EYE = torch.eye(N, dtype=torch.float64)
METHODS = {"cg": cg, "minres": minres, "bicgstab": bicgstab, "gmres": gmres}
CASES = [
    ("cg", "spd"),
    ("minres", "spd"),
    ("minres", "indefinite"),
    ("bicgstab", "general"),
    ("gmres", "general"),
    ("gmres", "indefinite"),
]

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
every_case = pytest.mark.parametrize("name, kind", CASES)


def matrix(kind, dtype=torch.float64, batch=(), n=N, seed=0):
    G = numbers((*batch, n, n), dtype, seed)
    eye = torch.eye(n, dtype=dtype)
    if kind == "spd":
        return G @ G.mH + n * eye
    if kind == "indefinite":
        sign = torch.where(torch.arange(n) % 2 == 0, 1.0, -1.0).to(dtype)
        return (G + G.mH) / 8 + torch.diag(sign * 10)
    return G + 3 * n**0.5 * eye


def tolerance(dtype):
    return 1e-4 if dtype in (torch.float32, torch.complex64) else 1e-11


def relative(A, x, b):
    """||b - A x|| / ||b||, in double, the largest of all columns; b [*B, n, k]."""
    wide = torch.complex128 if b.is_complex() else torch.float64
    A, x, b = A.to(wide), x.to(wide), b.to(wide)
    return float(((b - A @ x).norm(dim=-2) / b.norm(dim=-2)).max())


class Counted:
    """A map that counts its calls."""

    def __init__(self, apply):
        self.apply, self.calls = apply, 0

    def __call__(self, x):
        self.calls += 1
        return self.apply(x)


def grid(n=40):
    """Laplacian of an n x n grid, CSR of torch."""
    line = sp.diags_array([-np.ones(n - 1), 2 * np.ones(n), -np.ones(n - 1)], offsets=[-1, 0, 1])
    return from_scipy(sp.kron(line, sp.eye_array(n)) + sp.kron(sp.eye_array(n), line))


def from_scipy(A):
    A = sp.csr_array(A)
    return torch.sparse_csr_tensor(*map(torch.tensor, (A.indptr, A.indices, A.data)), size=A.shape)


# --- right answers --------------------------------------------------------------------------------------------------------


@every_dtype
@every_case
def test_solves_vectors_and_matrices(name, kind, dtype):
    A, rtol = matrix(kind, dtype), tolerance(dtype)
    options = {"restart": N} if name == "gmres" else {}
    for shape in [(N,), (N, 3), (2, N, 3)]:
        b = numbers(shape, dtype, 1)
        x, status = METHODS[name](A, b, rtol=rtol, **options)
        assert x.shape == b.shape and x.dtype == dtype
        assert status.converged.shape == (() if len(shape) == 1 else (*shape[:-2], 3)) == status.iterations.shape
        column = b.unsqueeze(-1) if len(shape) == 1 else b
        assert relative(A, x.view_as(column), column) <= rtol * (1 + 1e-3)
        expected = torch.linalg.solve(A, column).view_as(b)
        assert torch.linalg.vector_norm(x - expected) <= 100 * rtol * torch.linalg.vector_norm(expected)
        assert status.converged.all() and (status.iterations >= 1).all() and (status.iterations <= 2 * N).all()
        residual = torch.linalg.vector_norm(column - A @ x.view_as(column), dim=-2)
        torch.testing.assert_close(status.residual, residual.view_as(status.residual), rtol=0.1, atol=0)


@every_dtype
@every_case
def test_batches_of_dense_matrices(name, kind, dtype):
    A, rtol = matrix(kind, dtype, (2, 3)), tolerance(dtype)
    options = {"restart": N} if name == "gmres" else {}
    vectors, matrices, one = numbers((2, 3, N), dtype, 1), numbers((2, 3, N, 2), dtype, 2), numbers((N,), dtype, 3)
    x, status = METHODS[name](A, vectors, rtol=rtol, **options)
    assert status.residual.shape == (2, 3) and relative(A, x.unsqueeze(-1), vectors.unsqueeze(-1)) <= rtol * 1.001
    x, status = METHODS[name](A, matrices, rtol=rtol, **options)
    assert status.residual.shape == (2, 3, 2) and relative(A, x, matrices) <= rtol * 1.001
    x, _ = METHODS[name](A, one, rtol=rtol, **options)
    assert x.shape == (2, 3, N) and relative(A, x.unsqueeze(-1), one.unsqueeze(-1)) <= rtol * 1.001
    x, _ = METHODS[name](A, matrices[:1], rtol=rtol, x0=matrices[:1], **options)
    assert x.shape == (2, 3, N, 2) and relative(A, x, matrices[:1]) <= rtol * 1.001


class Linear:
    """An object with what is asked for, and nothing else."""

    def __init__(self, **members):
        self.__dict__.update(members)


class AtOnly:
    def __init__(self, A):
        self.A, self.shape = A, A.shape

    def __matmul__(self, x):
        return self.A @ x


@pytest.mark.filterwarnings("ignore:Sparse BSR tensor support:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_every_form_of_A(dtype):
    A = matrix("general", dtype)
    forms = [
        A, A.to_sparse_coo(), A.to_sparse_csr(), A.to_sparse_csc(), A.to_sparse_bsr((5, 5)), sp.csc_array(A.numpy()),
        lambda x: A @ x, (lambda x: A @ x, lambda y: A.mH @ y), Linear(matmul=lambda x: A @ x), AtOnly(A),
        Linear(matvec=lambda x: A @ x), Linear(matvec=lambda x: torch.mv(A, x), matmat=lambda x: torch.mm(A, x)),
    ]  # fmt: skip
    for b in (numbers((N,), dtype, 1), numbers((N, 2), dtype, 1)):
        expected = bicgstab(A, b, rtol=1e-11).x
        for form in forms:
            torch.testing.assert_close(bicgstab(form, b, rtol=1e-11).x, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_as_operator_and_adjoints(dtype):
    A, x, y = numbers((4, 3), dtype, 0), numbers((3,), dtype, 1), numbers((4,), dtype, 2)
    forms = [
        A, A.to_sparse_coo(), A.to_sparse_csr(), A.to_sparse_csc(), sp.coo_array(A.numpy()), (lambda x: A @ x, lambda y: A.mH @ y),
        Linear(matvec=lambda x: A @ x, rmatvec=lambda y: A.mH @ y), Linear(matmul=lambda x: A @ x, mH=A.mH),
        Linear(matmul=lambda x: A @ x, H=Linear(matvec=lambda y: A.mH @ y)), Linear(matmul=lambda x: A @ x, T=AtOnly(A.mT)),
    ]  # fmt: skip
    for form in forms:
        operator = as_operator(form)
        torch.testing.assert_close(operator.apply(x), A @ x)
        torch.testing.assert_close(operator.adjoint(y), A.mH @ y)
        assert operator.shape == (None if isinstance(form, tuple | Linear) else (4, 3))
    assert as_operator(lambda x: x).adjoint is None
    X = numbers((5, 3, 2), dtype, 3)
    for sparse in forms[1:4]:
        torch.testing.assert_close(as_operator(sparse).apply(X), A @ X)
    calls = Counted(lambda x: x)
    assert as_operator(Linear(matvec=None, matmat=None, matmul=calls)).apply(x) is x and calls.calls == 1


@pytest.mark.parametrize("shape", [(40, 12), (12, 40), (20, 20)])
@every_dtype
def test_lsmr_against_lstsq(shape, dtype):
    A, tol = numbers(shape, dtype, 0) + 2 * torch.eye(*shape), tolerance(dtype) / 10
    inverse = torch.linalg.pinv(A)  # the shortest solution, where there are many
    for b in (numbers(shape[:1], dtype, 1), numbers((shape[0], 3), dtype, 1)):
        for form in (A, A.to_sparse_csr(), (lambda x: A @ x, lambda y: A.mH @ y)):
            x, status = lsmr(form, b, atol=tol, btol=tol, maxiter=500)
            expected = inverse @ b
            assert (x - expected).norm() <= 1e3 * tol * expected.norm()
            assert status.converged.all() and set(status.istop.flatten().tolist()) <= (
                {2} if shape == (40, 12) else {1, 2}
            )
            torch.testing.assert_close(
                status.residual, torch.linalg.vector_norm(b - A @ x, dim=0), rtol=1e-3, atol=10 * tol
            )


def test_lsmr_batch_start_and_damping():
    A, b, x0 = (
        numbers((2, 9, 5), torch.float64, 0),
        numbers((2, 9), torch.float64, 1),
        numbers((2, 5), torch.float64, 2),
    )
    x, status = lsmr(A, b, x0, damp=0.7, atol=1e-12, btol=1e-12)
    stacked = torch.cat([A, 0.7 * torch.eye(5, dtype=A.dtype).expand(2, 5, 5)], 1)
    right = torch.cat([b, 0.7 * x0], 1)
    torch.testing.assert_close(
        x, torch.linalg.lstsq(stacked, right.unsqueeze(-1)).solution.squeeze(-1), rtol=1e-9, atol=1e-9
    )
    assert status.iterations.shape == (2,) and (status.normal_residual < 1e-8).all()
    again, status = lsmr(A, b, x, atol=1e-9)
    assert (
        status.converged.all() and (again - torch.linalg.lstsq(A, b.unsqueeze(-1)).solution.squeeze(-1)).norm() < 1e-6
    )


@pytest.mark.parametrize("name", ["well1850", "illc1033"])
@pytest.mark.parametrize("damp", [0.0, 0.3])
def test_lsmr_as_scipy(name, damp):
    A, b = load_matrix(name).tocsr(), load_rhs(name + "_rhs1")
    reference, istop, iterations, _, normal, *_ = spla.lsmr(A, b, damp=damp, atol=1e-8, btol=1e-8, maxiter=10**4)
    x, status = lsmr(from_scipy(A), torch.tensor(b), damp=damp, atol=1e-8, btol=1e-8, maxiter=10**4)
    assert status.istop == istop == 2 and abs(int(status.iterations) - iterations) <= 0.05 * iterations
    assert np.linalg.norm(x.numpy() - reference) <= 1e-4 * np.linalg.norm(reference)
    assert status.normal_residual <= 1.2 * normal


@pytest.mark.parametrize(
    "method, scipys, name",
    [
        (cg, spla.cg, "494_bus"),
        (cg, spla.cg, "bcsstk16"),
        (minres, spla.minres, "bar"),
        (bicgstab, spla.bicgstab, "bar"),
    ],
)
def test_as_scipy_on_real_matrices(method, scipys, name):
    A = load_matrix(name).tocsr()
    b = np.random.default_rng(0).standard_normal(A.shape[0])
    steps = []
    scipys(A, b, rtol=1e-6, callback=lambda x: steps.append(np.linalg.norm(b - A @ x)))
    seen = []
    x, status = method(from_scipy(A), torch.tensor(b), rtol=1e-6, callback=lambda x: seen.append(x.clone()))
    assert len(seen) == status.iterations and torch.equal(seen[-1], x)
    assert abs(np.linalg.norm(b - A @ seen[9].numpy()) / steps[9] - 1) < 1e-6  # the same method: same tenth iterate
    if method is not minres:  # SciPy's estimates what it stops by
        assert abs(int(status.iterations) - len(steps)) <= 0.1 * len(steps)
    assert np.linalg.norm(b - A @ x.numpy()) <= 1e-6 * np.linalg.norm(b) * (1 + 1e-9)


def test_gmres_restarts_as_scipy():
    A = load_matrix("bar").tocsr()
    b = np.random.default_rng(0).standard_normal(A.shape[0])
    steps = []
    reference, _ = spla.gmres(A, b, rtol=1e-9, restart=7, maxiter=4, callback=steps.append, callback_type="x")
    seen = []
    x, status = gmres(
        from_scipy(A), torch.tensor(b), rtol=1e-9, restart=7, maxiter=4, callback=seen.append, check=False
    )
    assert len(seen) == len(steps) == 4 and status.iterations == 28 and not status.converged
    assert np.linalg.norm(x.numpy() - reference) <= 1e-9 * np.linalg.norm(reference)


def test_gmres_needs_no_restart_where_others_break_down():
    shift = torch.roll(EYE, 1, 0)  # every iterate but the last is zero
    b = EYE[0].clone()
    x, status = gmres(shift, b, restart=N)
    assert torch.allclose(shift @ x, b) and status.iterations == N
    with pytest.raises(NotConvergedError, match="gmres: 1 of 1 .* no more progress after 20 iterations"):
        gmres(shift, b)


# --- the stopping rule ----------------------------------------------------------------------------------------------------


@every_method
def test_columns_stop_on_their_own_and_freeze(method):
    A = matrix("spd")
    b = numbers((N, 4), torch.float64, 1)
    b[:, 1] = 0
    b[:, 2] = A @ EYE[3]  # the start below is its solution
    b[:, 3] = torch.linalg.eigh(A).eigenvectors[:, 5]  # one iteration
    x0 = torch.zeros_like(b)
    x0[3, 2] = 1
    x0[:, 1] = 7  # the solution is zero, whatever the start
    history = []
    options = {"restart": 3} if method is gmres else {}
    x, status = method(A, b, x0, rtol=1e-10, callback=lambda x: history.append(x.clone()), **options)
    assert status.iterations[1:].tolist() == [0, 0, 1] and status.iterations[0] > 5
    assert (x[:, 1] == 0).all() and torch.equal(x[:, 2], EYE[3]) and status.residual[1] == 0
    assert all(torch.equal(step[:, 1:], history[0][:, 1:]) for step in history) and torch.equal(history[-1], x)
    assert not torch.equal(history[0][:, 0], history[1][:, 0])
    alone = method(A, b[:, 0], rtol=1e-10, **options)
    assert alone.status.iterations == status.iterations[0]
    torch.testing.assert_close(alone.x, x[:, 0], rtol=1e-9, atol=1e-12)


@every_method
def test_tolerances(method):
    A, b = matrix("spd"), numbers((N,), torch.float64, 1)
    norm = b.norm()
    loose, tight = method(A, b, rtol=1e-2).status, method(A, b, rtol=1e-10).status
    assert tight.residual <= 1e-10 * norm < loose.residual <= 1e-2 * norm and loose.iterations < tight.iterations
    absolute = method(A, b, rtol=0, atol=1e-2 * float(norm)).status
    assert absolute.iterations == loose.iterations
    assert method(A, b, rtol=1e-10, atol=1e-2 * float(norm)).status.iterations == loose.iterations  # the larger one
    assert method(A, b, atol=2 * float(norm)).status.iterations == 0
    exact = torch.linalg.solve(A, b)
    assert method(A, b, exact).status.iterations == 0
    zero = method(A, 0 * b, torch.ones_like(b))
    assert zero.status.iterations == 0 and zero.status.converged and (zero.x == 0).all()


@every_method
def test_empty(method):
    assert method(torch.zeros(0, 0), torch.zeros(0)).x.shape == (0,)
    assert method(torch.eye(3), torch.zeros(3, 0)).status.converged.shape == (0,)


@every_method
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_right_hand_sides_whose_square_is_no_number(method, size):
    A, b = matrix("spd", torch.float32), numbers((N, 2), torch.float32, 1) * torch.tensor([size, 1.0])
    seen = []
    x, status = method(A, b, rtol=1e-4, callback=lambda x: seen.append(x.clone()))
    assert torch.equal(seen[-1], x)
    assert (x[:, 0] != 0).all() and relative(A, x, b) <= 1.1e-4
    torch.testing.assert_close(
        status.residual.double(), (b.double() - A.double() @ x.double()).norm(dim=0), rtol=0.2, atol=0
    )
    vector = method(A, b[:, 0], rtol=1e-4).x
    assert relative(A, vector.unsqueeze(1), b[:, :1]) <= 1.1e-4
    far = lsmr(A, b[:, 0], atol=1e-6, btol=1e-6).x
    assert relative(A, far.unsqueeze(1), b[:, :1]) <= 1e-4


def test_work_of_an_iteration():
    b = numbers((N,), torch.float64, 1)
    for method, products in ((cg, 1), (minres, 1), (bicgstab, 2), (gmres, 1)):
        A, M = Counted(lambda x: matrix("spd") @ x), Counted(lambda r: r / N)
        iterations = int(
            method(A, b, M=M, restart=N).status.iterations if method is gmres else method(A, b, M=M).status.iterations
        )
        assert iterations > 3
        assert A.calls == products * iterations + 1, method  # and one for the true residual
        assert products * iterations <= M.calls <= products * iterations + 1


# --- failure --------------------------------------------------------------------------------------------------------------


@every_method
def test_not_converged(method):
    A, b = matrix("spd") * torch.logspace(0, 6, N, dtype=torch.float64), numbers((N, 2), torch.float64, 1)
    A = A.mT @ A
    b[:, 1] = 0
    options = {"restart": 4, "maxiter": 1} if method is gmres else {"maxiter": 4}
    with pytest.raises(
        NotConvergedError,
        match=rf"^{method.__name__}: 1 of 2 right-hand sides did not converge in 4 iterations; the worst residual is .* its tolerance; raise maxiter.*check=False",
    ) as info:
        method(A, b, **options)
    x, status = method(A, b, check=False, **options)
    assert (
        torch.equal(info.value.x, x)
        and status.iterations.tolist() == [4, 0]
        and status.converged.tolist() == [False, True]
    )
    torch.testing.assert_close(status.residual, (b - A @ x).norm(dim=0))
    assert isinstance(info.value, SpcacheError) and isinstance(info.value, RuntimeError)
    copy = pickle.loads(pickle.dumps(info.value))
    assert (
        str(copy) == str(info.value) and torch.equal(copy.x, x) and torch.equal(copy.status.residual, status.residual)
    )


def test_lsmr_not_converged():
    A, b = load_matrix("illc1033"), torch.tensor(load_rhs("illc1033_rhs1"))
    with pytest.raises(NotConvergedError, match="lsmr: 1 of 1 .* in 5 iterations .*raise maxiter") as info:
        lsmr(A, b, maxiter=5)
    assert info.value.status.istop == 7 and info.value.status.iterations == 5
    status = lsmr(A, b, conlim=10.0, check=False).status
    assert status.istop == 3 and not status.converged and status.iterations > 5
    for x0 in (None, torch.ones(A.shape[1], dtype=torch.float64)):
        zero = lsmr(A, 0 * b, x0)
        assert zero.status.istop == 0 and zero.status.converged and (zero.x == 0).all()
    columns = lsmr(E3, torch.tensor([[0.0, 1], [0, 2], [0, 3]]), torch.ones(3, 2))
    assert columns.status.converged.all() and (columns.x[:, 0] == 0).all()
    damped = lsmr(E3, torch.zeros(3), ONE, damp=1.0)
    assert damped.status.converged and torch.allclose(damped.x, ONE / 2)
    orthogonal = torch.linalg.qr(torch.tensor(A.toarray()), mode="complete").Q[:, -1]
    assert lsmr(A, orthogonal.contiguous(), btol=0).x.norm() < 1e-9


def test_a_breakdown_is_not_convergence():
    skew = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
    b = torch.tensor([1.0, 2.0])
    for method in (cg, bicgstab):
        x, status = method(skew, b, check=False)
        assert not status.converged and torch.isfinite(x).all() and status.residual == b.norm()
        with pytest.raises(NotConvergedError, match=f"{method.__name__}: .*no more progress after 1 iterations"):
            method(skew, b)
    indefinite = torch.diag(torch.tensor([1.0, -1.0]))
    assert not cg(indefinite, torch.ones(2), check=False).status.converged


@every_method
def test_singular(method):
    A, b = torch.diag(torch.tensor([1.0, 2.0, 0.0])), torch.tensor([[1.0, 1.0], [2.0, 2.0], [0.0, 1.0]])
    x, status = method(A, b, check=False)
    assert status.converged.tolist() == [True, False] and torch.isfinite(x).all()
    assert torch.allclose(x[:, 0], torch.tensor([1.0, 1.0, 0.0])) and status.residual[1] >= 0.999
    assert not method(A, b[:, 1], check=False).status.converged


@every_method
def test_numbers_that_are_not_finite_never_converge(method):
    A = matrix("spd")
    b = numbers((N, 2), torch.float64, 1)

    def wrong(x):
        y = A @ x
        return torch.stack([y[:, 0], y[:, 1] * torch.nan], 1) if calls.append(0) or len(calls) > 3 else y

    calls = []
    x, status = method(wrong, b, rtol=1e-10, check=False)
    assert status.converged.tolist() == [True, False] and relative(A, x[:, :1], b[:, :1]) <= 1e-10
    x, status = method(lambda x: torch.full_like(x, torch.inf), b[:, 0], check=False)
    assert not status.converged and torch.isfinite(x).all()
    with pytest.raises(NotConvergedError):
        method(lambda x: x * torch.nan, b[:, 0], torch.ones(N, dtype=torch.float64))

    def broken(r):
        return r * torch.tensor([1.0, torch.nan])

    x, status = method(A, b, M=broken, rtol=1e-10, check=False)
    assert status.converged.tolist() == [True, False] and torch.isfinite(x).all()


def test_lsmr_numbers_that_are_not_finite():
    A, b = numbers((6, 4), torch.float64, 0), numbers((6, 2), torch.float64, 1)
    mask = torch.tensor([1.0, torch.nan], dtype=torch.float64)
    x, status = lsmr((lambda x: A @ x * mask, lambda y: A.mH @ y), b, check=False)
    assert status.converged.tolist() == [True, False] and status.istop.tolist() == [2, 7] and torch.isfinite(x).all()
    assert not lsmr((lambda x: A @ x * torch.inf, lambda y: A.mH @ y), b[:, 0], check=False).status.converged
    tiny = A.float() * 1e-25
    assert not lsmr(tiny, b[:, 0].float(), check=False).status.converged  # and not "the start is a minimum"


def test_the_tolerance_is_met_by_the_true_residual():
    """What cg carries along says 1e-15 long after b - A x has stopped to improve."""
    A = load_matrix("494_bus").tocsr()
    b = torch.tensor(np.random.default_rng(0).standard_normal(494))
    x, status = cg(A, b, rtol=1e-16, maxiter=5000, check=False)
    assert not status.converged and status.iterations < 5000  # and it did not go on for nothing
    torch.testing.assert_close(status.residual, (b - as_operator(A).apply(x)).norm())
    x, status = minres(A, b, rtol=1e-9, maxiter=5000)
    assert (b - as_operator(A).apply(x)).norm() <= 1e-9 * b.norm() * (1 + 1e-9)


# --- preconditioners ------------------------------------------------------------------------------------------------------


def iterations(method, A, b, M=None, **options):
    x, status = method(A, b, M=M, rtol=1e-8, maxiter=3000, **options)
    residual = (b - as_operator(A).apply(x)).norm(dim=0)
    assert (residual <= 1.001e-8 * b.norm(dim=0)).all()
    return int(status.iterations.max())


@pytest.mark.parametrize("method", [cg, minres, bicgstab, gmres])
def test_factor_of_earlier_values(method):
    sequence = load_sequence("skfem_ex10_minimal_surface")
    size = sequence["shape"]
    first, later = (sp.csr_array((sequence["data"][k], sequence["indices"], sequence["indptr"]), size) for k in (4, 5))
    system, values = SparseSystem.from_matrix(first, kind="spd"), torch.tensor(first.tocoo().data)
    factor = system.factorize(values.requires_grad_())
    A = from_scipy(later)
    for b in (torch.tensor(sequence["rhs"][5]), torch.stack([torch.tensor(sequence["rhs"][k]) for k in (5, 6)], 1)):
        with_factor, without = (
            iterations(method, A, b, factor),
            iterations(method, A, b, restart=60) if method is gmres else iterations(method, A, b),
        )
        assert 1 <= with_factor <= 15 and 3 * with_factor < without
        assert not method(A, b, M=factor).x.requires_grad  # the factor's values do not drag in a graph
    assert iterations(method, A, b, Linear(solve=factor.solve)) == with_factor


def test_jacobi_blocks_and_incomplete():
    A = from_scipy(load_matrix("bcsstk16"))
    b = numbers((A.shape[0], 2), torch.float64, 0)
    plain, jacobi, blocks = (iterations(cg, A, b, M) for M in (None, diagonal(A), block_diagonal(A, 6)))
    assert jacobi < plain / 2 and blocks < jacobi
    ilu = incomplete(A, drop_tol=1e-4, fill_factor=5)
    assert iterations(gmres, A, b, ilu) < blocks and iterations(bicgstab, A, b, ilu) < blocks
    assert iterations(bicgstab, A, b[:, 0], ilu) < blocks


@pytest.mark.parametrize("shape", [(N,), (N, 3)])
def test_bicgstab_bears_a_preconditioner_that_gives_the_same_memory_again(shape):
    A, b = matrix("general"), numbers(shape, torch.float64, 1)
    P, buffer = torch.diag(1 / A.diagonal()), torch.empty_like(b)
    assert iterations(bicgstab, A, b, lambda r: torch.matmul(P, r, out=buffer)) == iterations(bicgstab, A, b, P)


def test_minres_with_a_preconditioner_stops_by_the_euclidean_norm():
    A = matrix("indefinite") * torch.logspace(0, 2, N, dtype=torch.float64).outer(
        torch.logspace(0, 2, N, dtype=torch.float64)
    )
    b = numbers((N, 2), torch.float64, 1)
    M = torch.diag(1 / A.diagonal().abs())
    assert iterations(minres, A, b, M) < iterations(minres, A, b)
    assert iterations(minres, A, b[:, 0], M) <= N
    with pytest.raises(ValueError, match=r"M must be Hermitian positive definite, got x\^H M x = -"):
        minres(A, b[:, 0], M=diagonal(A))
    with pytest.raises(ValueError, match=r"M must be Hermitian positive definite, got x\^H M x = -"):
        minres(A, b, M=-M)


@every_dtype
def test_preconditioners_are_what_they_say(dtype):
    A = matrix("general", dtype, n=7)
    r, R = numbers((7,), dtype, 1), numbers((7, 2), dtype, 2)
    dense_blocks = torch.block_diag(A[:3, :3], A[3:6, 3:6], A[6:, 6:])
    for form in (A, A.to_sparse_coo(), A.to_sparse_csr(), A.to_sparse_csc()):
        for b in (r, R, numbers((4, 7, 2), dtype, 3)):
            column = b if b.dim() > 1 else b.unsqueeze(-1)
            torch.testing.assert_close(diagonal(form)(b), (column / A.diagonal()[:, None]).view_as(b))
            torch.testing.assert_close(
                block_diagonal(form, 3)(b), torch.linalg.solve(dense_blocks, column).view_as(b), rtol=1e-4, atol=1e-5
            )
            exact = incomplete(form, drop_tol=0, fill_factor=100)(b)
            assert exact.dtype == dtype
            torch.testing.assert_close(exact, torch.linalg.solve(A, column).view_as(b), rtol=1e-3, atol=1e-4)
    batch = matrix("general", dtype, (2,), 7)
    for b in (numbers((2, 7), dtype, 1), numbers((2, 7, 3), dtype, 1)):
        column = b if b.dim() > 2 else b.unsqueeze(-1)
        torch.testing.assert_close(diagonal(batch)(b), (column / batch.diagonal(dim1=1, dim2=2)[..., None]).view_as(b))
        expected = torch.stack([block_diagonal(one, 3)(v) for one, v in zip(batch, b, strict=True)])
        torch.testing.assert_close(block_diagonal(batch, 3)(b), expected)
    assert torch.equal(incomplete(sp.csc_array(A.numpy()))(r), incomplete(A)(r))


def test_preconditioners_that_cannot_be():
    A = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    singular = torch.block_diag(torch.eye(2), torch.ones(2, 2))
    for form in (A, A.to_sparse_csr()):
        with pytest.raises(
            ValueError, match=r"A must have a diagonal without zeros, got 0.0 in row 1 \(counted from 0\)"
        ):
            diagonal(form)
    with pytest.raises(ValueError, match=r"got 0.0 in row 1 of matrix \(1,\)"):
        diagonal(torch.stack([torch.eye(2), A]))
    for form in (singular, singular.to_sparse_csr()):
        with pytest.raises(ValueError, match="A must have regular diagonal blocks, got a singular one in rows 2 to 3"):
            block_diagonal(form, 2)
    with pytest.raises(SingularMatrixError, match="zero pivot"):
        incomplete(torch.zeros(2, 2).to_sparse_csr())
    with pytest.raises(ValueError, match=r"A must be square, got shape \(2, 3\)"):
        diagonal(torch.ones(2, 3))
    with pytest.raises(TypeError, match="A must be a tensor, got ndarray"):
        block_diagonal(np.eye(2), 1)
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        block_diagonal(A, 0)
    with pytest.raises(RuntimeError, match=r"incomplete\(\) has no derivative"):
        incomplete(torch.eye(2))(torch.ones(2, requires_grad=True))


# --- derivatives ----------------------------------------------------------------------------------------------------------


ALL = METHODS | {"lsmr": lsmr}
REFUSED = r"{} requires grad, but iterative methods are not differentiated .* use spcache\.solve_operator\(A, b, solver=\"cg\"\).*no_grad"


def operator(A, scale):
    return (lambda x: scale * (A @ x), lambda y: scale * (A.mH @ y))


@pytest.mark.parametrize("method", ALL.values(), ids=ALL)
def test_gradients_are_refused(method):
    A, b = matrix("spd", n=6), numbers((6, 2), torch.float64, 1)
    scale = torch.tensor(1.3, dtype=torch.float64)
    leaf = lambda t: t.detach().requires_grad_()  # noqa: E731
    forms = [A, A.to_sparse_coo(), A.to_sparse_csr(), A.to_sparse_csc()]
    calls = [("b", (A, leaf(b))), ("b", (A, leaf(0 * b))), ("x0", (A, b, leaf(b))), ("A", (leaf(A), 0 * b))]
    calls += [("A", (leaf(form), b)) for form in forms]
    calls += [("what A('s adjoint)? gives", (operator(A, leaf(scale)), b))]
    for name, arguments in calls:
        with pytest.raises(RuntimeError, match=REFUSED.format(name)):
            method(*arguments)
        with torch.no_grad():
            x = method(*arguments).x
        assert not x.requires_grad
        plain = method(*(t.detach() if isinstance(t, torch.Tensor) else operator(A, scale) for t in arguments)).x
        assert torch.equal(x, plain)
    for wrap in (torch.func.grad, torch.func.hessian):
        with pytest.raises((RuntimeError, NotImplementedError), match="not differentiated"):
            wrap(lambda b: method(A, b).x.sum())(b)


@every_method
def test_gradients_of_the_preconditioner_do_not_matter(method):
    A, b = matrix("spd"), numbers((N, 2), torch.float64, 1)
    M = A.inverse().requires_grad_()
    for form in (M, lambda r: M @ r, Linear(solve=lambda r: M @ r)):
        x, status = method(A, b, M=form)
        assert status.iterations.max() <= 2 and not x.requires_grad


@pytest.mark.parametrize("method", ALL.values(), ids=ALL)
def test_tangents_are_refused(method):
    A, b = matrix("spd", n=6), numbers((6, 2), torch.float64, 1)
    scale = torch.tensor(1.3, dtype=torch.float64)
    with torch.autograd.forward_ad.dual_level():
        dual = lambda t: torch.autograd.forward_ad.make_dual(t, torch.ones_like(t))  # noqa: E731
        for arguments in (A, dual(b)), (A, b, dual(b)), (dual(A), b), (operator(A, dual(scale)), b):
            with pytest.raises(NotImplementedError, match="has a forward-mode tangent, .*not differentiated"):
                method(*arguments)
            with torch.no_grad(), pytest.raises(NotImplementedError, match="forward-mode"):
                method(*arguments)
        for form in (A, A.to_sparse_csr(), operator(A, scale)):
            assert torch.equal(method(form, b).x, method(form, b.clone(), x0=0 * b).x)
        if method is not lsmr:
            x = method(A, b, M=dual(A.inverse())).x
            assert torch.autograd.forward_ad.unpack_dual(x).tangent is None
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda b: method(A, b).x, (b,), (b,))


@pytest.mark.parametrize("name, kind", [("cg", "spd"), ("minres", "indefinite")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
def test_recorded_iterations(name, kind, dtype):
    """What drop-ins ask for: to the end, the derivatives of the iterations are those of the solution."""
    n = 5
    A = matrix(kind, dtype, n=n).requires_grad_()
    method = getattr(recorded, name)
    for b in (numbers((n,), dtype, 1).requires_grad_(), numbers((n, 2), dtype, 1).requires_grad_()):

        def solve(A, b):
            return method((A + A.mH) / 2, b, rtol=1e-12, maxiter=50).x

        assert torch.autograd.gradcheck(solve, (A, b), rtol=1e-4, atol=1e-6, check_forward_ad=True)


@pytest.mark.parametrize("solver_type", ["cg", "minres"])
def test_recorded_by_dprox(solver_type):
    A, b = matrix("spd", n=6).requires_grad_(), numbers((2, 3), torch.float64, 1).requires_grad_()
    apply = lambda x: ((A + A.mH) / 2 @ x.reshape(-1)).reshape(2, 3)  # noqa: E731
    gradients = []
    for analytic in (True, False):
        config = dprox.LinearSolveConfig(1e-13, 50, solver_type=solver_type, use_analytic_grad=analytic)
        gradients.append(torch.autograd.grad(dprox.linear_solve(apply, b, config).square().sum(), (A, b)))
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("preconditioned", [False, True])
def test_a_recorded_column_that_is_done_does_not_poison_the_others(preconditioned):
    A, D = matrix("spd"), torch.linspace(1, 2, N, dtype=torch.float64).unsqueeze(1)
    b = numbers((N, 4), torch.float64, 1)
    b[:, 1] = 0
    b[:, 2] = torch.linalg.eigh(A).eigenvectors[:, 5]
    b[:, 3] = 1e-3 * b[:, 0]
    A.requires_grad_(), b.requires_grad_()
    M = (lambda r: D * r) if preconditioned else None
    settings = utils.MINRESSettings(minres_tolerance=1e-13)
    x = utils.minres(lambda x: (A + A.mH) / 2 @ x, b, preconditioner=M, settings=settings)
    gradients = torch.autograd.grad(x[:, [0, 3]].square().sum(), (A, b), create_graph=True)
    expected = torch.autograd.grad(torch.linalg.solve((A + A.mH) / 2, b)[:, [0, 3]].square().sum(), (A, b))
    torch.testing.assert_close(gradients, expected, rtol=1e-7, atol=1e-9)
    assert all(g.isfinite().all() for g in torch.autograd.grad(x.sum(), (A, b), retain_graph=True))
    assert all(g.isfinite().all() for g in torch.autograd.grad(sum(g.sum() for g in gradients), (A, b)))


def test_arguments_are_not_written():
    A, b, x0 = matrix("spd"), numbers((N, 2), torch.float64, 1), numbers((N, 2), torch.float64, 2)
    copies = b.clone(), x0.clone()
    for method in (*METHODS.values(), lsmr):
        method(A, b, x0)
        method(lambda x: x, b, x0) if method is not lsmr else lsmr(
            (lambda x: x, lambda y: y), b, x0
        )  # a map that gives its argument
        assert torch.equal(b, copies[0]) and torch.equal(x0, copies[1])


# --- arguments ------------------------------------------------------------------------------------------------------------

E3, ONE = torch.eye(3), torch.ones(3)
WRONG = [
    (torch.ones(3, 4), ONE, {}, ValueError, r"A must be square, got shape \(3, 4\); lsmr"),
    (ONE, ONE, {}, ValueError, r"A must have at least two dimensions, got shape \(3,\)"),
    ("A", ONE, {}, TypeError, r"A must be a tensor, a function x -> A x, .* got str"),
    (E3.numpy(), ONE, {}, TypeError, r"A must be of torch, got a NumPy array; convert it: torch.from_numpy\(A\)"),
    ((E3, E3), ONE, {}, TypeError, r"A as a tuple must be a pair of functions"),
    (E3, [1.0], {}, TypeError, "b must be a dense tensor, got list"),
    (E3, ONE.to_sparse(), {}, TypeError, "b must be a dense tensor, got layout torch.sparse_coo"),
    (E3, ONE.long(), {}, TypeError, "b must be float32, .* got dtype torch.int64"),
    (E3, torch.tensor(1.0), {}, ValueError, "b must have at least one dimension, got a scalar"),
    (E3, torch.ones(4), {}, ValueError, r"b must have 3 rows, as A has \(shape \(3, 3\)\), got shape \(4,\), which is a vector"),
    (E3, torch.ones(4, 3), {}, ValueError, r"b must have 3 rows, .* got shape \(4, 3\), which is a matrix"),
    (E3.expand(2, 3, 3), torch.ones(5, 3), {}, ValueError, r"b's batch dimensions \(5,\) do not broadcast with A's \(2,\)"),
    (E3, ONE.double(), {}, TypeError, "A and b must have the same dtype, got torch.float32 and torch.float64"),
    (E3, torch.tensor([1, torch.nan, 0]), {}, ValueError, "b must be finite, got NaN or infinity"),
    (E3, ONE, {"x0": torch.ones(3, 1)}, ValueError, r"x0 must have shape \(3,\), got \(3, 1\)"),
    (E3, ONE, {"x0": ONE.double()}, TypeError, "x0 and b must have the same dtype"),
    (E3, ONE, {"x0": ONE * torch.inf}, ValueError, "x0 must be finite"),
    (E3, ONE, {"rtol": -1e-3}, ValueError, "rtol must be finite and not negative, got -0.001"),
    (E3, ONE, {"rtol": "1"}, TypeError, "rtol must be a number, got '1'"),
    (E3, ONE, {"atol": float("nan")}, ValueError, "atol must be finite and not negative, got nan"),
    (E3, ONE, {"maxiter": 0}, ValueError, "maxiter must be at least 1, got 0"),
    (E3, ONE, {"maxiter": 1.5}, TypeError, "maxiter must be an integer, got 1.5"),
    (E3, ONE, {"maxiter": True}, TypeError, "maxiter must be an integer, got True"),
    (E3, ONE, {"callback": 3}, TypeError, "callback must be a function of x, got int"),
    (E3, ONE, {"M": 3}, TypeError, "M must approximate the inverse of A: .* got int"),
    (E3, ONE, {"M": torch.eye(4)}, ValueError, r"M must have shape \(3, 3\), got \(4, 4\)"),
    (E3, ONE, {"M": E3.double()}, TypeError, "M and b must have the same dtype"),
    (E3, ONE, {"M": lambda r: 1.0}, TypeError, "M must give a tensor, got float"),
    (E3, ONE, {"M": lambda r: r.double()}, ValueError, r"M must give shape \(3,\), torch.float32 on cpu, got .*torch.float64"),
    (lambda x: x[:2], ONE, {}, ValueError, r"A must give shape \(3,\), .* got \(2,\)"),
    (torch.ones(2, 2, 2).to_sparse_csr(), torch.ones(2, 2), {}, ValueError, r"a sparse A must be two-dimensional .* got shape \(2, 2, 2\)"),
]  # fmt: skip


@every_method
@pytest.mark.parametrize("A, b, options, error, message", WRONG, ids=range(len(WRONG)))
def test_wrong_arguments(method, A, b, options, error, message):
    with pytest.raises(error, match=message):
        method(A, b, **options)


def test_wrong_arguments_of_gmres_and_lsmr():
    with pytest.raises(ValueError, match="restart must be at least 1, got 0"):
        gmres(E3, ONE, restart=0)
    assert gmres(E3, ONE, restart=1000).status.converged
    with pytest.raises(TypeError, match="A must offer its adjoint: .* got function"):
        lsmr(lambda x: x, ONE)
    with pytest.raises(ValueError, match="damp must be finite and not negative, got -1"):
        lsmr(E3, ONE, damp=-1)
    with pytest.raises(ValueError, match="conlim must be finite and not negative, got -1"):
        lsmr(E3, ONE, conlim=-1)
    with pytest.raises(ValueError, match=r"x0 must have shape \(2,\), got \(3,\)"):
        lsmr(torch.ones(3, 2), ONE, ONE)
    with pytest.raises(ValueError, match=r"A's adjoint must give shape \(3, 2\), .* got \(3,\)"):
        lsmr((lambda x: x, lambda y: y[:, 0]), torch.ones(3, 2))
    with pytest.raises(
        TypeError, match=r"M must be a factor, got a SparseSystem; factorize first: M=system.factorize\(values\)"
    ):
        cg(E3, ONE, M=SparseSystem(torch.arange(3).expand(2, 3), 3))
    for options in ({"rtol": 1e-3}, {"M": E3}):
        with pytest.raises(TypeError):
            lsmr(E3, ONE, **options)


@pytest.mark.filterwarnings(
    "ignore:Sparse BSC tensor support:UserWarning", "ignore:Sparse BSR tensor support:UserWarning"
)
def test_block_layouts():
    with pytest.raises(TypeError, match="A must not be in layout torch.sparse_bsc"):
        cg(E3.to_sparse_bsc((1, 1)), ONE)
    with pytest.raises(TypeError, match="A must offer its adjoint: .* got torch.sparse_bsr"):
        lsmr(E3.to_sparse_bsr((1, 1)), ONE)


def test_devices():
    class Elsewhere(torch.Tensor):
        @property
        def device(self):
            return torch.device("cuda")

    with pytest.raises(ValueError, match="A and b must be on the same device, got cuda and cpu"):
        cg(E3.as_subclass(Elsewhere), ONE)


def test_names():
    assert NotConvergedError.__mro__[1] is SpcacheError and spcache.iterative.cg is cg
