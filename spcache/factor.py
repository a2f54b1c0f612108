"""Numeric factors: who owns their storage, and the `Factor` that a user holds."""

from __future__ import annotations

import copy
import ctypes
import math
import weakref
from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ._pattern import Assembly, Loan, ValuesCopy
from .convention import NONE, TRANSPOSED, Convention
from .engines import klu, ldl, lu, multifrontal
from .engines.protocol import DTYPE_CODES, Failure, Storage, SymbolicFactor
from .errors import MODIFIED, SingularMatrixError
from .handles import factor_handle
from .library import is_vector, recorded, traced_solve
from .memory import plain
from .refinement import ENOUGH, EPS, Errors, rcond_of_definite, refine, residual, scales
from .stats import Stats
from .torch_private import transformed

if TYPE_CHECKING:
    from .factorizer import Factorizer

__all__ = ["Factor", "NumericFactor", "Pool", "describe"]

Careful: TypeAlias = "weakref.WeakMethod[Callable[[Tensor, NumericFactor], NumericFactor]]"

# Pivots of a Cholesky factor so far apart ask for the condition number; in single precision, and in double.
_SPREAD = tuple(torch.finfo(dtype).eps ** (2 / 3) for dtype in (torch.float32, torch.float64))

# Of a matrix singular to rounding, with pivots chosen inside of fronts, the estimate is seldom more than so many eps.
_LOW_RCOND = 32

# Idle storages a pool keeps: fresh memory costs page faults at every step.
KEEP_IDLE = 4


