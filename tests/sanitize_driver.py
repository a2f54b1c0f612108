"""Exercises the native modules alone, for valgrind and AddressSanitizer: neither torch nor pytest is imported.

    python tests/sanitize_driver.py [folder of the package]      # SPCACHE_SIMD=baseline: that instruction set only

Every result is checked. Some seconds natively, some minutes under valgrind.
"""

import importlib.machinery
import importlib.util
import itertools
import os
import sys
import threading
from pathlib import Path

import numpy as np

PACKAGE = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1] / "spcache"
DTYPES = (np.float32, np.float64, np.complex64, np.complex128)  # as the scalar types' codes number them
DIRECT, MIRRORED, DIAGONAL = 0, 1, 2
rng = np.random.default_rng(0)


def load(name):
    """A native module by its file: importing the package would import torch."""
    (file,) = [f for s in importlib.machinery.EXTENSION_SUFFIXES for f in PACKAGE.glob(name.replace(".", "/") + s)]
    spec = importlib.util.spec_from_file_location(name.rpartition(".")[2], file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


pattern, multifrontal, klu = load("_pattern"), load("engines._multifrontal"), load("engines._klu")
ldl, lu = load("engines._ldl"), load("engines._lu")


def numbers(size, dtype):
    x = rng.standard_normal(size)
    return (x + 1j * rng.standard_normal(size) if np.issubdtype(dtype, np.complexfloating) else x).astype(dtype)


def finite(array):
    """By our own code, so that valgrind reports numbers that were never written."""
    array = np.ascontiguousarray(array)
    return pattern.all_finite(array.ctypes.data, array.size, DTYPES.index(array.dtype))


def check(A, x, b):
    """Scaled residual of [batch, n, n] and [batch, n, width]."""
    assert finite(x)
    for M, y, r in zip(A.astype(complex), x.astype(complex), b, strict=True):
        scale = abs(M).sum(0).max() * abs(y).max() + abs(r).max()
        assert abs(M @ y - r).max() <= 30 * np.finfo(x.dtype).eps * scale


def random_mask(n, density, symmetric):
    mask = rng.random((n, n)) < density
    return (mask | mask.T if symmetric else mask) | np.eye(n, dtype=bool)


def entries(mask):
    """COO of a mask, in no order, a part of it twice; as the caller would give them."""
    rows, columns = np.nonzero(mask)
    order = rng.permutation(np.concatenate([np.arange(len(rows)), rng.integers(0, len(rows), len(rows) // 4)]))
    return rows[order].astype(np.int32), columns[order].astype(np.int32)


def gather(A, rows, columns):
    """Values of the entries, so that duplicates add up to A; [batch, nnz]."""
    count = np.zeros(A.shape[1:])
    np.add.at(count, (rows, columns), 1)
    return np.ascontiguousarray((A[:, rows, columns] / count[rows, columns]).astype(A.dtype))


def dominant(A, sign=1):
    return (A + sign * np.eye(A.shape[1]) * (abs(A).sum(2).max() + 1)).astype(A.dtype)


def solve(storage, b, factors=None, adjoint=False, threads=1):
    b = np.ascontiguousarray(b)
    x = np.empty_like(b)  # nothing but what is solved for may be in it
    select = None if factors is None else np.array(factors, np.int64)
    address = 0 if select is None else select.ctypes.data
    storage.solve(b.ctypes.data, x.ctypes.data, len(b), b.shape[2], address, adjoint, threads)
    return x


def adjoint_of(A):
    return A.conj().transpose(0, 2, 1)


# --- the multifrontal engine ----------------------------------------------------------------------------------------------


def lower(rows, columns, n):
    """Canonical lower triangle of a symmetric pattern, and what every entry contributes to it."""
    below, right = np.maximum(rows, columns), np.minimum(rows, columns)
    indptr, indices, slots = pattern.compress(below, right, n, n)
    roles = np.where(rows == columns, DIAGONAL, np.where(rows > columns, DIRECT, MIRRORED)).astype(np.uint8)
    return indptr, indices, slots, roles


def positive_plan(mask, simd, ordering):
    n = len(mask)
    rows, columns = entries(mask)
    indptr, indices, slots, roles = lower(rows, columns, n)
    perm = np.arange(n, dtype=np.int32)
    if ordering == "amd":
        perm = multifrontal.amd(indptr, indices)
    elif ordering == "metis":
        perm = multifrontal.camd(indptr, indices, multifrontal.separate(indptr, indices))
    plan = multifrontal.Symbolic(multifrontal.Elimination(indptr, indices, perm), simd)
    again = multifrontal.Elimination(indptr, indices, plan.perm)
    assert plan.nnz == again.nnz <= plan.stored and plan.flops == again.flops and plan.nbytes > 0
    sources = np.arange(len(rows), dtype=np.int32)
    assembly = pattern.Assembly(len(rows), slots, sources, roles, plan.supernodes, *plan.positions(), 0.5, True)
    return plan, assembly, rows, columns


def positive(mask, simd, ordering, dtype, batch=2, widths=(1, 3, 17), threads=(1,)):
    n = len(mask)
    plan, assembly, rows, columns = positive_plan(mask, simd, ordering)
    A = numbers((batch, n, n), dtype) * mask
    A = dominant((A + adjoint_of(A)) / 2)
    values = gather(A, rows, columns)
    storage = multifrontal.Storage(plan, DTYPES.index(dtype), batch)
    for count, width in itertools.product(threads, widths):
        storage.factorize(assembly, values.ctypes.data, len(rows), True, None, count)
        assert not storage.failed
        b = numbers((batch, n, width), dtype)
        check(A, solve(storage, b, threads=count), b)
        check(A[[0, 0, -1]], solve(storage, b[[0, 0, 0]], [0, 0, batch - 1], threads=count), b[[0, 0, 0]])
    for bad in (-1, np.nan, np.inf):  # in the last matrix, at some pivots
        broken = values.copy()
        at = np.flatnonzero(rows == columns)
        broken[-1, at[rows[at] >= rng.integers(0, n)]] = bad
        storage.factorize(assembly, broken.ctypes.data, len(rows), False, None, threads[-1])
        assert storage.failed and storage.failed_columns()[-1] in range(n)
        assert np.isnan(solve(storage, b)[-1]).all()
    plan.trim()


def test_positive():
    simd = os.environ.get("SPCACHE_SIMD")
    best = multifrontal.INSTRUCTION_SETS.index(multifrontal.best_simd())
    levels = [simd] if simd else multifrontal.INSTRUCTION_SETS[: best + 1]
    for level, dtype in itertools.product(levels, DTYPES):
        for n in (1, 2, 3, 7, 8, 9, 17, 33, 50):
            positive(random_mask(n, 1.0, True), level, "natural", dtype)
            positive(random_mask(n, 3 / n, True), level, ("amd", "metis", "natural")[n % 3], dtype)
        positive(random_mask(20, 0.1, True), level, "amd", dtype, 17, (1, 5, 13), threads=(1, 2))  # side by side
        positive(random_mask(161, 1.0, True), level, "natural", dtype, 1, (1, 5))  # packed kernels
        arms = np.kron(np.eye(2, dtype=bool), np.ones((70, 70), bool))
        arms = np.pad(arms, ((0, 45), (0, 45)), constant_values=True)
        positive(arms, level, "natural", dtype, 1, (2,))
    i = np.arange(45 * 45).reshape(45, 45)
    grid = np.eye(45 * 45, dtype=bool)
    for a, b in ((i[1:], i[:-1]), (i[:, 1:], i[:, :-1])):
        grid[a.ravel(), b.ravel()] = grid[b.ravel(), a.ravel()] = True
    positive(grid, levels[-1], "metis", np.float32, 1, (1,), threads=(1, 2, 4))
    positive(
        random_mask(50, 1.0, True), levels[-1], "natural", np.complex64, 300, (1,), threads=(3,)
    )  # share the batch


# --- LDL ---------------------------------------------------------------------------------------------------------------------


def indefinite(mask, level, dtype, hermitian, ordering="amd", batch=2, threads=(1,), diagonal=True):
    """Random numbers at these places, eigenvalues of both signs; pivots of order 2 where there is no diagonal."""
    n = len(mask)
    if not diagonal:
        mask = mask & ~np.eye(n, dtype=bool)
    rows, columns = entries(mask)
    indptr, indices, slots, roles = lower(rows, columns, n)
    perm = multifrontal.amd(indptr, indices) if ordering == "amd" else np.arange(n, dtype=np.int32)
    here = np.arange(len(indices), dtype=np.int32)
    plan = ldl.Symbolic(indptr, indices, indptr, indices, here, perm, level)
    sources = np.arange(len(rows), dtype=np.int32)
    assembly = pattern.Assembly(len(rows), slots, sources, roles, 1, None, None, 0.5, hermitian)
    A = numbers((batch, n, n), dtype) * mask
    A = ((A + (adjoint_of(A) if hermitian else A.transpose(0, 2, 1))) / 2).astype(dtype)
    values = gather(A, rows, columns)
    code = DTYPES.index(dtype)
    sizes = ldl.magnitudes(assembly, values.ctypes.data, len(rows), code, len(indices))
    partner = ldl.pair(indptr, indices, sizes)
    assert partner is None or (partner[partner] == np.arange(n)).all()
    storage = ldl.Storage(plan, code, batch)
    for count in threads:
        storage.factorize(assembly, values.ctypes.data, len(rows), True, None, count)
        if storage.failed_columns() is not None:  # without pairs of rows some cannot be trusted
            assert not diagonal or n < 3 or (mask.sum() < 0.9 * n * n)
            continue
        assert storage.report(0)["growth"] > 0 and (storage.inertia().sum(1) == n).all()
        for width, adjoint in itertools.product((1, 3, 17), (False, True)):
            b = numbers((batch, n, width), dtype)
            check(adjoint_of(A) if adjoint else A, solve(storage, b, adjoint=adjoint, threads=count), b)
            solve(storage, b[[0, 0, -1]], [0, 0, batch - 1], adjoint, count)
    for bad in (0, np.nan, np.inf, 1e-30):
        broken = values.copy()
        broken[-1, :: max(1, len(rows) // 4)] = bad
        storage.factorize(assembly, broken.ctypes.data, len(rows), bad == 0, None, threads[-1])
        solve(storage, numbers((batch, n, 2), dtype))
    zeros = np.zeros_like(values)
    storage.factorize(assembly, zeros.ctypes.data, len(rows), True)
    assert storage.failed_columns() is not None and np.isnan(solve(storage, numbers((batch, n, 2), dtype))).all()
    plan.trim()


def test_indefinite():
    simd = os.environ.get("SPCACHE_SIMD")
    best = multifrontal.INSTRUCTION_SETS.index(multifrontal.best_simd())
    levels = [multifrontal.INSTRUCTION_SETS.index(simd)] if simd else range(best + 1)
    for level, dtype, hermitian in itertools.product(levels, DTYPES, (False, True)):
        for n in (1, 2, 3, 8, 9, 17, 18, 50):
            indefinite(random_mask(n, 1.0, True), level, dtype, hermitian, "natural", diagonal=n % 2 > 0)
            indefinite(random_mask(n, 3 / n, True), level, dtype, hermitian)
        indefinite(random_mask(164, 1.0, True), level, dtype, hermitian, "natural", 1)  # packed kernels, two windows
    indefinite(random_mask(50, 1.0, True), best if not simd else levels[0], np.complex64, True, batch=300, threads=(3,))


# --- LU ----------------------------------------------------------------------------------------------------------------------


def unsymmetric(mask, level, dtype, diagonal, ordering="amd", batch=2, threads=(1,)):
    """Random numbers at these places, more of it on the diagonal; rows matched by the first matrix."""
    n = len(mask)
    A = (numbers((batch, n, n), dtype) * mask + diagonal * np.eye(n)).astype(dtype)
    rows, columns = entries(mask)
    indptr, indices, slots = pattern.compress(rows, columns, n, n)
    sources, direct = np.arange(len(rows), dtype=np.int32), np.full(len(rows), DIRECT, np.uint8)
    assembly = pattern.Assembly(len(rows), slots, sources, direct, 1, None, None, 1.0, False)
    values, code = gather(A, rows, columns), DTYPES.index(dtype)
    sizes = lu.magnitudes(assembly, values.ctypes.data, len(rows), code, len(indices))
    row_of = lu.match(indptr, indices, np.log(sizes))
    number = np.empty(n, np.int32)
    number[row_of] = np.arange(n, dtype=np.int32)
    i, j = number[indices], np.repeat(np.arange(n, dtype=np.int32), np.diff(indptr))
    tree_indptr, tree_indices, places = pattern.compress(np.maximum(i, j), np.minimum(i, j), n, n)
    perm = multifrontal.amd(tree_indptr, tree_indices) if ordering == "amd" else np.arange(n, dtype=np.int32)
    plan = lu.Symbolic(indptr, indices, row_of, tree_indptr, tree_indices, places, perm, level)
    storage = lu.Storage(plan, code, batch)
    for count in threads:
        storage.factorize(assembly, values.ctypes.data, len(rows), True, None, count)
        if storage.failed_columns() is not None:
            assert not diagonal
            continue
        assert storage.report(0)["growth"] > 0
        for width, adjoint in itertools.product((1, 3, 17), (False, True)):
            b = numbers((batch, n, width), dtype)
            check(adjoint_of(A) if adjoint else A, solve(storage, b, adjoint=adjoint, threads=count), b)
            solve(storage, b[[0, 0, -1]], [0, 0, batch - 1], adjoint, count)
    for bad in (0, np.nan, np.inf, 1e-30):
        broken = values.copy()
        broken[-1, :: max(1, len(rows) // 4)] = bad
        storage.factorize(assembly, broken.ctypes.data, len(rows), bad == 0, None, threads[-1])
        solve(storage, numbers((batch, n, 2), dtype))
    zeros = np.zeros_like(values)
    storage.factorize(assembly, zeros.ctypes.data, len(rows), True)
    assert storage.failed_columns() is not None and np.isnan(solve(storage, numbers((batch, n, 2), dtype))).all()
    plan.trim()


def test_unsymmetric():
    simd = os.environ.get("SPCACHE_SIMD")
    best = multifrontal.INSTRUCTION_SETS.index(multifrontal.best_simd())
    levels = [multifrontal.INSTRUCTION_SETS.index(simd)] if simd else range(best + 1)
    for level, dtype, diagonal in itertools.product(levels, DTYPES, (0, 30)):
        for n in (1, 2, 3, 8, 9, 17, 50):
            unsymmetric(random_mask(n, 1.0, False), level, dtype, diagonal, "natural")
            unsymmetric(random_mask(n, 3 / n, False), level, dtype, diagonal)
        unsymmetric(random_mask(164, 1.0, False), level, dtype, diagonal, "natural", 1)  # packed kernels, two windows
    unsymmetric(random_mask(50, 1.0, False), best if not simd else levels[0], np.complex64, 0, batch=300, threads=(3,))
    unsymmetric(random_mask(500, 1.0, False), best if not simd else levels[0], np.float32, 0, "natural", 1, (1, 2))


# --- KLU ------------------------------------------------------------------------------------------------------------------


def general(n, dtype, ordering, wide, density):
    """A plan, its assembly, and two matrices whose large entries are not on the diagonal."""
    order, mask = rng.permutation(n), random_mask(n, density, False)
    A = dominant(numbers((2, n, n), dtype) * mask, -1)[:, order]
    rows, columns = entries(mask[order])
    indptr, indices, slots = pattern.compress(rows, columns, n, n)
    plan = klu.Symbolic(indptr, indices, ordering, wide)
    sources, direct = np.arange(len(rows), dtype=np.int32), np.full(len(rows), DIRECT, np.uint8)
    assembly = pattern.Assembly(len(rows), slots, sources, direct, 1, None, None, 1.0, False)
    return plan, assembly, A, gather(A, rows, columns)


def test_general():
    for dtype, wide, ordering in itertools.product(DTYPES, (False, True), klu.ORDERINGS):
        for n, density in ((1, 1.0), (2, 1.0), (6, 0.5), (25, 0.15), (40, 0.3)):
            plan, assembly, A, values = general(n, dtype, ordering, wide, density)
            first, second = (klu.Storage(plan, DTYPES.index(dtype), 2) for _ in range(2))
            nnz = values.shape[1]

            def factorize(storage, values, *rest, assembly=assembly, nnz=nnz):
                storage.factorize(assembly, values.ctypes.data, nnz, *rest)
                return storage.failed_columns()

            for storage, checked, template in ((first, True, None), (first, False, None), (second, True, first)):
                assert factorize(storage, values, checked, template) is None
                for width, adjoint in itertools.product((1, 4, 7), (False, True)):
                    M, b = adjoint_of(A) if adjoint else A, numbers((2, n, width), dtype)
                    check(M, solve(storage, b, adjoint=adjoint), b)
                    check(M[[1, 1]], solve(storage, b, [1, 1], adjoint), b)
            for bad in (0, np.nan, np.inf, 1e-30):
                broken = values.copy()
                broken[1, :: max(1, nnz // 4)] = bad
                factorize(second, broken, bad == 0)
                check(A[:1], solve(second, b[:1], [0]), b[:1])
                solve(second, b)
            factorize(second, np.zeros_like(values), True)
            assert np.isnan(solve(second, b)).all()
            assert factorize(second, values, True) is None
            plan.trim()
    # threads share a batch of so many entries
    plan, assembly, A, values = general(40, np.complex64, "amd", False, 0.3)
    many = np.tile(values, (50, 1))
    storage, b = klu.Storage(plan, 2, len(many)), numbers((len(many), 40, 3), np.complex64)
    for checked in (True, False):
        storage.factorize(assembly, many.ctypes.data, many.shape[1], checked, None, 3)
        assert storage.failed_columns() is None
        check(np.tile(A, (50, 1, 1)), solve(storage, b, threads=3), b)
    # structurally singular
    indptr, indices = np.array([0, 2, 4, 4]), np.array([0, 2, 0, 2], np.int32)
    plan = klu.Symbolic(indptr, indices, "amd")
    slots = np.arange(4, dtype=np.int32)
    assembly = pattern.Assembly(4, slots, slots, np.zeros(4, np.uint8), 1, None, None, 1.0, False)
    storage, ones = klu.Storage(plan, 1, 1), np.ones(4)
    storage.factorize(assembly, ones.ctypes.data, 4, True)
    assert plan.structural_rank == 2 and storage.failed_columns()[0] >= 0
    assert np.isnan(solve(storage, np.ones((1, 3, 2)))).all()


# --- what is done on the caller's entries ---------------------------------------------------------------------------------


def test_entries():
    for n, density, dtype in itertools.product((1, 5, 30), (0.0, 0.2, 1.0), DTYPES):
        mask = random_mask(n, density, True)
        rows, columns = entries(mask)
        nnz, code = len(rows), DTYPES.index(dtype)
        indptr, indices, slots, _ = lower(rows, columns, n)
        view = pattern.Entries(rows, columns)
        view.pair(n, indptr, indices, slots)
        A = numbers((1, n, n), dtype) * mask
        H = dominant((A + adjoint_of(A)) / 2)
        values = gather(H, rows, columns)
        negative = -values
        tolerance = 64 * float(np.finfo(dtype).eps)
        difference, largest = view.asymmetry(values.ctypes.data, nnz, code, True)
        assert difference <= tolerance * largest and abs(largest / abs(H).max() - 1) < 1e-5
        assert view.positive_hermitian(values.ctypes.data, nnz, code, tolerance)
        assert not view.positive_hermitian(negative.ctypes.data, nnz, code, tolerance)
        for width, mirror, one in itertools.product((1, 2, 5), (0, 1, 2), (False, True)):
            u, w, out = numbers((2, n, width), dtype), numbers((2, n, width), dtype), np.empty((2, nnz), dtype)
            view.outer(u.ctypes.data, w.ctypes.data, out.ctypes.data, 2, n, n, width, code, mirror, one)
            assert finite(out)
            if mirror == 0:
                assert np.allclose(
                    out, -np.einsum("bkr,bkr->bk", u[:, rows], w[:, columns].conj()), rtol=1e-4, atol=1e-4
                )
            v = numbers(2 * len(rows), dtype).reshape(2, -1)
            for adjoint, stride in itertools.product((False, True), (0, len(rows))):
                y = np.zeros((2, n, width), dtype)
                view.matvec(
                    v.ctypes.data, stride, w.ctypes.data, n, y.ctypes.data, n, 2, width, code, mirror, one, adjoint
                )
                assert finite(y)
                # <t, outer(u, w)> = -<matvec(t, w), u>, the rule that derivatives rely on
                if stride and not adjoint:
                    left = (out.conj() * v).sum().real
                    right = -(u.conj() * y).sum().real
                    assert abs(left - right) <= 1e-3 * (1 + abs(left))
    for count, dtype in itertools.product((0, 1, 7, 8, 9, 31), DTYPES):
        x = numbers(count, dtype)
        copy = pattern.ValuesCopy()
        copy.keep(x.ctypes.data, x.nbytes)
        assert finite(x) and copy.equals(x.ctypes.data, x.nbytes) and not copy.equals(x.ctypes.data, x.nbytes + 1)
        for k in range(count):
            y = x.copy()
            y[k] = np.nan
            assert not finite(y) and not copy.equals(y.ctypes.data, y.nbytes)
    for m, n in ((1, 1), (3, 7), (9, 2)):
        rows, columns = (rng.integers(0, k, 40).astype(np.int32) for k in (m, n))
        indptr, indices, slots = pattern.compress(rows, columns, m, n)
        assert indptr[-1] == len(indices) == len(set(zip(rows.tolist(), columns.tolist(), strict=True)))
        assert (indices[slots] == rows).all()


def test_refusals():
    """What is refused must not be touched."""
    eye = np.arange(4, dtype=np.int64), np.arange(3, dtype=np.int32)
    plan = multifrontal.Symbolic(multifrontal.Elimination(*eye, np.arange(3, dtype=np.int32)), "baseline")
    other = klu.Symbolic(*eye, "amd")
    short = np.arange(2, dtype=np.int32)
    assembly = pattern.Assembly(3, eye[1], eye[1], np.zeros(3, np.uint8), 1, None, None, 1.0, False)
    storages = multifrontal.Storage(plan, 1, 2), klu.Storage(other, 1, 2)
    x = np.ones((2, 3, 1))
    calls = [
        lambda: multifrontal.amd(eye[0], short),
        lambda: multifrontal.separate(np.array([0, 3, 2, 3]), eye[1]),
        lambda: multifrontal.camd(*eye, np.array([0, 1, 3], np.int32)),
        lambda: multifrontal.camd(*eye, short),
        lambda: multifrontal.Elimination(*eye, np.array([0, 1, 3], np.int32)),
        lambda: multifrontal.Elimination(*eye, short),
        lambda: klu.Symbolic(np.array([0, 3, 2, 3]), eye[1], "amd"),
        lambda: klu.Symbolic(eye[0], np.array([0, 1, 3], np.int32), "amd"),
        lambda: pattern.Entries(eye[1], short),
        lambda: pattern.Entries(eye[1], eye[1]).asymmetry(x.ctypes.data, 3, 1, False),
    ]
    for storage in storages:
        calls += [
            lambda s=storage: s.factorize(assembly, x.ctypes.data, 4, True),
            lambda s=storage: s.solve(x.ctypes.data, x.ctypes.data, 3, 1, 0, False),
            lambda s=storage: solve(s, x, [0, 2]),
            lambda s=storage: type(s)(s.symbolic, 4, 1),
            lambda s=storage: type(s)(s.symbolic, 1, 0),
        ]
    for call in calls:
        try:
            call()
        except ValueError:
            continue
        raise AssertionError("was not refused")


def test_threads():
    """One plan, one storage read by all, storages of their own."""
    mask = random_mask(60, 0.05, True)
    plan, assembly, rows, columns = positive_plan(mask, os.environ.get("SPCACHE_SIMD", "baseline"), "amd")
    A = dominant(-mask[None].astype(np.float64))
    values = gather(A, rows, columns)
    shared = multifrontal.Storage(plan, 1, 1)
    shared.factorize(assembly, values.ctypes.data, len(rows), True, None, 1)
    b = numbers((1, 60, 3), np.float64)
    failed = []

    def work():
        own = multifrontal.Storage(plan, 1, 1)
        for _ in range(10):
            own.factorize(assembly, values.ctypes.data, len(rows), True, None, 2)
            if not np.array_equal(solve(shared, b, threads=2), solve(own, b)):
                failed.append(1)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    check(A, solve(shared, b), b)


if __name__ == "__main__":
    assert "torch" not in sys.modules
    for test in (
        test_entries, test_refusals, test_positive, test_indefinite, test_unsymmetric, test_general, test_threads,
    ):  # fmt: skip
        test()
        print(f"{test.__name__}: passed", flush=True)
