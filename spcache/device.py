"""Numeric factors on a CUDA device, and of the CPU for CUDA tensors: what factor.py is for the CPU.

What the host has to know is read as one status after all work has been asked for: cuDSS's, and the flags of the values.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._pattern import Loan, ValuesCopy
from .engines.cudss import Assembly, Storage, SymbolicFactor, require_eager
from .engines.protocol import DTYPE_CODES, Failure
from .errors import SingularMatrixError
from .factor import KEEP_IDLE, NumericFactor, Pool
from .memory import plain
from .pattern import Pattern

__all__ = ["DeviceFactor", "DevicePool", "HostFactor", "Pairs", "to_host"]

# Refinement after perturbed pivots, in units of eps of the scaled residual: what is good enough, and what is not
# accepted. It ends where a step does not halve the residual.
_GOOD, _BAD, _STEPS = 4.0, 1e3, 20
_PROBES = 3  # solves that have to bring the residual down


class DevicePool(Pool):
    """Lends storage on one device.

    Args:
        multiply: (values [nnz], x [n, k], adjoint) -> S x or S^H x.
        checks: whether solutions by perturbed pivots are refined and looked at.
    """

    plan: SymbolicFactor  # type: ignore[assignment]
    assembly: Assembly  # type: ignore[assignment]

    def __init__(
        self, n: int, plan: SymbolicFactor, assembly: Assembly, stats: Any,
        multiply: Callable[[Tensor, Tensor, bool], Tensor], checks: bool,
    ):  # fmt: skip
        super().__init__(n, plan, assembly, stats, None, None, None)  # type: ignore[arg-type]
        self.multiply, self.checks = multiply, checks

    def renewed(self, stats: Any, careful: Any) -> DevicePool:
        return DevicePool(self.n, self.plan, self.assembly, stats, self.multiply, self.checks)

    def factorize(self, values: Tensor, check: bool, fresh: bool = False) -> DeviceFactor:
        """Asks for the factors of contiguous values [*B, nnz]; nobody waits for the device yet."""
        dtype, batch = DTYPE_CODES[values.dtype], math.prod(values.shape[:-1])
        idle: list[Any] = self._idle.setdefault((dtype, batch), [])
        try:
            storage, copy = idle.pop()
        except IndexError:
            self._make_room()
            storage, copy = self.plan.storage(dtype, batch), ValuesCopy()
        start = perf_counter()
        kept = values.clone()  # whoever changes the values later cannot make the two differ
        storage.factorize(self.assembly, kept.reshape(batch, -1))
        stats = self.stats
        stats.seconds["factorize"] += perf_counter() - start
        stats.factorizations += 1
        stats.matrices += batch
        stats.refactorizations += storage.refactorized
        factor = DeviceFactor(self, Loan(storage, copy, idle, KEEP_IDLE), values, kept)
        self._latest = weakref.ref(factor)
        return factor


class DeviceFactor(NumericFactor):
    """As `NumericFactor`. What became of the factorization is known after `settle`."""

    __slots__ = ("_address", "_device", "_kept", "_settled")

    _pool: DevicePool
    storage: Storage  # type: ignore[assignment]
    plan: SymbolicFactor

    def __init__(self, pool: DevicePool, loan: Loan, values: Tensor, kept: Tensor):
        self._loan, self._pool, self._kept = loan, pool, kept
        self._substitute = None
        self.doubtful = self.last = False
        self.rcond = None
        self._stats = pool.stats
        self._address, self._device = values.data_ptr(), values.device
        self.plan, self.n, self.storage = pool.plan, pool.n, loan.storage
        self.batch_shape, self.dtype = values.shape[:-1], values.dtype
        self.finite = self._settled = False
        self.failures = None
        self.failed = None
        if self.plan.hopeless is not None:
            self.settle()

    def settle(self) -> None:
        """Waits for the device, and learns which matrices have no factor."""
        if self._settled:
            return
        start = perf_counter()
        self.failures = self.storage.failures()
        self._look_at_perturbed()
        self._stats.seconds["factorize"] += perf_counter() - start
        self._stats.nnz_factor = self.plan.nnz
        if self.failures is not None:
            failed = torch.tensor([f is not None for f in self.failures], device="cpu")
            self.failed = failed.to(self._device).view(self.batch_shape)
        self._settled = True

    def _look_at_perturbed(self) -> None:
        """A matrix some of whose pivots had to be replaced is singular to working precision where refinement does not
        bring the residual of a random right-hand side down; the largest part of its solution tells the column."""
        perturbed = [e for e, count in enumerate(self.storage.perturbed) if count]
        if not perturbed:
            return
        failures = list(self.failures or [None] * self.storage.batch)
        generator = torch.Generator("cpu").manual_seed(0)
        b = torch.randn(1, self.n, dtype=self.dtype, generator=generator, device="cpu").to(self._device)
        for e in perturbed:
            x, r = torch.zeros_like(b), b
            for _ in range(_PROBES):
                x = x + self._apply(e, r, False)
                r = b - self._pool.multiply(self._values(e), x.mT, False).mT
            if failures[e] is None and not float(r.norm() / b.norm()) < 0.1:
                failures[e] = Failure(int(x[0].abs().nan_to_num(torch.inf).argmax()), "singular")
        self.failures = failures if any(f is not None for f in failures) else None

    def _norm(self, e: int, adjoint: bool) -> Tensor:
        """An upper bound of the largest row sum of |S| or |S^H|."""
        ones = torch.ones(self.n, 1, dtype=self.dtype, device=self._device)
        return self._pool.multiply(self._values(e).abs().to(self.dtype), ones, adjoint).abs().amax()

    def _values(self, e: int) -> Tensor:
        return self._kept.view(-1, self._kept.shape[-1])[e]

    @property
    def nbytes(self) -> int:
        return self.storage.nbytes + self._kept.nbytes

    def may_be(self, values: Tensor) -> bool:
        """Whether values lie where the factorized ones did; only then they are worth a comparison."""
        return (values.data_ptr(), values.device, values.shape) == (self._address, self._device, self._kept.shape)

    def same_values(self, values: Tensor) -> bool:
        """Bit by bit; waits for the device."""
        require_eager(values)
        mine = self._kept
        if values.shape != mine.shape or values.dtype != mine.dtype or values.device != mine.device:
            return False
        return torch.equal(_bits(mine), _bits(values))

    def solve(self, b: Tensor, vector: bool, adjoint: bool) -> Tensor:
        """As `NumericFactor.solve`, asynchronous unless pivots were perturbed."""
        if b.dtype != self.dtype:
            self._refuse_dtype(b)
        own = 1 if vector else 2
        lead = b.shape[:-own]
        if self.batch_shape and lead != self.batch_shape:
            lead = torch.broadcast_shapes(lead, self.batch_shape)
            b = b.expand(*lead, *b.shape[-own:])
        start = perf_counter()
        x = torch.empty(b.shape, dtype=b.dtype, device=b.device)
        columns = plain(b if vector else b.mT).view(math.prod(lead), -1, self.n)  # [P, k, n]
        (x if vector else x.mT).copy_(
            self._solve_columns(columns, lead, adjoint).view(b.shape if vector else b.mT.shape)
        )
        self._stats.seconds["solve"] += perf_counter() - start
        self._stats.solves += 1
        return x

    def _solve_columns(self, b: Tensor, lead: torch.Size, adjoint: bool) -> Tensor:
        """b: [P, k, n]"""
        if not self.batch_shape:
            return self._solve_with(0, b.flatten(0, 1), adjoint).view(b.shape)
        if lead == self.batch_shape:
            return torch.stack([self._solve_with(e, b[e], adjoint) for e in range(len(b))])
        index = np.broadcast_to(np.arange(self.storage.batch).reshape(self.batch_shape), lead).reshape(-1)
        x = torch.empty_like(b)
        for e in range(self.storage.batch):
            chosen = torch.from_numpy(np.flatnonzero(index == e)).to(b.device)
            x[chosen] = self._solve_with(e, b[chosen].flatten(0, 1), adjoint).view(-1, *b.shape[1:])
        return x

    def _solve_with(self, e: int, b: Tensor, adjoint: bool) -> Tensor:
        """b: [columns, n]"""
        if self.failures is not None and self.failures[e] is not None:
            return torch.full_like(b, torch.nan)
        x = self._apply(e, b, adjoint)
        if not self._pool.checks or not self.storage.perturbed[e]:
            return x
        values, norm = self._values(e), self._norm(e, adjoint)
        before, eps = math.inf, torch.finfo(self.dtype).eps
        for _ in range(_STEPS):
            r = b - self._pool.multiply(values, x.mT, adjoint).mT
            scale = norm * x.abs().amax(-1) + b.abs().amax(-1)
            error = float((r.abs().amax(-1) / (scale + (scale == 0))).amax()) / eps
            if not error > _GOOD or not error < before / 2:
                break
            x, before = x + self._apply(e, r, adjoint), error
            self._stats.refinements += 1
        if not error < _BAD:
            raise SingularMatrixError(
                f"the matrix is singular to working precision: {self.storage.perturbed[e]} pivots had to be replaced, "
                f"and refinement leaves a scaled residual of {error:.1e} eps (check=False lets it pass)"
            )
        return x

    def _apply(self, e: int, b: Tensor, adjoint: bool) -> Tensor:
        """By the factor alone. Only transposed solves are asked of cuDSS, for general matrices."""
        if adjoint and b.is_complex() and self.plan.kind in ("general", "symmetric"):
            return self.storage.solve(plain(b.conj()), e, self.plan.kind == "general").conj().resolve_conj()
        return self.storage.solve(b, e, adjoint and self.plan.kind == "general")

    def info(self) -> Tensor:
        """As `NumericFactor.info`; waits for the device."""
        self.settle()
        failures = self.failures if self.failures is not None else [None] * self.storage.batch
        info = torch.tensor([0 if f is None else f.column + 1 for f in failures], dtype=torch.int32, device="cpu")
        info = info.to(self._device).view(self.batch_shape)
        return info if self.finite else info.masked_fill(~self._kept.isfinite().all(-1), -1)


def _bits(t: Tensor) -> Tensor:
    t = torch.view_as_real(t) if t.is_complex() else t
    return t.view(torch.int32 if t.dtype == torch.float32 else torch.int64)


# --- CUDA tensors, factorized on the CPU -----------------------------------------------------------------------------


def to_host(t: Tensor) -> Tensor:
    """A copy on the CPU, through pinned memory; waits for it."""
    if t.is_cpu:
        return t
    t = plain(t)
    host = torch.empty(t.shape, dtype=t.dtype, device="cpu", pin_memory=True)
    return host.copy_(t)


class HostFactor(NumericFactor):
    """A factor of the CPU as tensors of another device see it: they are copied there and back."""

    __slots__ = ("_device", "_inner")

    def __init__(self, inner: NumericFactor, device: torch.device):
        self._inner, self._device = inner, device
        self.plan, self.n, self.storage = inner.plan, inner.n, inner.storage
        self.batch_shape, self.dtype, self.failures = inner.batch_shape, inner.dtype, inner.failures
        self.finite = inner.finite
        self.failed = None if inner.failed is None else inner.failed.to(device)
        self.rcond = inner.rcond

    @property
    def nbytes(self) -> int:
        return self._inner.nbytes

    def same_values(self, values: Tensor) -> bool:
        return self._inner.same_values(plain(to_host(values)))

    def solve(self, b: Tensor, vector: bool, adjoint: bool) -> Tensor:
        x = self._inner.solve(to_host(b), vector, adjoint)
        return (x.pin_memory() if self._device.type == "cuda" else x).to(self._device, non_blocking=True)

    def info(self) -> Tensor:
        return self._inner.info().to(self._device)


# --- tests of symmetry ----------------------------------------------------------------------------------------------


class Pairs:
    """What kernels/pattern.hpp knows as pairs, on a device: the entries (i, j) and (j, i), summed."""

    def __init__(self, pattern: Pattern, device: torch.device):
        lower = pattern.lower
        slots = len(lower.structure.indices)
        places = lower.slots.astype(np.int64) + slots * (lower.roles == 1)
        ones = np.ones(len(places))
        self._sums = Assembly(2 * slots, places, lower.sources, ones, None, None, device)
        rows = lower.structure.indices.astype(np.int64)
        columns = np.repeat(np.arange(pattern.n), np.diff(lower.structure.indptr))
        diagonal = np.flatnonzero(rows == columns)
        self._complete = len(diagonal) == pattern.n
        self._rows, self._columns, self._diagonal, self._on = (
            torch.from_numpy(a).to(device) for a in (rows, columns, diagonal, rows == columns)
        )

    def _both(self, values: Tensor, hermitian: bool) -> tuple[Tensor, Tensor]:
        """Sums below the diagonal and on it, and those above as they ought to be equal to them."""
        below, above = self._sums(values).unflatten(-1, (2, -1)).unbind(-2)
        above = torch.where(self._on, below, above)
        return below, above.conj() if hermitian else above

    def asymmetry(self, values: Tensor, hermitian: bool) -> tuple[Tensor, Tensor]:
        """[*B] the largest difference, and the largest magnitude."""
        below, above = self._both(values, hermitian)
        return (below - above).abs().amax(-1), torch.maximum(below.abs().amax(-1), above.abs().amax(-1))

    def positive_hermitian(self, values: Tensor, tolerance: float) -> bool:
        """Whether all are Hermitian to rounding with a positive diagonal; waits for the device."""
        if not self._complete:
            return False
        below, above = self._both(values, True)
        diagonal = below.index_select(-1, self._diagonal).real
        root = diagonal.clamp(min=0).sqrt()
        scale = root.index_select(-1, self._rows) * root.index_select(-1, self._columns)
        close = (below - above).abs() <= tolerance * scale
        return bool((diagonal > 0).all() & close.all())
