"""cuDSS (NVIDIA, 1.x): every kind on CUDA. Values, factors and solutions are tensors that never leave the device.

Other than the engines of protocol.py this one takes tensors: what it does with them besides calling cuDSS (summing
entries, changing the order of columns) are torch operations on the current stream. Nothing is loaded before the first
CUDA tensor; the library comes with `pip install spcache[cuda13]` (or [cuda12]), or is named by SPCACHE_CUDSS.

One `SymbolicFactor` is the plan of one structure on one device. Each matrix that is factorized at a time has a slot:
cuDSS keeps analysis and factor in one object, so that a second factor alive needs a second one. It is given the
permutation that the first analysis found, and makes the symbolic factorization anew.
"""

from __future__ import annotations

import ctypes.util
import importlib.util
import os
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching
from torch import Tensor

from ..errors import EngineUnavailableError
from ..torch_private import current_raw_stream
from . import _cudss
from .protocol import DTYPE_CODES, Failure, Structure

__all__ = ["ORDERINGS", "Assembly", "Storage", "SymbolicFactor", "analyze", "require_eager", "variant", "where"]

# Numbers of cuDSS. Phases may be added up.
REORDERING, SYMBOLIC, FACTORIZATION, REFACTORIZATION, SOLVE = 1, 2, 4, 8, 1008
REORDERING_ALG, MATCHING_ALG, SOLVE_MODE, DETERMINISTIC_MODE = 0, 3, 4, 24  # settings
INFO, LU_NNZ, NPIVOTS, PERM_REORDER_ROW, USER_PERM = 0, 1, 2, 4, 9  # data
NO_MATCHING, TRANSPOSED = 0, 1
GENERAL, SYMMETRIC, HERMITIAN, SPD, HPD = range(5)
FULL, UPPER = 0, 2

# ordering -> cudssReorderingAlg_t
_REORDERING = {"auto": 0, "colamd": 2, "amd": 3, "metis": 4, "natural": 5}
ORDERINGS = tuple(_REORDERING)

_MAJOR = 1  # numbers and signatures changed before, and may again


def library() -> _cudss.Library:
    """cuDSS. Loading it again costs microseconds.

    Raises:
        EngineUnavailableError: it is not there, or is another version; says what to install.
    """
    cuda = (torch.version.cuda or "13").partition(".")[0]
    remedy = (
        f"pip install 'spcache[cuda{cuda}]', or pass cuda='host' to SparseSystem to factorize CUDA tensors on the CPU"
    )
    path = _path(cuda)
    try:
        found = _cudss.Library(path)
    except OSError as error:
        raise EngineUnavailableError(f"CUDA tensors need cuDSS, which was not found ({error}): {remedy}") from None
    if found.version[0] != _MAJOR:
        version = ".".join(map(str, found.version))
        raise EngineUnavailableError(f"CUDA tensors need cuDSS {_MAJOR}.x, found {version} ({path}): {remedy}")
    return found


def where() -> str | None:
    """The file of cuDSS that a CUDA tensor would load, or None. Loads nothing."""
    path = _path((torch.version.cuda or "13").partition(".")[0])
    if os.sep not in path:
        return ctypes.util.find_library("cudss")
    return path if os.path.exists(path) else None


def variant() -> str:
    return ""


def _path(cuda: str) -> str:
    """What SPCACHE_CUDSS names; or in NVIDIA's wheel, else wherever the loader looks."""
    if named := os.environ.get("SPCACHE_CUDSS"):
        return named
    name = f"libcudss.so.{_MAJOR}"
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        for file in (Path(folder) / f"cu{cuda}" / "lib" / name, Path(folder) / "cudss" / "lib" / name):
            if file.exists():
                return str(file)
    return name


