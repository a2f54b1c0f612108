"""`Factorizer`: what stands behind a `SparseSystem`. Checks arguments, finds the factor of given values or makes it,
and has all that autograd asks for."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterator
from itertools import islice
from time import perf_counter
from typing import Any, NoReturn
from weakref import WeakMethod

import numpy as np
import torch
from torch import Tensor

from . import autograd
from ._pattern import all_finite
from .autograd import silence
from .convention import CONJUGATED, NONE, TRANSPOSED, Convention
from .device import DeviceFactor, DevicePool, HostFactor, Pairs, to_host
from .dynamo import hide
from .engines import DTYPE_CODES, Permutation, cudss, engine_for, klu, ldl, lu
from .errors import (
    MODIFIED,
    EngineUnavailableError,
    IllConditionedWarning,
    NotPositiveDefiniteError,
    SingularMatrixError,
)
from .factor import NumericFactor, Pool, describe
from .memory import plain
from .mixed import MixedFactor, MixedPool
from .pattern import Contributions, Pattern
from .plans import plan_cache
from .stats import Stats
from .torch_private import transformed

__all__ = ["Factorizer"]

# Values further from symmetric than this share of the largest entry are not what the kind says.
_ASYMMETRY = 1e-4

# "auto" takes values for Hermitian that differ by so many eps of sqrt(a_ii a_jj), as sums in another order may
# (entries of ani5_crop, under tests/data: 22).
_ROUNDING = 64

# After so many factorizations in a row for which pivots inside of fronts did not do, they are not tried again.
_DISTRUST = 3

# Engines that compute in double whatever the values are: rounding for them would gain nothing.
_DOUBLE_ONLY = (klu,)

# kind -> (name, permutation): orderings that need not be computed again
Orderings = dict[str, tuple[str, np.ndarray]]


class Factorizer:
    """A pattern, the plans made of it, and the factor of the latest values. It is a `Source` of autograd.py.

    Separate from `SparseSystem`, because a graph holds this and must not hold the system: a system owns its handle,
    and the handle what stands behind the system.

    Args:
        pattern, options: those of the system; options are not validated again.
        orderings: found by an earlier system of the same pattern.
        stats: counters of somebody else, whose work this does.
    """

    def __init__(
        self, pattern: Pattern, options: dict[str, Any], orderings: Orderings | None = None, stats: Stats | None = None
    ):
        self.pattern = pattern
        self.options = options
        self.orderings = orderings or {}
        self.stats = Stats(nnz=pattern.nnz) if stats is None else stats
        self._own = stats is None
        self.keep_factor: bool = options["keep_factor"]
        self._kind: str = options["kind"]
        self.checks: bool = options["check"]
        self._pools: dict[Any, Pool] = {}  # kind; with a device other than the CPU, a pairing of rows, or "careful"
        self._partner: Permutation | None = None  # pairing of rows that the latest values asked for
        self._distrust = 0  # factorizations in a row that needed KLU
        self._general: Any = None  # the engine of general matrices, once it is chosen
        self._pairs: dict[torch.device, Pairs] = {}
        self._held: NumericFactor | None = None
        mirror = {"spd": CONJUGATED, "hermitian": CONJUGATED, "symmetric": TRANSPOSED}.get(self._kind, NONE)
        self.convention = Convention(pattern, mirror, options["triangle"] is not None, options["threads"])

    def copy(self, stats: Stats | None = None) -> Factorizer:
        """Shares the pattern and the plans; counters (unless they are given) and factors start anew."""
        new = Factorizer(self.pattern, self.options, self.orderings, stats)
        for key, pool in list(self._pools.items()):
            new._pools[key] = pool.renewed(new.stats, WeakMethod(new._factorize_carefully))
        new._partner, new._general = self._partner, self._general
        return new

    def found_orderings(self) -> Orderings:
        plans = {kind: pool.plan for kind, pool in list(self._pools.items()) if isinstance(kind, str)}
        return self.orderings | {
            kind: (p.ordering, p.permutation) for kind, p in plans.items() if p.permutation is not None
        }

    @property
    def nbytes(self) -> int:
        held = self._held
        pools = list(self._pools.values())
        return (
            self.pattern.nbytes
            + sum(p.nbytes + p.plan.nbytes + p.assembly.nbytes for p in pools)
            + (held.nbytes if held is not None else 0)
        )

    def clear(self) -> None:
        self._held = None
        self.trim()

    def trim(self) -> None:
        for pool in list(self._pools.values()):
            pool.trim()

    # --- what the user asks for, arguments checked ---------------------------------------------------------------

    def solve(
        self, values: Tensor, b: Tensor, adjoint: bool, numeric: NumericFactor | None = None, dual: bool = False
    ) -> Tensor:
        """`SparseSystem.solve`; numeric: the factor of values, where the caller has it; dual: see `autograd.solve`."""
        vector = self.check_arguments(values, b)
        if values.numel() == 0 or b.numel() == 0:
            return self.empty(values, b, vector, self.checks)
        if numeric is None and not transformed():
            numeric = self.find(values)
        return autograd.solve(self, numeric, values, b, vector, adjoint, None, self.checks, dual)

    def solve_ex(self, values: Tensor, b: Tensor, check_errors: bool) -> tuple[Tensor, Tensor]:
        """`SparseSystem.solve_ex`."""
        vector = self.check_arguments(values, b)
        if transformed():
            raise RuntimeError("solve_ex reads its status and cannot run inside a torch.func transform; use solve")
        if values.numel() == 0 or b.numel() == 0:
            x = self.empty(values, b, vector, check_errors)
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
        return autograd.solve(self, numeric, values, b, vector, False, failed if failed.any() else None), info

    def factorize(self, values: Tensor) -> NumericFactor | None:
        """The factor of values; None where there is nothing to factorize, or under a transform."""
        self.check_square()
        self.check_values(values)
        if values.numel() == 0:
            self._refuse_no_entries(values.shape[:-1], self.checks)
        return None if transformed() or values.numel() == 0 else self.find(values)

    def matmul(self, values: Tensor, x: Tensor, adjoint: bool) -> Tensor:
        """`SparseSystem.matmul`."""
        vector = self.check_product(values, x, None, adjoint)
        size = self.pattern.n if adjoint else self.pattern.m
        return autograd.matmul(self, values, x, vector, adjoint, size)

    # --- what autograd asks for ----------------------------------------------------------------------------------

    def find(self, values: Tensor, raising: bool | None = None) -> NumericFactor:
        """The factor of values that can be read: the one held, if they are equal bit by bit, or a new one.

        Args:
            raising: raise where values are not finite or a matrix has no factor; None: if this system checks.
        """
        values = plain(values.detach())
        if not values.is_cpu:
            return self._find_on_device(values, raising)
        raising = self.checks if raising is None else raising
        held = self._held
        if held is not None and held.same_values(values):
            self.stats.reuses += 1
            if raising and not held.finite:
                self.require_finite("values", values)
        else:
            if raising:
                self.require_finite("values", values)
            if self.checks and self.convention.mirror != NONE and not self.convention.one_triangle:
                self._require_symmetric(values)
            self._held = held = None  # its storage goes back to the pool before new storage is lent
            held = self._factorize(values)
            held.finite = raising
            if self.checks and held.failures is None:
                self._look_at_condition(held)
            if self.keep_factor:
                self._held = held
        if raising and held.failures is not None:
            self._held = None
            self._raise(held)
        return held

    def _look_at_condition(self, numeric: NumericFactor) -> None:
        """Warns of a factor that may be of no use although nothing is wrong with it."""
        rcond = numeric.estimate()
        self.stats.rcond = math.nan if rcond is None else float(np.nanmin(rcond))
        if rcond is None or not self._own or not self.stats.rcond < numeric.low_rcond:
            return
        e = int(np.nanargmin(rcond))
        where = _where(_batch_index(e, numeric.batch_shape))
        warnings.warn(
            IllConditionedWarning(
                f"the matrix{where} has an estimated reciprocal condition number of {rcond[e]:.1e}, rows and columns "
                f"scaled, below {numeric.low_rcond:.1e}: solutions have small residuals, but perhaps no correct digit "
                "(check=False does not look)"
            ),
            stacklevel=_outside(),
        )

    def _find_on_device(self, values: Tensor, raising: bool | None) -> NumericFactor:
        """As `find`. With check=False equal values are not recognized, and nobody waits for the device."""
        if self.options["cuda"] == "host":
            return HostFactor(self.find(to_host(values), raising), values.device)
        cudss.require_eager(values)
        raising = self.checks if raising is None else raising
        reading = self.checks or raising
        held = self._held
        if not (reading and isinstance(held, DeviceFactor) and held.may_be(values) and held.same_values(values)):
            self._held = held = None
            flags = self._flags(values) if reading else None
            held = self._factorize(values)
            assert isinstance(held, DeviceFactor)
            if flags is not None:
                held.settle()
                self._look(values, flags.tolist(), raising)
                held.finite = raising
            if self.keep_factor:
                self._held = held
        else:
            self.stats.reuses += 1
            if raising and not held.finite:
                self.require_finite("values", values)
        if raising and held.failures is not None:
            self._held = None
            self._raise(held)
        return held

    def _flags(self, values: Tensor) -> Tensor:
        """[1 + 2 *B] whether all values are finite; differences of the triangles and largest magnitudes."""
        flags = [torch.isfinite(values).all().double().reshape(1)]
        if self.checks and self.convention.mirror != NONE and not self.convention.one_triangle:
            flags += [t.double().reshape(-1) for t in self._pairs_on(values.device).asymmetry(
                values, self.convention.mirror == CONJUGATED)]  # fmt: skip
        return torch.cat(flags)

    def _look(self, values: Tensor, flags: list[float], raising: bool) -> None:
        if raising and not flags[0]:
            self.require_finite("values", values)
        batch = len(flags) // 2
        for e in range(batch):
            self._check_asymmetry(values, e, flags[1 + e], flags[1 + batch + e])

    def _pairs_on(self, device: torch.device) -> Pairs:
        pairs = self._pairs.get(device)
        return self._pairs.setdefault(device, Pairs(self.pattern, device)) if pairs is None else pairs

    def recall(self, memo: autograd.Memo, values: Tensor, b: Tensor) -> NumericFactor:
        """The factor of values from memo, by exact comparison, or found and put there."""
        values = plain(values.detach())
        numeric = next((f for f in memo if f.same_values(values)), None)
        if numeric is None:
            if memo.given:
                raise RuntimeError(MODIFIED)
            numeric = self.find(values)
            if self.keep_factor:
                memo.append(numeric)
        return numeric

    def run(
        self,
        factor: NumericFactor,
        values: Tensor,
        b: Tensor,
        vector: bool,
        adjoint: bool,
        check: bool,
        cotangent: bool,
    ) -> Tensor:
        if check and self.checks:
            self.require_finite("b", b)
        x = factor.solve(b, vector, adjoint)
        if factor.failed is not None and cotangent:
            x = silence(x, b.expand(x.shape), factor.failed, vector)
        return x

    def outer(self, u: Tensor, w: Tensor, vector: bool, nnz: int) -> Tensor:
        return self.convention.outer(u, w, vector)

    def matvec(self, values: Tensor, x: Tensor, adjoint: bool, size: int) -> Tensor:
        return self.convention.matvec(values, x, adjoint)

    def _factorize(self, values: Tensor) -> NumericFactor:
        device = None if values.is_cpu else values.device
        kind = "general" if self._kind == "auto" else self._kind
        if self._kind == "auto" and self._looks_positive(values):
            numeric = self._pool("spd", device).factorize(values, self.checks)
            if isinstance(numeric, DeviceFactor):
                numeric.settle()
            if numeric.failures is None:
                return numeric
            del numeric
        if self._engine(device or torch.device("cpu"), kind) in (ldl, lu):
            return self._factorize_pivoted(kind, values)
        return self._pool(kind, device).factorize(values, self.checks)

    def _factorize_pivoted(self, kind: str, values: Tensor) -> NumericFactor:
        """L D L^H, or L U, with pivots chosen inside of fronts, rows in an order that the first values ask for. Where
        they cannot be trusted: with rows paired by these values, and if that does not help by KLU."""
        if self._distrust >= _DISTRUST:
            return self._pool(kind, None, careful=True).factorize(values, self.checks)
        if self._partner is None and kind not in self._pools:
            self._partner = self._pairing(kind, values, 0, first=True)
        numeric = self._pool(kind, None, self._partner).factorize(values, self.checks)
        if numeric.failures is None or not self.checks:
            self._distrust = 0
            return numeric
        failed = next(e for e, f in enumerate(numeric.failures) if f is not None)
        del numeric
        partner = self._pairing(kind, values, failed, first=False)
        if partner is not None and partner != self._partner:
            numeric = self._pool(kind, None, partner).factorize(values, self.checks)
            self.stats.repivots += numeric.storage.batch
            if numeric.failures is None:
                self._pools.pop(_key(kind, self._partner), None)
                self._partner, self._distrust = partner, 0
                return numeric
            self._pools.pop(_key(kind, partner))
            del numeric
        numeric = self._pool(kind, None, careful=True).factorize(values, self.checks)
        self.stats.repivots += numeric.storage.batch
        self._distrust += numeric.failures is None
        return numeric

    def _pairing(self, kind: str, values: Tensor, e: int, first: bool) -> Permutation | None:
        """Pairs of rows by the e-th matrix of a batch, as `ldl.pairing` and `lu.pairing`; first of all, as their
        `arrangement`."""
        start = perf_counter()
        engine = self._engine(torch.device("cpu"), kind)
        contributions = self._contributions(kind, True)
        address, dtype = next(islice(_matrices(values), e, None))
        structure, assembly = contributions.structure, self._assembly_of(engine, kind, contributions)
        what = assembly, address, self.pattern.nnz, dtype
        if first:
            partner = engine.arrangement(structure, *what, *self._ordering(kind))
        else:
            partner = engine.pairing(structure, engine.magnitudes(*what, structure))
        self.stats.seconds["analyze"] += perf_counter() - start
        return None if partner is None else Permutation(partner)

    def _ordering(self, kind: str) -> tuple[Any, ...]:
        """The ordering's name, and its permutation where that is known."""
        ordering = self.options["ordering"]
        named = ("given", ordering.pivots) if isinstance(ordering, Permutation) else (ordering,)
        return self.orderings.get(kind, named)

    def _factorize_carefully(self, values: Tensor, stalled: NumericFactor) -> NumericFactor:
        """The factor of values for which refinement has stalled: in working precision, or KLU with pivots chosen
        for them, or an error."""
        self.stats.repivots += stalled.storage.batch
        if isinstance(stalled, MixedFactor):
            numeric = stalled.in_working_precision(values, self.checks)
            if numeric.failures is None:
                return numeric
            if self._kind == "spd":
                self._raise(numeric)
        kind = "general" if self._kind == "auto" else self._kind
        numeric = self._pool(kind, None, careful=True).factorize(values, self.checks, fresh=True)
        if numeric.failures is not None:
            self._raise(numeric)
        numeric.last = True
        return numeric

    def _pool(
        self, kind: str, device: torch.device | None, partner: Permutation | None = None, careful: bool = False
    ) -> Pool:
        """The pool that serves a kind other than "auto"; its plan comes from the plan cache or is analyzed now. Without
        a device: of the CPU. With a pairing of rows: LDL^H or LU; careful: KLU, whatever the kind."""
        key: Any = ("careful", kind) if careful else _key(kind, partner) if device is None else (kind, device)
        pool = self._pools.get(key)
        if pool is None:
            start = perf_counter()
            device = device or torch.device("cpu")
            engine = klu if careful else self._engine(device, kind)
            on_device = engine is cudss
            if on_device and self.options["precision"] == "mixed":
                raise EngineUnavailableError(
                    "precision='mixed' is for CPU tensors; pass precision='working', or cuda='host' for factors on "
                    "the CPU"
                )
            contributions = self._contributions(kind, on_device or engine is ldl)
            ordering = self.options["ordering"]
            if careful and isinstance(ordering, str) and ordering not in klu.ORDERINGS:
                ordering = "auto"
            structure = contributions.structure
            named: tuple[Any, ...] = ("given", ordering.pivots) if isinstance(ordering, Permutation) else (ordering,)
            if not on_device:
                if not careful and partner is None:
                    named = self.orderings.get(kind, named)
            elif len(named) > 1:
                raise EngineUnavailableError(
                    "cuDSS orders by itself: a permutation as ordering serves CPU tensors; name an ordering, or pass "
                    "cuda='host'"
                )
            where: tuple[Any, ...] = (kind, device) if on_device else ()
            if partner is not None:
                where = (partner.pivots,) if len(named) > 1 else (None, partner.pivots)

            def analyze() -> Any:
                return engine.analyze(structure, *named, *where)

            paired = where if partner is None else (partner,)
            plan, found = plan_cache.find((engine.__name__, engine.variant(), structure, ordering, *paired), analyze)
            assembly = self._assembly_of(plan, kind, contributions)
            if on_device:
                pool = DevicePool(self.pattern.n, plan, assembly, self.stats, self.convention.matvec, self.checks)
            else:
                mixed = self.options["precision"] == "mixed" and engine not in _DOUBLE_ONLY
                pool = (MixedPool if mixed else Pool)(
                    self.pattern.n, plan, assembly, self.stats, self.options["threads"], self.convention,
                    WeakMethod(self._factorize_carefully) if self.checks else None,
                )  # fmt: skip
            pool = self._pools.setdefault(key, pool)
            self.stats.analyses += not found
            self.stats.seconds["analyze"] += perf_counter() - start
        stats, plan = self.stats, pool.plan
        stats.engine, stats.ordering, stats.nnz_factor, stats.flops = plan.engine, plan.ordering, plan.nnz, plan.flops
        return pool

    def _assembly_of(self, plan: Any, kind: str, contributions: Contributions) -> Any:
        averaged = self.convention.mirror != NONE or kind == "spd"
        return plan.assembly(
            self.pattern.nnz, contributions.slots, contributions.sources, contributions.roles,
            0.5 if averaged and not self.convention.one_triangle else 1.0, kind in ("spd", "hermitian"),
        )  # fmt: skip

    def _engine(self, device: torch.device, kind: str) -> Any:
        if kind != "general" or device.type != "cpu":
            return engine_for(device.type, kind)
        if self._general is None:
            self._general = self._chosen()
        return self._general

    def _chosen(self) -> Any:
        """The engine of general matrices on the CPU, by structure and predicted work; see `lu.pays`."""
        ordering, structure = self.options["ordering"], self.pattern.stored.structure
        if not lu.in_question(structure.n, ordering):
            return klu
        start = perf_counter()
        key = (klu.__name__, klu.variant(), structure, "auto")
        plan, found = plan_cache.find(key, lambda: klu.analyze(structure, "auto"))
        engine = lu if lu.pays(plan.flops, plan.nnz, plan.largest_block / structure.n) else klu
        self.stats.analyses += engine is klu and ordering == "auto" and not found
        self.stats.seconds["analyze"] += perf_counter() - start
        return engine

    def _contributions(self, kind: str, triangle: bool) -> Contributions:
        """triangle: the engine takes one of every symmetric matrix."""
        if kind == "spd" or (triangle and kind != "general"):
            return self.pattern.lower
        return self.pattern.stored if kind == "general" else self.pattern.mirrored

    # --- checks --------------------------------------------------------------------------------------------------

    @property
    def _threads(self) -> int:
        return self.options["threads"] or torch.get_num_threads()

    def require_finite(self, name: str, t: Tensor) -> None:
        t = plain(t)
        if t.is_cpu:
            finite = all_finite(t.data_ptr(), t.numel(), DTYPE_CODES[t.dtype], self._threads)
        else:
            finite = bool(torch.isfinite(t).all())
        if finite:
            return
        t = t.detach()
        first = tuple((~torch.isfinite(t)).nonzero()[0].tolist())
        raise ValueError(
            f"{name} must be finite, got {t[first].item()} at {name}{list(first)} "
            f"(check=False lets it pass, solve_ex reports it)"
        )

    def _require_symmetric(self, values: Tensor) -> None:
        """Values whose triangles agree, as the kind says."""
        nnz = self.pattern.nnz
        found = self.pattern.paired.asymmetric(
            values.data_ptr(), values.numel() // nnz, nnz, DTYPE_CODES[values.dtype],
            self.convention.mirror == CONJUGATED, _ASYMMETRY, self._threads,
        )  # fmt: skip
        if found:
            self._check_asymmetry(values, *found)

    def _check_asymmetry(self, values: Tensor, e: int, difference: float, largest: float) -> None:
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
        if self.pattern.m != self.pattern.n:
            return False
        tolerance = _ROUNDING * torch.finfo(values.dtype).eps
        if not values.is_cpu:
            return self._pairs_on(values.device).positive_hermitian(values, tolerance)
        return all(
            self.pattern.paired.positive_hermitian(address, self.pattern.nnz, dtype, tolerance)
            for address, dtype in _matrices(values)
        )

    def _raise(self, numeric: NumericFactor) -> NoReturn:
        assert numeric.failures is not None
        e, failure = next((e, f) for e, f in enumerate(numeric.failures) if f is not None)
        batch = _batch_index(e, numeric.batch_shape)
        error = NotPositiveDefiniteError if failure.reason == "not positive definite" else SingularMatrixError
        raise error(describe(failure, self._kind) + _where(batch), failure.column, batch)

    def check_values(self, values: Tensor) -> None:
        if not isinstance(values, Tensor):
            raise TypeError(f"values must be a torch.Tensor, got {type(values).__name__}")
        if values.dtype not in DTYPE_CODES:
            raise TypeError(f"values must be float32, float64, complex64 or complex128, got {values.dtype}")
        if values.layout is not torch.strided:
            raise TypeError(
                f"values must be a dense vector of entries, got layout {values.layout}; "
                "SparseSystem.from_matrix and system.values_of take a sparse matrix"
            )
        if values.dim() < 1 or values.shape[-1] != self.pattern.nnz:
            raise ValueError(
                f"values must have shape (*batch, {self.pattern.nnz}), one number per column of indices, "
                f"got {tuple(values.shape)}"
            )
        if not values.is_cpu and not values.is_cuda:
            raise EngineUnavailableError(
                f"values are on {values.device}: spcache has engines for the CPU and CUDA; move values and b there"
            )

    def check_square(self) -> None:
        if self.pattern.m != self.pattern.n:
            raise ValueError(
                f"solve needs a square matrix, this system has shape {(self.pattern.m, self.pattern.n)}; "
                "lstsq is least squares with it, matmul a product"
            )

    def check_product(self, values: Tensor, x: Tensor, vector: bool | None, adjoint: bool) -> bool:
        """Checks the arguments of a product; as `check_arguments`."""
        return self.check_arguments(values, x, "x", self.pattern.m if adjoint else self.pattern.n, vector)

    def check_arguments(
        self, values: Tensor, b: Tensor, name: str = "b", length: int | None = None, vector: bool | None = None
    ) -> bool:
        """Checks both arguments; True where b holds vectors, which its rank says unless the caller does."""
        self.check_values(values)
        return self.check_rhs(values, b, name, length, vector)

    def check_rhs(self, values: Tensor, b: Tensor, name: str, length: int | None, vector: bool | None) -> bool:
        """The second half of `check_arguments`."""
        if not isinstance(b, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(b).__name__}")
        if b.dtype != values.dtype:
            raise TypeError(
                f"{name} must have the dtype of values, {values.dtype}, got {b.dtype}; "
                f"convert it: {name}.to(values.dtype)"
            )
        if b.layout is not torch.strided or not (b.is_cpu if values.is_cpu else b.device == values.device):
            raise TypeError(
                f"{name} must be a dense tensor on the device of values, got layout {b.layout} on {b.device}"
            )
        if length is None:
            self.check_square()
            length = self.pattern.m
        dims, batch = b.dim(), values.dim() - 1
        if vector is None:
            vector = dims == values.dim() or dims == 1
            fits = vector or dims > values.dim()
        else:  # with one vector for all values already made a matrix
            fits = dims >= 2 - vector
        own = 1 if vector else 2
        if not fits or b.shape[-own] != length:
            raise ValueError(_shapes_message(name, values, b, length))
        if batch and b.shape[:-own] != values.shape[:-1]:
            try:
                torch.broadcast_shapes(b.shape[:-own], values.shape[:-1])
            except RuntimeError:
                raise ValueError(_shapes_message(name, values, b, length)) from None
        return vector

    def empty(self, values: Tensor, b: Tensor, vector: bool, raising: bool) -> Tensor:
        """The solution where the system, the batch, b, or the values are empty; connected to values and b."""
        own = 1 if vector else 2
        lead = torch.broadcast_shapes(b.shape[:-own], values.shape[:-1])
        x = b.new_zeros(*lead, *b.shape[-own:]) + 0 * (b.sum() + values.sum())
        if x.numel() == 0:
            return x
        self._refuse_no_entries(lead, raising)  # neither b nor the batch is empty
        return x + torch.nan

    def _refuse_no_entries(self, batch: torch.Size, raising: bool) -> None:
        if raising and self.pattern.n and math.prod(batch):
            raise SingularMatrixError("the matrix has no entries (nnz = 0): structurally singular at column 0", 0)


