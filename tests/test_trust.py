"""Never a plausible wrong answer: old pivots that fail, matrices that are singular or nearly so, numbers far apart in size;
every real matrix and sequence against references in extended precision, with factors in double and in single precision."""

import importlib
import warnings

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from cases import find_case, make, relative_error, scaled_residual
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse.linalg import LinearOperator, onenormest, splu
from test_data import MATRICES, SEQUENCES, load, tensors
from test_data import scaled_residual as residual_of
from test_klu import BAD, GOOD
from test_ldl import saddle

from datafiles import load_matrix, load_sequence
from spcache import IllConditionedWarning, NotPositiveDefiniteError, SingularMatrixError, SparseSystem

EPS = torch.finfo(torch.float64).eps
C = 10  # tolerated scaled residual in units of eps
every_kind = pytest.mark.parametrize("kind", ["symmetric", "hermitian", "general"])
every_precision = pytest.mark.parametrize("precision", ["working", "mixed"])


def double(A):
    return torch.from_numpy(np.array(A, np.float64, order="C"))


# --- old pivots ----------------------------------------------------------------------------------------------------------


def test_old_pivots_that_fail_are_chosen_anew():
    """And the counters say so; solutions and gradients are those of the new values."""
    rows, columns = np.nonzero(GOOD)
    system = SparseSystem(np.stack([rows, columns]), 3, kind="general")
    b = torch.ones(3, dtype=torch.float64)
    system.solve(double(GOOD[rows, columns]), b)
    assert system.stats.repivots == 0
    values = double(BAD[rows, columns]).requires_grad_()
    x = system.solve(values, b)
    assert scaled_residual(double(BAD), x.detach()[:, None], b[:, None]) <= C * EPS
    (grad,) = torch.autograd.grad(x.sum(), values)
    exact, lam = np.linalg.solve(BAD, np.ones(3)), np.linalg.solve(BAD.T, np.ones(3))
    assert relative_error(grad, double(-lam[rows] * exact[columns])) < 100 * EPS
    assert (system.stats.analyses, system.stats.factorizations, system.stats.repivots) == (1, 2, 1)


@pytest.mark.parametrize("batch", [(), (4,)], ids=["one", "batch"])
@pytest.mark.parametrize("digits", [1, 2, 3, 4, 5, 6, 7, 9, 12])
def test_old_pivots_that_lose_digits_are_refined(digits, batch):
    """A diagonal that served shrinks: solutions stay as good, by steps of refinement or by new pivots, and counters tell
    by which. check=False shows what they are worth without."""
    g = np.random.default_rng(digits)
    n = 40
    A = g.standard_normal((n, n)) + 20 * np.eye(n)
    indices = np.stack(np.nonzero(np.ones((n, n))))
    later = A - np.diag(np.diag(A)) * (1 - 10.0**-digits)
    first, later = (double(np.broadcast_to(M.ravel(), (*batch, n * n))) for M in (A, later))
    b = double(g.standard_normal((*batch, n)))
    errors = {}
    for check in (True, False):
        system = SparseSystem(indices, n, kind="general", check=check)
        system.solve(first, b)
        leaf, rhs = later.clone().requires_grad_(), b.clone().requires_grad_()
        x = system.solve(leaf, rhs)
        dense = later.unflatten(-1, (n, n))
        errors[check] = scaled_residual(dense, x.detach()[..., None], b[..., None]) / EPS
        stats = system.stats
        assert (stats.analyses, stats.factorizations) == (int(check), 2)
        if check:
            assert (stats.repivots > 0) + (stats.refinements > 0) <= 1
            assert stats.repivots or stats.refinements or errors[check] <= C
            x.sum().backward()
            assert scaled_residual(dense.mT, rhs.grad[..., None], torch.ones(*batch, n, 1).double()) <= C * EPS
    assert errors[True] <= C
    if digits >= 9:
        assert stats.repivots == 0 and errors[False] > 100


def test_refinement_that_stalls_ends_in_fresh_pivots(monkeypatch):
    """Where the probe was too confident. One more factorization for all solves that follow, then an error if that fails."""
    problem = make(find_case("general"), 30)
    b = problem.rhs(30)
    system = problem.system()
    system.solve(problem.values, b)
    monkeypatch.setattr("spcache.engines.klu.Storage.doubtful", True, raising=False)
    monkeypatch.setattr("spcache.factor.ENOUGH", 0.0)
    with pytest.raises(SingularMatrixError, match="refinement leaves a scaled residual"):
        system.solve(problem.values * 2, b)
    monkeypatch.setattr("spcache.factor.ENOUGH", 32.0)
    x = system.solve(problem.values * 3, b)
    assert scaled_residual(problem.matrix() * 3, x[:, None], b[:, None]) <= C * EPS
    assert system.stats.repivots == 1 and system.stats.factorizations == 4 and system.stats.analyses == 1


