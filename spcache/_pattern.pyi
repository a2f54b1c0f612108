from typing import Any

import numpy as np

def compress(rows: np.ndarray, columns: np.ndarray, m: int, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]: ...
def all_finite(address: int, count: int, dtype: int, threads: int = 1) -> bool: ...
def workers() -> int: ...
def narrow(
    b: int,
    count: int,
    n: int,
    width: int,
    dtype: int,
    scale: np.ndarray,
    select: np.ndarray,
    out: int,
    size: np.ndarray,
) -> None: ...
def widen(
    x: int,
    y: int,
    count: int,
    n: int,
    width: int,
    dtype: int,
    scale: np.ndarray,
    select: np.ndarray,
    d: int,
    size: np.ndarray,
) -> None: ...

class ValuesCopy:
    nbytes: int
    @property
    def address(self) -> int: ...
    def keep(self, address: int, nbytes: int, threads: int = 1) -> None: ...
    def finite(self, part: int, parts: int, dtype: int) -> bool: ...
    def equals(self, address: int, nbytes: int, threads: int = 1) -> bool: ...

class Loan:
    storage: Any
    copy: ValuesCopy
    def __init__(self, storage: Any, copy: ValuesCopy, idle: list[Any], limit: int) -> None: ...

class Assembly:
    def __init__(
        self,
        nnz: int,
        slots: np.ndarray,
        sources: np.ndarray,
        roles: np.ndarray,
        groups: int,
        group_of: np.ndarray | None,
        position_of: np.ndarray | None,
        weight: float,
        hermitian: bool,
    ) -> None: ...
    @property
    def address(self) -> int: ...
    @property
    def nbytes(self) -> int: ...

class Entries:
    @property
    def nbytes(self) -> int: ...
    def __init__(self, rows: np.ndarray, columns: np.ndarray) -> None: ...
    def pair(self, n: int, indptr: np.ndarray, indices: np.ndarray, slots: np.ndarray) -> None: ...
    def asymmetry(
        self, values: int, nnz: int, dtype: int, hermitian: bool, threads: int = 1
    ) -> tuple[float, float]: ...
    def asymmetric(
        self, values: int, batch: int, nnz: int, dtype: int, hermitian: bool, allowed: float, threads: int = 1
    ) -> tuple[int, float, float] | None: ...
    def positive_hermitian(self, values: int, nnz: int, dtype: int, tolerance: float) -> bool: ...
    def outer(
        self,
        u: int,
        w: int,
        out: int,
        batch: int,
        m: int,
        n: int,
        width: int,
        dtype: int,
        mirror: int,
        one_triangle: bool,
        threads: int = 1,
    ) -> None: ...
    def matvec(
        self,
        values: int,
        stride: int,
        x: int,
        n: int,
        y: int,
        m: int,
        batch: int,
        width: int,
        dtype: int,
        mirror: int,
        one_triangle: bool,
        adjoint: bool,
    ) -> None: ...
    def equilibrate(
        self, values: int, batch: int, n: int, dtype: int, symmetric: bool, left: np.ndarray, right: np.ndarray
    ) -> None: ...
    def narrow(
        self, values: int, batch: int, n: int, dtype: int, left: np.ndarray, right: np.ndarray, out: int
    ) -> None: ...
    def residual(
        self,
        values: int,
        units: np.ndarray,
        select: np.ndarray,
        b: int,
        x: int,
        r: int,
        count: int,
        n: int,
        width: int,
        dtype: int,
        mirror: int,
        one_triangle: bool,
        adjoint: bool,
    ) -> np.ndarray: ...
