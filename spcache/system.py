"""`SparseSystem`: validates once, owns a pattern, picks the engine, holds the latest factor."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import matrices
from .engines import KINDS, Permutation, engine_for
from .factor import Factor
from .factorizer import Factorizer
from .handles import system_handle
from .least_squares import Fitter
from .library import is_vector, recorded, traced_least_squares, traced_matmul, traced_solve
from .memory import read
from .pattern import Pattern
from .stats import Stats

__all__ = ["SparseSystem"]


class SparseSystem:
    """A sparse linear system `A x = b` whose pattern stays while its values change.

    The symbolic analysis (ordering, elimination tree, memory plan) is made once for a pattern, at the first
    factorization, and shared with every other system of the same pattern and options through `spcache.plan_cache`. The
    system holds the factor of the latest values, so that equal values (compared exactly) are not factorized again.

    Args:
        indices: [2, nnz; int32|int64] row and column of each entry: torch or NumPy, any order. Entries at the same
            place add up, and the gradient reaches each of them.
        n: order of the matrix; or (m, n), rows and columns: `lstsq` and `matmul` are defined, the rest if m == n.
        kind: what is known of A, and what its gradient means (see Notes):
            "auto": nothing. Values that are Hermitian to rounding with a positive diagonal are tried with
                Cholesky; everything else is factorized with pivoting. One choice per call, for the whole batch.
            "spd": Hermitian positive definite.
            "symmetric": A^T = A, no conjugation. "hermitian": A^H = A.
            "general": nothing.
        triangle: None, both triangles are stored; "lower" or "upper", only that one is and the other is its mirror
            image. For "spd", "symmetric" and "hermitian".
        ordering: how rows and columns are ordered to keep the factor sparse: "auto" (what predicts the least work),
            "amd", "metis" (nested dissection; spd, symmetric, hermitian), "colamd" (general), "natural"; or
            [n; integer], NumPy or torch, the original index of each pivot. Where KLU serves kind "general", it orders
            inside the blocks of the block triangular form; rows may be exchanged for the sake of pivots. Names only for
            cuDSS.
        threads: the most threads that a factorization or a solve may use; None: as many as torch
            (`torch.get_num_threads`). The result does not depend on it. Small systems use one
            thread; where KLU serves kind "general", only batches use more.
        keep_factor: False drops the factor after each forward solve and factorizes again in the backward pass:
            less memory between the two, one more factorization.
        precision: "working", factors in the precision of the values. "mixed": float64 and complex128 are factorized in
            single precision (half the memory of a factor, and of large ones nearly half the time) and every solution,
            gradients' too, is refined in double to a backward error of some eps: a few more solves and products each.
            Pays for large factors, as of 3-D grids from about 30^3 on. Where that cannot work (condition numbers
            beyond about 1e7, rows and columns scaled) values are factorized in double after all, counted in
            `stats.repivots`; after three in a row at once. Nothing changes for float32 and complex64, and for what KLU
            factorizes, which computes in double anyway; nor for `lstsq`. CPU tensors, or cuda="host".
        check: refuse values and b that are not finite, values that are not of the kind, factorizations that cannot be
            trusted; warn of matrices that are regular but hardly so (`IllConditionedWarning`). False checks
            nothing: `Factor.info` has the status, x may be garbage, nothing is raised for it.
        cuda: how CUDA tensors are served. "cudss": on the device, by NVIDIA's cuDSS (`pip install spcache[cuda13]`, or
            [cuda12]); values, factors and solutions stay there, and the host reads their status (with check=False
            only kind "auto" reads anything).
            A batch is factorized and solved one matrix after the other, equal values are recognized where they lie in
            the memory of the last ones, and the column of an error is in cuDSS's numbering. "host": factorized and
            solved on the CPU, values and b copied there and x back in each call; needs no cuDSS.

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
        ordering: Any = "auto",
        threads: int | None = None,
        keep_factor: bool = True,
        precision: str = "working",
        check: bool = True,
        cuda: str = "cudss",
    ):
        m, n = _shape(n)
        _choice("kind", kind, KINDS)
        _choice("triangle", triangle, (None, "lower", "upper"))
        _choice("precision", precision, ("working", "mixed"))
        _choice("cuda", cuda, ("cudss", "host"))
        if threads is not None:
            threads = _integer("threads", threads)
            if not 1 <= threads <= 1024:
                raise ValueError(f"threads must be None or between 1 and 1024, got {threads}")
        if isinstance(ordering, Tensor | np.ndarray):
            ordering = _permutation(ordering, m, n)
        elif not isinstance(ordering, str):
            raise TypeError(f"ordering must be a name, or a NumPy or torch array, got {type(ordering).__name__}")
        else:
            for each in ("spd", "general") if kind == "auto" else (kind,):
                _choice(f"ordering (with kind={kind!r})", ordering, engine_for("cpu", each).ORDERINGS)
        if triangle is not None and kind in ("auto", "general"):
            raise ValueError(f"triangle={triangle!r} needs kind='spd', 'symmetric' or 'hermitian', got kind={kind!r}")
        if m != n and kind not in ("auto", "general"):
            raise ValueError(f"kind={kind!r} needs a square matrix, got shape ({m}, {n})")
        pattern = Pattern(indices, m, n)
        options = {
            "kind": kind, "triangle": triangle, "ordering": ordering, "threads": threads,
            "keep_factor": bool(keep_factor), "precision": precision, "check": bool(check), "cuda": cuda,
        }  # fmt: skip
        if kind in ("spd", "symmetric", "hermitian"):
            _require_partners(pattern, kind, triangle)
        self._start(Factorizer(pattern, options))

    def _start(self, factorizer: Factorizer, fitter: Fitter | None = None) -> None:
        self._factorizer = factorizer
        self._fitter = Fitter(factorizer) if fitter is None else fitter
        self._handle = system_handle(factorizer)  # what the system is under torch.compile, where
        self._fitter_handle = system_handle(self._fitter)
        self._square = factorizer.pattern.m == factorizer.pattern.n  # its numbers would become constants
        self._general = factorizer.options["kind"] in ("auto", "general")
        self._flags = factorizer.keep_factor, factorizer.checks

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
        return matrices.values_in_order(A, self._factorizer.pattern)

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
            IllConditionedWarning: once per factorization, where x may have no correct digit (check=True).
            ValueError: shapes do not fit; values or b not finite; values not of the kind (check=True).
            TypeError: not tensors, or dtypes that differ or are not supported.
            EngineUnavailableError: no engine for that device.

        Cost: equal values again: one comparison and one triangular solve. New values: O(nnz) assembly and
        one numeric factorization before it. First values of a pattern: the analysis too. Backward: one triangular
        solve and O(nnz).
        """
        if recorded():
            return traced_solve(self._handle, None, values, b, is_vector(values, b), bool(adjoint), *self._flags)
        return self._factorizer.solve(values, b, bool(adjoint))

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
        return self._factorizer.solve_ex(values, b, check_errors)

    def factorize(self, values: Tensor) -> Factor:
        """The factorization of one batch of values, to be solved with any number of times.

        Args:
            values: [*B, nnz; float32|float64|complex64|complex128].

        Returns:
            A `Factor`, valid for as long as it is held; its solves are differentiable in values and b.

        Raises:
            As `solve`.
        """
        if recorded():  # nothing is factorized yet: a copy stays what the values are now
            return Factor(self._factorizer, self._handle, None, values.clone())
        return Factor(self._factorizer, self._handle, self._factorizer.factorize(values), values)

    def lstsq(self, values: Tensor, b: Tensor, *, damping: float = 0.0, method: str = "auto", **options: Any) -> Tensor:
        """x that minimizes |A x - b|^2 + damping^2 |x|^2, differentiable in values and b to any order.

        A [m, n] must have full rank (columns where m >= n, rows where m < n) unless there is damping. Without damping
        a wide A (m < n) gives the shortest x with A x = b. For kind "auto" and "general".

        Args:
            values: [*B, nnz; float32|float64|complex64|complex128]; float32 and complex64 are computed in double.
            b: [m], [*B, m] or [*P, m, k], same dtype, as in `solve`.
            damping: mu, a number, not negative; in the units of A. There is no derivative in it.
            method: "auto" (or "direct"): the corrected semi-normal equations: Cholesky of A^H A (A A^H where m < n),
                refined until x is as good as QR would make it; where the estimated condition number (columns
                scaled) is beyond about 3e6, or a few long rows would fill A^H A, the augmented system
                [[alpha I, A], [A^H, 0]], with pivoting, up to about 1e13. `stats.lstsq_path` says which it was,
                `stats.lstsq_condition` the estimate; one path for a whole batch.
                "normal", "augmented": that one or an error. "lsmr": iterative, no factorization.
            options: for "lsmr", those of `spcache.iterative.lsmr`, forward and backward: atol, btol (default here: ten
                times the precision of b), conlim, maxiter, callback, check.

        Returns:
            x: [n], [*P, n] or [*P, n, k].

        Raises:
            SingularMatrixError: the rank is not full, or too near to that (check=True), with the batch index and
                a column (a row where m < n) that depends on others.
            NotConvergedError: lsmr did not converge (its check=True).
            ValueError, TypeError: as `solve`; the kind; damping; method.

        Cost: equal values again: a comparison, and two triangular solves with four products, or more of them where A is
        ill-conditioned. New values: the products of A^H A (their places are found once), one Cholesky
        factorization and one triangular solve more. Backward: as equal values again, and O(nnz). CUDA tensors are
        copied to the CPU and back ("lsmr": computed where they are).

        References: least_squares.py; for the derivative Golub & Pereyra (1973), doi:10.1137/0710036.

        Example:
            >>> import torch, spcache
            >>> line = spcache.SparseSystem(torch.tensor([[0, 1, 1, 2, 2], [0, 0, 1, 0, 1]]), (3, 2))
            >>> line.lstsq(torch.tensor([1.0, 1.0, 1.0, 1.0, 2.0]), torch.tensor([1.0, 3.0, 5.0]))  # 1 + 2 t
            tensor([1., 2.])
        """
        if not self._general:
            raise ValueError(
                f"lstsq needs kind='auto' or 'general', this system has {self._factorizer.options['kind']!r}"
            )
        if recorded():
            if options:
                raise TypeError(
                    f"recorded code (torch.compile, make_fx) takes no options of lsmr, got {', '.join(options)}"
                )
            m, n = self.shape
            return traced_least_squares(
                self._fitter_handle, values, b, is_vector(values, b), m, n, float(damping), method
            )
        return self._fitter.solve(values, b, damping, method, options)

    def matmul(self, values: Tensor, x: Tensor, *, adjoint: bool = False) -> Tensor:
        """y = S x for the very matrix S that `solve` inverts (see the table in `SparseSystem`); adjoint: S^H x.

        Args:
            values: [*B, nnz]; x: [n], [*B, n] or [*P, n, k], as `b` of `solve` (m instead of n where adjoint).

        Returns:
            y, differentiable to any order. Cost: O(nnz) torch operations.
        """
        if recorded():
            vector = is_vector(values, x)
            size = x.shape[-1 if vector else -2] if self._square else self.shape[1 if adjoint else 0]
            return traced_matmul(self._handle, values, x, vector, bool(adjoint), size)
        return self._factorizer.matmul(values, x, bool(adjoint))

    @property
    def stats(self) -> Stats:
        """A snapshot of the counters, see `Stats`."""
        stats = self._factorizer.stats
        return replace(stats, bytes=self.nbytes, seconds=dict(stats.seconds))

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) of A."""
        pattern = self._factorizer.pattern
        return pattern.m, pattern.n

    @property
    def nnz(self) -> int:
        """Length of the values."""
        return self._factorizer.pattern.nnz

    @property
    def nbytes(self) -> int:
        """Memory of the pattern, the plans, and the factors held or kept idle."""
        return self._factorizer.nbytes + self._fitter.nbytes

    def clear(self) -> None:
        """Lets go of the factor this system holds and of idle storage. Plans stay; so do factors in use elsewhere."""
        self._factorizer.clear()
        self._fitter.clear()

    def trim(self) -> None:
        """Lets go of idle storage, keeps the factor."""
        self._factorizer.trim()
        self._fitter.trim()

    def __repr__(self) -> str:
        m, n = self.shape
        return f"SparseSystem({m} x {n}, nnz={self.nnz}, kind={self._factorizer.options['kind']!r})"

    # --- copies --------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """Indices, options and the orderings found; the rest is rebuilt on first use. Bytes, strings and numbers: for
        `torch.load(..., weights_only=True)` no more than this class has to be declared safe, and unlike a tensor made
        for the occasion they outlive the way to a spawned process."""
        factorizer = self._factorizer
        orderings = factorizer.found_orderings().items()
        options = dict(factorizer.options)
        if isinstance(options["ordering"], Permutation):
            options["ordering"] = _to_bytes(options["ordering"].pivots)
        return {
            "indices": _to_bytes(np.stack([factorizer.pattern.rows, factorizer.pattern.columns])),
            "shape": self.shape,
            "options": options,
            "orderings": {kind: (name, _to_bytes(permutation)) for kind, (name, permutation) in orderings},
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        indices = _from_bytes(state["indices"]).reshape(2, -1)
        options = dict(state["options"])
        if isinstance(options["ordering"], bytearray):
            options["ordering"] = _from_bytes(options["ordering"])
        SparseSystem.__init__(self, indices, state["shape"], **options)
        orderings = state["orderings"].items()
        self._factorizer.orderings = {kind: (name, _from_bytes(permutation)) for kind, (name, permutation) in orderings}

    def __copy__(self) -> SparseSystem:
        """Shares the immutable pattern and plans; counters and factors start anew."""
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        factorizer = self._factorizer.copy()
        new._start(factorizer, self._fitter.copy(factorizer))
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> SparseSystem:
        return self.__copy__()


def _to_bytes(numbers: np.ndarray) -> bytearray:
    return bytearray(numbers.astype("<i4").tobytes())


def _from_bytes(data: bytearray) -> np.ndarray:
    return np.frombuffer(data, "<i4").astype(np.int32)


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


def _permutation(ordering: Tensor | np.ndarray, m: int, n: int) -> Permutation:
    """A copy of an ordering that the caller gives, validated."""
    given: np.ndarray
    given = read(ordering, lambda t: t.detach().cpu().numpy()) if isinstance(ordering, Tensor) else ordering
    if given.dtype.kind not in "iu":
        raise TypeError(f"ordering must be a name or integers (int32 or int64), got dtype {given.dtype}")
    if m != n:
        raise ValueError(f"an ordering of pivots needs a square matrix, got shape ({m}, {n}); pass ordering='auto'")
    if given.shape != (n,):
        raise ValueError(f"ordering must have shape ({n},), one original index for each pivot, got {given.shape}")
    beyond = np.flatnonzero((given < 0) | (given >= n))
    if len(beyond):
        k = int(beyond[0])
        raise ValueError(f"ordering must list each of 0..{n - 1} once, got ordering[{k}] = {int(given[k])}")
    pivots = np.array(given, np.int32)
    times = np.bincount(pivots, minlength=n)
    if (times > 1).any():
        i = int(np.argmax(times > 1))
        raise ValueError(f"ordering must list each of 0..{n - 1} once, got {i} {times[i]} times")
    return Permutation(pivots)


def _require_partners(pattern: Pattern, kind: str, triangle: str | None) -> None:
    """Entries in the triangles that the kind needs."""
    if triangle is None:
        k = pattern.without_partner()
        if k is not None:
            i, j = int(pattern.rows[k]), int(pattern.columns[k])
            raise ValueError(
                f"kind={kind!r} needs both triangles in indices: entry {k} = ({i}, {j}) has no "
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


def _choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}")