class NumericFactor:
    """The factors of one batch of values. Immutable; the loan of its storage ends with the last reference.

    Attributes:
        batch_shape: batch dimensions of the values.
        dtype: scalar type of the values.
        failures: per matrix, why it has no factor; None where all have one.
        failed: the same as a bool tensor of `batch_shape`, or None.
        finite: whether the values were seen to be finite before they were factorized.
        doubtful: whether solves are refined by the residual of the values: the engine is not sure of its pivots, or
            works in single precision.
        last: it is the last resort: there is no other factor where refinement stalls.
        scale: [2, batch, n; float64] those of the equations and of the unknowns, where they were needed.
        rcond: [batch; float64] estimated reciprocal condition numbers, or None; NaN for a matrix that gave no reason.
    """

    __slots__ = (
        "__weakref__", "_copy", "_loan", "_pool", "_stats", "_substitute", "batch_shape", "code", "doubtful", "dtype",
        "failed", "failures", "finite", "last", "n", "plan", "rcond", "scale", "storage",
    )  # fmt: skip

    def __init__(self, pool: Pool, loan: Loan, values: Tensor, code: int):
        self._loan = loan
        self._copy: ValuesCopy = loan.copy
        self._pool = pool
        self._stats = pool.stats
        self._substitute: NumericFactor | None = None
        self.code = code  # scalar type of the storage
        self.plan = pool.plan
        self.n = pool.n
        self.storage: Storage = loan.storage
        self.batch_shape = values.shape[:-1]
        self.dtype = values.dtype
        self.finite = self.last = False
        self.scale: np.ndarray | None = None
        self.rcond: np.ndarray | None = None
        self.doubtful: bool = self.storage.doubtful
        self.failures = self.storage.failures()
        self.failed: Tensor | None = None
        if self.failures is not None:
            self.failed = torch.tensor([f is not None for f in self.failures], device="cpu").view(self.batch_shape)

    @property
    def nbytes(self) -> int:
        substitute = self._substitute.nbytes if self._substitute is not None else 0
        scale = self.scale.nbytes if self.scale is not None else 0
        return self.storage.nbytes + self._copy.nbytes + scale + substitute

    def same_values(self, values: Tensor) -> bool:
        """Whether these are the very values factorized here: shape, type and every bit."""
        return (
            values.shape[:-1] == self.batch_shape
            and values.dtype == self.dtype
            and values.is_cpu
            and self._copy.equals(values.data_ptr(), values.nbytes, self._pool.threads or torch.get_num_threads())
        )

    def solve(self, b: Tensor, vector: bool, adjoint: bool) -> Tensor:
        """A^-1 b (adjoint: A^-H b) without derivatives; b is [*P, n] if vector, else [*P, n, k], P broadcast with the
        batch. NaN where a matrix has no factor."""
        if b.dtype != self.dtype:
            self._refuse_dtype(b)
        own = 1 if vector else 2
        lead, index = b.shape[:-own], None
        if self.batch_shape and lead != self.batch_shape:
            lead = torch.broadcast_shapes(lead, self.batch_shape)
            b = b.expand(*lead, *b.shape[-own:])
            index = torch.arange(self.storage.batch, device="cpu").view(self.batch_shape).expand(lead).contiguous()
        b = plain(b)
        if self._substitute is not None:
            return self._substitute.solve(b, vector, adjoint)
        start = perf_counter()
        x, count, width = torch.empty_like(b), math.prod(lead), 1 if vector else b.shape[-1]
        if self.doubtful:
            columns = (count, self.n, width)
            steps = self._refined(b.view(columns), x.view(columns), index, adjoint)
        else:
            steps = self._direct(b, x, count, width, index, adjoint)
        stats = self._stats
        stats.seconds["solve"] += perf_counter() - start
        stats.solves += 1
        stats.refinements += steps if steps >= 0 else ~steps
        if steps < 0 and self._pool.careful is not None:
            return self._replaced().solve(b, vector, adjoint)
        return x

    def _refined(self, b: Tensor, x: Tensor, index: Tensor | None, adjoint: bool) -> int:
        """x for columns b, both [count, n, width], by the index[p]-th matrix of the batch for each. Returns steps as
        `Storage.solve`."""
        count, _, width = b.shape
        self._direct(b, x, count, width, index, adjoint)
        select = self._select(index, count)

        def improve(x: Tensor, r: Tensor) -> Tensor:
            d = torch.empty_like(r)
            self._direct(r, d, count, width, index, adjoint)
            return torch.from_numpy(x.numpy() + d.numpy())  # on this thread alone

        best, steps, errors = refine(x, lambda x: self.residual(b, x, select, adjoint), improve)
        np.copyto(x.numpy(), best.numpy())
        return self._judged(steps, errors.min(0), b, select)

    def _direct(self, b: Tensor, x: Tensor, count: int, width: int, index: Tensor | None, adjoint: bool) -> int:
        """As `_refined`, by the engine alone, in the scalar type of the storage; any shapes of so many numbers."""
        factors = 0 if index is None else index.data_ptr()
        threads = self._pool.threads or torch.get_num_threads()
        return self.storage.solve(b.data_ptr(), x.data_ptr(), count, width, factors, adjoint, threads) or 0

    def residual(self, b: Tensor, x: Tensor, select: np.ndarray, adjoint: bool) -> tuple[Tensor, Errors]:
        """b - S x, and how large it is; as `refinement.residual`."""
        convention = self._pool.convention
        return residual(convention, self._copy.address, self._scales(), b, x, select, adjoint)

    def _scales(self) -> np.ndarray:
        """Those of the equations and unknowns, see `refinement.scales`; found when they are first needed."""
        if self.scale is None:
            convention, code = self._pool.convention, DTYPE_CODES[self.dtype]
            symmetric = convention.mirror != NONE or self.plan.engine == "multifrontal"
            self.scale = scales(convention, self._copy.address, self.storage.batch, code, symmetric)
        return self.scale

    def _select(self, index: Tensor | None, count: int) -> np.ndarray:
        """[count; int64] the matrix of each columns."""
        if index is not None:
            return index.view(-1).numpy()
        return np.arange(count) if self.storage.batch == count else np.zeros(count, np.int64)

    def _judged(self, steps: int, errors: np.ndarray, b: Tensor, select: np.ndarray) -> int:
        """steps, or ~steps where a matrix that has a factor, and a right-hand side that is finite, have errors that are
        not small; [count, width]."""
        bad = ~(errors <= ENOUGH * EPS)
        if not bad.any():
            return steps
        if self.failed is not None:
            bad &= ~self.failed.view(-1).numpy()[select][:, None]
        bad &= torch.isfinite(b).all(1).numpy()
        if self.last and bad.any():
            worst = float(errors[bad].max())
            raise SingularMatrixError(
                "the matrix is singular to working precision: with pivots chosen for it, refinement leaves a scaled "
                f"residual of {worst:.1e} (check=False lets it pass)"
            )
        return ~steps if bad.any() else steps

    def _replaced(self) -> NumericFactor:
        """The factor that takes the place of this one, with which refinement has stalled."""
        if self._substitute is None:
            careful = None if self._pool.careful is None else self._pool.careful()
            assert careful is not None  # whoever asks for solutions keeps its owner alive
            if self.plan.engine == "klu":
                self._pool.demand_accuracy()
            self._substitute = careful(self._factorized(), self)
        return self._substitute

    def _factorized(self) -> Tensor:
        """The values factorized here."""
        memory = (ctypes.c_char * self._copy.nbytes).from_address(self._copy.address)
        return torch.frombuffer(memory, dtype=self.dtype).view(*self.batch_shape, -1).clone()

    def _refuse_dtype(self, b: Tensor) -> NoReturn:
        raise RuntimeError(
            f"the factor is of {self.dtype}, the right-hand side of {b.dtype}: the values were converted after "
            f"they were used (module.to, tensor.data); solve again with the new ones"
        )

    def estimate(self) -> np.ndarray | None:
        """`rcond`: estimated now, where small pivots give reason to."""
        storage: Any = self.storage
        if isinstance(storage, multifrontal.Storage):
            if storage.spread() < _SPREAD[self.code % 2] and self.code == DTYPE_CODES[self.dtype]:
                values = self._factorized().view(storage.batch, -1).numpy()
                self.rcond = rcond_of_definite(self._pool.convention, values, self._inverse)
        elif isinstance(storage, klu.Storage | ldl.Storage | lu.Storage) and storage.weak:
            self.rcond = storage.rcond
        return self.rcond

    @property
    def low_rcond(self) -> float:
        """The `rcond` below which a solution may have no correct digit: eps of the numbers that the engine computes
        with, or so many of them that estimates of singular matrices are below it."""
        eps = torch.finfo(self.dtype).eps
        return EPS if self.plan.engine == "klu" else _LOW_RCOND * eps if self.plan.engine in ("ldl", "lu") else eps

    def _inverse(self, b: np.ndarray) -> np.ndarray:
        """A^-1 b, one vector for each matrix, by the engine alone."""
        x = np.empty_like(b)
        self._direct(torch.from_numpy(b), torch.from_numpy(x), len(b), 1, None, False)
        return x

    def info(self) -> Tensor:
        """[*B; int32] 0, or 1 + the failing column in the caller's numbering, or -1 where values are not finite."""
        batch, code = self.storage.batch, DTYPE_CODES[self.dtype]
        failures = self.failures if self.failures is not None else [None] * batch
        info = [0 if f is None else f.column + 1 for f in failures]
        if not self.finite:
            info = [k if self._copy.finite(e, batch, code) else -1 for e, k in enumerate(info)]
        return torch.tensor(info, dtype=torch.int32, device="cpu").view(self.batch_shape)


