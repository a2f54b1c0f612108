"""What goes wrong, and what the user reads: the exception, and the words that say what is expected, what came, and the way out."""

import pickle
from functools import partial

import numpy as np
import pytest
import torch
from cases import CASES, DTYPES, GENERAL, SPD, find_case, make, numbers, relative_error

import spcache
from spcache import (
    EngineUnavailableError,
    NotPositiveDefiniteError,
    SingularMatrixError,
    SparseSystem,
    SpcacheError,
)  # fmt: skip

INDICES = torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 1, 0]])
EVERY_KIND = ("auto", "spd", "symmetric", "hermitian", "general")
each_engine = pytest.mark.parametrize("case", [SPD, GENERAL], ids=str)


def with_entry(row, column):
    return torch.cat([INDICES, torch.tensor([[row], [column]])], 1)


# --- the constructor ------------------------------------------------------------------------------------------------------

WRONG_SYSTEMS = [
    # indices
    (INDICES.tolist(), 3, {}, TypeError, "indices must be a torch tensor or a NumPy array, got list"),
    (None, 3, {}, TypeError, "indices must be a torch tensor or a NumPy array, got NoneType"),
    (INDICES.float(), 3, {}, TypeError, r"indices must be integers \(int32 or int64\), got dtype float32; convert"),
    (INDICES.bool(), 3, {}, TypeError, "indices must be integers.* got dtype bool"),
    (INDICES.numpy().astype(complex), 3, {}, TypeError, "indices must be integers.* got dtype complex128"),
    (INDICES.to_sparse(), 3, {}, TypeError, r"indices must be a dense \(strided\) tensor, got layout torch.sparse_coo"),
    (INDICES.T, 3, {}, ValueError, r"indices must have shape \(2, nnz\).* got \(5, 2\); did you mean indices.T\?"),
    (INDICES[0], 3, {}, ValueError, r"indices must have shape \(2, nnz\).* got \(5,\)$"),
    (INDICES[None], 3, {}, ValueError, r"indices must have shape \(2, nnz\).* got \(1, 2, 5\)"),
    (with_entry(-1, 0), 3, {}, ValueError, r"entry 5 = \(-1, 0\) has its row outside 0..2 .*negative indices do not wrap"),
    (with_entry(0, -2), 3, {}, ValueError, r"entry 5 = \(0, -2\) has its column outside 0..2"),
    (with_entry(3, 0), 3, {}, ValueError, r"entry 5 = \(3, 0\) has its row outside 0..2 \(shape is \(3, 3\)"),
    (with_entry(0, 3), 3, {}, ValueError, r"entry 5 = \(0, 3\) has its column outside 0..2"),
    (with_entry(2**40, 0), 3, {}, ValueError, r"entry 5 = \(1099511627776, 0\) has its row outside"),
    (INDICES.numpy().astype(np.uint64) + 2**63, 3, {}, ValueError, r"entry 0 = \(9223372036854775808, .* outside 0..2"),
    (with_entry(3, 0), (3, 4), {}, ValueError, r"entry 5 = \(3, 0\) has its row outside 0..2 \(shape is \(3, 4\)"),
    (INDICES, 0, {}, ValueError, r"outside .*shape is \(0, 0\)"),
    # n
    (INDICES, 3.0, {}, TypeError, r"n must be an integer or a pair \(m, n\) of integers, got 3.0"),
    (INDICES, "3", {}, TypeError, "n must be an integer or a pair .* got '3'"),
    (INDICES, None, {}, TypeError, "n must be an integer or a pair .* got None"),
    (INDICES, (3, 3, 3), {}, TypeError, r"n must be an integer or a pair .* got \(3, 3, 3\)"),
    (INDICES, -1, {}, ValueError, r"n must not be negative, got \(-1, -1\)"),
    (INDICES, 2**31, {}, ValueError, r"n must be below 2\^31, got 2147483648"),
    (INDICES, (3, 2**40), {}, ValueError, r"n must be below 2\^31, got 1099511627776"),
    # options
    (INDICES, 3, {"kind": "sdp"}, ValueError, "kind must be one of 'auto', 'spd', 'symmetric', .* got 'sdp'"),
    (INDICES, 3, {"kind": None}, ValueError, "kind must be one of .* got None"),
    (INDICES, 3, {"kind": "SPD"}, ValueError, "kind must be one of .* got 'SPD'"),
    (INDICES, 3, {"kind": "spd", "triangle": "L"}, ValueError, "triangle must be one of None, 'lower', 'upper', got 'L'"),
    (INDICES, 3, {"triangle": "lower"}, ValueError, "triangle='lower' needs kind='spd', 'symmetric' or 'hermitian', got kind='auto'"),
    (INDICES, 3, {"kind": "general", "triangle": "upper"}, ValueError, "triangle='upper' needs kind=.*got kind='general'"),
    (INDICES, 3, {"ordering": "and"}, ValueError, "ordering .*must be one of 'auto', 'amd', .* got 'and'"),
    (INDICES, 3, {"kind": "spd", "ordering": "colamd"}, ValueError, r"ordering \(with kind='spd'\) must be one of .*'metis'.* got 'colamd'"),
    (INDICES, 3, {"kind": "general", "ordering": "metis"}, ValueError, r"ordering \(with kind='general'\) must be one of .*'colamd'.* got 'metis'"),
    (INDICES, 3, {"ordering": "metis"}, ValueError, r"ordering \(with kind='auto'\) must be one of .* got 'metis'"),
    (INDICES, 3, {"threads": 0}, ValueError, "threads must be None or between 1 and 1024, got 0"),
    (INDICES, 3, {"threads": 1.5}, TypeError, "threads must be an integer, got 1.5"),
    (INDICES, 3, {"threads": True}, TypeError, "threads must be an integer, got True"),
    (INDICES, 3, {"precision": "double"}, ValueError, "precision must be one of 'working', 'mixed', got 'double'"),
    # structure
    (with_entry(2, 0), 3, {"kind": "spd"}, ValueError, r"kind='spd' needs both triangles in indices: entry 5 = \(2, 0\) has no partner \(0, 2\).*triangle='lower'"),
    (with_entry(0, 2), 3, {"kind": "symmetric"}, ValueError, r"entry 5 = \(0, 2\) has no partner \(2, 0\).*triangle='lower' or 'upper'"),
    (with_entry(0, 2), 3, {"kind": "hermitian"}, ValueError, r"entry 5 = \(0, 2\) has no partner \(2, 0\)"),
    (INDICES, 3, {"kind": "spd", "triangle": "lower"}, ValueError, r"triangle='lower': entry 3 = \(0, 1\) of indices lies in the other triangle; leave it out, or pass triangle=None"),
    (INDICES, 3, {"kind": "hermitian", "triangle": "upper"}, ValueError, r"triangle='upper': entry 4 = \(1, 0\) of indices lies in the other triangle"),
    (INDICES, (3, 4), {"kind": "spd"}, ValueError, r"kind='spd' needs a square matrix, got shape \(3, 4\)"),
    (INDICES, (4, 3), {"kind": "symmetric"}, ValueError, r"kind='symmetric' needs a square matrix, got shape \(4, 3\)"),
]  # fmt: skip