def test_pivots_that_need_refinement_give_way_where_it_stalls(monkeypatch):
    """A power grid: small pivots save fill and are refined; where that stalls, ones chosen for accuracy take over."""
    A = load(load_matrix, "ACTIVSg200_AC_01")
    indices, values = tensors(A)
    b = double(np.random.default_rng(3).standard_normal(A.shape[0]))
    system = SparseSystem(indices, A.shape[0], kind="general")
    factor = system.factorize(values)
    x = factor.solve(b)
    assert system.stats.refinements > 0 and system.stats.repivots == 0
    assert residual_of(A, x.numpy(), b.numpy()) <= C
    thrifty = factor._numeric.storage.nnz

    judged = type(factor._numeric)._judged

    def never_good(self, steps, errors, b, select):
        if self.storage.nnz == thrifty:
            return ~steps
        return judged(self, steps, errors, b, select)

    monkeypatch.setattr("spcache.factor.NumericFactor._judged", never_good)
    x = factor.solve(b)
    assert system.stats.repivots == 1 and factor._numeric._substitute.storage.nnz > 1.4 * thrifty
    assert residual_of(A, x.numpy(), b.numpy()) <= C
    for step in range(2, 4):  # and stay
        x = system.solve(values * step, b)
        assert residual_of(A * step, x.numpy(), b.numpy()) <= C
        assert system.stats.repivots == 1 and system._factorizer._held.storage.nnz > 1.4 * thrifty
    assert system.stats.refactorizations == 1


# --- singular and nearly singular ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["general", "auto"])
@every_precision
def test_singular_on_later_values(kind, precision):
    """gent113: its pattern is regular, its values are of rank 107; before and after regular values."""
    A = load(load_matrix, "gent113.mtx")
    indices, values = tensors(A)
    system = SparseSystem(indices, 113, kind=kind, precision=precision)
    regular = values + 10 * double(np.random.default_rng(0).random(len(values)))
    b = torch.ones(113, dtype=torch.float64)
    for _ in range(2):
        with pytest.raises(SingularMatrixError, match="singular to working precision at column"):
            system.solve(values, b)
        A = sp.csr_array((regular.numpy(), tuple(indices.numpy())), shape=(113, 113))
        assert residual_of(A, system.solve(regular, b).numpy(), b.numpy()) <= C
        x, info = system.solve_ex(values, b)
        assert info > 0 and x.isnan().all()
    assert system.stats.analyses == 1


@every_kind
@every_precision
def test_structurally_singular_at_every_step(kind, precision):
    mask = np.ones((6, 6), bool)
    mask[:3, :3] = mask[3:, 3:] = False
    mask[2] = mask[:, 2] = False
    mask[2, 5] = mask[5, 2] = mask[1, 5] = mask[5, 1] = True
    mask[1, :5] = mask[:5, 1] = False  # rows 1 and 2 have nothing but column 5
    indices = np.stack(np.nonzero(mask))
    system = SparseSystem(indices, 6, kind=kind, precision=precision)
    for k in (1, 2):
        with pytest.raises(SingularMatrixError, match="singular"):
            system.solve(torch.full((indices.shape[1],), float(k), dtype=torch.float64), torch.ones(6).double())


def nearly(n, digits, definite=False):
    """Singular values from 1 down to 10^-digits; symmetric."""
    g = np.random.default_rng(round(10 * digits))
    Q, _ = np.linalg.qr(g.standard_normal((n, n)))
    sign = 1 if definite else g.choice([-1, 1], n)
    A = (Q * (sign * 10.0 ** -np.linspace(0, digits, n))) @ Q.T
    return (A + A.T) / 2


