"""Every engine of the table against every sentence of `spcache/engines/protocol.py`."""

import gc
import math
import threading
import time

import numpy as np
import pytest
import torch
from cases import CASES, DTYPES, find_case, make
from protocol_driver import Driver

from spcache import EngineUnavailableError
from spcache.engines import _TABLE, DTYPE_CODES, KINDS, engine_for
from spcache.engines.protocol import Failure, Storage, Structure, SymbolicFactor

ROWS = [c for c in CASES if (("cpu", c.kind) in _TABLE)]  # "auto" is none of an engine's business
every_row = pytest.mark.parametrize("case", ROWS, ids=str)
every_kind = pytest.mark.parametrize("case", [find_case(kind) for device, kind in _TABLE if device == "cpu"], ids=str)


def test_the_table_is_covered():
    assert {c.kind for c in ROWS} == set(KINDS) - {"auto"}
    assert set(_TABLE) == {(device, c.kind) for c in ROWS for device in ("cpu", "cuda")}
    assert {c.dtype for c in ROWS} == set(DTYPE_CODES) == set(DTYPES)
    assert all(engine_for("cpu", c.kind).__name__.endswith(c.engine) for c in ROWS)
    with pytest.raises(EngineUnavailableError, match="no engine solves kind='spd' on device 'mps'"):
        engine_for("mps", "spd")


@every_row
def test_plan_and_storage(case):
    driver = Driver(make(case, 12, (3,)))
    plan, storage = driver.plan, driver.storage()
    assert isinstance(plan, SymbolicFactor) and isinstance(storage, Storage)
    assert plan.engine == case.engine and plan.ordering in driver.engine.ORDERINGS and plan.ordering != "auto"
    assert plan.nnz >= 12 and (plan.flops > 0 or math.isnan(plan.flops)) and plan.nbytes > 0
    assert storage.batch == 3 and storage.nbytes >= 0
    assert np.isnan(driver.solve(storage, driver.rhs(3, 12, 1))).all()  # nothing is factorized yet
    driver.factorize(storage=storage)
    assert storage.nbytes >= 3 * 12 * driver.values.itemsize and 12 <= storage.nnz <= 144 + 12
    assert storage.failures() is None and storage.repivots == 0
    assert len({id(driver.storage()) for _ in range(3)}) >= 1 and driver.storage() is not storage
    before = driver.plan.nbytes
    plan.trim()
    assert plan.nbytes <= before
    assert driver.residual(driver.solve(storage, driver.rhs(3, 12, 2)), driver.rhs(3, 12, 2)) <= case.c


@every_kind
def test_orderings(case):
    engine = engine_for("cpu", case.kind)
    assert engine.ORDERINGS[0] == "auto"
    problem = make(case, 60, (1,), density=0.03)
    for ordering in engine.ORDERINGS:
        driver = Driver(problem, ordering)
        assert driver.plan.ordering == ordering or ordering == "auto"
        b = driver.rhs(1, 60, 2)
        assert driver.residual(driver.solve(driver.factorize(), b), b) <= case.c
        permutation = driver.plan.permutation
        if permutation is not None:  # `analyze` takes it back
            assert permutation.dtype == np.int32 and sorted(permutation) == list(range(60))
            again = engine.analyze(driver.contributions.structure, driver.plan.ordering, permutation)
            assert (again.nnz, again.flops, again.ordering) == (
                driver.plan.nnz,
                driver.plan.flops,
                driver.plan.ordering,
            )


@every_row
@pytest.mark.parametrize("adjoint", [False, True])
@pytest.mark.parametrize("n", [1, 2, 30])
def test_solutions(case, adjoint, n):
    driver = Driver(make(case, n, (3,)))
    storage = driver.factorize()
    for width in (1, 2, 3, 4, 5, 8, 9, 17):
        b = driver.rhs(3, n, width)
        kept = b.copy()
        x = driver.solve(storage, b, adjoint=adjoint)
        assert driver.residual(x, b, adjoint=adjoint) <= case.c and np.array_equal(b, kept)


