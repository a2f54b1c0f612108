"""spcache itself, through its public interface only."""

from dataclasses import asdict
from typing import Any, ClassVar

import torch
from cases import Case
from torch import Tensor

from peers.base import Configuration, Peer


class Spcache(Peer):
    name = "spcache"
    packages: ClassVar[list[str]] = ["spcache"]
    kinds: ClassVar[set[str]] = {"spd", "general"}
    torch_threads: ClassVar[int] = 0  # torch's default, as a user meets it

    def __init__(self, case: Case) -> None:
        import spcache

        super().__init__(case)
        self.spcache = spcache
        self.indices = torch.from_numpy(case.indices)

    def analyze(self, configuration: Configuration) -> None:
        self.spcache.plan_cache.clear()
        self.system = self.spcache.SparseSystem(self.indices, self.case.n, kind=self.case.kind)

    def refactorize(self, values: Tensor) -> None:
        self.factor = self.system.factorize(values)

    def solve(self, b: Tensor, adjoint: bool = False) -> Tensor:
        return self.factor.solve(b, adjoint=adjoint)

    def apply(self, values: Tensor, b: Tensor) -> Tensor:
        return self.system.solve(values, b)

    def late_analysis(self) -> float:
        return self.system.stats.seconds["analyze"]

    def facts(self) -> dict[str, Any]:
        return asdict(self.system.stats)
