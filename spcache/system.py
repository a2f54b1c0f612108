"""`SparseSystem`: validates once, owns a pattern, picks the engine, holds the latest factor."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from dataclasses import replace
from time import perf_counter
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from . import matrices
from ._pattern import all_finite
from .autograd import CONJUGATED, NONE, TRANSPOSED, Convention, plain, solve, transformed
from .engines import DTYPE_CODES, KINDS, engine_for
from .errors import EngineUnavailableError, NotPositiveDefiniteError, SingularMatrixError
from .factor import Factor, NumericFactor, Pool, describe
from .pattern import Contributions, Pattern
from .plans import plan_cache
from .stats import Stats

__all__ = ["SparseSystem"]

# Values further from symmetric than this share of the largest entry are not what the kind says.
_ASYMMETRY = 1e-4


class SparseSystem:
    """A sparse linear system `A x = b` whose pattern stays while its values change.

    The symbolic analysis (ordering, elimination tree, memory plan) is made once for a pattern, at the first
    factorization, and shared with every other system of the same pattern and options through `spcache.plan_cache`. The
    system holds the factor of the latest values, so that equal values (compared exactly) are not factorized again.

    Args:
        indices: [2, nnz; int32|int64] row and column of each entry: torch or NumPy, any order. Entries at the same
            place add up, and the gradient reaches each of them.
        n: order of the matrix; or (m, n), rows and columns, of which only `matmul` is defined unless m == n.
        kind: what is known of A, and what its gradient means (see Notes):
            "auto": nothing. Values that are Hermitian to rounding with a positive diagonal are tried with
                Cholesky; everything else is factorized with pivoting. One choice per call, for the whole batch.
            "spd": Hermitian positive definite.
            "symmetric": A^T = A, no conjugation. "hermitian": A^H = A.
            "general": nothing.
        triangle: None, both triangles are stored; "lower" or "upper", only that one is and the other is its mirror
            image. For "spd", "symmetric" and "hermitian".
        ordering: "auto", "amd", "metis" (spd only), "colamd" (all but spd and auto), "natural".
        threads: the most threads that a factorization or a solve may use; None: as many as torch
            (`torch.get_num_threads`). The result does not depend on it. Small systems and kinds other than "spd" use
            one thread.
        keep_factor: False drops the factor after each forward solve and factorizes again in the backward pass:
            less memory between the two, one more factorization.
        precision: "working", factors in the precision of the values.
        check: refuse values and b that are not finite, values that are not of the kind, factorizations that cannot be
            trusted. False checks nothing: `Factor.info` has the status, x may be garbage, nothing is raised for it.

    Raises:
        TypeError, ValueError: an argument is not as described; the message says which, and what is expected.

    Notes:
        Gradients at entry (i, j), with lam = A^-H g: "general" and "auto" -lam_i conj(x_j), every entry independent.
        With the other kinds `solve` inverts the average of A and its transpose (conjugated for "spd" and
        "hermitian"), or the mirrored triangle, and the gradient is that of this matrix: finite differences agree
        entry by entry.

    Example:
        >>> import torch, spcache
        >>> indices = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1]])
        >>> system = spcache.SparseSystem(indices, 2, kind="spd")
        >>> values = torch.tensor([4.0, 1.0, 1.0, 3.0], requires_grad=True)
        >>> x = system.solve(values, torch.tensor([1.0, 2.0]))
        >>> x.sum().backward()
        >>> system.stats.factorizations, system.stats.solves
        (1, 2)
    """

    def __init__(
        self,
        indices: Any,
        n: int | tuple[int, int],
        *,
        kind: str = "auto",
        triangle: str | None = None,
        ordering: str = "auto",
        threads: int | None = None,
        keep_factor: bool = True,
        precision: str = "working",
        check: bool = True,
    ):
        m, n = _shape(n)
        _choice("kind", kind, KINDS)
        _choice("triangle", triangle, (None, "lower", "upper"))
        _choice("precision", precision, ("working",))
        if threads is not None:
            threads = _integer("threads", threads)
            if not 1 <= threads <= 1024:
                raise ValueError(f"threads must be None or between 1 and 1024, got {threads}")
        kinds = ("spd", "general") if kind == "auto" else (kind,)
        for each in kinds:
            _choice(f"ordering (with kind={kind!r})", ordering, engine_for("cpu", each).ORDERINGS)
        if triangle is not None and kind in ("auto", "general"):
            raise ValueError(f"triangle={triangle!r} needs kind='spd', 'symmetric' or 'hermitian', got kind={kind!r}")
        if m != n and kind not in ("auto", "general"):
            raise ValueError(f"kind={kind!r} needs a square matrix, got shape ({m}, {n})")
        self._pattern = Pattern(indices, m, n)
        self._options: dict[str, Any] = {
            "kind": kind, "triangle": triangle, "ordering": ordering, "threads": threads,
            "keep_factor": bool(keep_factor), "precision": precision, "check": bool(check),
        }  # fmt: skip
        mirror = {"spd": CONJUGATED, "hermitian": CONJUGATED, "symmetric": TRANSPOSED}.get(kind, NONE)
        if mirror != NONE:
            self._require_partners(triangle)
        self.convention = Convention(self._pattern, mirror, triangle is not None)
        self._orderings: dict[str, tuple[str, np.ndarray]] = {}  # kind -> (name, permutation), from a pickle
        self._start()

    def _start(self) -> None:
        """The part of the state that is neither pickled nor copied."""
        self._kind: str = self._options["kind"]
        self._check: bool = self._options["check"]
        self._stats = Stats(nnz=self._pattern.nnz)
        self._pools: dict[str, Pool] = {}
        self._held: NumericFactor | None = None

    def _require_partners(self, triangle: str | None) -> None:
        pattern = self._pattern
        if triangle is None:
            k = pattern.without_partner()
            if k is not None:
                i, j = int(pattern.rows[k]), int(pattern.columns[k])
                raise ValueError(
                    f"kind={self._options['kind']!r} needs both triangles in indices: entry {k} = ({i}, {j}) has no "
                    f"partner ({j}, {i}). Add it, or store one triangle only and pass triangle='lower' or 'upper'"
                )
            return
        wrong = pattern.rows < pattern.columns if triangle == "lower" else pattern.rows > pattern.columns
        if wrong.any():
            k = int(np.argmax(wrong))
            raise ValueError(
                f"triangle={triangle!r}: entry {k} = ({int(pattern.rows[k])}, {int(pattern.columns[k])}) of indices "
                f"lies in the other triangle; leave it out, or pass triangle=None and store both"
            )

    @classmethod
    def from_matrix(cls, A: Any, **options: Any) -> SparseSystem:
        """A system with the pattern of a sparse matrix: torch COO, CSR or CSC, or SciPy. Options as in the constructor.

        Its values, in the system's order, are `system.values_of(A)`.
        """
        entries = matrices.entries_of(A)
        return cls(entries.indices(), entries.shape, **options)

    def values_of(self, A: Any) -> Tensor:
        """The values of a sparse matrix in the order of this system's indices, [nnz], differentiable in A.

        Args:
            A: torch COO, CSR or CSC, or SciPy. Its pattern must be exactly the system's; O(nnz) to compare.

        Raises:
            ValueError: A has another pattern, or duplicates in another order than the system.
        """
        return matrices.values_in_order(A, self._pattern)

    # --- what the user calls -------------------------------------------------------------------------------------

    def solve(self, values: Tensor, b: Tensor, *, adjoint: bool = False) -> Tensor:
        """x = A^-1 b, differentiable in values and b.

        Args:
            values: [*B, nnz; float32|float64|complex64|complex128] one number per column of indices.
            b: [n], [*B, n] or [*P, n, k], same dtype. With as many dimensions as values it holds vectors, with
                more it holds matrices; leading dimensions broadcast. [n] with batched values: one vector for all.
            adjoint: solve A^H x = b instead.

        Returns:
            x: the shape of b, broadcast with the batch.

        Raises:
            NotPositiveDefiniteError, SingularMatrixError: with the column and the batch index (check=True).
            ValueError: shapes do not fit; values or b not finite; values not of the kind (check=True).
            TypeError: not tensors, or dtypes that differ or are not supported.
            EngineUnavailableError: no engine for that device.

        Cost: equal values again: one comparison and one triangular solve. New values: O(nnz) assembly and
        one numeric factorization before it. First values of a pattern: the analysis too. Backward: one triangular
        solve and O(nnz).
        """
        return self._solve(values, b, adjoint)

    def solve_ex(self, values: Tensor, b: Tensor, *, check_errors: bool = False) -> tuple[Tensor, Tensor]:
        """As `solve`, but reports failures instead of raising, like `torch.linalg.solve_ex`.

        Returns:
            x: as `solve`; NaN for an element that failed. Its gradient is exactly zero where the incoming
                gradient is zero, so that a masked loss stays finite, and NaN elsewhere.
            info: [*P; int32] 0; k > 0, column k (counted from 1) has no pivot; -1, values or b are not finite.

        Raises:
            As `solve` for arguments of the wrong shape, dtype or device, and for values that are not of the kind
            (check=True); with check_errors=True for failures too.
        """
        vector = self._arguments(values, b)
        if transformed():
            raise RuntimeError("solve_ex reads its status and cannot run inside a torch.func transform; use solve")
        if values.numel() == 0 or b.numel() == 0:
            x = self._empty(values, b, vector, check_errors)
            info = torch.zeros(x.shape[: -1 if vector else -2], dtype=torch.int32, device=x.device)
            return x, info + (1 if x.numel() else 0)  # no entries: the first column is singular
        numeric = self.find(values, raising=False)
        finite = torch.isfinite(b).all(-1) if vector else torch.isfinite(b).flatten(-2).all(-1)
        info, finite = torch.broadcast_tensors(numeric.info(), finite)
        info = info.masked_fill(~finite, -1)
        failed = info != 0
        if check_errors and failed.any():
            self.require_finite("values", values)
            self.require_finite("b", b)
            self._raise(numeric)
        return solve(self, numeric, values, b, vector, False, failed if failed.any() else None), info

    def factorize(self, values: Tensor) -> Factor:
        """The factorization of one batch of values, to be solved with any number of times.

        Args:
            values: [*B, nnz; float32|float64|complex64|complex128].

        Returns:
            A `Factor`, valid for as long as it is held; its solves are differentiable in values and b.

        Raises:
            As `solve`.
        """
        self._values_argument(values)
        if values.numel() == 0:
            self._refuse_no_entries(values.shape[:-1], self._check)
        numeric = None if transformed() or values.numel() == 0 else self.find(values)
        return Factor(self._solve, numeric, values)

    def matmul(self, values: Tensor, x: Tensor, *, adjoint: bool = False) -> Tensor:
        """y = S x for the very matrix S that `solve` inverts (see the table in `SparseSystem`); adjoint: S^H x.

        Args:
            values: [*B, nnz]; x: [n], [*B, n] or [*P, n, k], as `b` of `solve` (m instead of n where adjoint).

        Returns:
            y, differentiable to any order. Cost: O(nnz) torch operations.
        """
        vector = self._arguments(values, x, "x", self._pattern.m if adjoint else self._pattern.n)
        y = self.convention.apply(values, x.unsqueeze(-1) if vector else x, bool(adjoint))
        return y.squeeze(-1) if vector else y

    @property
    def stats(self) -> Stats:
        """A snapshot of the counters, see `Stats`."""
        return replace(self._stats, bytes=self.nbytes, seconds=dict(self._stats.seconds))

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of A."""
        return self._pattern.m, self._pattern.n

    @property
    def nnz(self) -> int:
        """Length of the values."""
        return self._pattern.nnz

    @property
    def nbytes(self) -> int:
        """Memory of the pattern, the plans, and the factors held or kept idle."""
        held = self._held
        pools = list(self._pools.values())
        return (
            self._pattern.nbytes
            + sum(p.nbytes + p.plan.nbytes + p.assembly.nbytes for p in pools)
            + (held.nbytes if held is not None else 0)
        )

    def clear(self) -> None:
        """Lets go of the factor this system holds and of idle storage. Plans stay; so do factors in use elsewhere."""
        self._held = None
        self.trim()

    def trim(self) -> None:
        """Lets go of idle storage, keeps the factor."""
        for pool in list(self._pools.values()):
            pool.trim()

    def __repr__(self) -> str:
        m, n = self.shape
        return f"SparseSystem({m} x {n}, nnz={self.nnz}, kind={self._kind!r})"

    # --- what autograd and Factor call -----------------------------------------------------------------------------

    def _solve(self, values: Tensor, b: Tensor, adjoint: bool, numeric: NumericFactor | None = None) -> Tensor:
        vector = self._arguments(values, b)
        if values.numel() == 0 or b.numel() == 0:
            return self._empty(values, b, vector, self._check)
        if numeric is None and not transformed():
            numeric = self.find(values)
        return solve(self, numeric, values, b, vector, bool(adjoint), None, self._check)

    @property
    def keep_factor(self) -> bool:
        return self._options["keep_factor"]

    def find(self, values: Tensor, raising: bool | None = None) -> NumericFactor:
        """The factor of values that can be read: the one held, if they are equal bit by bit, or a new one.

        Args:
            raising: raise where values are not finite or a matrix has no factor; None: if this system checks.
        """
        raising = self._check if raising is None else raising
        values = plain(values.detach())
        held = self._held
        if held is not None and held.same_values(values):
            self._stats.reuses += 1
            if raising and not held.finite:
                self.require_finite("values", values)
        else:
            if raising:
                self.require_finite("values", values)
            if self._check and self.convention.mirror != NONE and not self.convention.one_triangle:
                self._require_symmetric(values)
            self._held = held = None  # its storage goes back to the pool before new storage is lent
            held = self._factorize(values)
            held.finite = raising
            self._held = held
        if raising and held.failures is not None:
            self._held = None
            self._raise(held)
        return held

    def _factorize(self, values: Tensor) -> NumericFactor:
        if self._kind != "auto":
            return self._pool(self._kind).factorize(values, self._check)
        if self._looks_positive(values):
            numeric = self._pool("spd").factorize(values, self._check)
            if numeric.failures is None:
                return numeric
            del numeric
        return self._pool("general").factorize(values, self._check)

    def _pool(self, kind: str) -> Pool:
        """The pool that serves a kind other than "auto"; its plan comes from the plan cache or is analyzed now."""
        pool = self._pools.get(kind)
        if pool is None:
            start = perf_counter()
            engine, contributions = engine_for("cpu", kind), self._contributions(kind)
            ordering = self._options["ordering"]

            def analyze() -> Any:
                return engine.analyze(contributions.structure, *self._orderings.get(kind, (ordering,)))

            plan, found = plan_cache.find((engine.__name__, contributions.structure, ordering), analyze)
            averaged = self.convention.mirror != NONE or kind == "spd"
            one_triangle = self.convention.one_triangle
            assembly = plan.assembly(
                self._pattern.nnz, contributions.slots, contributions.sources, contributions.roles,
                0.5 if averaged and not one_triangle else 1.0, kind in ("spd", "hermitian"),
            )  # fmt: skip
            pool = self._pools.setdefault(
                kind, Pool(self._pattern.n, plan, assembly, self._stats, self._options["threads"])
            )
            self._stats.analyses += not found
            self._stats.seconds["analyze"] += perf_counter() - start
        stats, plan = self._stats, pool.plan
        stats.engine, stats.ordering, stats.nnz_factor, stats.flops = plan.engine, plan.ordering, plan.nnz, plan.flops
        return pool

    def _contributions(self, kind: str) -> Contributions:
        if kind == "spd":
            return self._pattern.lower
        return self._pattern.stored if kind == "general" else self._pattern.mirrored

    # --- checks --------------------------------------------------------------------------------------------------

    def require_finite(self, name: str, t: Tensor) -> None:
        t = plain(t.detach())
        if all_finite(t.data_ptr(), t.numel(), DTYPE_CODES[t.dtype]):
            return
        first = tuple((~torch.isfinite(t)).nonzero()[0].tolist())
        raise ValueError(
            f"{name} must be finite, got {t[first].item()} at {name}{list(first)} "
            f"(check=False lets it pass, solve_ex reports it)"
        )

    def _require_symmetric(self, values: Tensor) -> None:
        """Values whose triangles agree, as the kind says."""
        for e, (address, dtype) in enumerate(_matrices(values)):
            difference, largest = self._pattern.paired.asymmetry(
                address, self.nnz, dtype, self.convention.mirror == CONJUGATED
            )
            if difference > _ASYMMETRY * largest:
                what = "Hermitian" if self.convention.mirror == CONJUGATED and values.is_complex() else "symmetric"
                where = _where(_batch_index(e, values.shape[:-1]))
                raise ValueError(
                    f"values are not {what}{where}: entries (i, j) and (j, i) differ by up to {difference:.3g}, the "
                    f"largest entry is {largest:.3g}; kind={self._kind!r} allows {_ASYMMETRY:g} of it. "
                    "Use kind='general'"
                )

    def _looks_positive(self, values: Tensor) -> bool:
        """Whether every matrix of the batch is Hermitian to rounding with a positive diagonal."""
        if self._pattern.m != self._pattern.n:
            return False
        tolerance = 16 * torch.finfo(values.dtype).eps
        return all(
            self._pattern.paired.positive_hermitian(address, self.nnz, dtype, tolerance)
            for address, dtype in _matrices(values)
        )

    def _raise(self, numeric: NumericFactor) -> NoReturn:
        assert numeric.failures is not None
        e, failure = next((e, f) for e, f in enumerate(numeric.failures) if f is not None)
        batch = _batch_index(e, numeric.batch_shape)
        error = NotPositiveDefiniteError if failure.reason == "not positive definite" else SingularMatrixError
        raise error(describe(failure, self._kind) + _where(batch), failure.column, batch)

    def _values_argument(self, values: Tensor) -> None:
        if not isinstance(values, Tensor):
            raise TypeError(f"values must be a torch.Tensor, got {type(values).__name__}")
        if values.dtype not in DTYPE_CODES:
            raise TypeError(f"values must be float32, float64, complex64 or complex128, got {values.dtype}")
        if values.layout is not torch.strided:
            raise TypeError(
                f"values must be a dense vector of entries, got layout {values.layout}; "
                "SparseSystem.from_matrix and system.values_of take a sparse matrix"
            )
        if values.dim() < 1 or values.shape[-1] != self._pattern.nnz:
            raise ValueError(
                f"values must have shape (*batch, {self._pattern.nnz}), one number per column of indices, "
                f"got {tuple(values.shape)}"
            )
        if not values.is_cpu:
            raise EngineUnavailableError(
                f"values are on {values.device}: this version of spcache has engines for the CPU only; "
                "move values and b there with .cpu()"
            )

    def _arguments(self, values: Tensor, b: Tensor, name: str = "b", length: int | None = None) -> bool:
        """Checks both arguments; True where b holds vectors."""
        self._values_argument(values)
        if not isinstance(b, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(b).__name__}")
        if b.dtype != values.dtype:
            raise TypeError(
                f"{name} must have the dtype of values, {values.dtype}, got {b.dtype}; "
                f"convert it: {name}.to(values.dtype)"
            )
        if b.layout is not torch.strided or not b.is_cpu:
            raise TypeError(
                f"{name} must be a dense tensor on the device of values, got layout {b.layout} on {b.device}"
            )
        if length is None:
            length = self._pattern.m
            if length != self._pattern.n:
                raise ValueError(
                    f"solve needs a square matrix, this system has shape {self.shape}; only matmul is defined for it"
                )
        dims, batch = b.dim(), values.dim() - 1
        vector = dims == values.dim() or dims == 1
        own = 1 if vector else 2
        if (not vector and dims < values.dim()) or dims < 1 or b.shape[-own] != length:
            raise ValueError(_shapes_message(name, values, b, length))
        if batch and b.shape[:-own] != values.shape[:-1]:
            try:
                torch.broadcast_shapes(b.shape[:-own], values.shape[:-1])
            except RuntimeError:
                raise ValueError(_shapes_message(name, values, b, length)) from None
        return vector

    def _empty(self, values: Tensor, b: Tensor, vector: bool, raising: bool) -> Tensor:
        """The solution where the system, the batch, b, or the values are empty; connected to values and b."""
        own = 1 if vector else 2
        lead = torch.broadcast_shapes(b.shape[:-own], values.shape[:-1])
        x = b.new_zeros(*lead, *b.shape[-own:]) + 0 * (b.sum() + values.sum())
        if x.numel() == 0:
            return x
        self._refuse_no_entries(lead, raising)  # neither b nor the batch is empty
        return x + torch.nan

    def _refuse_no_entries(self, batch: torch.Size, raising: bool) -> None:
        if raising and self._pattern.n and math.prod(batch):
            raise SingularMatrixError("the matrix has no entries (nnz = 0): structurally singular at column 0", 0)

    # --- copies --------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """Indices, options and the orderings found; the rest is rebuilt on first use."""
        plans = {kind: pool.plan for kind, pool in list(self._pools.items())}
        found = {kind: (p.ordering, p.permutation) for kind, p in plans.items() if p.permutation is not None}
        return {
            "indices": np.stack([self._pattern.rows, self._pattern.columns]),
            "shape": self.shape,
            "options": self._options,
            "orderings": self._orderings | found,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        SparseSystem.__init__(self, state["indices"], state["shape"], **state["options"])
        self._orderings = state["orderings"]

    def __copy__(self) -> SparseSystem:
        """Shares the immutable pattern and plans; counters and factors start anew."""
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        new._start()
        for kind, pool in list(self._pools.items()):
            new._pools[kind] = Pool(self._pattern.n, pool.plan, pool.assembly, new._stats, self._options["threads"])
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> SparseSystem:
        return self.__copy__()


def _shape(n: Any) -> tuple[int, int]:
    """(m, n) of an order or a pair."""
    pair = tuple(n) if isinstance(n, tuple | list | torch.Size) else (n, n)
    if len(pair) != 2 or not all(hasattr(i, "__index__") and not isinstance(i, bool) for i in pair):
        raise TypeError(f"n must be an integer or a pair (m, n) of integers, got {n!r}")
    m, n = (operator.index(i) for i in pair)
    if m < 0 or n < 0:
        raise ValueError(f"n must not be negative, got {(m, n)}")
    return m, n


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    return operator.index(value)


def _choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")


def _matrices(values: Tensor) -> Iterator[tuple[int, int]]:
    """Address and scalar type of each matrix of a contiguous batch."""
    dtype, stride = DTYPE_CODES[values.dtype], values.shape[-1] * values.element_size()
    for e in range(math.prod(values.shape[:-1])):
        yield values.data_ptr() + e * stride, dtype


def _batch_index(e: int, batch_shape: torch.Size) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(e, batch_shape)) if batch_shape else ()


def _where(batch: tuple[int, ...]) -> str:
    return f" (batch element {batch})" if batch else ""


def _shapes_message(name: str, values: Tensor, b: Tensor, length: int) -> str:
    batch = tuple(values.shape[:-1])
    return (
        f"{name} of shape {tuple(b.shape)} does not fit values of shape {tuple(values.shape)}: expected "
        f"({length},) or {(*batch, length)} for vectors, (*{list(batch)}, {length}, k) for matrices; with as many "
        f"dimensions as values {name} holds vectors, with more it holds matrices"
    )