@pytest.mark.parametrize("indices, n, options, error, message", WRONG_SYSTEMS)
def test_wrong_systems(indices, n, options, error, message):
    with pytest.raises(error, match=message):
        SparseSystem(indices, n, **options)


def test_options_are_keywords():
    with pytest.raises(TypeError):
        SparseSystem(INDICES, 3, "spd")
    with pytest.raises(TypeError, match="symmetry"):
        SparseSystem(INDICES, 3, symmetry="spd")


def test_indices_are_accepted_in_every_integer_type():
    values, b = torch.tensor([2.0, 3, 4, 1, 1]), torch.ones(3)
    expected = SparseSystem(INDICES, 3).solve(values, b)
    for indices in (INDICES.int(), INDICES.short(), INDICES.byte(), INDICES.numpy(), INDICES.numpy().astype(np.uint32),
                    np.asfortranarray(INDICES.numpy()), INDICES.flip(1).flip(1)):  # fmt: skip
        assert torch.equal(SparseSystem(indices, 3).solve(values, b), expected)
    indices = INDICES.clone()
    system = SparseSystem(indices, np.int64(3))
    indices.zero_()  # the system has its own copy
    assert torch.equal(system.solve(values, b), expected)


# --- arguments of the calls -----------------------------------------------------------------------------------------------

