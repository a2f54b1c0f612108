"""Libraries that analyze anew in every factorization."""

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import torch
from cases import Case
from torch import Tensor

from peers.base import Configuration, Peer, compressed


class SuperLU(Peer):
    """SciPy's SuperLU: every factorization analyzes anew."""

    name = "superlu"
    packages: ClassVar[list[str]] = ["scipy"]
    modules: ClassVar[list[str]] = ["scipy.sparse.linalg"]
    heavy = False
    kinds: ClassVar[set[str]] = {"spd", "symmetric", "general"}
    analyzes = False

    def configurations(self) -> Iterator[Configuration]:
        for ordering in ("MMD_AT_PLUS_A", "COLAMD"):
            yield {"ordering": ordering}

    def __init__(self, case: Case) -> None:
        from scipy.sparse import csc_matrix
        from scipy.sparse.linalg import splu

        super().__init__(case)
        rows, cols = case.indices
        indptr, indices, self.positions = compressed(cols, rows, case.n)
        self.A = csc_matrix((np.ones(len(indices)), indices, indptr), shape=(case.n, case.n))
        self.splu = splu

    def analyze(self, configuration: Configuration) -> None:
        self.options: dict[str, Any] = {"permc_spec": configuration["ordering"]}
        if self.case.kind == "spd" and configuration["ordering"] == "MMD_AT_PLUS_A":
            self.options |= {"diag_pivot_thresh": 0.0, "options": {"SymmetricMode": True}}

    def refactorize(self, values: Tensor) -> None:
        np.take(values.numpy(), self.positions, out=self.A.data, mode="clip")
        self.F = self.splu(self.A, **self.options)

    def solve(self, b: Tensor, adjoint: bool = False) -> Tensor:
        return torch.from_numpy(self.F.solve(b.numpy(), "T" if adjoint else "N"))


class Cholespy(Peer):
    """The approach spcache succeeds: a new cholespy solver in each step."""

    name = "cholespy"
    packages: ClassVar[list[str]] = ["cholespy"]
    modules: ClassVar[list[str]] = ["cholespy"]
    heavy = False
    columns = False
    analyzes = False

    def __init__(self, case: Case) -> None:
        import cholespy

        super().__init__(case)
        self.cholespy = cholespy
        self.i, self.j = (torch.from_numpy(side.astype(np.int32)) for side in case.indices)

    def refactorize(self, values: Tensor) -> None:
        coo = self.cholespy.MatrixType.COO
        self.F = self.cholespy.CholeskySolverD(self.case.n, self.i, self.j, values, coo)

    def solve(self, b: Tensor, adjoint: bool = False) -> Tensor:
        x = torch.empty_like(b)
        self.F.solve(b.contiguous(), x)
        return x


class TorchSla(Peer):
    """torch-sla's `spsolve`, which gives no factor: SuperLU in each step, and a derivative of its own."""

    name = "torch-sla"
    packages: ClassVar[list[str]] = ["torch-sla"]
    modules: ClassVar[list[str]] = ["torch_sla"]
    kinds: ClassVar[set[str]] = {"spd", "symmetric", "general"}
    analyzes = False
    factors = False
    heavy = False

    def __init__(self, case: Case) -> None:
        from torch_sla import spsolve

        super().__init__(case)
        self.spsolve = spsolve

    def apply(self, values: Tensor, b: Tensor) -> Tensor:
        shape = (self.case.n, self.case.n)
        return self.spsolve(values, self.rows, self.cols, shape, b, backend="scipy", method="lu")
