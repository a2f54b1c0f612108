"""Real matrices and real sequences of matrices, by the scaled residual.

Measured: at most 5.4 eps (one triangle of ani5_crop, whose two triangles differ by 22 eps), below 3 eps elsewhere.
"""

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from cases import relative_error

import spcache
from datafiles import DataFileMissing, available, load_matrix, load_rhs, load_sequence
from spcache import SparseSystem

C = 10  # tolerated scaled residual in units of eps
EPS = torch.finfo(torch.float64).eps

# name: kinds; "general" and "auto" run for each of them
MATRICES = {
    "494_bus.mtx": ("spd", "symmetric"),
    "bar.mat": ("spd", "symmetric"),
    "bcsstk16.tri": ("spd", "symmetric"),
    "ani5_crop.mtx": ("spd", "symmetric"),
    "ACTIVSg200_AC_01.mtx": ("symmetric",),
    "ACTIVSg200_AC_02.mtx": ("symmetric",),
    "hangGlider_2.mtx": ("symmetric", "hermitian"),
    "adder_dcop_05.mtx": (),
    "fidap007.mtx": (),
    "memplus.mtx": (),
    "watt_2.mtx": (),
    "west0479.mtx": (),
}
BY_LU = ("bar.mat", "bcsstk16.tri", "ani5_crop.mtx", "fidap007.mtx", "watt_2.mtx")  # work that pays
SINGULAR = ("gent113.mtx",)
RECTANGULAR = ("illc1033.mtx.gz", "lp_dfl001.mtx", "well1850.mtx.gz")
SEQUENCES = {
    "seq/ipm_kkt_CVXQP1_M.npz": "symmetric",
    "seq/powerflow_case1354pegase.npz": "general",
    "seq/skfem_ex10_minimal_surface.npz": "spd",
    "seq/skfem_ex36_hyperelastic_saddle.npz": "symmetric",
}
LEAST_SQUARES = ("seq/posegraph_w100.jac.npz", "seq/posegraph_sphere2500.jac.npz")


def load(loader, name):
    try:
        return loader(name)
    except DataFileMissing as missing:
        pytest.skip(str(missing))


def scaled_residual(A, x, b):
    """||Ax - b|| / (||A||_1 ||x|| + ||b||) in units of eps; A scipy, x and b one-dimensional."""
    return abs(A @ x - b).max() / (abs(A).sum(0).max() * abs(x).max() + abs(b).max()) / EPS


def tensors(A):
    """Indices and values of a scipy matrix, for the constructor."""
    A = A.tocoo()
    return torch.from_numpy(np.stack([A.row, A.col]).astype(np.int64)), torch.from_numpy(A.data)


def test_every_file_has_its_place():
    """A matrix that is added to the data has to be added here."""
    known = {*MATRICES, *SINGULAR, *RECTANGULAR, *SEQUENCES, *LEAST_SQUARES}
    found = {n for n in available() if n.endswith((".mtx", ".mtx.gz", ".tri", ".mat", ".npz")) and "_rhs" not in n}
    assert found <= known, found - known


def check(A, system, values):
    """One right-hand side and three, forwards and adjoint; and the gradient's own system."""
    n = A.shape[0]
    rng = np.random.default_rng(0)
    for b, adjoint in [
        (rng.standard_normal(n), False),
        (A @ rng.standard_normal((n, 3)), False),
        (rng.standard_normal(n), True),
    ]:
        x = system.solve(values, torch.from_numpy(b), adjoint=adjoint).numpy()
        M = A.T if adjoint else A
        for xk, bk in zip(x.reshape(n, -1).T, b.reshape(n, -1).T, strict=True):
            assert scaled_residual(M, xk, bk) <= C
    leaf, b = values.clone().requires_grad_(), torch.from_numpy(rng.standard_normal(n)).requires_grad_()
    system.solve(leaf, b).sum().backward()
    assert scaled_residual(A.T, b.grad.numpy(), np.ones(n)) <= C
    assert leaf.grad.isfinite().all()
    stats = system.stats
    assert (stats.factorizations - (stats.engine in ("klu", "lu") and stats.analyses == 2), stats.repivots) == (1, 0)
    assert stats.reuses == 3


