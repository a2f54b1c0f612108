import numpy as np

class Rows:
    def __init__(self, rows: np.ndarray, columns: np.ndarray, p: int, q: int) -> None: ...
    @property
    def count(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def structure(self) -> tuple[np.ndarray, np.ndarray]: ...
    def scale(
        self,
        values: int,
        batch: int,
        nnz: int,
        dtype: int,
        conjugate: bool,
        damping: float,
        w: int,
        scale: int,
    ) -> np.ndarray: ...
    def apply(
        self,
        w: int,
        batch: int,
        x: int,
        y: int,
        count: int,
        width: int,
        factors: int,
        dtype: int,
        adjoint: bool,
    ) -> None: ...
    def products(self) -> int: ...

class Products:
    def __init__(self, rows: Rows) -> None: ...
    @property
    def count(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    def structure(self) -> tuple[np.ndarray, np.ndarray]: ...
    def multiply(self, w: int, scale: int, batch: int, dtype: int, damping: float, out: int) -> np.ndarray: ...