class Device:
    """Streams and memory of one CUDA device."""

    def __init__(self, device: torch.device):
        self.device = device

    def current(self) -> AbstractContextManager[Any]:
        """Makes it the current device."""
        return torch.cuda.device(self.device) if torch.cuda.current_device() != self.device.index else nullcontext()

    def stream(self) -> int:
        """The stream that torch works on now."""
        return current_raw_stream(self.device.index)

    def wait(self, stream: int, other: int) -> None:
        """What is done on `stream` from now on happens after all that was asked of `other`."""
        self._stream(stream).wait_stream(self._stream(other))

    def _stream(self, address: int) -> torch.cuda.Stream:
        if address == 0:  # which ExternalStream takes for a wish of a new one
            return torch.cuda.default_stream(self.device)
        return torch.cuda.ExternalStream(address, device=self.device)

    def allocate(self, nbytes: int, stream: int) -> int:
        return torch.cuda.caching_allocator_alloc(nbytes, self.device, stream)

    def release(self, address: int) -> None:
        torch.cuda.caching_allocator_delete(address)


def require_eager(t: Tensor) -> None:
    """Before anything waits for the device of t, which would spoil a capture."""
    if t.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "a solve cannot be captured into a CUDA graph: it reads its status; capture what comes before and after"
        )


def analyze(structure: Structure, ordering: str, kind: str, device: torch.device) -> SymbolicFactor:
    """The plan of a structure on a device; cuDSS analyzes it when the first matrix is factorized.

    Args:
        structure: n > 0, at least one entry; one triangle, but for kind "general".
        ordering: "auto" (cuDSS's choice, nested dissection), "metis" (nested dissection), "amd", "colamd", "natural".
        kind: all but "auto".
    """
    if ordering not in ORDERINGS:
        raise ValueError(f"ordering={ordering!r}: the cuDSS engine knows {', '.join(ORDERINGS)}")
    return SymbolicFactor(structure, ordering, kind, Device(device))