class Pool:
    """Lends the numeric storage of one plan to one system and takes it back.

    Args:
        n: order of the matrix.
        plan: the symbolic factor.
        assembly: how this system's values get into its storage.
        stats: the system's counters.
        threads: how many threads a factorization may use; None: as many as torch does.
        convention: how values make up the matrix, for residuals.
        careful: a method, (values, factor) -> another factor of values, where refinement with the factor has stalled;
            None: solutions are left as they are.
    """

    def __init__(
        self, n: int, plan: SymbolicFactor, assembly: Assembly, stats: Stats, threads: int | None,
        convention: Convention, careful: Careful | None,
    ):  # fmt: skip
        self.n = n
        self.plan = plan
        self.assembly = assembly
        self.stats = stats
        self.threads = threads
        self.convention = convention
        self.careful = careful
        self._idle: dict[tuple[int, int], list[tuple[Storage, ValuesCopy]]] = {}
        self._latest: weakref.ref[NumericFactor] | None = None
        self._used = self._strict = False

    def renewed(self, stats: Stats, careful: Careful) -> Pool:
        """The same plan for another system."""
        also = None if self.careful is None else careful
        return type(self)(self.n, self.plan, self.assembly, stats, self.threads, self.convention, also)

    def factorize(self, values: Tensor, check: bool, fresh: bool = False) -> NumericFactor:
        """Factors contiguous `values` [*B, nnz] in storage that nobody else holds.

        fresh: with pivots chosen for these values, and for accuracy; of KLU only."""
        return self._factorize(values, check, values.dtype, NumericFactor, lambda copy: copy.address, fresh)

    def _factorize(
        self, values: Tensor, check: bool, dtype: torch.dtype, factor_type: type[NumericFactor],
        address_of: Callable[[ValuesCopy], int], fresh: bool = False,
    ) -> NumericFactor:  # fmt: skip
        """A factor in `dtype`, of what is found at address_of(copy of the values)."""
        code, batch = DTYPE_CODES[dtype], math.prod(values.shape[:-1])
        idle = self._idle.setdefault((code, batch), [])
        latest = self._latest() if self._latest is not None else None
        template = None
        if not fresh and latest is not None and latest.failures is None and latest.code == code:
            template = latest.storage  # its pivots serve a storage that has none
        try:
            if fresh:
                raise IndexError
            storage, copy = idle.pop()
        except IndexError:
            self._make_room()
            plan: Any = self.plan
            storage = plan.storage(code, batch, strict=True) if fresh or self._strict else plan.storage(code, batch)
            copy = ValuesCopy()
        threads = self.threads or torch.get_num_threads()
        start = perf_counter()
        # Factored from the copy: whoever changes the values meanwhile cannot make the two differ.
        copy.keep(values.data_ptr(), values.nbytes, threads)
        storage.factorize(self.assembly, address_of(copy), values.shape[-1], check, template, threads)
        stats = self.stats
        stats.seconds["factorize"] += perf_counter() - start
        stats.factorizations += 1
        stats.matrices += batch
        stats.repivots += storage.repivots
        if storage.refactorized and self._used:
            stats.refactorizations += 1
        self._used = True
        factor = factor_type(self, Loan(storage, copy, idle, KEEP_IDLE), values, code)
        self._latest = weakref.ref(factor)
        return factor

    def demand_accuracy(self) -> None:
        """Of KLU: pivots are chosen for accuracy from now on, refinement having stalled with others."""
        self._strict, self._latest = True, None
        self._idle.clear()  # storage that is lent goes to a list that nobody looks at any more

    def _make_room(self) -> None:
        """Lets go of what other scalar types and batches left idle, beyond a few."""
        lists = list(self._idle.values())
        excess = sum(map(len, lists)) - KEEP_IDLE + 1
        for idle in lists:
            while excess > 0 and idle:
                idle.pop(0)
                excess -= 1

    @property
    def nbytes(self) -> int:
        """Memory of idle storage."""
        return sum(s.nbytes + c.nbytes for idle in self._idle.values() for s, c in idle)

    def trim(self) -> None:
        """Lets go of idle storage."""
        for idle in self._idle.values():
            idle.clear()