@every_row
def test_which_factor(case):
    """factors names them; without, p-th for p-th, or the only one for all."""
    driver = Driver(make(case, 9, (3,)))
    storage, select = driver.factorize(), [2, 2, 0, 1, 2, 0, 0]
    for width in (1, 3):
        b = driver.rhs(7, 9, width)
        assert driver.residual(driver.solve(storage, b, select), b, select) <= case.c
        only = driver.factorize(driver.values[1])
        assert driver.residual(driver.solve(only, b), b, [1] * 7) <= case.c
        assert driver.solve(only, b[:0]).shape == (0, 9, width)
    with pytest.raises(ValueError, match="count (must be )?the batch"):
        driver.solve(storage, driver.rhs(2, 9, 1))
    for beyond in (-1, 3, 2**40):
        with pytest.raises(ValueError, match="beyond the batch"):
            driver.solve(storage, driver.rhs(2, 9, 1), [0, beyond])


@every_kind
def test_sizes_are_checked_again(case):
    driver = Driver(make(case, 9, (2,)))
    storage = driver.storage()
    for nnz in (driver.nnz - 1, driver.nnz + 1, 0):
        with pytest.raises(ValueError, match="another length"):
            storage.factorize(driver.assembly, driver.values.ctypes.data, nnz, True, None)
    for dtype, batch in ((4, 1), (-1, 1), (1, 0), (1, -1)):
        with pytest.raises(ValueError, match="unknown scalar type, or empty batch"):
            driver.plan.storage(dtype, batch)
    wrong = driver.contributions.structure
    with pytest.raises(ValueError):
        driver.engine.analyze(
            Structure(wrong.n + 1, np.append(wrong.indptr, 10**6), wrong.indices, wrong.triangle), "auto"
        )


@every_row
def test_factorize_overwrites(case):
    driver = Driver(make(case, 20, (5,)))
    storage, b = driver.storage(1), driver.rhs(1, 20, 2)
    for e in (0, 1, 1, 4, 0):
        driver.factorize(driver.values[e], storage)
        assert storage.failures() is None
        assert driver.residual(driver.solve(storage, b), b, [e]) <= case.c
    if case.engine == "multifrontal":
        assert storage.refactorized  # its pivots are static


@every_kind
def test_template(case):
    """A storage without pivots may copy those of another one, which is only read."""
    problem = make(case, 20, (1,))
    driver = Driver(problem)
    first, b = driver.factorize(), driver.rhs(1, 20, 2)
    before = driver.solve(first, b)
    second = driver.storage(1)
    driver.factorize(driver.values * 1.5, second, template=first)
    assert second.refactorized and second.repivots == 0
    assert driver.residual(driver.solve(second, b) * 1.5, b) <= case.c + 2
    del second
    gc.collect()
    assert np.array_equal(driver.solve(first, b), before)
    batch = driver.factorize(np.repeat(driver.values, 3, 0), template=first)
    assert batch.refactorized and np.allclose(driver.solve(batch, np.repeat(b, 3, 0)), before)


@every_row
@pytest.mark.parametrize("check", [True, False])
def test_failures(case, check):
    """One entry per matrix; the others have their factors; NaN where there is none; the storage stays usable."""
    driver = Driver(make(case, 10, (4,)))
    values = driver.values.copy()
    rows, columns = driver.problem.indices.numpy()
    gone = (columns == 6) | ((rows == 6) & driver.problem.case.symmetric_pattern)
    values[1][gone] = values[3][gone] = 0
    storage = driver.factorize(values, check=check)
    failures = storage.failures()
    reason = "not positive definite" if case.kind == "spd" else "singular"
    assert failures == [None, Failure(6, reason), None, Failure(6, reason)]
    b = driver.rhs(4, 10, 3)
    x = driver.solve(storage, b)
    assert np.isnan(x[[1, 3]]).all() and driver.residual(x[[0, 2]], b[[0, 2]], [0, 2]) <= case.c
    x = driver.solve(storage, b, [1, 0, 3, 0])
    assert np.isnan(x[[0, 2]]).all() and driver.residual(x[[1, 3]], b[[1, 3]], [0, 0]) <= case.c
    driver.factorize(storage=storage, check=check)
    assert storage.failures() is None and driver.residual(driver.solve(storage, b), b) <= case.c


@every_kind
def test_values_that_are_not_finite(case):
    """Even unchecked nothing crashes or hangs, and the storage stays usable."""
    driver = Driver(make(case, 10, (1,)))
    storage, b = driver.storage(), driver.rhs(1, 10, 2)
    for bad in (np.nan, np.inf, -np.inf):
        for k in range(driver.nnz):
            values = driver.values.copy()
            values[0, k] = bad
            driver.solve(driver.factorize(values, storage, check=False), b)
    driver.factorize(storage=storage)
    assert storage.failures() is None and driver.residual(driver.solve(storage, b), b) <= case.c