class SymbolicFactor:
    """The plan. The matrix goes to cuDSS as CSR: of a triangle stored by columns that is the upper one.

    Attributes:
        nnz, flops: of the factor, as cuDSS says; 0 and nan before the first analysis.
        hopeless: why no matrix of this structure has a factor, or None.
    """

    engine = "cudss"
    permutation = None

    def __init__(self, structure: Structure, ordering: str, kind: str, device: Device):
        self.kind, self.ordering, self.device = kind, ordering, device
        self.n, self.entries = structure.n, len(structure.indices)
        self.nnz, self.flops = 0, float("nan")
        self.library = library()
        indptr, indices = structure.indptr, structure.indices
        self.hopeless = _hopeless(structure, kind)
        self._place: np.ndarray | None = None  # of each canonical slot in the CSR array, where they differ
        if not structure.triangle:
            columns = np.repeat(np.arange(self.n, dtype=np.int32), np.diff(indptr))
            order = np.argsort(indices, kind="stable")
            self._place = np.empty(self.entries, np.int64)
            self._place[order] = np.arange(self.entries)
            indptr = np.concatenate([[0], np.cumsum(np.bincount(indices, minlength=self.n))])
            indices = columns[order]
        if self.entries > 2**31 - 1:
            raise ValueError(f"cuDSS is called with 32-bit indices, which {self.entries} entries exceed")
        where = device.device
        self.indptr = torch.from_numpy(np.ascontiguousarray(indptr, np.int32)).to(where)
        self.indices = torch.from_numpy(np.ascontiguousarray(indices, np.int32)).to(where)
        self._handles: dict[int, _cudss.Handle] = {}
        self._configs: dict[tuple[bool, bool], _cudss.Config] = {}
        self._permutation: np.ndarray | None = None
        self._lock = threading.Lock()  # nothing is waited for under it

    @property
    def nbytes(self) -> int:
        return self.indptr.nbytes + self.indices.nbytes

    def trim(self) -> None:
        """There is no idle scratch memory: cuDSS keeps its own in each slot."""

    def assembly(
        self, nnz: int, slots: np.ndarray, sources: np.ndarray, roles: np.ndarray, weight: float, hermitian: bool
    ) -> Assembly:
        """How the caller's values make up the CSR array; arguments as in protocol.py."""
        places = slots if self._place is None else self._place[slots]
        # roles 0 direct, 1 mirrored, 2 diagonal. What is stored by columns is handed over by rows: transposed, so that
        # of a Hermitian matrix it is the direct entries that have to be conjugated.
        weights = np.where(roles == 2, 1.0, weight)
        if not hermitian:
            return Assembly(self.entries, places, sources, weights, None, None, self.device.device)
        return Assembly(self.entries, places, sources, weights, roles == 0, roles == 2, self.device.device)

    def storage(self, dtype: int, batch: int) -> Storage:
        return Storage(self, dtype, batch)

    # --- of one scalar type --------------------------------------------------------------------------------------

    def handle(self, dtype: int) -> _cudss.Handle:
        """The handle of a scalar type, made on the current device."""
        handle = self._handles.get(dtype)
        if handle is None:
            made = _cudss.Handle(self.library, self.device.allocate, self.device.release)
            with self._lock:
                handle = self._handles.setdefault(dtype, made)
        return handle

    def config(self, transposed: bool) -> _cudss.Config:
        key = transposed, torch.are_deterministic_algorithms_enabled()
        config = self._configs.get(key)
        if config is None:
            made = _cudss.Config(
                self.library,
                {
                    REORDERING_ALG: _REORDERING[self.ordering],
                    MATCHING_ALG: NO_MATCHING,
                    SOLVE_MODE: TRANSPOSED if transposed else 0,
                    DETERMINISTIC_MODE: int(key[1]),
                },
            )
            with self._lock:
                config = self._configs.setdefault(key, made)
        return config

    def matrix(self, dtype: int, values: int) -> _cudss.Matrix:
        mtype = {
            "general": GENERAL,
            "symmetric": SYMMETRIC,
            "hermitian": HERMITIAN if dtype > 1 else SYMMETRIC,
            "spd": HPD if dtype > 1 else SPD,
        }[self.kind]
        return _cudss.Matrix.csr(
            self.library, self.n, self.entries, self.indptr.data_ptr(), self.indices.data_ptr(), values, dtype,
            mtype, FULL if mtype == GENERAL else UPPER,
        )  # fmt: skip

    def order(self, data: _cudss.Data, stream: int) -> bool:
        """Gives a slot the permutation that an earlier one found; False where there is none yet."""
        permutation = self._permutation
        if permutation is not None:
            data.set(USER_PERM, permutation, stream)
        return permutation is not None

    def learn(self, data: _cudss.Data, stream: int) -> None:
        """Remembers what the first analysis found; waits for the device."""
        self.nnz = int(data.get(LU_NNZ, np.zeros(1, np.int64), stream)[0])
        self._permutation = data.get(PERM_REORDER_ROW, np.empty(self.n, np.int32), stream)


def _hopeless(structure: Structure, kind: str) -> Failure | None:
    """By the structure alone: a diagonal entry that is not there, or a column that no row is left for."""
    n, columns = structure.n, np.repeat(np.arange(structure.n), np.diff(structure.indptr))
    if kind == "spd":
        there = np.zeros(n, bool)
        there[columns[structure.indices == columns]] = True
        return None if there.all() else Failure(int(np.argmin(there)), "not positive definite")
    A = csr_array((np.ones(len(columns), np.int8), structure.indices, structure.indptr), shape=(n, n))
    if structure.triangle:
        A = csr_array(A + A.T)
    row = maximum_bipartite_matching(A, perm_type="column")  # of each column: A is stored by columns
    return None if (row >= 0).all() else Failure(int(np.argmin(row)), "structurally singular")