class Factor:
    """A factorization that the user holds: solves with it any number of times, differentiably in values and b.

    Made by `SparseSystem.factorize`. It stays valid whatever the system does later. The values tensor is kept, because
    the gradient flows to it; each `solve` compares it with what was factorized, and refuses if it was changed.

    Attributes:
        info: [*B; int32] status of each matrix: 0, or k > 0 where column k (counted from 1) had no pivot,
            or -1 where the values are not finite.
        nnz: stored entries of one factor.
    """

    def __init__(self, factorizer: Factorizer, system: Tensor, numeric: NumericFactor | None, values: Tensor):
        self._factorizer = factorizer
        self._system = system
        self._numeric = numeric
        self._handle = None if numeric is None else factor_handle(numeric)
        self._values = values
        self._flags = factorizer.keep_factor, factorizer.checks

    def __repr__(self) -> str:
        if self._numeric is None:
            return f"Factor(values={tuple(self._values.shape)}, nothing factorized)"
        n, batch = self._numeric.n, tuple(self._numeric.batch_shape)
        return f"Factor(n={n}, batch={batch}, nnz={self.nnz}, dtype={self._numeric.dtype})"

    @property
    def info(self) -> Tensor:
        if self._numeric is not None:
            return self._numeric.info()
        self._require_data()
        empty_rows = self._values.shape[-1] == 0  # the first column of a matrix without entries is singular
        return torch.full(self._values.shape[:-1], int(empty_rows), dtype=torch.int32, device="cpu")

    @property
    def nnz(self) -> int:
        if self._numeric is not None:
            return self._numeric.plan.nnz
        self._require_data()
        return 0

    @property
    def rcond(self) -> Tensor:
        """[*B; float64] estimated reciprocal condition numbers in the 1-norm, rows and columns scaled. NaN where none
        was estimated: it is where pivots are small, with check=True, on the CPU."""
        numeric = self._numeric
        if numeric is None:
            self._require_data()
        if numeric is None or numeric.rcond is None:
            return torch.full(self._values.shape[:-1], math.nan, dtype=torch.float64, device="cpu")
        return torch.from_numpy(numeric.rcond.copy()).view(numeric.batch_shape)

    @property
    def inertia(self) -> Tensor:
        """[*B, 3; int64] how many eigenvalues are positive and how many negative, and how many signs are not known,
        because pivots that came out as nearly zero were replaced.

        Raises:
            RuntimeError: the factorization does not tell: kind "general", complex numbers with kind "symmetric", a
                matrix that needed LU, CUDA.
        """
        numeric, convention = self._numeric, self._factorizer.convention
        if numeric is None:
            self._require_data()
        storage: Any = None if numeric is None else numeric.storage
        if numeric is not None and numeric.failures is None:
            batch = numeric.batch_shape
            if isinstance(storage, multifrontal.Storage):
                return torch.tensor([numeric.n, 0, 0], device="cpu").expand(*batch, 3).clone()
            if isinstance(storage, ldl.Storage) and not (numeric.dtype.is_complex and convention.mirror == TRANSPOSED):
                return torch.from_numpy(storage.inertia()).view(*batch, 3)
        raise RuntimeError(
            "the signs of the eigenvalues are known of factors L L^H and L D L^H only: those of kinds 'spd', "
            "'hermitian' and, with real numbers, 'symmetric', where the matrix needed no LU (stats.engine) "
            "and has a factor"
        )

    def _require_data(self) -> None:
        if self._values.numel():
            raise RuntimeError(
                "inside a torch.func transform or torch.compile a factor has no data to look at; ask outside of it"
            )

    def solve(self, b: Tensor, *, adjoint: bool = False) -> Tensor:
        """x = A^-1 b, with adjoint=True x = A^-H b. Shapes, errors and gradients as `SparseSystem.solve`.

        Cost: one comparison of the values and one triangular solve, no factorization.

        Raises:
            RuntimeError: the values were changed after `factorize`.
        """
        values = self._values
        if recorded():
            return traced_solve(
                self._system, self._handle, values, b, is_vector(values, b), bool(adjoint), *self._flags
            )
        numeric = self._numeric
        if numeric is not None and not transformed() and not numeric.same_values(plain(values.detach())):
            raise RuntimeError(MODIFIED)  # under a transform it is found out below
        return self._factorizer.solve(values, b, bool(adjoint), numeric)

    def __copy__(self) -> Factor:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Factor:
        """Shares the numbers, which nobody can change."""
        return Factor(self._factorizer, self._system, self._numeric, copy.deepcopy(self._values, memo))

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Factor cannot be pickled; pickle the SparseSystem and the values, and factorize them again")


def describe(failure: Failure, kind: str) -> str:
    """What happened, for an error message."""
    if failure.reason == "not positive definite":
        return (
            f"the matrix is not positive definite: the pivot of row and column {failure.column} (counted from 0) "
            f"is not positive; if it is not meant to be, use kind='general' (or 'symmetric', 'hermitian')"
        )
    if failure.reason == "structurally singular":
        return (
            f"the matrix is structurally singular: no choice of pivots covers column {failure.column} (counted from "
            f"0), whatever the values; look for an empty row or column"
        )
    if failure.reason == "untrusted":
        return (
            f"no stable pivots were found for the matrix; the worst is that of column {failure.column} (counted from 0)"
        )
    return f"the matrix is singular to working precision at column {failure.column} (counted from 0), kind={kind!r}"
