"""MKL PARDISO."""

import ctypes
from collections.abc import Iterator
from functools import cache
from typing import Any, ClassVar

import numpy as np
import torch
from cases import LARGE, Case
from torch import Tensor

from peers.base import THREADS, Configuration, Peer, compressed

MINIMUM_DEGREE, METIS, PARALLEL_METIS = 0, 2, 3
TYPES = {"spd": 2, "symmetric": -2, "general": 11}
SMALL = 20_000  # unknowns, beyond which minimum degree does not win


@cache
def library() -> ctypes.CDLL:
    """Returns MKL as pypardiso finds it, which takes a quarter of a second."""
    from pypardiso import PyPardisoSolver

    return PyPardisoSolver().libmkl


class Pardiso(Peer):
    """MKL PARDISO, loaded by pypardiso and called through ctypes: pypardiso converts all arguments in every call."""

    name = "pardiso"
    packages: ClassVar[list[str]] = ["pypardiso", "mkl"]
    modules: ClassVar[list[str]] = ["pypardiso", "threadpoolctl"]
    kinds: ClassVar[set[str]] = {"spd", "symmetric", "general"}

    def configurations(self) -> Iterator[Configuration]:
        for configuration in self.schedules():
            yield configuration
            if self.case.kind == "symmetric" and configuration["levels"] == 1:  # two levels forbid it
                yield configuration | {"matching": True}

    def schedules(self) -> Iterator[Configuration]:
        for threads in THREADS[-1:] if self.case.name in LARGE else THREADS:
            for ordering in (METIS, PARALLEL_METIS) if threads > 1 else (METIS,):
                yield {"ordering": ordering, "levels": 2, "threads": threads}
                yield {"ordering": ordering, "levels": 1, "threads": threads}
            if self.case.n <= SMALL:  # with two levels the ordering is METIS's, whatever is asked for
                yield {"ordering": MINIMUM_DEGREE, "levels": 1, "threads": threads}

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        rows, cols = case.indices
        upper = cols >= rows if case.kind != "general" else None
        missing = np.arange(0)
        if case.kind == "symmetric":  # the whole diagonal must be there
            missing = np.setdiff1d(np.arange(case.n), rows[rows == cols])
            rows, cols = np.concatenate([rows, missing]), np.concatenate([cols, missing])
            upper = cols >= rows
        self.indptr, self.columns, self.positions = compressed(rows, cols, case.n, upper)
        self.zeros = np.flatnonzero(self.positions >= case.indices.shape[1])
        self.indptr += 1
        self.columns += 1
        self.data = np.ones(len(self.columns))
        self.handle, self.iparm = np.zeros(64, np.int64), np.zeros(64, np.int32)
        self.pardiso = library()["pardiso"]
        self.status = ctypes.c_int32(0)
        one, zero, mtype, n = map(ctypes.c_int32, (1, 0, TYPES[case.kind], case.n))
        matrix = (self.data, self.indptr, self.columns)
        addresses = (ctypes.c_void_p(array.ctypes.data) for array in (self.handle, *matrix, self.iparm))
        pt, a, ia, ja, iparm = addresses
        ref = ctypes.byref
        self.before = (pt, ref(one), ref(one), ref(mtype))  # the arguments before and after the phase
        self.width = ctypes.c_int32(1)  # right-hand sides
        self.after = (ref(n), a, ia, ja, None, ref(self.width), iparm, ref(zero))
        self.phases = {phase: ref(ctypes.c_int32(phase)) for phase in (-1, 11, 22, 33)}

    def __del__(self) -> None:
        if hasattr(self, "phases"):
            self.call(-1)

    def call(self, phase: int, b: int | None = None, x: int | None = None) -> None:
        vectors = ctypes.c_void_p(b), ctypes.c_void_p(x)
        self.pardiso(*self.before, self.phases[phase], *self.after, *vectors, ctypes.byref(self.status))
        if self.status.value:
            raise RuntimeError(f"PARDISO, phase {phase}: error {self.status.value}")

    def analyze(self, configuration: Configuration) -> None:
        self.call(-1)
        self.iparm[:] = 0
        self.iparm[0] = 1  # no defaults
        self.iparm[1] = configuration["ordering"]
        # pivots below 1e-13 are replaced; neither scaling nor matching: two levels forbid them, and they cost accuracy
        self.iparm[9] = 13 if self.case.kind == "general" else 8
        self.iparm[20] = self.case.kind == "symmetric"  # pivots of order 2, and refinement where some were replaced
        if configuration.get("matching"):  # of the first values
            self.iparm[10] = self.iparm[12] = 1
            self.fill(torch.from_numpy(self.case.values(0)))
        self.iparm[17] = -1  # report nnz(L)
        self.iparm[18] = configuration.get("flops", 0)
        self.iparm[23] = configuration["levels"] - 1  # of the schedule; 10 crashes in MKL 2026.2
        self.call(11)

    def refactorize(self, values: Tensor) -> None:
        self.fill(values)
        self.call(22)

    def fill(self, values: Tensor) -> None:
        np.take(values.numpy(), self.positions, out=self.data, mode="clip")
        if len(self.zeros):
            self.data[self.zeros] = 0

    def solve(self, b: Tensor, adjoint: bool = False) -> Tensor:
        x = torch.empty_like(b)  # column by column, as b
        self.width.value = 1 if b.ndim == 1 else b.shape[1]
        self.iparm[11] = 2 if adjoint and self.case.kind == "general" else 0
        self.call(33, b.data_ptr(), x.data_ptr())
        return x

    def facts(self, configuration: Configuration) -> dict[str, Any]:
        if configuration["levels"] == 2:  # nobody counts
            return {}
        self.analyze(configuration | {"flops": -1})
        if not self.iparm[18]:  # it counts millions
            return {}
        return {"nnz": float(self.iparm[17]), "flops": 1e6 * float(self.iparm[18])}