@pytest.mark.parametrize(
    "name, kind", [(name, kind) for name, kinds in MATRICES.items() for kind in (*kinds, "general", "auto")]
)
def test_matrix(name, kind):
    A = load(load_matrix, name)
    indices, values = tensors(A)
    system = SparseSystem(indices, A.shape[0], kind=kind)
    check(A, system, values)
    definite = kind == "spd" or (kind == "auto" and "spd" in MATRICES[name])
    direct = "multifrontal" if definite else "lu" if name in BY_LU else "klu"
    assert system.stats.engine == ("ldl" if kind in ("symmetric", "hermitian") else direct)


@pytest.mark.parametrize("name", [name for name, kinds in MATRICES.items() if "spd" in kinds])
@pytest.mark.parametrize("triangle", ["lower", "upper"])
@pytest.mark.parametrize("ordering", ["amd", "metis"])
def test_one_triangle(name, triangle, ordering):
    A = load(load_matrix, name).tocsc()
    indices, values = tensors(sp.tril(A) if triangle == "lower" else sp.triu(A))
    system = SparseSystem(indices, A.shape[0], kind="spd", triangle=triangle, ordering=ordering)
    check(A, system, values)
    assert system.stats.ordering == ordering


@pytest.mark.parametrize("name", ["494_bus.mtx", "bar.mat", "west0479.mtx", "watt_2.mtx"])
def test_single_precision(name):
    A = load(load_matrix, name)
    indices, values = tensors(A)
    system = SparseSystem(indices, A.shape[0])
    b = torch.from_numpy(np.random.default_rng(0).standard_normal(A.shape[0])).float()
    x = system.solve(values.float(), b)
    single = A.astype(np.float32).astype(np.float64)
    assert x.dtype == torch.float32
    assert scaled_residual(single, x.double().numpy(), b.double().numpy()) <= C * torch.finfo(torch.float32).eps / EPS


@pytest.mark.parametrize("name, rhs", [("memplus.mtx", "memplus_rhs1.mtx"), ("ACTIVSg200_AC_01.mtx", "ACTIVSg200_AC_rhs_01.mtx"), ("ACTIVSg200_AC_02.mtx", "ACTIVSg200_AC_rhs_02.mtx")])  # fmt: skip
def test_right_hand_side_of_its_own(name, rhs):
    A, b = load(load_matrix, name), load(load_rhs, rhs)
    system = SparseSystem.from_matrix(A, kind="general")
    x = system.solve(system.values_of(A), torch.from_numpy(b))
    assert scaled_residual(A, x.numpy(), b) <= C


@pytest.mark.parametrize("kind", ["general", "auto"])
def test_singular_matrix(kind):
    """gent113 is structurally regular and of rank 107."""
    A = load(load_matrix, SINGULAR[0])
    indices, values = tensors(A)
    system = SparseSystem(indices, 113, kind=kind)
    with pytest.raises(spcache.SingularMatrixError, match="singular to working precision at column") as caught:
        system.solve(values, torch.ones(113, dtype=torch.float64))
    rest = np.delete(A.toarray(), caught.value.column, 1)
    assert np.linalg.matrix_rank(rest) == np.linalg.matrix_rank(A.toarray())  # that column depends on the others
    x, info = system.solve_ex(values, torch.ones(113, dtype=torch.float64))
    assert info == caught.value.column + 1 and x.isnan().all()


@pytest.mark.parametrize("name", RECTANGULAR)
def test_rectangular_matrix(name):
    A = load(load_matrix, name)
    system = SparseSystem.from_matrix(A)
    x, y = (torch.from_numpy(np.random.default_rng(0).standard_normal(k)) for k in reversed(A.shape))
    values = system.values_of(A)
    assert np.allclose(system.matmul(values, x).numpy(), A @ x.numpy())
    assert np.allclose(system.matmul(values, y, adjoint=True).numpy(), A.T @ y.numpy())
    with pytest.raises(ValueError, match="needs a square matrix"):
        system.solve(values, y)


