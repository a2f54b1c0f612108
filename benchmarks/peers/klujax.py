"""klujax: KLU, called from compiled JAX."""

from typing import Any, ClassVar

import numpy as np
import torch
from cases import Case
from torch import Tensor

from peers.base import Configuration, Peer


class Klujax(Peer):
    """klujax at its best: analysis once, one numeric object that is refactorized in place, calls compiled by JAX.

    What is compiled must depend on its inputs: XLA drops a `refactor` whose result nobody uses, and moves a solve with
    the same object before it. Called plainly, `refactor` often returns before it is done, and cannot be waited for. So
    the refactorization is timed together with one solve, and the adjoint solve of a step is a call of its own.
    """

    name = "klujax"
    packages: ClassVar[list[str]] = ["klujax", "jax"]
    modules: ClassVar[list[str]] = ["jax", "klujax"]
    kinds: ClassVar[set[str]] = {"spd", "symmetric", "general"}  # pivots whatever the kind
    batches = True
    columns = False
    environment: ClassVar[dict[str, str]] = {
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_X64": "1",
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

    def analyze(self, configuration: Configuration) -> None:
        self.symbolic = self.klu.analyze(self.i, self.j, self.case.n)
        self.numeric = None
        self.b = torch.from_numpy(self.case.b)

    def refactorize(self, values: Tensor) -> None:
        if self.numeric is None:
            array = self.jax.numpy.asarray(values.numpy())
            self.numeric = self.klu.factor(self.i, self.j, array, self.symbolic)
            self.compile(self.numeric, self.symbolic)
        self.refactorize_and_solve(values, self.b)

    def compile(self, numeric: Any, symbolic: Any) -> None:
        klu, jit, i, j = self.klu, self.jax.jit, self.i, self.j
        self.solve_ = jit(lambda b: klu.solve_with_numeric(numeric, b, symbolic))
        self.solve_adjoint_ = jit(lambda b: klu.tsolve_with_numeric(numeric, b, symbolic))
        self.refactor_and_solve_ = jit(lambda values, b: klu.refactor_and_solve(i, j, values, b, numeric, symbolic)[0])

    def solve(self, b: Tensor, adjoint: bool = False) -> Tensor:
        solve = self.solve_adjoint_ if adjoint else self.solve_
        return torch.from_numpy(np.array(solve(b.numpy())))

    def refactorize_and_solve(self, values: Tensor, b: Tensor) -> Tensor:
        if self.numeric is None:
            self.refactorize(values)
        return torch.from_numpy(np.array(self.refactor_and_solve_(values.numpy(), b.numpy())))