V, B = torch.tensor([2.0, 3, 4, 1, 1]), torch.ones(3)
WRONG_ARGUMENTS = [
    (V.tolist(), B, TypeError, "values must be a torch.Tensor, got list"),
    (V.numpy(), B, TypeError, "values must be a torch.Tensor, got ndarray"),
    (V.half(), B.half(), TypeError, "values must be float32, float64, complex64 or complex128, got torch.float16"),
    (V.long(), B.long(), TypeError, "values must be float32, .* got torch.int64"),
    (V.bfloat16(), B, TypeError, "values must be float32, .* got torch.bfloat16"),
    (V[:4], B, ValueError, r"values must have shape \(\*batch, 5\), one number per column of indices, got \(4,\)"),
    (V[0], B, ValueError, r"values must have shape \(\*batch, 5\).* got \(\)"),
    (V.expand(2, 5).T, B, ValueError, r"values must have shape \(\*batch, 5\).* got \(5, 2\)"),
    (V.to_sparse(), B, TypeError, "values must be a dense vector of entries, got layout torch.sparse_coo; .*from_matrix"),
    (V.to("meta"), B.to("meta"), EngineUnavailableError, r"values are on meta: .*CPU and CUDA.*move"),
    (V, B.tolist(), TypeError, "must be a torch.Tensor, got list"),
    (V, None, TypeError, "must be a torch.Tensor, got NoneType"),
    (V, B.double(), TypeError, r"must have the dtype of values, torch.float32, got torch.float64; convert it: .\.to\(values.dtype\)"),
    (V.double(), B, TypeError, "must have the dtype of values, torch.float64, got torch.float32"),
    (V, B.long(), TypeError, "must have the dtype of values, torch.float32, got torch.int64"),
    (V, B.to_sparse(), TypeError, "must be a dense tensor on the device of values, got layout torch.sparse_coo"),
    (V, B.to("meta"), TypeError, "must be a dense tensor on the device of values, got layout torch.strided on meta"),
    (V, B[:2], ValueError, r"of shape \(2,\) does not fit values of shape \(5,\): expected \(3,\)"),
    (V, B[None], ValueError, r"of shape \(1, 3\) does not fit"),
]  # fmt: skip


@pytest.mark.parametrize("values, b, error, message", WRONG_ARGUMENTS)
@pytest.mark.parametrize("check", [True, False])
def test_wrong_arguments(values, b, error, message, check):
    """The same at every door, with and without checks."""
    system = SparseSystem(INDICES, 3, check=check)
    for call in (system.solve, system.solve_ex, system.matmul):
        with pytest.raises(error, match=message):
            call(values, b)
    if error is EngineUnavailableError:
        assert issubclass(error, SpcacheError) and issubclass(error, RuntimeError)
    if values is not V and message.startswith("values"):
        with pytest.raises(error, match=message):
            system.factorize(values)
    else:
        factor = system.factorize(values)
        with pytest.raises(error, match=message):
            factor.solve(b)
    assert system.stats.solves == 0
    assert system.solve(V, B).isfinite().all()


# --- values and right-hand sides that are not what they should be ---------------------------------------------------------


@pytest.mark.parametrize("kind", EVERY_KIND)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_not_finite(kind, dtype, bad):
    case = find_case(kind, dtype)
    problem = make(case, 6, (2,))
    system, other, b = problem.system(), problem.system(), problem.rhs(2, 6)
    factor = other.factorize(problem.values)
    for number in [bad] + [complex(0, bad)] * dtype.is_complex:
        for k in (0, 3, problem.values.shape[1] - 1):  # in the vectorized part of the test and in its rest
            values, rhs = problem.values.clone(), b.clone()
            values[1, k] = number
            rhs[1, k % 6] = number
            for call in (lambda v: system.solve(v, b), system.factorize):
                with pytest.raises(ValueError, match=rf"values must be finite, got .*(nan|inf).* at values\[1, {k}\]"):
                    call(values)
            assert system.stats.factorizations == 0  # nothing was kept, nothing tried
            for solve in (factor.solve, partial(other.solve, problem.values)):
                with pytest.raises(ValueError, match=rf"b must be finite, got .*(nan|inf).* at b\[1, {k % 6}\]"):
                    solve(rhs)