# Where Dynamo gave up on a frame that calls them (`solve_ex` always, the others under a transform of a compiled
# function), they are called and not traced: inside there are native calls, and every pattern would compile anew.
for _door in ("solve", "solve_ex", "factorize", "matmul"):
    hide(Factorizer, _door)


def _matrices(values: Tensor) -> Iterator[tuple[int, int]]:
    """Address and scalar type of each matrix of a contiguous batch."""
    dtype, stride = DTYPE_CODES[values.dtype], values.shape[-1] * values.element_size()
    for e in range(math.prod(values.shape[:-1])):
        yield values.data_ptr() + e * stride, dtype


def _key(kind: str, partner: Permutation | None) -> Any:
    return kind if partner is None else (kind, partner)


def _batch_index(e: int, batch_shape: torch.Size) -> tuple[int, ...]:
    return tuple(int(i) for i in np.unravel_index(e, batch_shape)) if batch_shape else ()


def _outside() -> int:
    """The stack level, from who asks, of the first caller outside of the package and of torch, which may be between."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and (frame.f_globals.get("__package__") or "").split(".")[0] in ("spcache", "torch"):
        frame, level = frame.f_back, level + 1
    return level


def _where(batch: tuple[int, ...]) -> str:
    return f" (batch element {batch})" if batch else ""


def _shapes_message(name: str, values: Tensor, b: Tensor, length: int) -> str:
    batch = tuple(values.shape[:-1])
    return (
        f"{name} of shape {tuple(b.shape)} does not fit values of shape {tuple(values.shape)}: expected "
        f"({length},) or {(*batch, length)} for vectors, (*{list(batch)}, {length}, k) for matrices; with as many "
        f"dimensions as values {name} holds vectors, with more it holds matrices"
    )
