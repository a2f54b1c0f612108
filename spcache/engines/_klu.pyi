from collections.abc import Sequence

import numpy as np

from .._pattern import Assembly

ORDERINGS: tuple[str, ...]
LIBRARIES: dict[str, str]

def suitesparse() -> str: ...

class Symbolic:
    ordering: str
    def __init__(
        self,
        indptr: np.ndarray,
        indices: np.ndarray,
        ordering: str,
        wide: bool = False,
        permutation: np.ndarray | None = None,
    ) -> None: ...
    @property
    def n(self) -> int: ...
    @property
    def structural_rank(self) -> int: ...
    @property
    def nnz(self) -> int: ...
    @property
    def flops(self) -> float: ...
    @property
    def largest_block(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def trim(self) -> None: ...

class Storage:
    symbolic: Symbolic
    batch: int
    dtype: int
    def __init__(self, symbolic: Symbolic, dtype: int, batch: int) -> None: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def nnz(self) -> int: ...
    @property
    def refactorized(self) -> bool: ...
    @property
    def repivots(self) -> int: ...
    def factorize(
        self,
        assembly: Assembly,
        values: int,
        nnz: int,
        check: bool,
        template: Storage | None = None,
        threads: int = 1,
    ) -> None: ...
    def failed_columns(self) -> Sequence[int] | None: ...
    def solve(self, b: int, x: int, count: int, width: int, factors: int, adjoint: bool, threads: int = 1) -> None: ...
