from collections.abc import Callable
from typing import Any

import numpy as np

NAMES: tuple[str, ...]
STATUS: tuple[str, ...]

class Library:
    version: tuple[int, int, int]
    def __init__(self, path: str) -> None: ...

class Handle:
    library: Library
    allocated: int
    def __init__(
        self, library: Library, allocator: Callable[[int, int], int], deallocator: Callable[[int], Any]
    ) -> None: ...
    def execute(self, phase: int, config: Config, data: Data, A: Matrix, x: Matrix, b: Matrix, stream: int) -> None: ...

class Config:
    def __init__(self, library: Library, settings: dict[int, int]) -> None: ...

class Matrix:
    @staticmethod
    def csr(
        library: Library, n: int, nnz: int, indptr: int, indices: int, values: int, dtype: int, mtype: int, view: int
    ) -> Matrix: ...
    @staticmethod
    def dense(library: Library, n: int, columns: int, values: int, dtype: int) -> Matrix: ...
    def set_values(self, values: int) -> None: ...

class Data:
    def __init__(self, handle: Handle) -> None: ...
    def set(self, parameter: int, numbers: np.ndarray, stream: int) -> None: ...
    def get(self, parameter: int, out: np.ndarray, stream: int) -> np.ndarray: ...