@pytest.mark.parametrize("kind", ["spd", "symmetric", "general", "auto"])
@every_precision
def test_nearly_singular(kind, precision):
    """A small residual, and a warning only where the condition number is that of a singular matrix; or an error there."""
    for digits in np.arange(10, 18.5, 0.5):
        A = nearly(12, digits, kind == "spd")
        indices = np.stack(np.nonzero(np.ones((12, 12))))
        system = SparseSystem(indices, 12, kind=kind, precision=precision)
        b = double(np.random.default_rng(0).standard_normal(12))
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            try:
                x = system.solve(double(A.ravel()), b)
            except (SingularMatrixError, NotPositiveDefiniteError):
                assert digits >= 14
                continue
        assert scaled_residual(double(A), x[:, None], b[:, None]) <= C * EPS
        assert digits < 17 or seen, "a matrix that is singular to working precision must not pass in silence"
        assert not seen or (
            digits >= 14 and system.stats.rcond < (32 if system.stats.engine in ("ldl", "lu") else 1) * EPS
        )


def definite_but_barely():
    """A scaled graph Laplacian, shifted: positive definite in floating point, and singular for all that it tells."""
    n = 40
    L = 2 * np.eye(n) - np.eye(n, k=1) - np.eye(n, k=-1)
    L[0, 0] = L[-1, -1] = 1
    return L + 4e-16 * np.diag(np.arange(n) == n - 1)


@pytest.mark.parametrize("dynamo", [False, True], ids=["", "after torch._dynamo"])
def test_ill_conditioned_warning(dynamo):
    """Once per factorization, at the line of who asks; silent without checks; the numbers are in Factor and stats."""
    if dynamo:
        importlib.import_module("torch._dynamo")  # puts frames of torch between caller and package
    A = definite_but_barely()
    rows, columns = np.nonzero(A)
    system = SparseSystem(np.stack([rows, columns]), len(A), kind="spd")
    values, b = double(A[rows, columns]), torch.ones(len(A), dtype=torch.float64)
    with pytest.warns(IllConditionedWarning, match="reciprocal condition number of .*e-1[789], .* below") as seen:
        factor = system.factorize(values)
    assert len(seen) == 1 and seen[0].filename == __file__
    x = factor.solve(b)
    assert torch.equal(system.solve(values, b), x)  # no other factorization, no other warning
    assert scaled_residual(double(A), x[:, None], b[:, None]) <= C * EPS
    assert factor.rcond == system.stats.rcond < EPS
    exact = 1 / np.linalg.cond(A / np.sqrt(np.outer(np.diag(A), np.diag(A))), 1)
    assert exact / 10 < float(factor.rcond) < 10 * exact or exact < EPS
    copy = torch.stack([values, values + double(rows == columns)])
    with pytest.warns(IllConditionedWarning, match=r"batch element \(0,\)"):
        batch = system.factorize(copy)
    assert batch.rcond[0] < EPS and batch.rcond[1] > 1e-2
    silent = SparseSystem(np.stack([rows, columns]), len(A), kind="spd", check=False)
    assert torch.equal(silent.solve(values, b), x) and np.isnan(silent.stats.rcond)
    assert silent.factorize(values).rcond.isnan()


@pytest.mark.parametrize("case", [find_case(k, d) for k in ("spd", "symmetric", "general", "hermitian") for d in (torch.float32, torch.float64, torch.complex128)], ids=str)  # fmt: skip
def test_no_warning_without_reason(case):
    """Whatever the units of equations and unknowns: warnings are errors in these tests."""
    problem = make(case, 30)
    for spread in (0, 5) if case.dtype == torch.float32 else (0, 5, 30, 60):
        D, E = (10.0 ** torch.from_numpy(np.random.default_rng(k).uniform(-spread, spread, 30)) for k in (0, 1))
        rows, columns = problem.indices
        scale = D[rows] * (E if case.kind == "general" else D)[columns]
        system = problem.system()
        factor = system.factorize((problem.values * scale).to(case.dtype))
        assert not (factor.rcond < 1e-3).any()


def test_rcond_of_general_matrices():
    """Near the truth where it is estimated, after any scaling."""
    g = np.random.default_rng(0)
    for digits in (9, 11, 13):
        A = nearly(20, digits)
        A[-1] = A[:-1].sum(0) + 10.0**-digits * g.standard_normal(20)
        for size in (1.0, 1e-100, 1e100):
            system = SparseSystem(np.stack(np.nonzero(np.ones((20, 20)))), 20, kind="general")
            try:
                rcond = float(system.factorize(double((A * size).ravel())).rcond)
            except SingularMatrixError:
                assert digits == 13
                continue
            if not np.isnan(rcond):
                B = A / abs(A).max(1, keepdims=True)
                B = B / abs(B).max(0)
                exact = 1 / np.linalg.cond(B, 1)
                assert exact / 3 < rcond < 30 * exact and system.stats.rcond == rcond