@pytest.mark.parametrize("kind", ["spd", "symmetric", "hermitian"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_asymmetric_values(kind, dtype):
    """On summed entries, against the largest entry: 1e-4 of it is the limit."""
    indices = torch.cat([INDICES, INDICES[:, 3:]], 1)  # (0, 1) and (1, 0) twice
    system, b = SparseSystem(indices, 3, kind=kind), torch.ones(2, 3, dtype=dtype)
    for by, fine in [(0.5e-4, True), (2e-4, False)]:
        values = torch.tensor([5, 8, 4, 1, 0.5, 1, 1.5 + 8 * by], dtype=dtype).expand(2, 7).clone()
        values[0, -1] = 1.5
        if fine:
            assert system.solve(values, b).isfinite().all()
            continue
        word = "Hermitian" if kind != "symmetric" and dtype.is_complex else "symmetric"
        with pytest.raises(ValueError, match=rf"values are not {word} \(batch element \(1,\)\).*differ by up to 0.0016, the largest entry is 8; kind='{kind}' allows 0.0001 of it.*Use kind='general'"):  # fmt: skip
            system.solve(values, b)
    if dtype.is_complex:
        values = torch.tensor([5, 8, 4, 1j, 1j, 0, 0], dtype=dtype)
        if kind == "symmetric":
            system.solve(values, b[0])
        else:
            with pytest.raises(ValueError, match="values are not Hermitian"):
                system.solve(values, b[0])
            values[4] = -1j
            system.solve(values, b[0])
            values[0] += 0.01j  # the diagonal has to be real
            with pytest.raises(ValueError, match="values are not Hermitian"):
                system.solve(values, b[0])


# --- matrices that have no factor -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [c for c in CASES if c.kind == "spd"], ids=str)
@pytest.mark.parametrize("pivot", [-1.0, 0.0])
def test_not_positive_definite(case, pivot):
    """The row of the caller, whatever the ordering made of it, and the place in the batch."""
    n = 40
    problem = make(case, n, (2, 3), density=0.05)
    system, b = problem.system(), problem.rhs(n)
    for row in (0, 17, n - 1):
        values = problem.values.clone()
        values[1, 2, (problem.indices == row).any(0)] = 0
        values[1, 2, (problem.indices == row).all(0)] = pivot
        for call in (lambda v: system.solve(v, b), system.factorize):
            with pytest.raises(NotPositiveDefiniteError, match=rf"not positive definite: the pivot of row and column {row} .*kind='general'.*batch element \(1, 2\)") as caught:  # fmt: skip
                call(values)
            assert isinstance(caught.value, SpcacheError) and isinstance(caught.value, torch.linalg.LinAlgError)
            assert caught.value.column == row and caught.value.batch == (1, 2)
    with pytest.raises(NotPositiveDefiniteError) as caught:
        system.solve(values[1, 2], b)
    assert caught.value.batch == () and "batch" not in str(caught.value)


@pytest.mark.parametrize("kind", ["general", "symmetric", "hermitian", "auto"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_singular(kind, dtype):
    """Exactly, and to working precision; the structure is full."""
    n = 8
    indices = torch.ones(n, n).nonzero().T
    system, b = SparseSystem(indices, n, kind=kind), torch.ones(n, dtype=dtype)
    exact = torch.diag(torch.arange(1, n + 1)).to(dtype)
    exact[5, 5] = 0
    half = numbers((n, n - 1), dtype, 0).to(torch.complex128 if dtype.is_complex else torch.float64)
    nearly = -half @ (half.mT if kind == "symmetric" else half.mH)
    for A, column in [(exact, 5), (nearly.to(dtype), None)]:
        if column is None and dtype in (torch.float32, torch.complex64):
            continue  # rounded to single precision such a matrix is regular
        with pytest.raises(
            SingularMatrixError, match=rf"singular.* column \d.*\(counted from 0\), kind='{kind}'"
        ) as caught:
            system.solve(A.flatten(), b)
        assert isinstance(caught.value, SpcacheError) and isinstance(caught.value, torch.linalg.LinAlgError)
        assert caught.value.column == column or (column is None and caught.value.column in range(n))
    batch = torch.stack([torch.eye(n, dtype=dtype), exact]).flatten(1)
    with pytest.raises(SingularMatrixError, match=r"column 5 .*batch element \(1,\)"):
        system.solve(batch, b)
    assert torch.equal(system.solve(batch[0], b), b)


STRUCTURES = {
    "an empty row": [[0, 0, 2], [0, 1, 2]],
    "an empty column": [[0, 1, 2], [0, 0, 2]],
    "too few columns": [[0, 1, 2, 0, 1, 2], [0, 0, 0, 1, 1, 1]],
    "an empty row and column": [[0, 2, 2, 0], [0, 2, 0, 2]],
    "a block of zeros": [[0, 1, 2, 0, 0], [0, 0, 0, 1, 2]],
}
SYMMETRIC = list(STRUCTURES)[3:]


@pytest.mark.parametrize(
    "kind, structure",
    [(kind, s) for kind in EVERY_KIND for s in STRUCTURES if kind in ("auto", "general") or s in SYMMETRIC],
)
def test_structurally_singular(kind, structure):
    """Raised when it matters, not before: the system is made, `matmul` works."""
    indices, n = torch.tensor(STRUCTURES[structure]), 3
    system = SparseSystem(indices, n, kind=kind)
    values = torch.ones(indices.shape[1], dtype=torch.float64)
    b = torch.ones(n, dtype=torch.float64)
    assert system.matmul(values, b).isfinite().all()
    for call in (lambda: system.solve(values, b), lambda: system.factorize(values)):
        if kind == "spd":
            with pytest.raises(NotPositiveDefiniteError, match="not positive definite"):
                call()
        elif kind == "general":
            with pytest.raises(
                SingularMatrixError, match="structurally singular: no choice of pivots .*empty row or column"
            ):
                call()
        else:
            with pytest.raises(SingularMatrixError, match="singular"):
                call()
    x, info = system.solve_ex(values, b)
    assert 1 <= info <= n and x.isnan().all()
    unchecked = SparseSystem(indices, n, kind=kind, check=False)
    assert unchecked.solve(values, b).isnan().all() and 1 <= unchecked.factorize(values).info <= n


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_no_entries(kind):
    system = SparseSystem(torch.zeros(2, 0, dtype=torch.int64), 3, kind=kind)
    values, b = torch.zeros(2, 0), torch.ones(2, 3, requires_grad=True)
    for call in (lambda: system.solve(values, b), lambda: system.factorize(values)):
        with pytest.raises(SingularMatrixError, match="no entries.*structurally singular") as caught:
            call()
        assert caught.value.column == 0
    assert torch.equal(system.matmul(values, b), torch.zeros(2, 3))
    x, info = system.solve_ex(values, b)
    assert info.tolist() == [1, 1] and x.isnan().all()
    unchecked = SparseSystem(torch.zeros(2, 0, dtype=torch.int64), 3, kind=kind, check=False)
    assert unchecked.solve(values, b).isnan().all()
    assert unchecked.factorize(values).info.tolist() == [1, 1]


def test_a_factor_of_more_than_2_31_entries():
    """Its size is known before any memory is asked for: fronts whose places no longer fit 32 bits are refused."""
    n = 70_000  # an arrow pointing the wrong way fills everything
    i = torch.arange(n)
    indices = torch.cat([torch.stack([i, i]), torch.stack([i[1:], torch.zeros_like(i[1:])])], 1)
    system = SparseSystem(indices, n, kind="spd", triangle="lower", ordering="natural")
    values = torch.cat([torch.full((n,), 2.0 * n), torch.ones(n - 1)])
    with pytest.raises((OverflowError, MemoryError), match="32-bit|allocate"):
        system.solve(values, torch.ones(n))
    good = SparseSystem(indices, n, kind="spd", triangle="lower", ordering="amd")
    assert relative_error(good.matmul(values, good.solve(values, torch.ones(n))), torch.ones(n)) < 1e-5


# --- the exceptions themselves --------------------------------------------------------------------------------------------


def test_exceptions_pickle():
    for kind in (NotPositiveDefiniteError, SingularMatrixError):
        error = pickle.loads(pickle.dumps(kind("what happened", 7, (1, 2))))
        assert type(error) is kind and (error.column, error.batch, str(error)) == (7, (1, 2), "what happened")
        bare = pickle.loads(pickle.dumps(kind("what happened")))
        assert (bare.column, bare.batch) == (None, ())
    assert str(pickle.loads(pickle.dumps(EngineUnavailableError("why")))) == "why"


def test_public_names():
    assert set(spcache.__all__) <= set(dir(spcache))
    assert not issubclass(SpcacheError, (ValueError, TypeError))
    assert {"SparseSystem", "Factor", "solve", "plan_cache", "Stats"} < set(spcache.__all__)