class Assembly:
    """Sums of the caller's entries, on the device: out[places] += weights * values[sources], in a fixed order.

    Contributions come in levels: in each of them no place occurs twice, so that no two threads add to one number.

    Args:
        size: length of the result.
        conjugated, real: [contributions; bool] or None: contributions of conj(values), and of their real part.
    """

    def __init__(
        self, size: int, places: np.ndarray, sources: np.ndarray, weights: np.ndarray, conjugated: np.ndarray | None,
        real: np.ndarray | None, device: torch.device,
    ):  # fmt: skip
        self.size = size
        order = np.argsort(places, kind="stable")
        first = np.flatnonzero(np.diff(places[order], prepend=-1))
        rank = np.arange(len(order)) - np.repeat(first, np.diff(first, append=len(order)))
        self._levels = []
        for level in range(int(rank.max(initial=-1)) + 1):
            chosen = order[rank == level]

            def on_device(a: np.ndarray | None, chosen: np.ndarray = chosen) -> Tensor | None:
                return None if a is None or not a[chosen].any() else torch.from_numpy(a[chosen]).to(device)

            source = torch.from_numpy(sources[chosen].astype(np.int64)).to(device)
            complete = level == 0 and len(chosen) == size  # every place, in order
            target = None if complete else torch.from_numpy(places[chosen].astype(np.int64)).to(device)
            scaled = on_device(weights - 1)
            self._levels.append(
                (target, source, None if scaled is None else scaled + 1, on_device(conjugated), on_device(real))
            )

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for level in self._levels for t in level if t is not None)

    def __call__(self, values: Tensor) -> Tensor:
        """[*B, nnz] -> [*B, size]"""
        out = values.new_zeros(*values.shape[:-1], self.size)
        for target, source, weights, conjugated, real in self._levels:
            v = values.index_select(-1, source)
            if v.is_complex():
                if conjugated is not None:
                    v = torch.where(conjugated, v.conj(), v)
                if real is not None:
                    v = torch.where(real, v.real.to(v.dtype), v)
            if weights is not None:
                v = v * weights.to(v.real.dtype)
            if target is None:
                out = v
            else:
                out.index_copy_(-1, target, out.index_select(-1, target) + v)
        return out.contiguous()


class _Slot:
    """One matrix: cuDSS's data, and the descriptor of the values."""

    def __init__(self, plan: SymbolicFactor, dtype: int):
        self.plan, self.dtype = plan, dtype
        self.data = _cudss.Data(plan.handle(dtype))
        self.A: _cudss.Matrix | None = None
        self.analyzed = self.factorized = False

    def execute(self, phase: int, transposed: bool, x: _cudss.Matrix, b: _cudss.Matrix, stream: int) -> None:
        assert self.A is not None
        self.plan.handle(self.dtype).execute(phase, self.plan.config(transposed), self.data, self.A, x, b, stream)

    def factorize(self, values: int, any_columns: _cudss.Matrix, stream: int) -> None:
        """any_columns: cuDSS wants right-hand sides from the analysis on; they are not read."""
        if self.A is None:
            self.A = self.plan.matrix(self.dtype, values)
        self.A.set_values(values)
        if not self.analyzed:
            given = self.plan.order(self.data, stream)
            self.execute(REORDERING | SYMBOLIC, False, any_columns, any_columns, stream)
            if not given:
                self.plan.learn(self.data, stream)
            self.analyzed = True
        self.data.set(INFO, np.zeros(1, np.int32), stream)  # it is sticky
        self.execute(REFACTORIZATION if self.factorized else FACTORIZATION, False, any_columns, any_columns, stream)
        self.factorized = True

    def number(self, parameter: int, stream: int) -> int:
        return int(self.data.get(parameter, np.zeros(1, np.int32), stream)[0])


