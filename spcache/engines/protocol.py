"""What an engine of the CPU must offer. `tests/test_engines.py` checks each of them against this page; that of CUDA
(cudss.py) has the same objects, and takes tensors where these take addresses.

An engine is a module with a function `analyze`, which makes a `SymbolicFactor` of one canonical structure, the name of
an ordering, and perhaps that ordering itself, [n; int32], the original index of each pivot; and a function `variant`,
which names what else its plans depend on (an environment variable), "" for nothing. The symbolic factor lends itself
to any number of `Storage`s, each of which holds the factors of one batch of values.

Arrays of numbers are passed as an address with their sizes, never as tensors: native code knows pointers only, and
`tensor.data_ptr()` is the cheapest way to hand one over. Whoever calls keeps the memory alive and has checked dtype,
device and contiguity. Native calls run without the GIL; two threads may use one SymbolicFactor, and may solve with
one Storage, at the same time. A Storage is factorized by one thread, while nobody else holds it.

Scalar types travel as codes: 0 float32, 1 float64, 2 complex64, 3 complex128 (`DTYPE_CODES`).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

__all__ = ["DTYPE_CODES", "Failure", "Permutation", "Storage", "Structure", "SymbolicFactor"]

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.complex64: 2, torch.complex128: 3}


@dataclass(frozen=True, eq=False)
class Structure:
    """A canonical sparsity structure: CSC, rows ascending in each column, no duplicates. Compared exactly.

    Attributes:
        n: number of rows and columns.
        indptr: [n + 1; int64].
        indices: [nnz; int32].
        triangle: True where only the lower triangle of a symmetric structure is listed.
    """

    n: int
    indptr: np.ndarray
    indices: np.ndarray
    triangle: bool

    def __hash__(self) -> int:
        return zlib.crc32(self.indices.data, zlib.crc32(self.indptr.data)) ^ self.n

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Structure) and (
            self is other
            or (
                self.n == other.n
                and self.triangle == other.triangle
                and np.array_equal(self.indptr, other.indptr)
                and np.array_equal(self.indices, other.indices)
            )
        )


@dataclass(frozen=True, eq=False)
class Permutation:
    """An ordering that the caller gives, or a pairing of rows. Compared exactly.

    Attributes:
        pivots: [n; int32] original index of each pivot; who goes with each row or column.
    """

    pivots: np.ndarray
    _hash: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", zlib.crc32(self.pivots.data))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Permutation) and (self is other or np.array_equal(self.pivots, other.pivots))


@dataclass(frozen=True)
class Failure:
    """Why one matrix of a batch has no factor.

    Attributes:
        column: the column, numbered from 0 as the caller does; -1 where the values are not finite.
        reason: one of "not positive definite", "singular", "structurally singular", "untrusted" (another engine may
            succeed).
    """

    column: int
    reason: str


@runtime_checkable
class SymbolicFactor(Protocol):
    """The plan of one canonical structure: immutable, shared between threads and systems."""

    engine: str  # name of the engine
    ordering: str  # the fill-reducing ordering that was chosen, or "given"
    permutation: np.ndarray | None  # [n; int32] that ordering, where `analyze` takes it back as its third argument
    nnz: int  # entries of the factor, predicted where values decide
    flops: float  # floating-point operations of one factorization, predicted; nan where unknown
    nbytes: int  # memory held by the plan itself and its idle scratch memory

    def trim(self) -> None:
        """Lets go of idle scratch memory."""

    def assembly(
        self, nnz: int, slots: np.ndarray, sources: np.ndarray, roles: np.ndarray, weight: float, hermitian: bool
    ) -> Any:
        """Composes the pattern's COO map (one contribution each: canonical slot, source, role) with the positions
        of this plan into a `spcache._pattern.Assembly`."""

    def storage(self, dtype: int, batch: int) -> Storage:
        """Memory for the factors of `batch` matrices of one scalar type. Nothing is factorized yet."""


@runtime_checkable
class Storage(Protocol):
    """The factors of one batch of values; holds nothing that depends on who uses them."""

    batch: int
    nbytes: int  # memory held
    nnz: int  # stored entries of one factor, the diagonal included
    refactorized: bool  # the last factorize used pivots chosen for earlier values (always, where pivots are static)
    repivots: int  # how many matrices of the last factorize were factorized anew because old pivots failed
    doubtful: bool  # solves with the last factorize are to be refined by who asks (factor.py): the engine does not

    def factorize(
        self, assembly: Any, values: int, nnz: int, check: bool, template: Any = None, threads: int = 1
    ) -> None:
        """Factors values [batch, nnz] at address `values`, overwriting what was here.

        Args:
            assembly: of this plan. It outlives the call.
            check: whether old pivots are to be trusted only after looking (`check=False`: never look).
            template: another Storage of this plan and scalar type, successfully factorized, whose pivots a Storage
                that has none yet may copy. It is only read.
            threads: the largest number of threads to use. The result does not depend on it.
        """

    def failures(self) -> Sequence[Failure | None] | None:
        """One entry per matrix of the last factorize; None where all of them have a factor."""

    def solve(
        self, b: int, x: int, count: int, width: int, factors: int, adjoint: bool, threads: int = 1
    ) -> int | None:
        """x[p] = A[f(p)]^-1 b[p], adjoint: A^-H, for p < count; b and x are [count, n, width], row-major.

        Args:
            factors: address of int64 [count] giving f(p), each below `batch`; 0: f(p) = p if count == batch,
                and 0 if batch == 1.
            threads: the largest number of threads to use. The result does not depend on it.

        Where a matrix has no factor x[p] is filled with NaN. b and x may not overlap.

        Returns the steps of iterative refinement, ~steps where they left a residual that is not small; None where the
        engine never refines.
        """