# --- far apart in size, permuted: properties ------------------------------------------------------------------------------


def scaled_back(A, D, E, x, b):
    """Residual of A for x and b of D A E."""
    return scaled_residual(double(A), (x * double(E))[:, None], (b / double(D))[:, None])


@pytest.mark.filterwarnings("ignore::spcache.IllConditionedWarning")  # equilibration may leave it badly scaled
@settings(max_examples=40)
@given(st.integers(2, 25), st.integers(0, 10**6), st.sampled_from([0, 20, 75]), st.sampled_from(["symmetric", "hermitian", "general"]), st.booleans())  # fmt: skip
def test_saddle_points_of_any_scale(n, seed, spread, kind, mixed):
    """Permuted, with entries up to 1e+-150: as if they were not scaled."""
    g = np.random.default_rng(seed)
    A = saddle(n, n // 2, torch.float64, seed).numpy()[0]
    order = g.permutation(len(A))
    A = A[order][:, order]
    if np.linalg.cond(A) > 1e7:
        return
    D = 2.0 ** np.round(g.uniform(-spread, spread, len(A)) / np.log10(2))
    rows, columns = np.nonzero(A)
    values = double(A[rows, columns] * D[rows] * D[columns])
    system = SparseSystem(np.stack([rows, columns]), len(A), kind=kind, precision="mixed" if mixed else "working")
    b = double(g.standard_normal(len(A)) * D)
    x = system.solve(values, b)
    # by rows alone KLU may choose pivots that the units of the unknowns favour
    assert scaled_back(A, D, D, x, b) <= (1e6 if system.stats.engine == "klu" and spread else 200) * EPS


@settings(max_examples=40)
@given(st.integers(2, 30), st.integers(0, 10**6), st.integers(0, 150), st.booleans())
def test_general_matrices_of_any_scale(n, seed, spread, permuted):
    """D A with numbers up to 1e+-150, and c D A E: residuals small in their own units."""
    g = np.random.default_rng(seed)
    A = g.standard_normal((n, n)) * (g.random((n, n)) < 0.4) + np.diag(1 + g.random(n))
    if permuted:
        A = A[g.permutation(n)]
    if np.linalg.cond(A) > 1e7:
        return
    D = 2.0 ** np.round(g.uniform(-spread, spread, n) / np.log10(2))
    rows, columns = np.nonzero(A)
    system = SparseSystem(np.stack([rows, columns]), n, kind="general")
    b = double(g.standard_normal(n) * D)
    x = system.solve(double(A[rows, columns] * D[rows]), b)
    assert scaled_back(A, D, np.ones(n), x, b) <= 50 * EPS
    lam = system.solve(double(A[rows, columns] * D[rows]), double(np.ones(n)), adjoint=True)
    assert scaled_residual(double(A).mT, (lam * double(D))[:, None], torch.ones(n, 1).double()) <= 50 * EPS


@settings(max_examples=40)
@given(st.integers(3, 20), st.integers(0, 10**6), st.floats(6, 20), st.sampled_from(["symmetric", "general", "auto"]))
def test_nearly_singular_of_any_kind(n, seed, digits, kind):
    """A small residual or the error; never neither. Permuted, one row next to a combination of the others."""
    g = np.random.default_rng(seed)
    A = g.standard_normal((n, n))
    A = A + A.T
    A[0] = A[1] = (A[0] + A[1]) / 2
    A[:, 0] = A[:, 1] = (A[:, 0] + A[:, 1]) / 2
    A[0, 0] += 10.0**-digits
    A = (A + A.T) / 2
    system = SparseSystem(np.stack(np.nonzero(np.ones((n, n)))), n, kind=kind)
    b = double(g.standard_normal(n))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", IllConditionedWarning)
            x = system.solve(double(A.ravel()), b)
    except SingularMatrixError:
        assert digits > 12
        return
    assert digits < 17 and scaled_residual(double(A), x[:, None], b[:, None]) <= 50 * EPS


# --- real matrices, against extended precision ----------------------------------------------------------------------------


def solver_of(A):
    """rhs -> A^-1 rhs to more than double precision, and the condition number; A scipy."""
    A = sp.csc_array(A)
    row = 1 / np.asarray(abs(A).max(1).todense()).ravel()
    B = sp.csc_array(sp.diags_array(row) @ A)
    column = 1 / np.asarray(abs(B).max(0).todense()).ravel()
    B = sp.csc_array(B @ sp.diags_array(column))
    lu, exact = splu(B), sp.csr_array(A, dtype=np.longdouble)
    operator = LinearOperator(A.shape, matvec=lu.solve, rmatvec=lambda x: lu.solve(x, "T"), dtype=float)
    condition = abs(B).sum(0).max() * onenormest(operator)

    def solve(rhs, transposed=False):
        x = np.zeros(len(rhs), np.longdouble)
        M, how = (exact.T, "T") if transposed else (exact, "N")
        left, right = (column, row) if transposed else (row, column)
        for _ in range(12):
            x += right * lu.solve((left * (rhs - M @ x)).astype(float), how)
        return x

    return solve, condition, row, column


@pytest.mark.parametrize(
    "name, kind", [(name, kind) for name, kinds in MATRICES.items() for kind in {"general", *kinds[:1]}]
)
def test_gradients_of_real_matrices(name, kind):
    """x, and the gradients, as good as the condition number (rows and columns scaled) allows; in both precisions."""
    A = load(load_matrix, name)
    indices, values = tensors(A)
    solve, condition, row, column = solver_of(A)
    g = np.random.default_rng(0).standard_normal(A.shape[0])
    b = A @ np.random.default_rng(1).standard_normal(A.shape[0])
    exact, lam = solve(b), solve(g, True)
    i, j = indices.numpy()
    wanted = -lam[i] * exact[j]
    if kind != "general":
        wanted = (wanted - lam[j] * exact[i]) / 2
    for precision in ("working", "mixed"):
        system = SparseSystem(indices, A.shape[0], kind=kind, precision=precision)
        leaves = values.clone().requires_grad_(), double(b).requires_grad_()
        x = system.solve(*leaves)
        grads = torch.autograd.grad(x, leaves, double(g))
        for actual, reference, unit in (x.detach(), exact, column), (grads[1], lam, row):
            error = abs((actual.numpy() - reference) / unit).max() / abs(reference / unit).max()
            assert error <= 1e3 * EPS * condition
        unit = row[i] * column[j]
        error = abs((grads[0].numpy() - wanted) / unit).max() / abs(wanted / unit).max()
        assert error <= 1e4 * EPS * condition


@pytest.mark.parametrize("name", [*SEQUENCES, "ACTIVSg200_AC"])
@every_precision
def test_sequences_with_one_analysis(name, precision):
    """Every matrix of every sequence, forward and adjoint: residuals below 10 eps, with one analysis. (The last step of
    the interior point changes what is large, and with it which rows are paired: that is another plan, and counted.)"""
    if name == "ACTIVSg200_AC":
        matrices = [sp.csr_array(load(load_matrix, f"{name}_0{k}.mtx")) for k in (1, 2)]
        for A in matrices:
            A.sort_indices()
        steps, kind = [(A, A @ np.ones(A.shape[0])) for A in matrices], "symmetric"
    else:
        s, kind = load(load_sequence, name), SEQUENCES[name]
        steps = [(sp.csr_array((d, s["indices"], s["indptr"]), shape=s["shape"]), b) for d, b in zip(s["data"], s["rhs"], strict=True)]  # fmt: skip
    ones = sp.csr_array((np.ones(steps[0][0].nnz), steps[0][0].indices, steps[0][0].indptr), shape=steps[0][0].shape)
    for used in {kind, "general"}:
        system = SparseSystem(tensors(ones)[0], ones.shape[0], kind=used, precision=precision)
        for k, (A, b) in enumerate(steps):
            values, rhs = double(A.data).requires_grad_(), double(b).requires_grad_()
            x = system.solve(values, rhs)
            assert residual_of(A, x.detach().numpy(), b) <= C
            x.sum().backward()
            assert residual_of(A.T, rhs.grad.numpy(), np.ones(len(b))) <= C
            assert values.grad.isfinite().all()
            stats = system.stats
            assert stats.factorizations >= k + 1
            assert stats.analyses == 1 or ("ipm" in name and stats.analyses <= 1 + stats.repivots)
        assert stats.repivots == 0 or "ipm" in name or precision == "mixed"
        if "ipm" in name and used == "general" and precision == "working":
            assert stats.refinements > 0 and 1 <= stats.repivots <= 3