@pytest.mark.parametrize("name", SEQUENCES)
@pytest.mark.parametrize("kind", ["own", "general", "auto"])
def test_sequence(name, kind):
    """One analysis; each matrix is solved with and its gradient taken as in an optimization."""
    sequence = load(load_sequence, name)
    shape, indptr, indices = sequence["shape"], sequence["indptr"], sequence["indices"]
    pattern = sp.csr_array((np.ones(len(indices)), indices, indptr), shape=shape)
    system = SparseSystem(tensors(pattern)[0], shape[0], kind=SEQUENCES[name] if kind == "own" else kind)
    for k, (data, b) in enumerate(zip(sequence["data"], sequence["rhs"], strict=True)):
        A = sp.csr_array((data, indices, indptr), shape=shape)
        values = torch.from_numpy(data.copy()).requires_grad_()
        x = system.solve(values, torch.from_numpy(b))
        assert scaled_residual(A, x.detach().numpy(), b) <= C
        x.sum().backward()
        assert values.grad.isfinite().all()
        stats = system.stats
        if (
            kind == "own" and SEQUENCES[name] == "symmetric"
        ):  # rows paired anew are an analysis and a factorization more
            assert stats.engine == "ldl" and stats.solves == 2 * k + 2 and stats.reuses == 0
            assert (stats.analyses, stats.factorizations) == (1 + stats.repivots, k + 1 + stats.repivots)
        elif stats.engine == "lu":
            assert (stats.factorizations, stats.solves) == (k + 1 + stats.repivots, 2 * k + 2) and stats.reuses == 0
            assert stats.analyses == 1 + stats.repivots or kind == "auto"
        elif kind != "auto":
            assert (stats.analyses, stats.factorizations, stats.solves, stats.reuses) == (1, k + 1, 2 * k + 2, 0)
    if kind == "auto":
        assert stats.analyses <= 2
    elif stats.engine in ("ldl", "lu"):  # only the interior point's last step needs other pairs
        assert stats.refactorizations == k and stats.repivots == ("ipm" in name)
    else:  # each begins with the pivots of the one before; the interior point's last steps need others
        assert stats.refactorizations + stats.repivots == k
        assert stats.repivots == 0 or "ipm" in name


@pytest.mark.parametrize("name", LEAST_SQUARES)
def test_least_squares_sequence(name):
    """A^T A as spd, its lower triangle: one analysis, the normal equations hold at each step."""
    sequence = load(load_sequence, name)
    shape, indptr, indices = sequence["shape"], sequence["indptr"], sequence["indices"]
    system = None
    for k, (data, b) in enumerate(zip(sequence["data"], sequence["rhs"], strict=True)):
        J = sp.csr_array((data, indices, indptr), shape=shape)
        ones = sp.csr_array((np.ones(len(indices)), indices, indptr), shape=shape)
        pattern, N = sp.tril(ones.T @ ones).tocoo(), sp.csr_array(J.T @ J)
        if system is None:
            system = SparseSystem(tensors(pattern)[0], shape[1], kind="spd", triangle="lower")
        values = torch.from_numpy(np.asarray(N[pattern.row, pattern.col]).ravel()).requires_grad_()
        rhs = J.T @ b
        x = system.solve(values, torch.from_numpy(rhs))
        assert scaled_residual(N, x.detach().numpy(), rhs) <= C
        x.sum().backward()
        assert values.grad.isfinite().all()
        assert (system.stats.analyses, system.stats.factorizations, system.stats.solves) == (1, k + 1, 2 * k + 2)


def test_both_halves_of_a_sequence_agree():
    """Refactorized or factorized afresh, in order or backwards: the same solutions."""
    sequence = load(load_sequence, "seq/powerflow_case1354pegase.npz")
    pattern = sp.csr_array(
        (np.ones(len(sequence["indices"])), sequence["indices"], sequence["indptr"]), shape=sequence["shape"]
    )
    indices, n = tensors(pattern)[0], sequence["shape"][0]
    warm = SparseSystem(indices, n, kind="general")
    for data, b in list(zip(sequence["data"], sequence["rhs"], strict=True))[::-1]:
        values, rhs = torch.from_numpy(data), torch.from_numpy(b)
        fresh = SparseSystem(indices, n, kind="general")
        assert relative_error(warm.solve(values, rhs), fresh.solve(values, rhs)) < 1e-9
        assert fresh.stats.refactorizations == 0
    assert warm.stats.refactorizations > 5
