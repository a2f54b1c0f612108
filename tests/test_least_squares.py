"""`SparseSystem.lstsq`: tall, wide and damped, every dtype, batches, derivatives, counters, conditions, real files."""

import copy
import math
import pickle
import threading

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from cases import relative_error
from scipy.linalg import cho_factor, cho_solve
from scipy.sparse.linalg import splu
from torch.autograd import gradcheck, gradgradcheck

import spcache
from datafiles import DataFileMissing, load_matrix, load_rhs, load_sequence
from spcache import SingularMatrixError, SparseSystem

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)
EPS = torch.finfo(torch.float64).eps
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
double_dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.complex128], ids=str)
shapes = pytest.mark.parametrize(
    ("shape", "damping"), [((9, 4), 0.0), ((4, 9), 0.0), ((9, 4), 0.7), ((4, 9), 0.7), ((5, 5), 0.0)], ids=str
)
direct_methods = pytest.mark.parametrize("method", ["normal", "augmented"])


class Case:
    """A random matrix of full rank, entries in no order, some of them in two parts that add up."""

    def __init__(self, shape, dtype=torch.float64, batch=(), seed=0, density=0.5):
        g = torch.Generator().manual_seed(seed)
        m, n = self.shape = shape
        mask = torch.rand(m, n, generator=g) < density
        mask |= torch.eye(max(m, n), dtype=torch.bool)[:m, :n]
        indices = mask.nonzero().T
        again = torch.randperm(indices.shape[1], generator=g)[: indices.shape[1] // 4]
        indices = torch.cat([indices, indices[:, again]], 1)
        self.indices = indices[:, torch.randperm(indices.shape[1], generator=g)]
        wide = torch.complex128 if dtype.is_complex else torch.float64
        values = torch.randn(*batch, self.indices.shape[1], dtype=wide, generator=g)
        self.values = (values + 2.0 * (self.indices[0] == self.indices[1])).to(dtype)
        self.system = SparseSystem(self.indices, shape)
        self.g = g

    def dense(self, values=None):
        values = self.values if values is None else values
        m, n = self.shape
        flat = values.new_zeros(*values.shape[:-1], m * n)
        return flat.index_add(-1, self.indices[0] * n + self.indices[1], values).unflatten(-1, (m, n))

    def rhs(self, *shape):
        wide = torch.complex128 if self.values.is_complex() else torch.float64
        return torch.randn(shape, dtype=wide, generator=self.g).to(self.values.dtype)

    def reference(self, values, b, damping):
        """By dense operations; b is [..., m, k]. By the inverse: torch.linalg.solve itself is wrong in some nested
        transforms."""
        A = self.dense(values)
        m, n = self.shape
        if m >= n:
            return torch.linalg.inv(A.mH @ A + damping**2 * torch.eye(n, dtype=A.dtype)) @ (A.mH @ b)
        return A.mH @ (torch.linalg.inv(A @ A.mH + damping**2 * torch.eye(m, dtype=A.dtype)) @ b)


def stacked(A, b, damping):
    """Dense least squares by SVD of [A; mu I]."""
    n = A.shape[-1]
    wide = torch.complex128 if A.is_complex() else torch.float64
    eye = damping * torch.eye(n, dtype=wide).expand(*A.shape[:-2], n, n)
    A, b = torch.cat([A.to(wide), eye], -2), torch.cat([b.to(wide), b.new_zeros(*b.shape[:-2], n, b.shape[-1])], -2)
    return torch.linalg.pinv(A) @ b


@every_dtype
@shapes
@direct_methods
def test_against_dense(shape, damping, dtype, method):
    case = Case(shape, dtype)
    for size in (shape[0],), (shape[0], 3):
        b = case.rhs(*size)
        x = case.system.lstsq(case.values, b, damping=damping, method=method)
        expected = stacked(case.dense().to(torch.promote_types(dtype, torch.float64)), b.view(shape[0], -1), damping)
        assert x.dtype == dtype
        assert relative_error(x, expected.view(x.shape)) < 100 * torch.finfo(dtype).eps
    assert case.system.stats.lstsq_path == method


@double_dtypes
@shapes
@direct_methods
def test_derivatives(shape, damping, dtype, method):
    case = Case((shape[0] // 2, shape[1] // 2), dtype, density=0.8)
    values, b = case.values.requires_grad_(), case.rhs(case.shape[0], 2).requires_grad_()

    def f(values, b):
        return case.system.lstsq(values, b, damping=damping, method=method)

    assert gradcheck(f, (values, b), check_forward_ad=True, check_batched_grad=False)
    assert gradgradcheck(f, (values, b), check_fwd_over_rev=True)


@double_dtypes
@shapes
def test_gradients_where_the_residual_is_large(shape, damping, dtype):
    case = Case(shape, dtype)
    values, b = case.values.requires_grad_(), case.rhs(shape[0], 2).requires_grad_()
    x, expected = case.system.lstsq(values, b, damping=damping), case.reference(values, b, damping)
    g = torch.randn_like(expected)
    for actual, wanted in zip(*(torch.autograd.grad(y, (values, b), g) for y in (x, expected)), strict=True):
        assert relative_error(actual, wanted) < 1e4 * EPS


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64], ids=str)
@shapes
def test_gradients_in_single_precision(shape, damping, dtype):
    case = Case(shape, dtype)
    g = case.rhs(shape[1])
    b = case.rhs(shape[0])
    grads = []
    for wide in dtype, torch.promote_types(dtype, torch.float64):
        leaves = [t.detach().to(wide).requires_grad_() for t in (case.values, b)]
        grads.append(torch.autograd.grad(case.system.lstsq(*leaves, damping=damping), leaves, g.to(wide)))
    for single, double in zip(*grads, strict=True):
        assert single.dtype == dtype and relative_error(single, double) < 1e3 * torch.finfo(dtype).eps


@shapes
@direct_methods
def test_batches(shape, damping, method):
    """Values and right-hand sides broadcast as in `solve`."""
    (m, n), batch = shape, (2, 3)
    case = Case(shape, torch.complex128, batch)
    A = case.dense()
    for size, expected in [
        ((m,), (*batch, n)), ((*batch, m), (*batch, n)), ((*batch, m, 2), (*batch, n, 2)), ((3, 2, 1, m, 2), (3, 2, 3, n, 2)),
    ]:  # fmt: skip
        b = case.rhs(*size)
        if len(size) > 3:
            with pytest.raises(ValueError, match="does not fit"):
                case.system.lstsq(case.values, b[:, :, [0, 0]], damping=damping, method=method)
        matrix = b if len(size) > 3 else b.unsqueeze(-1)
        x = case.system.lstsq(case.values, b, damping=damping, method=method)
        assert x.shape == expected
        wanted = stacked(A, matrix.expand(*expected[: 3 if len(size) > 4 else 2], *matrix.shape[-2:]), damping)
        assert relative_error(x, wanted.view(expected)) < 1e3 * EPS
    values = case.values.requires_grad_()
    b = case.rhs(m, 2).requires_grad_()
    x = case.system.lstsq(values, b.expand(*batch, m, 2), damping=damping, method=method)
    g = torch.randn_like(x)
    grads = torch.autograd.grad(x, (values, b), g)
    for actual, wanted in zip(
        grads, torch.autograd.grad(case.reference(values, b, damping), (values, b), g), strict=True
    ):
        assert relative_error(actual, wanted) < 1e5 * EPS


# --- counters --------------------------------------------------------------------------------------------------------


@shapes
def test_one_analysis(shape, damping):
    """Law 6: one analysis, a factorization for each new values, none for equal ones, for another b or for gradients."""
    case = Case(shape)
    for k in range(1, 4):
        values = (case.values * k).requires_grad_()
        b = case.rhs(shape[0]).requires_grad_()
        x = case.system.lstsq(values, b, damping=damping)
        case.system.lstsq(values.detach().clone(), case.rhs(shape[0], 2), damping=damping)
        x.sum().backward()
        stats = case.system.stats
        assert (stats.analyses, stats.factorizations, stats.reuses) == (1, k, k)
        assert (stats.engine, stats.lstsq_path) == ("multifrontal", "normal")
    other = SparseSystem(case.indices, shape)
    other.lstsq(case.values, b.detach(), damping=damping)
    assert (other.stats.analyses, other.stats.factorizations) == (0, 1)  # the plan was in the cache


def test_another_damping_is_another_factor():
    case = Case((9, 4))
    b = case.rhs(9)
    for damping in 0.0, 1.0, 1.0, 2.0:
        x = case.system.lstsq(case.values, b, damping=damping)
        assert relative_error(x, stacked(case.dense(), b[:, None], damping)[:, 0]) < 100 * EPS
    assert (case.system.stats.factorizations, case.system.stats.reuses) == (3, 1)


def test_graphs_keep_their_factors():
    case = Case((9, 4))
    leaves = [(case.values * k).requires_grad_() for k in (1, 2, 3)]
    b = case.rhs(9)
    xs = [case.system.lstsq(v, b) for v in leaves]
    for k in 1, 2, 0:
        xs[k].square().sum().backward()
        (expected,) = torch.autograd.grad(case.reference(leaves[k], b[:, None], 0.0).square().sum(), leaves[k])
        assert relative_error(leaves[k].grad, expected) < 1e4 * EPS
    assert case.system.stats.factorizations == 3


def test_keep_factor_false():
    case = Case((9, 4))
    system = SparseSystem(case.indices, (9, 4), keep_factor=False)
    values = case.values.requires_grad_()
    system.lstsq(values, case.rhs(9)).sum().backward()
    assert (system.stats.factorizations, system.stats.reuses) == (2, 0)


def test_values_changed_in_place_are_noticed():
    case = Case((9, 4))
    values, b = case.values.clone(), case.rhs(9)
    case.system.lstsq(values, b)
    values.mul_(2)
    assert relative_error(case.system.lstsq(values, b), stacked(case.dense(values), b[:, None], 0.0)[:, 0]) < 100 * EPS


def test_the_function_keeps_its_system():
    case = Case((4, 9))
    b = case.rhs(4)
    expected = case.system.lstsq(case.values, b)
    spcache.plan_cache.clear()
    triple = case.indices, (4, 9), case.values
    assert torch.equal(spcache.lstsq(triple, b), expected)
    misses = spcache.plan_cache.info().misses
    assert torch.equal(spcache.lstsq((case.indices.clone(), (4, 9), 2 * case.values), 2 * b), expected)
    A = torch.sparse_coo_tensor(case.indices, case.values, (4, 9)).coalesce().requires_grad_()
    assert spcache.plan_cache.info().misses == misses
    x = spcache.lstsq(A, b)
    assert relative_error(x, expected) < 100 * EPS
    x.sum().backward()
    assert A.grad.is_sparse and A.grad.shape == (4, 9)


# --- inside torch ----------------------------------------------------------------------------------------------------


@shapes
def test_torch_func(shape, damping):
    m, _ = shape
    case = Case(shape, batch=(3,))
    B = case.rhs(3, m)

    def ours(v, b):
        return case.system.lstsq(v, b, damping=damping)

    def reference(v, b):
        return case.reference(v, b.unsqueeze(-1), damping).squeeze(-1)

    for in_dims, arguments in [
        ((0, 0), (case.values, B)),
        ((0, None), (case.values, B[0])),
        ((None, 0), (case.values[0], B)),
    ]:
        for transform in (
            lambda f: f,
            lambda f: torch.func.jacrev(f, argnums=(0, 1)),
            lambda f: torch.func.jacfwd(f, argnums=(0, 1)),
            lambda f: torch.func.hessian(lambda v, b, f=f: f(v, b).square().sum()),
        ):
            actual, expected = (
                torch.utils._pytree.tree_leaves(torch.vmap(transform(f), in_dims)(*arguments))
                for f in (ours, reference)
            )
            for a, e in zip(actual, expected, strict=True):
                assert relative_error(a, e) < 1e7 * EPS


def test_vmap_over_matrices_is_one_factorization():
    case = Case((9, 4), batch=(5,))
    torch.vmap(case.system.lstsq)(case.values, case.rhs(5, 9))
    assert (case.system.stats.factorizations, case.system.stats.matrices) == (1, 5)


def test_forward_mode_with_a_history():
    """Reverse over forward: the tangent depends on values and b."""
    case = Case((6, 3))
    values, b, t = case.values.requires_grad_(), case.rhs(6), torch.randn_like(case.values)

    def tangent(f):
        with torch.autograd.forward_ad.dual_level():
            x = f(torch.autograd.forward_ad.make_dual(values, t), b)
            return torch.autograd.forward_ad.unpack_dual(x).tangent

    (actual,) = torch.autograd.grad(tangent(case.system.lstsq).square().sum(), values)
    x_dot = torch.func.jvp(lambda v: case.reference(v, b[:, None], 0.0)[:, 0], (values,), (t,))[1]
    (expected,) = torch.autograd.grad(x_dot.square().sum(), values)
    assert relative_error(actual, expected) < 1e6 * EPS


@pytest.mark.slow
@shapes
def test_compile(shape, damping):
    case = Case(shape)
    values, b = case.values.requires_grad_(), case.rhs(shape[0])
    expected = torch.autograd.grad(case.system.lstsq(values, b, damping=damping).square().sum(), values)[0]

    @torch.compile(fullgraph=True, backend="aot_eager")
    def f(system, values, b):
        return system.lstsq(values, b, damping=damping).square().sum()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def g(indices, values, b):
        return spcache.lstsq((indices, shape, values), b, damping=damping).square().sum()

    for y in f(case.system, values, b), g(case.indices, values, b):
        assert relative_error(torch.autograd.grad(y, values)[0], expected) < 100 * EPS


# --- rank, conditions, scales ----------------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize("wide", [False, True])
def test_a_deficient_rank(dtype, wide):
    """A dependent column (row), an empty one, one too many, by values and by structure; the second of a batch."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(20, 4, dtype=torch.complex128, generator=generator)
    base = base if dtype.is_complex else base.real
    what = "row" if wide else "column"
    for last in torch.zeros(20), base[:, 1], base[:, 0] - base[:, 2] / 3, 1e-20 * base[:, 3]:
        D = torch.cat([base, last.to(base.dtype)[:, None]], 1)
        D = D.to(dtype).to(base.dtype) if dtype in (torch.float64, torch.complex128) else _exact(D, dtype)
        D = D.mT if wide else D
        for stored in torch.ones(D.shape, dtype=torch.bool), D != 0:
            indices = stored.nonzero().T
            values = D[indices[0], indices[1]].to(dtype)
            good = values + torch.randn(len(values), generator=generator).to(dtype)
            system, b = SparseSystem(indices, D.shape), torch.ones(D.shape[0], dtype=dtype)
            for batch, expected in (values, ()), (torch.stack([good, values]), (1,)):
                with pytest.raises(SingularMatrixError, match=f"no full {what} rank.*damping=") as caught:
                    system.lstsq(batch, b)
                assert caught.value.batch == (expected if stored.all() else caught.value.batch)
                assert caught.value.column is None or 0 <= caught.value.column < 5
            x = system.lstsq(values, b, damping=0.1)  # still usable, and defined
            assert (
                relative_error(x, stacked(D, b.to(base.dtype)[:, None], 0.1)[:, 0].to(dtype))
                < 1e4 * torch.finfo(dtype).eps
            )


def _exact(D, dtype):
    """Dependent columns that stay so in single precision: of integers."""
    D = (D * 8).real.round() + (1j * (D * 8).imag.round() if D.is_complex() else 0)
    D[:, -1] = D[:, 0] - D[:, 1] if D[:, -1].abs().max() > 0 else 0
    return D


@double_dtypes
@pytest.mark.parametrize("digits", [2, 4, 6, 7, 8, 10, 12])
@pytest.mark.parametrize("residual", [1.0, 1e-8, 0.0])
@pytest.mark.parametrize("wide", [False, True])
def test_as_good_as_qr(dtype, digits, residual, wide):
    """Against the exact solution: errors within a hundred times what rounding A once may do to x."""
    mpmath = pytest.importorskip("mpmath")
    generator = torch.Generator().manual_seed(digits)
    U, _, V = torch.linalg.svd(torch.randn(12, 5, dtype=dtype, generator=generator), full_matrices=False)
    sigma = torch.logspace(0, -digits, 5, dtype=torch.float64)
    D = (U * sigma) @ V
    D = D.mH.contiguous() if wide else D
    b = D @ torch.randn(D.shape[1], dtype=dtype, generator=generator)
    b = b + residual * torch.randn(D.shape[0], dtype=dtype, generator=generator)
    indices = torch.ones(D.shape).nonzero().T
    system = SparseSystem(indices, D.shape)
    x = system.lstsq(D.flatten(), b)
    with mpmath.workdps(80):
        A, c = mpmath.matrix(D.tolist()), mpmath.matrix(b.tolist())
        exact = A.H * mpmath.lu_solve(A * A.H, c) if wide else mpmath.lu_solve(A.H * A, A.H * c)
        error = mpmath.norm(mpmath.matrix(x.tolist()) - exact) / mpmath.norm(exact)
        left = mpmath.norm(c - A * exact) / mpmath.norm(exact)
    condition = 10.0**digits
    assert error < 100 * EPS * (condition + (0 if wide else condition**2 * float(left)))
    stats = system.stats
    assert stats.lstsq_path == ("normal" if digits <= 6 else "augmented" if digits >= 8 else stats.lstsq_path)
    assert condition / 30 < stats.lstsq_condition < condition * 30


def test_the_normal_equations_are_refused_where_they_end():
    U, _, V = torch.linalg.svd(torch.randn(30, 10).double(), full_matrices=False)
    D = (U * torch.logspace(0, -9, 10).double()) @ V
    system, b = SparseSystem(torch.ones(30, 10).nonzero().T, (30, 10)), torch.randn(30).double()
    with pytest.raises(SingularMatrixError, match="method='normal' cannot be trusted.*method='auto', or damping="):
        system.lstsq(D.flatten(), b, method="normal")
    x = system.lstsq(D.flatten(), b)
    assert system.stats.lstsq_path == "augmented"
    assert (D.T @ (b - D @ x)).norm() < 100 * EPS * (D.norm() ** 2 * x.norm() + b.norm())


@pytest.mark.parametrize("scale", [1e-150, 1e-20, 1e20, 1e150])
@pytest.mark.parametrize("shape", [(30, 12), (12, 30)])
def test_scales(scale, shape):
    """Columns (of a wide matrix, rows) of any size, and any size of all: nothing overflows, no digit is lost."""
    case = Case(shape, density=0.3)
    wide = shape[0] < shape[1]
    sizes = torch.logspace(0, math.log10(scale), 12, dtype=torch.float64)
    place = case.indices[0 if wide else 1]
    b = case.rhs(shape[0])
    expected = stacked(case.dense(), b[:, None], 0.0)[:, 0]
    if wide:
        x = case.system.lstsq(case.values * sizes[place], b * sizes)
    else:
        x = case.system.lstsq(case.values * sizes[place], b) * sizes
    assert relative_error(x, expected) < 1e3 * EPS
    x = case.system.lstsq(case.values * scale, b * scale)
    assert relative_error(x, expected) < 1e3 * EPS
    x = case.system.lstsq(case.values * scale, b, damping=scale) * scale
    assert relative_error(x, stacked(case.dense(), b[:, None], 1.0)[:, 0]) < 1e3 * EPS


def test_random_matrices():
    """Shapes, densities, conditions and dampings at random."""
    rng = np.random.default_rng(0)
    for seed in range(60):
        shape = tuple(int(i) for i in rng.integers(1, 25, 2))
        dtype = (torch.float64, torch.complex128)[seed % 2]
        case = Case(shape, dtype, seed=seed, density=float(rng.uniform(0.1, 1)))
        damping = float(rng.choice([0.0, 1e-3, 1.0]))
        b = case.rhs(shape[0], 2)
        D = case.dense()
        condition = float(
            torch.linalg.cond(torch.cat([D, damping * torch.eye(shape[1])])) if damping else torch.linalg.cond(D)
        )
        try:
            x = case.system.lstsq(case.values, b, damping=damping)
        except SingularMatrixError:
            assert condition > 1e10
            continue
        r = b - D @ x
        normal = D.mH @ r - damping**2 * x
        assert normal.norm() <= 1e3 * EPS * (D.norm() * r.norm() + (D.norm() ** 2 + damping**2) * x.norm())
        assert relative_error(x, stacked(D, b, damping)) < 1e3 * EPS * max(1.0, condition) ** 2


def test_a_few_long_rows_are_not_multiplied():
    """One row of 3000 entries would fill A^H A: the augmented system is taken instead."""
    n = 3000
    i = torch.arange(n)
    indices = torch.cat([torch.stack([i, i]), torch.stack([i[1:], i[:-1]]), torch.stack([torch.full((n,), n), i])], 1)
    values = torch.cat([torch.full((n,), 2.0), torch.full((n - 1,), -1.0), torch.ones(n)]).double()
    system, x = SparseSystem(indices, (n + 1, n)), torch.randn(n).double()
    b = system.matmul(values, x)
    assert relative_error(system.lstsq(values, b), x) < 1e4 * EPS
    assert system.stats.lstsq_path == "augmented" and system.stats.nnz_factor < 20 * n


# --- edges -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 0), (0, 3), (0, 0)])
def test_nothing(shape):
    system = SparseSystem(torch.zeros(2, 0).long(), shape)
    x = system.lstsq(torch.zeros(0), torch.ones(shape[0]))
    assert torch.equal(x, torch.zeros(shape[1]))
    assert SparseSystem(torch.zeros(2, 1).long(), (3, 2)).lstsq(torch.ones(0, 1), torch.ones(0, 3, 2)).shape == (
        0,
        2,
        2,
    )
    assert SparseSystem(torch.zeros(2, 1).long(), (3, 2)).lstsq(torch.ones(1), torch.ones(3, 0)).shape == (2, 0)


def test_no_entries():
    system = SparseSystem(torch.zeros(2, 0).long(), (3, 2))
    with pytest.raises(SingularMatrixError, match="no full column rank"):
        system.lstsq(torch.zeros(0), torch.ones(3))
    assert torch.equal(system.lstsq(torch.zeros(0), torch.ones(3), damping=1.0), torch.zeros(2))


def test_a_rectangular_system():
    """matmul is defined, solve and factorize name lstsq."""
    case = Case((5, 3))
    x, b = case.rhs(3, 2), case.rhs(5)
    assert relative_error(case.system.matmul(case.values, x), case.dense() @ x) < 10 * EPS
    assert relative_error(case.system.matmul(case.values, b, adjoint=True), case.dense().mH @ b) < 10 * EPS
    for f in lambda: case.system.solve(case.values, b), lambda: case.system.factorize(case.values):
        with pytest.raises(
            ValueError, match=r"needs a square matrix, this system has shape \(5, 3\); lstsq is least squares"
        ):
            f()


@pytest.mark.parametrize("kind", ["spd", "symmetric", "hermitian"])
def test_kinds(kind):
    system = SparseSystem(torch.tensor([[0, 1], [0, 1]]), 2, kind=kind)
    with pytest.raises(ValueError, match=f"lstsq needs kind='auto' or 'general', this system has '{kind}'"):
        system.lstsq(torch.ones(2), torch.ones(2))


def test_values_that_are_not_finite():
    case = Case((5, 3))
    with pytest.raises(ValueError, match="values must be finite"):
        case.system.lstsq(case.values * torch.nan, case.rhs(5))
    with pytest.raises(ValueError, match="b must be finite"):
        case.system.lstsq(case.values, case.rhs(5) * torch.inf)
    assert case.system.lstsq(case.values, case.rhs(5)).isfinite().all()


@direct_methods
def test_without_checks(method):
    case = Case((5, 3))
    system = SparseSystem(case.indices, (5, 3), check=False)
    b = case.rhs(5)
    x = system.lstsq(case.values, b, method=method)
    assert relative_error(x, stacked(case.dense(), b[:, None], 0.0)[:, 0]) < 1e3 * EPS
    system.lstsq(0 * case.values, b, method=method)  # whatever it is, nothing is raised
    assert system.lstsq(case.values * torch.nan, b, method=method).isnan().any()


def test_copies():
    case = Case((9, 4))
    b = case.rhs(9)
    expected = case.system.lstsq(case.values, b)
    for other in copy.copy(case.system), copy.deepcopy(case.system), pickle.loads(pickle.dumps(case.system)):
        assert torch.equal(other.lstsq(case.values, b), expected)
        assert (other.stats.analyses, other.stats.factorizations) == (0, 1)
    assert case.system.stats.factorizations == 1


def test_memory_is_counted_and_let_go():
    case = Case((90, 40))
    before = case.system.nbytes
    case.system.lstsq(case.values, case.rhs(90))
    full = case.system.nbytes
    case.system.clear()
    assert before < case.system.nbytes < full
    case.system.lstsq(case.values, case.rhs(90))
    assert case.system.stats.factorizations == 2


def test_threads():
    case = Case((40, 15))
    leaves = [case.values * (k + 1) for k in range(4)]
    b = case.rhs(40)
    expected = [stacked(case.dense(v), b[:, None], 0.0)[:, 0] for v in leaves]
    errors = [math.inf] * 4

    def work(k):
        errors[k] = max(relative_error(case.system.lstsq(leaves[k], b), expected[k]) for _ in range(30))

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert max(errors) < 1e3 * EPS


# --- lsmr ------------------------------------------------------------------------------------------------------------


@double_dtypes
@shapes
def test_lsmr(shape, damping, dtype):
    """The same solution and the same derivative, without a factorization."""
    case = Case(shape, dtype)
    values, b = case.values.requires_grad_(), case.rhs(shape[0], 2).requires_grad_()
    x = case.system.lstsq(values, b, damping=damping, method="lsmr")
    expected = case.reference(values, b, damping)
    assert relative_error(x, expected) < 1e-11
    g = torch.randn_like(expected)
    for actual, wanted in zip(*(torch.autograd.grad(y, (values, b), g) for y in (x, expected)), strict=True):
        assert relative_error(actual, wanted) < 1e-10
    assert case.system.stats.factorizations == 0


# --- real files ------------------------------------------------------------------------------------------------------


def load(loader, name):
    try:
        return loader(name)
    except DataFileMissing as missing:
        pytest.skip(str(missing))


def system_of(A):
    A = A.tocoo()
    return SparseSystem(torch.from_numpy(np.stack([A.row, A.col]).astype(np.int64)), A.shape), torch.from_numpy(A.data)


@pytest.mark.parametrize("name", ["illc1033", "well1850"])
@direct_methods
def test_surveying(name, method):
    """The residual of QR, in the normal equations and in x."""
    A, b = load(load_matrix, name + ".mtx.gz"), load(load_rhs, name + "_rhs1.mtx.gz")
    system, values = system_of(A)
    D = A.toarray()
    x = system.lstsq(values, torch.from_numpy(b), method=method).numpy()
    Q, R = np.linalg.qr(D)
    by_qr = np.linalg.solve(R, Q.T @ b)
    assert np.linalg.norm(x - by_qr) < 1e3 * EPS * np.linalg.cond(D) * np.linalg.norm(by_qr)
    r, r_qr = b - D @ x, b - D @ by_qr
    normal, normal_qr = (np.linalg.norm(D.T @ t) / (np.linalg.norm(D) * np.linalg.norm(t)) for t in (r, r_qr))
    assert normal <= 3 * normal_qr + 10 * EPS * np.linalg.norm(b) / np.linalg.norm(r)
    assert np.linalg.norm(r) <= np.linalg.norm(r_qr) + 10 * EPS * np.linalg.norm(D) * np.linalg.norm(x)


@pytest.mark.parametrize("name", ["illc1033", "well1850"])
def test_surveying_gradients(name):
    """Against the rule written out, in extended precision."""
    A, b = load(load_matrix, name + ".mtx.gz"), load(load_rhs, name + "_rhs1.mtx.gz")
    system, values = system_of(A)
    D, g = A.toarray(), np.random.default_rng(0).standard_normal(A.shape[1])
    leaves = values.requires_grad_(), torch.from_numpy(b).requires_grad_()
    x = system.lstsq(*leaves)
    grad_values, grad_b = torch.autograd.grad(x, leaves, torch.from_numpy(g))
    long, factor = sp.csr_array(A, dtype=np.longdouble), cho_factor(D.T @ D)

    def solve(rhs):
        """(A^T A)^-1 rhs to more than double precision."""
        y = np.zeros(len(rhs), np.longdouble)
        for _ in range(8):
            y += cho_solve(factor, (rhs - long.T @ (long @ y)).astype(float))
        return y

    exact, z = solve(long.T @ b), solve(g)
    gB, r = long @ z, b - long @ exact
    G = np.outer(r, z) - np.outer(gB, exact)
    condition = np.linalg.cond(D)
    wanted = G[A.tocoo().row, A.tocoo().col]
    assert np.abs(grad_b.numpy() - gB).max() < 100 * EPS * condition * np.abs(gB).max()
    assert np.abs(grad_values.numpy() - wanted).max() < 100 * EPS * condition * np.abs(wanted).max()


def test_lp_dfl001():
    """Rank 6058 of 6071 rows: said, with a row that depends on others, and solved with damping."""
    A = load(load_matrix, "lp_dfl001.mtx")
    system, values = system_of(A)
    b = torch.from_numpy(np.random.default_rng(0).standard_normal(A.shape[0]))
    for _ in range(2):
        with pytest.raises(SingularMatrixError, match="no full row rank.*damping=") as caught:
            system.lstsq(values, b)
        assert 0 <= caught.value.column < 6071
    A, exact = A.tocoo(), sp.csr_array(A, dtype=np.longdouble)
    for damping in 1.0, 1e-3:
        leaf = values.clone().requires_grad_()
        x = system.lstsq(leaf, b, damping=damping)
        (grad,) = torch.autograd.grad(x, leaf, torch.ones_like(x))
        shifted = sp.csc_array(A @ A.T + damping**2 * sp.eye_array(A.shape[0]))
        lu = splu(shifted, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": True})

        def solve(rhs, lu=lu, damping=damping):
            """(A A^T + mu^2)^-1 rhs to more than double precision."""
            y = np.zeros(A.shape[0], np.longdouble)
            for _ in range(6):
                y += lu.solve((rhs - exact @ (exact.T @ y) - damping**2 * y).astype(float))
            return y

        y = solve(b.numpy())
        xi = solve(exact @ np.ones(A.shape[1]))
        wanted_x, rho = exact.T @ y, 1 - exact.T @ xi
        wanted_grad = y[A.row] * rho[A.col] - xi[A.row] * wanted_x[A.col]
        for actual, wanted in (x.detach(), wanted_x), (grad, wanted_grad):
            assert relative_error(actual, torch.from_numpy(wanted.astype(float))) < 1e4 * EPS / damping
    assert system.stats.analyses == 1 and system.stats.lstsq_path == "normal"


@pytest.mark.parametrize("name", ["seq/posegraph_w100.jac.npz", "seq/posegraph_sphere2500.jac.npz"])
def test_pose_graphs(name):
    """Gauss-Newton steps: one analysis, one factorization each; forward, backward, damped as Levenberg does."""
    sequence = load(load_sequence, name)
    system = None
    for k, (data, b) in enumerate(zip(sequence["data"], sequence["rhs"], strict=True)):
        A = sp.csr_array((data, sequence["indices"], sequence["indptr"]), shape=sequence["shape"])
        if system is None:
            system, _ = system_of(A)
        leaf, b = torch.from_numpy(data).requires_grad_(), torch.from_numpy(b)
        x = system.lstsq(leaf, b)
        x.sum().backward()
        x = x.detach().numpy()
        r = b.numpy() - A @ x
        scale = np.sqrt((A.multiply(A)).sum(0))  # each column on its own
        assert (abs(A.T @ r) / scale).max() <= 100 * EPS * (
            np.linalg.norm(r) + np.linalg.norm(b) + abs(scale * x).max()
        )
        assert leaf.grad.isfinite().all()
        assert (system.stats.analyses, system.stats.factorizations, system.stats.reuses) == (1, k + 1, 0)
    assert system.stats.lstsq_path == "normal"
    y = system.lstsq(leaf.detach(), b, damping=1e-2).numpy()
    r = b.numpy() - A @ y
    assert abs(A.T @ r - 1e-4 * y).max() <= 100 * EPS * scale.max() * (np.linalg.norm(b) + abs(scale * y).max())
    assert np.linalg.norm(y) < np.linalg.norm(x)
