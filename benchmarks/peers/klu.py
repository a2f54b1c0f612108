"""KLU itself, the library that distributions ship."""

import ctypes
from ctypes.util import find_library
from functools import cache
from typing import ClassVar

import torch
from cases import Case
from torch import Tensor

from peers.base import Configuration, Peer, compressed

COMMON = 1024  # bytes, more than klu_common has


@cache
def library() -> ctypes.CDLL:
    klu = ctypes.CDLL(find_library("klu"))
    for function in (klu.klu_analyze, klu.klu_factor):
        function.restype = ctypes.c_void_p
    return klu


class Klu(Peer):
    """KLU through ctypes: its refactorization with the pivots of the first values, which it does not question."""

    name = "klu"
    packages: ClassVar[list[str]] = []
    modules: ClassVar[list[str]] = []
    kinds: ClassVar[set[str]] = {"general"}

    @classmethod
    def load(cls) -> None:
        if find_library("klu") is None:
            raise ImportError("no libklu")

    def __init__(self, case: Case) -> None:
        super().__init__(case)
        rows, cols = case.indices
        self.indptr, self.indices, positions = compressed(cols, rows, case.n)
        self.positions = torch.from_numpy(positions)
        self.data = torch.empty(len(positions), dtype=torch.float64)
        self.common = ctypes.create_string_buffer(COMMON)
        self.klu = library()
        self.pattern = tuple(ctypes.c_void_p(a.ctypes.data) for a in (self.indptr, self.indices))
        self.numbers = ctypes.c_void_p(self.data.data_ptr())
        self.symbolic = self.numeric = ctypes.c_void_p()

    def __del__(self) -> None:
        self.free()

    def free(self) -> None:
        if self.numeric:
            self.klu.klu_free_numeric(ctypes.byref(self.numeric), self.common)
        if self.symbolic:
            self.klu.klu_free_symbolic(ctypes.byref(self.symbolic), self.common)

    def analyze(self, configuration: Configuration) -> None:
        self.free()
        self.klu.klu_defaults(self.common)
        self.symbolic = ctypes.c_void_p(self.klu.klu_analyze(self.case.n, *self.pattern, self.common))
        assert self.symbolic

    def refactorize(self, values: Tensor) -> None:
        torch.index_select(values, 0, self.positions, out=self.data)
        if self.numeric:
            done = self.klu.klu_refactor(*self.pattern, self.numbers, self.symbolic, self.numeric, self.common)
        else:
            factor = self.klu.klu_factor(*self.pattern, self.numbers, self.symbolic, self.common)
            self.numeric = done = ctypes.c_void_p(factor)
        assert done

    def solve(self, b: Tensor, adjoint: bool = False) -> Tensor:
        x = b.clone()  # column by column, as b
        width = 1 if b.ndim == 1 else b.shape[1]
        solve = self.klu.klu_tsolve if adjoint else self.klu.klu_solve
        assert solve(self.symbolic, self.numeric, self.case.n, width, ctypes.c_void_p(x.data_ptr()), self.common)
        return x