class Storage:
    """The factors of one batch of values, used by one stream after the other.

    Attributes:
        refactorized: the latest factorization reused the structures of an earlier one.
        perturbed: [batch] pivots that were replaced in the latest one; after `failures`.
    """

    repivots = 0
    doubtful = False  # refinement is cuDSS's own

    def __init__(self, plan: SymbolicFactor, dtype: int, batch: int):
        if not 0 <= dtype < 4 or batch < 1:
            raise ValueError("unknown scalar type, or empty batch")
        self.plan, self.dtype, self.batch = plan, dtype, batch
        self.refactorized = False
        self.perturbed: list[int] = []
        self._slots: list[_Slot] = []
        self._values: Tensor | None = None  # what the descriptors point to
        self._stream: int | None = None  # that used it last
        self._streams: set[int] = set()  # all that used it: the factors' memory is theirs
        self._lock = threading.Lock()  # over calls of cuDSS, which are asynchronous: streams and slots change together

    @property
    def nbytes(self) -> int:
        itemsize = (4, 8, 8, 16)[self.dtype]
        values = 0 if self._values is None else self._values.nbytes
        return values + len(self._slots) * (self.plan.nnz * itemsize + 4 * self.plan.n)

    @property
    def nnz(self) -> int:
        return self.plan.nnz if self._slots else 0

    def _enter(self) -> int:
        """The current stream, made to wait for the one that used the factors before."""
        device = self.plan.device
        stream = device.stream()
        if self._stream is not None and stream != self._stream:
            device.wait(stream, self._stream)
        self._stream = stream
        self._streams.add(stream)
        return stream

    def __del__(self) -> None:
        for stream in self._streams:
            if self._stream is not None and stream != self._stream:
                self.plan.device.wait(stream, self._stream)

    def _columns(self, t: Tensor, count: int) -> _cudss.Matrix:
        return _cudss.Matrix.dense(self.plan.library, self.plan.n, count, t.data_ptr(), self.dtype)

    def factorize(self, assembly: Assembly, values: Tensor) -> None:
        """Factors values [batch, nnz], without waiting for the device (but in a first analysis)."""
        assembled = assembly(values)
        with self._lock, self.plan.device.current():
            stream = self._enter()
            self.perturbed = []
            self.refactorized = bool(self._slots)
            while len(self._slots) < self.batch:
                self._slots.append(_Slot(self.plan, self.dtype))
            self.refactorized = self.refactorized and all(slot.factorized for slot in self._slots)
            self._values = assembled
            if self.plan.hopeless is not None:
                return
            dummy = assembled.new_empty(self.plan.n)
            columns = self._columns(dummy, 1)
            stride = assembled.shape[-1] * assembled.element_size()
            for e, slot in enumerate(self._slots):
                slot.factorize(assembled.data_ptr() + e * stride, columns, stream)

    def failures(self) -> Sequence[Failure | None] | None:
        """As in protocol.py; waits for the device. The column is cuDSS's: in its own numbering of pivots."""
        reason = "not positive definite" if self.plan.kind == "spd" else "singular"
        if self.plan.hopeless is not None:
            return [self.plan.hopeless] * self.batch
        with self._lock, self.plan.device.current():
            stream = self._enter()
            info = [slot.number(INFO, stream) for slot in self._slots]
            self.perturbed = [0] * self.batch
            if self.plan.kind != "spd":
                self.perturbed = [slot.number(NPIVOTS, stream) for slot in self._slots]
        if not any(info):
            return None
        return [Failure(min(abs(k), self.plan.n) - 1, reason) if k else None for k in info]

    def solve(self, b: Tensor, e: int, transposed: bool) -> Tensor:
        """x [columns, n] with A[e] x = b, or A[e]^T x = b; b [columns, n], contiguous."""
        x = torch.empty_like(b)
        at_once = 1 if torch.are_deterministic_algorithms_enabled() else len(b)
        with self._lock, self.plan.device.current():
            stream = self._enter()
            for k in range(0, len(b), at_once):
                count = min(at_once, len(b) - k)
                self._slots[e].execute(
                    SOLVE, transposed, self._columns(x[k], count), self._columns(b[k], count), stream
                )
        return x


assert list(DTYPE_CODES.values()) == [0, 1, 2, 3]
