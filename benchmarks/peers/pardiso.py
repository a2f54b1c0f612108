"""MKL PARDISO."""

import ctypes
from collections.abc import Iterator
from itertools import product
from typing import ClassVar

import numpy as np
import torch
from cases import Case
from torch import Tensor

from peers.base import Configuration, Peer, compressed


class Pardiso(Peer):
    """MKL PARDISO, loaded by pypardiso and called through ctypes with arguments made once."""

    name = "pardiso"
    packages: ClassVar[list[str]] = ["pypardiso", "mkl"]
    kinds: ClassVar[set[str]] = {"spd", "general"}

    def configurations(self) -> Iterator[Configuration]:
        for ordering, threads in product((0, 2, 3), (1, 2)):  # minimum degree, METIS, parallel METIS
            yield {"ordering": ordering, "threads": threads}

    def __init__(self, case: Case) -> None:
        from pypardiso import PyPardisoSolver

        super().__init__(case)
        rows, cols = case.indices
        upper = cols >= rows if case.kind == "spd" else None
        self.indptr, self.columns, self.positions = compressed(rows, cols, case.n, upper)
        self.indptr += 1
        self.columns += 1
        self.data = np.ones(len(self.columns))
        self.solver = PyPardisoSolver(mtype=2 if case.kind == "spd" else 11)
        self.iparm = self.solver.iparm
        self.pardiso = self.solver.libmkl["pardiso"]  # pypardiso converts its arguments anew in every call
        self.status = ctypes.c_int32(0)
        one, zero, mtype, n = map(ctypes.c_int32, (1, 0, self.solver.mtype, case.n))
        matrix = (self.data, self.indptr, self.columns)
        addresses = (ctypes.c_void_p(array.ctypes.data) for array in (self.solver.pt, *matrix, self.iparm))
        pt, a, ia, ja, iparm = addresses
        ref = ctypes.byref
        self.before = (pt, ref(one), ref(one), ref(mtype))  # the arguments before and after the phase
        self.after = (ref(n), a, ia, ja, None, ref(one), iparm, ref(zero))
        self.phases = {phase: ref(ctypes.c_int32(phase)) for phase in (-1, 11, 22, 33)}

    def __del__(self) -> None:
        if hasattr(self, "status"):
            self.call(-1)

    def call(self, phase: int, b: int | None = None, x: int | None = None) -> None:
        vectors = ctypes.c_void_p(b), ctypes.c_void_p(x)
        self.pardiso(*self.before, self.phases[phase], *self.after, *vectors, ctypes.byref(self.status))
        if self.status.value:
            raise RuntimeError(f"PARDISO, phase {phase}: error {self.status.value}")

    def analyze(self, configuration: Configuration) -> None:
        general = self.case.kind == "general"
        self.call(-1)
        self.iparm[:] = 0
        self.iparm[0] = 1  # no defaults
        self.iparm[1] = configuration["ordering"]
        self.iparm[[9, 10, 12]] = (13, 1, 1) if general else (8, 0, 0)  # pivots 1e-13; scaling and matching
        self.iparm[17] = -1  # report nnz(L)
        self.iparm[18] = configuration.get("flops", 0)
        self.call(11)

    def refactorize(self, values: Tensor) -> None:
        np.take(values.numpy(), self.positions, out=self.data, mode="clip")
        self.call(22)

    def solve(self, b: Tensor, adjoint: bool = False) -> Tensor:
        x = torch.empty_like(b)
        self.iparm[11] = 2 if adjoint and self.case.kind == "general" else 0
        self.call(33, b.data_ptr(), x.data_ptr())
        return x

    def facts(self) -> dict[str, float]:
        self.analyze({"ordering": 2, "flops": -1})
        return {"nnz(L) metis": float(self.iparm[17]), "flops metis": 1e6 * float(self.iparm[18])}