@every_kind
def test_assembly_outlives_the_call_only(case):
    """A plan serves any number of assemblies and lets them die."""
    driver = Driver(make(case, 10, (2,)))
    storage, b = driver.factorize(), driver.rhs(2, 10, 1)
    x = driver.solve(storage, b)
    driver.assembly = driver.assemble()
    gc.collect()
    assert np.array_equal(driver.solve(storage, b), x)
    assert np.array_equal(driver.solve(driver.factorize(), b), x)
    storage_alone = driver.factorize()
    n, dtype = driver.n, driver.values.dtype
    del driver
    gc.collect()  # a storage keeps its plan alive
    y = np.empty((2, n, 1), dtype)
    storage_alone.solve(b.ctypes.data, y.ctypes.data, 2, 1, 0, False)
    assert np.array_equal(x, y)


@every_kind
def test_threads_share_a_plan_and_a_storage(case):
    driver = Driver(make(case, 60, (2,), density=0.05))
    shared, b = driver.factorize(), driver.rhs(2, 60, 5)
    expected = [driver.solve(shared, b, adjoint=adjoint) for adjoint in (False, True)]
    wrong = []

    def work(seed):
        own = driver.storage(1)
        for k in range(40):
            adjoint = bool((k + seed) % 2)
            if not np.array_equal(driver.solve(shared, b, adjoint=adjoint), expected[adjoint]):
                wrong.append("solve")
            driver.factorize(driver.values[k % 2], own, template=shared if k % 3 else None)
            if driver.residual(driver.solve(own, b[:1]), b[:1], [k % 2]) > case.c:
                wrong.append("factorize")

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@every_kind
def test_native_calls_release_the_gil(case):
    """Another thread gets on while one matrix is factorized and solved with."""
    n = 500
    problem = make(case, n, (1,), density=1.0)
    driver = Driver(problem)
    storage, b = driver.factorize(), driver.rhs(1, n, 64)
    for call in (lambda: driver.factorize(storage=storage), lambda: driver.solve(storage, b)):
        beats, stop = [], threading.Event()

        def beat(beats=beats, stop=stop):
            while not stop.is_set():
                beats.append(time.perf_counter())
                time.sleep(0)

        thread = threading.Thread(target=beat)
        thread.start()
        try:
            inside = 0
            for _ in range(30):
                while not beats:
                    time.sleep(0)
                start = time.perf_counter()
                call()
                end = time.perf_counter()
                width = end - start
                inside = max(inside, sum(start + 0.1 * width < t < end - 0.1 * width for t in list(beats)))
                if inside > 2:
                    break
                beats.clear()
        finally:
            stop.set()
            thread.join()
        assert inside > 2


# --- structures -----------------------------------------------------------------------------------------------------------


def test_structures_are_compared_exactly():
    def structure(n=3, indptr=(0, 1, 2, 3), indices=(0, 1, 2), triangle=False):
        return Structure(n, np.array(indptr, np.int64), np.array(indices, np.int32), triangle)

    same = structure()
    assert same == structure() and hash(same) == hash(structure())
    different = [structure(n=4), structure(indptr=(0, 2, 2, 3)), structure(indices=(0, 2, 2)), structure(triangle=True)]
    for other in different:
        assert same != other
    assert same != "structure" and len({same, structure(), *different}) == 5


@every_kind
def test_the_engine_gets_a_canonical_structure(case):
    structure = Driver(make(case, 20, (1,))).contributions.structure
    assert structure.indptr.dtype == np.int64 and structure.indices.dtype == np.int32
    assert structure.indptr[0] == 0 and structure.indptr[-1] == len(structure.indices)
    for j in range(20):
        rows = structure.indices[structure.indptr[j] : structure.indptr[j + 1]]
        assert (np.diff(rows) > 0).all() and (not structure.triangle or (rows >= j).all())
    assert structure.triangle == (case.kind != "general")


def test_scalar_types_travel_as_codes():
    assert {torch.float32: 0, torch.float64: 1, torch.complex64: 2, torch.complex128: 3} == DTYPE_CODES
