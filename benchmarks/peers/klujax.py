"""klujax: KLU, called from compiled JAX."""

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import torch
from cases import Case
from torch import Tensor

from peers.base import Configuration, Peer


class Klujax(Peer):
    """klujax at its best: analysis once, one numeric object that is refactorized in place, calls compiled by JAX.

    What is compiled must depend on its inputs: XLA drops a `refactor` whose result nobody uses, and moves a solve
    with the same object before it. So `refactor` is called plainly, and in a step `refactor_and_solve` is one compiled
    call and the adjoint solve the next.
    """

    name = "klujax"
    packages: ClassVar[list[str]] = ["klujax", "jax"]
    modules: ClassVar[list[str]] = ["jax", "klujax"]
    kinds: ClassVar[set[str]] = {"spd", "general"}  # pivots whatever the kind
    batches = True
    columns = False
    environment: ClassVar[dict[str, str]] = {
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_X64": "1",
        "JAX_CPU_ENABLE_ASYNC_DISPATCH": "0",  # else `refactor` returns before it is done, and cannot be waited for
        "TF_CPP_MIN_LOG_LEVEL": "3",  # XLA complains of how long it compiles
    }
    largest: ClassVar[int] = 2000  # unknowns of a definite system, beyond which LU cannot win

    @classmethod
    def takes(cls, case: Case) -> bool:
        return super().takes(case) and (case.kind == "general" or case.n <= cls.largest)

    def __init__(self, case: Case) -> None:
        import jax
        import klujax

        super().__init__(case)
        self.jax, self.klu = jax, klujax
        self.i, self.j = (jax.numpy.asarray(side.astype(np.int32)) for side in case.indices)

    def configurations(self) -> Iterator[Configuration]:
        yield {"step": "compiled"}
        yield {"step": "plain"}

    def analyze(self, configuration: Configuration) -> None:
        self.compiled = configuration["step"] == "compiled"
        self.symbolic = self.klu.analyze(self.i, self.j, self.case.n)
        self.numeric = None

    def refactorize(self, values: Tensor) -> None:
        values = self.jax.numpy.asarray(values.numpy())
        if self.numeric is None:
            self.numeric = self.klu.factor(self.i, self.j, values, self.symbolic)
            self.compile(self.numeric, self.symbolic)
        else:
            self.klu.refactor(self.i, self.j, values, self.numeric, self.symbolic)

    def compile(self, numeric: Any, symbolic: Any) -> None:
        klu, jit, i, j = self.klu, self.jax.jit, self.i, self.j
        self.solve_ = jit(lambda b: klu.solve_with_numeric(numeric, b, symbolic))
        self.solve_adjoint_ = jit(lambda b: klu.tsolve_with_numeric(numeric, b, symbolic))
        self.refactor_and_solve_ = jit(lambda values, b: klu.refactor_and_solve(i, j, values, b, numeric, symbolic)[0])

    def solve(self, b: Tensor, adjoint: bool = False) -> Tensor:
        solve = self.solve_adjoint_ if adjoint else self.solve_
        return torch.from_numpy(np.array(solve(b.numpy())))

    def refactorize_and_solve(self, values: Tensor, b: Tensor) -> Tensor:
        if not self.compiled or self.numeric is None:
            return super().refactorize_and_solve(values, b)
        return torch.from_numpy(np.array(self.refactor_and_solve_(values.numpy(), b.numpy())))
