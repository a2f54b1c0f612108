"""spcache itself, through its public interface only."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from cases import Case
from torch import Tensor

from peers.base import THREADS, Configuration, Peer


class Spcache(Peer):
    """spcache, on as many threads as torch. Its number is that of its first configuration, all cores."""

    name = "spcache"
    packages: ClassVar[list[str]] = ["spcache"]
    modules: ClassVar[list[str]] = ["spcache"]
    kinds: ClassVar[set[str]] = {"spd", "symmetric", "general"}
    batches = True
    columns = False
    torch_threads: ClassVar[int] = 0  # as the configuration says
    matrix_kind: ClassVar[str] = ""  # that the system is told, where it is not the case's own

    def __init__(self, case: Case) -> None:
        import spcache

        super().__init__(case)
        self.spcache = spcache
        self.indices = torch.from_numpy(case.indices)

    def configurations(self) -> Iterator[Configuration]:
        for threads in reversed(THREADS):
            yield {"threads": threads}

    def analyze(self, configuration: Configuration) -> None:
        torch.set_num_threads(configuration["threads"])
        self.spcache.plan_cache.clear()
        self.system = self.spcache.SparseSystem(self.indices, self.case.n, kind=self.matrix_kind or self.case.kind)

    def refactorize(self, values: Tensor) -> None:
        self.factor = self.system.factorize(values)

    def solve(self, b: Tensor, adjoint: bool = False) -> Tensor:
        return self.factor.solve(b, adjoint=adjoint)

    def apply(self, values: Tensor, b: Tensor) -> Tensor:
        return self.system.solve(values, b)

    def late_analysis(self) -> float:
        return self.system.stats.seconds["analyze"]

    def facts(self, configuration: Configuration) -> dict[str, Any]:
        stats = asdict(self.system.stats)
        return {"nnz": float(stats["nnz_factor"]), "flops": stats["flops"], "stats": stats}


class SpcacheSingle(Spcache):
    """The same in single precision, where double takes long enough to be worth it; no contestant."""

    name = "spcache-float32"
    kinds: ClassVar[set[str]] = {"spd"}  # LU computes in double
    dtype: ClassVar[torch.dtype] = torch.float32
    least: ClassVar[int] = 8000  # unknowns

    @classmethod
    def takes(cls, case: Case) -> bool:
        return super().takes(case) and case.n >= cls.least


class SpcacheGeneral(Spcache):
    """Our own LU of symmetric matrices: a contestant."""

    name = "spcache-general"
    kinds: ClassVar[set[str]] = {"symmetric"}
    heavy = False
    matrix_kind = "general"
