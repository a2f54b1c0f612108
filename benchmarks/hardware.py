"""What a machine with a CUDA device says of spcache: its tests, the questions that only hardware answers, and times.

    python benchmarks/hardware.py [--out docs/hardware.md]

Appends a dated section of Markdown to --out, and writes it anew after every task, so that what was done survives a
kill. Tasks run in a process that is replaced where one of them hangs, crashes or spoils the device; what went wrong is
its answer. Residuals are scaled, ||Ax - b|| / (||A||_1 ||x|| + ||b||) in the largest norm, in units of eps.
"""

import argparse
import importlib.util
import json
import os
import platform
import re
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from functools import cache, partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

import spcache
from spcache import SparseSystem, plan_cache
from spcache.engines import _cudss, cudss, multifrontal
from spcache.engines.protocol import DTYPE_CODES, Structure

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 450  # of everything, unless --seconds says otherwise
TEST_SECONDS = 170
NONE_YET = "No run on hardware has been recorded yet.\n"
DEVICE = torch.device("cuda", 0)

F32, F64, C64, C128 = torch.float32, torch.float64, torch.complex64, torch.complex128
KINDS = ["general", "symmetric", "hermitian", "spd", "hpd"]
FULL, LOWER, UPPER = range(3)
ANALYSIS, FACTORIZATION, REFACTORIZATION, SOLVE = 3, 4, 8, 1008
REORDERING, SYMBOLIC = 1, 2
MATCHING, MODE, DETERMINISTIC, REORDERING_ALG = 3, 4, 24, 0  # settings
INFO, LU_NNZ, NPIVOTS, INERTIA, PERM, DIAG, USER_PERM = 0, 1, 2, 3, 4, 8, 9  # data


class Task(NamedTuple):
    """A question or a measurement. `run(quick)` returns Markdown, or a bare sentence."""

    title: str
    limit: float  # seconds
    benchmark: bool
    run: Callable[[bool], str]


TASKS: dict[str, Task] = {}


def task(title: str, limit: float = 40, benchmark: bool = False) -> Callable[[Callable[[bool], str]], Any]:
    def add(run: Callable[[bool], str]) -> Callable[[bool], str]:
        TASKS[run.__name__] = Task(title, limit, benchmark, run)
        return run

    return add


def table(head: list[str], rows: list[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}"


def short(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".replace("|", "/")[:300]


# --- time, memory, matrices -------------------------------------------------------------------------------------------


def timed(run: Callable[[], Any], repeats: int = 5, seconds: float = 3.0, warm: int = 1) -> tuple[float, float]:
    """Medians of the time until the calls return, and until the device is done; fewer repeats where they are long."""
    for _ in range(warm):
        run()
    host, total, begin = [], [], time.perf_counter()
    while len(total) < repeats and (not total or time.perf_counter() - begin < seconds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        host.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        total.append(time.perf_counter() - start)
    return median(host), median(total)


def once(run: Callable[[], Any]) -> float:
    return timed(run, 1, warm=0)[1]


def grid(*shape: int) -> tuple[np.ndarray, int]:
    """Edges [2, edges] of a grid and the number of its nodes; the later node first."""
    i = np.arange(np.prod(shape)).reshape(shape)
    pairs = [
        np.stack([np.take(i, range(1, s), a).ravel(), np.take(i, range(s - 1), a).ravel()]) for a, s in enumerate(shape)
    ]
    return np.concatenate(pairs, 1), i.size


def laplacian(*shape: int) -> sp.csr_array:
    """Positive definite: the Laplacian of a grid with random weights, plus a tenth."""
    (rows, columns), n = grid(*shape)
    w = np.random.default_rng(0).random(len(rows)) + 0.5
    off = sp.coo_array((-w, (rows, columns)), shape=(n, n))
    off = (off + off.T).tocsr()
    return sp.csr_array(off + sp.dia_array((0.1 - off.sum(0)[None], [0]), shape=(n, n)))


def matrix(kind: str, dtype: torch.dtype, n: int = 200) -> sp.csr_array:
    """Sparse, diagonally dominant: no pivoting is needed."""
    rng = np.random.default_rng(1)
    A = sp.random_array((n, n), density=0.02, rng=rng)
    if dtype.is_complex:
        A = A + 1j * sp.random_array((n, n), density=0.02, rng=rng)
    if kind != "general":
        A = A + (A.T if kind == "symmetric" else A.conj().T)
    d = abs(A).sum(0) + abs(A).sum(1) + 1
    if kind in ("symmetric", "hermitian"):
        d = d * (-1.0) ** np.arange(n)
    if dtype.is_complex and kind in ("general", "symmetric"):
        d = d * np.exp(0.3j)
    return sp.csr_array(A + sp.dia_array((d[None], [0]), shape=(n, n)))


@cache
def library() -> _cudss.Library:
    return cudss.library()


class Handle:
    """cuDSS's handle with torch's memory, and what went through."""

    def __init__(self) -> None:
        self.device, self.calls, self.largest = cudss.Device(DEVICE), 0, 0
        with self.device.current():
            self.object = _cudss.Handle(library(), self._allocate, self.device.release)

    def _allocate(self, nbytes: int, stream: int) -> int:
        self.calls, self.largest = self.calls + 1, max(self.largest, nbytes)
        return self.device.allocate(nbytes, stream)


@cache
def handle(dtype: torch.dtype) -> Handle:
    return Handle()


class Raw:
    """One matrix in cuDSS, by the binding alone.

    Args:
        A: all of it; what the view leaves out is not given to cuDSS.
        kind: of KINDS; "spd" and "hermitian" are taken for what they are in the dtype.
    """

    def __init__(self, A: Any, kind: str, dtype: torch.dtype = F64, view: int = LOWER, own: Handle | None = None):
        kind = {("spd", True): "hpd", ("hermitian", False): "symmetric"}.get((kind, dtype.is_complex), kind)
        view = FULL if kind == "general" else view
        self.full = sp.csr_array(A)
        stored = sp.csr_array([self.full, sp.tril(self.full), sp.triu(self.full)][view])
        stored.sort_indices()
        self.n, self.dtype, self.code = stored.shape[0], dtype, DTYPE_CODES[dtype]
        self.indptr = torch.from_numpy(stored.indptr.astype(np.int32)).to(DEVICE)
        self.indices = torch.from_numpy(stored.indices.astype(np.int32)).to(DEVICE)
        self.values = torch.from_numpy(stored.data).to(DEVICE, dtype)
        self.handle = own or handle(dtype)
        self.data = _cudss.Data(self.handle.object)
        self.A = _cudss.Matrix.csr(
            library(), self.n, len(stored.data), self.indptr.data_ptr(), self.indices.data_ptr(),
            self.values.data_ptr(), self.code, KINDS.index(kind), view,
        )  # fmt: skip
        self.dummy = torch.empty(self.n, dtype=dtype, device=DEVICE)

    def columns(self, t: Tensor) -> _cudss.Matrix:
        """t [columns, n]"""
        return _cudss.Matrix.dense(library(), self.n, t.numel() // self.n, t.data_ptr(), self.code)

    def execute(self, phase: int, settings: dict[int, int] | None = None, x: Any = None, b: Any = None) -> None:
        config = _cudss.Config(library(), {MATCHING: 0, **(settings or {})})
        to, of = (self.columns(self.dummy if t is None else t) for t in (x, b))
        self.handle.object.execute(phase, config, self.data, self.A, to, of, self.handle.device.stream())

    def factorize(self, settings: dict[int, int] | None = None) -> None:
        self.execute(ANALYSIS, settings)
        self.execute(FACTORIZATION, settings)

    def set_values(self, values: Any) -> None:
        self.values = torch.as_tensor(values).to(DEVICE, self.dtype)
        self.A.set_values(self.values.data_ptr())

    def solve(self, b: Tensor, settings: dict[int, int] | None = None) -> Tensor:
        x = torch.full_like(b, torch.nan)
        self.execute(SOLVE, settings, x, b)
        return x

    def rhs(self, columns: int = 1) -> Tensor:
        wide = C128 if self.dtype.is_complex else F64
        g = torch.Generator().manual_seed(columns)
        return torch.randn(columns, self.n, dtype=wide, generator=g).to(DEVICE, self.dtype)

    def residual(self, x: Tensor, b: Tensor, mode: int = 0) -> float:
        """Scaled, in units of eps; of A, A^T or A^H."""
        A = self.full if mode == 0 else self.full.T if mode == 1 else self.full.conj().T
        x, b = (t.cpu().numpy().T.astype(complex) for t in (x, b))
        scale = abs(A).sum(0).max() * abs(x).max(0) + abs(b).max(0)
        return float((abs(A @ x - b).max(0) / scale).max()) / torch.finfo(self.dtype).eps

    def check(self, columns: int = 1, mode: int = 0, settings: dict[int, int] | None = None) -> str:
        """The residual of a solve, or the status."""
        try:
            b = self.rhs(columns)
            return f"{self.residual(self.solve(b, {MODE: mode, **(settings or {})}), b, mode):.2g}"
        except Exception as error:
            return short(error)

    def get(self, parameter: int, dtype: Any = np.int32, count: int = 1) -> np.ndarray:
        return self.data.get(parameter, np.zeros(count, dtype), self.handle.device.stream())

    def number(self, parameter: int) -> Any:
        """Of data, or the status."""
        try:
            return int(self.get(parameter, np.int64 if parameter == LU_NNZ else np.int32)[0])
        except Exception as error:
            return short(error)

    @property
    def permutation(self) -> np.ndarray:
        return self.get(PERM, np.int32, self.n)


def inverse(permutation: np.ndarray) -> np.ndarray:
    return np.argsort(permutation).astype(np.int32)


# --- questions --------------------------------------------------------------------------------------------------------


@task("cuDSS: version, loading after torch, cost of cudssCreate")
def loading(quick: bool) -> str:
    torch.zeros(1, device=DEVICE)
    first = once(library)
    again = once(lambda: _cudss.Library(where()))
    handles: list[Handle] = []
    create = [once(lambda: handles.append(Handle())) for _ in range(3)]
    free = torch.cuda.mem_get_info()[0]
    handles.append(Handle())
    held = free - torch.cuda.mem_get_info()[0]
    version = ".".join(map(str, library().version))
    return (
        f"cuDSS {version} at `{where()}`. dlopen {ms(first)} ms, again {ms(again)} ms. cudssCreate "
        f"{', '.join(map(ms, create))} ms; a fourth takes {held / 2**20:.1f} MiB of the device."
    )


def where() -> str:
    return os.environ.get("SPCACHE_CUDSS") or cudss._find((torch.version.cuda or "13").partition(".")[0])


@task("First use: milliseconds of each phase, of the first matrix and of others", 60)
def first_use(quick: bool) -> str:
    rows = []
    for name, kind, dtype, n in [
        ("first", "spd", F64, 50), ("the same again", "spd", F64, 50), ("another size", "spd", F64, 2000),
        ("float32", "spd", F32, 50), ("general", "general", F64, 50), ("general, complex", "general", C128, 50),
        ("general, complex, again", "general", C128, 50),
    ]:  # fmt: skip
        raw = Raw(matrix(kind, dtype, n), kind, dtype)
        solve = partial(raw.solve, raw.rhs())
        runs = [partial(raw.execute, p) for p in (REORDERING, SYMBOLIC, FACTORIZATION, REFACTORIZATION)]
        rows.append([name, *(ms(once(run)) for run in [*runs, solve, solve])])
    return table(["matrix", "reordering", "symbolic", "factorization", "refactorization", "solve", "again"], rows)


@task("Positive definite matrices by one triangle: residuals")
def triangles(quick: bool) -> str:
    rows = []
    for dtype in (F32, F64, C64, C128):
        row = [dtype]
        for view in (LOWER, UPPER, FULL):
            try:
                raw = Raw(matrix("spd", dtype), "spd", dtype, view)
                raw.factorize()
                row.append(raw.check())
                raw.execute(REFACTORIZATION)
                row.append(raw.check())
            except Exception as error:
                row += [short(error), "-"]
        rows.append(row)
    return table(["dtype", "lower", "refactorized", "upper", "refactorized", "full", "refactorized"], rows)


@task("Time of each phase: until the call returns / until the device is done, ms", 60)
def phases(quick: bool) -> str:
    rows = []
    for name, A in [
        ("2-D", laplacian(*(2 * [100 if quick else 300]))),
        ("3-D", laplacian(*(3 * [15 if quick else 30]))),
    ]:
        for kind in ("spd", "symmetric", "general"):
            raw = Raw(A, kind)
            row = [f"{name}, n = {raw.n}, {kind}"]
            row += [ms(once(partial(raw.execute, p))) for p in (REORDERING, SYMBOLIC, FACTORIZATION)]
            x, b = raw.rhs(), raw.rhs()
            for run in (
                partial(raw.execute, FACTORIZATION), partial(raw.execute, REFACTORIZATION), partial(raw.solve, b),
                partial(raw.execute, REFACTORIZATION | SOLVE, None, x, b), partial(raw.get, INFO),
                partial(raw.data.set, INFO, np.zeros(1, np.int32)),
            ):  # fmt: skip
                try:
                    row.append(" / ".join(map(ms, timed(run))))
                except Exception as error:
                    row.append(short(error))
            rows.append([*row, raw.number(LU_NNZ), raw.check()])
    head = ["matrix", "reordering", "symbolic", "first factorization", "factorization", "refactorization", "solve",
            "refactorization + solve", "read INFO", "set INFO", "LU_NNZ", "residual"]  # fmt: skip
    return table(head, rows)


@task("SOLVE_MODE × kind × dtype × matching × right-hand sides: residual or status", 90)
def solve_modes(quick: bool) -> str:
    rows = []
    for kind, dtype, matching in product(("general", "symmetric", "hermitian", "spd"), (F32, F64, C64, C128), (0, 6)):
        if kind == "hermitian" and not dtype.is_complex:
            continue
        row = [kind, str(dtype).removeprefix("torch."), "AUTO" if matching else "NONE"]
        try:
            raw = Raw(matrix(kind, dtype), kind, dtype)
            raw.factorize({MATCHING: matching})
            cells = [raw.check(k, mode, {MATCHING: matching}) for mode, k in product(range(3), (1, 8, 64))]
        except Exception as error:
            cells = [short(error)] + ["-"] * 8
        rows.append(row + cells)
    return table(["kind", "dtype", "matching", *[f"{m} {k}" for m, k in product("NTH", (1, 8, 64))]], rows)


@task("INFO: which pivot, in whose numbering; whether it stays; recovery")
def info(quick: bool) -> str:
    n, rows = 40, []
    tridiagonal = sp.diags_array([-1.0, 4.0, -1.0], offsets=[-1, 0, 1], shape=(n, n)).tocsr()
    for name, reordering in [("default order", 0), ("natural order", 5), ("AMD", 3)]:
        for k in (0, 17, n - 1):
            raw = Raw(tridiagonal, "spd")
            A = tridiagonal.copy()
            A[k, k] = -1e3  # row k fails wherever it comes, and nothing before it
            good, bad = (sp.tril(M).tocsr().data for M in (tridiagonal, A))
            settings = {REORDERING_ALG: reordering}
            raw.set_values(bad)
            raw.execute(ANALYSIS, settings)
            raw.execute(FACTORIZATION, settings)
            at_once = raw.number(INFO)
            torch.cuda.synchronize()
            read, p = raw.number(INFO), raw.permutation
            raw.set_values(good)
            raw.execute(REFACTORIZATION, settings)
            sticky = raw.number(INFO)
            raw.data.set(INFO, np.zeros(1, np.int32))
            reset = raw.number(INFO)
            rows.append(
                [name, k, at_once, read, int(p[k]), int(inverse(p)[k]), sticky, reset, raw.check(settings=settings)]
            )
    head = ["order", "bad row k", "INFO at once", "after synchronize", "perm[k]", "position of k in perm",
            "INFO after a good refactorization", "after set 0", "residual then"]  # fmt: skip
    more = []
    for spoil, kind in [(0.0, "symmetric"), (0.0, "general"), (0.0, "spd"), (np.nan, "spd"), (np.nan, "general"),
                        (np.nan, "symmetric"), (None, "symmetric")]:  # fmt: skip
        A = tridiagonal.tocoo(copy=True)
        if spoil is not None:
            A.data[(A.coords[0] == 17) | (A.coords[1] == 17)] = spoil
        raw = Raw(A, kind)
        raw.factorize()
        more.append(
            [
                kind,
                "nothing" if spoil is None else f"{spoil} in row 17",
                raw.number(INFO),
                raw.number(NPIVOTS),
                raw.check(),
            ]
        )
    return table(head, rows) + "\n\n" + table(["kind", "spoilt by", "INFO", "NPIVOTS", "residual"], more)


@task("DIAG of a positive definite, a symmetric and a general diagonal matrix")
def diagonal(quick: bool) -> str:
    rows, d = [], np.array([4.0, 9, 16, 25, 36])
    for kind in ("spd", "symmetric", "general"):
        raw = Raw(sp.diags_array(d).tocsr(), kind)
        raw.factorize()
        try:
            rows.append([kind, d.tolist(), raw.get(DIAG, np.float64, 5).tolist(), raw.permutation.tolist()])
        except Exception as error:
            rows.append([kind, d.tolist(), short(error), raw.permutation.tolist()])
    return table(["kind", "matrix", "DIAG", "PERM_REORDER_ROW"], rows)


def structure_of(A: sp.csr_array) -> Structure:
    L = sp.csc_array(sp.tril(A))
    L.sort_indices()
    return Structure(A.shape[0], L.indptr.astype(np.int64), L.indices.astype(np.int32), True)


def with_permutations(A: sp.csr_array, kind: str, permutations: dict[str, np.ndarray | None]) -> list[list[Any]]:
    """Each as USER_PERM: times, fill, residual, and the fill that our own analysis counts."""
    rows, structure = [], structure_of(A)
    for name, p in permutations.items():
        try:
            raw = Raw(A, kind)
            if p is not None:
                raw.data.set(USER_PERM, np.ascontiguousarray(p, np.int32))
            times = [once(partial(raw.execute, phase)) for phase in (REORDERING, SYMBOLIC)]
            raw.execute(FACTORIZATION)
            times += [
                timed(partial(raw.execute, REFACTORIZATION))[1],
                timed(partial(raw.solve, raw.rhs()))[1],
            ]
            found = raw.permutation
            same = (
                "-"
                if p is None
                else "yes"
                if (found == p).all()
                else "inverse"
                if (found == inverse(p)).all()
                else "no"
            )
            ours = [multifrontal.analyze(structure, "given", q).nnz for q in (found, inverse(found))]
            rows.append([kind, name, *map(ms, times), raw.number(LU_NNZ), *ours, same, raw.check()])
        except Exception as error:
            rows.append([kind, name, short(error), *"--------"])
    return rows


PERMUTATION_HEAD = [
    "kind", "USER_PERM", "reordering ms", "symbolic ms", "refactorization ms", "solve ms", "LU_NNZ",
    "fill of PERM_REORDER_ROW as new-to-old", "as old-to-new", "returned as given", "residual",
]  # fmt: skip


@task(
    "A second data object with the permutation of the first: is it reproduced, does it save time, which way round", 60
)
def second_data(quick: bool) -> str:
    A, rows = laplacian(*(2 * [60 if quick else 200])), []
    for kind in ("spd", "general"):
        raw = Raw(A, kind)
        raw.execute(ANALYSIS)
        p = raw.permutation
        rng = np.random.default_rng(0)
        given = {"none": None, "PERM_REORDER_ROW": p, "its inverse": inverse(p),
                 "identity": np.arange(raw.n, dtype=np.int32)}  # fmt: skip
        if raw.n < 5000:
            given["random"] = rng.permutation(raw.n).astype(np.int32)
        rows += with_permutations(A, kind, given)
    return table(PERMUTATION_HEAD, rows)


@task("METIS's permutation of the CPU's plan as USER_PERM", 60)
def metis(quick: bool) -> str:
    rows = []
    for shape in [(100, 100), (15, 15, 15)] if quick else [(300, 300), (30, 30, 30)]:
        A = laplacian(*shape)
        start = time.perf_counter()
        p = np.asarray(multifrontal.analyze(structure_of(A), "metis").permutation, np.int32)
        seconds = time.perf_counter() - start
        given = {"none": None, f"METIS ({ms(seconds)} ms on the CPU)": p, "its inverse": inverse(p)}
        rows += [[f"{'×'.join(map(str, shape))}, {row[0]}", *row[1:]] for row in with_permutations(A, "spd", given)]
    return table(PERMUTATION_HEAD, rows)


@task("Device memory: through our callbacks, and past them")
def memory(quick: bool) -> str:
    A, rows = laplacian(*(3 * [15 if quick else 40])), []
    own = Handle()
    torch.cuda.synchronize()

    def state() -> tuple[int, int]:
        return torch.cuda.mem_get_info()[0], torch.cuda.memory_reserved()

    raw = Raw(A, "spd", own=own)
    x, b, (free_before, reserved_before) = raw.rhs(8), raw.rhs(8), state()
    for name, phase in [("analysis", ANALYSIS), ("factorization", FACTORIZATION), ("refactorization", REFACTORIZATION),
                        ("solve, 8 columns", SOLVE), ("solve again", SOLVE)]:  # fmt: skip
        raw.execute(phase, None, x, b)
        torch.cuda.synchronize()
        free, reserved = state()
        past = free_before - free - (reserved - reserved_before)
        rows.append([name, own.calls, f"{own.object.allocated / 2**20:.2f}", f"{past / 2**20:.2f}"])
    nnz = raw.number(LU_NNZ)
    del raw
    rows.append(["data object destroyed", own.calls, f"{own.object.allocated / 2**20:.2f}", "-"])
    head = ["after", "calls of allocate", "MiB through callbacks", "MiB of the device taken past torch"]
    return table(head, rows) + f"\n\nLU_NNZ {nnz}: {8 * nnz / 2**20 if isinstance(nnz, int) else 0:.1f} MiB of numbers."


@task("Right-hand sides other in number than in the analysis: residual, ms")
def widths(quick: bool) -> str:
    A, rows = laplacian(100, 100), []
    for kind, analyzed in product(("spd", "general"), (1, 64)):
        raw = Raw(A, kind)
        b = raw.rhs(analyzed)
        raw.execute(ANALYSIS, None, b + 0, b)
        raw.execute(FACTORIZATION)
        row = [kind, analyzed]
        for k in (1, 2, 8, 17, 64, 200):
            try:
                c = raw.rhs(k)
                row.append(f"{raw.check(k)}, {ms(timed(partial(raw.solve, c))[1])}")
            except Exception as error:
                row.append(short(error))
        rows.append(row)
    return table(["kind", "analyzed with", *[f"{k} columns" for k in (1, 2, 8, 17, 64, 200)]], rows)


@task("Two threads on two streams: largest residual, ms of 2 × 20 refactorizations and solves")
def threads(quick: bool) -> str:
    rows, A = [], laplacian(100, 100)

    def work(raw: Raw, stream: Any, out: list[float]) -> None:
        with torch.cuda.stream(stream):
            for turn in range(20):
                raw.set_values(raw.start * (1 + turn))
                raw.execute(REFACTORIZATION)
                b = raw.rhs()
                x = raw.solve(b) * (1 + turn)
                out.append(raw.residual(x, b) if turn % 5 == 0 else 0.0)

    for name, same in [("one handle", True), ("a handle each", False)]:
        for together in (False, True):
            shared = Handle()
            raws = [Raw(A, "spd", own=shared if same else Handle()) for _ in range(2)]
            streams = [torch.cuda.Stream() for _ in raws]
            for raw in raws:
                raw.start = raw.values  # type: ignore[attr-defined]
                raw.factorize()
            torch.cuda.synchronize()
            out: list[float] = []
            workers = [threading.Thread(target=work, args=(r, s, out)) for r, s in zip(raws, streams, strict=True)]
            start = time.perf_counter()
            for worker in workers:
                worker.start()
                if not together:
                    worker.join()
            for worker in workers:
                worker.join()
            torch.cuda.synchronize()
            done = "two at a time" if together else "one after the other"
            residual = f"{max(out):.2g}" if len(out) == 40 else "a thread failed"
            rows.append([name, done, residual, ms(time.perf_counter() - start)])
    return table(["handles", "threads", "residual", "ms"], rows)


@task("Equal bits: in 5 repeats, with and without DETERMINISTIC_MODE", 60)
def determinism(quick: bool) -> str:
    rows = []
    for kind, dtype, on in product(("spd", "symmetric", "general"), (F32, F64), (0, 1)):
        A, settings = laplacian(20, 20, 10), {DETERMINISTIC: on}
        row = [kind, str(dtype).removeprefix("torch."), on]
        for columns in (1, 8):
            try:
                raw = Raw(A, kind, dtype)
                raw.factorize(settings)
                b = raw.rhs(columns)
                solves = [raw.solve(b, settings) for _ in range(5)]
                again = []
                for _ in range(5):
                    raw.execute(REFACTORIZATION, settings)
                    again.append(raw.solve(b, settings))
                fresh = []
                for _ in range(3):
                    other = Raw(A, kind, dtype)
                    other.factorize(settings)
                    fresh.append(other.solve(b, settings))
                row += ["yes" if all(torch.equal(x, xs[0]) for x in xs) else "no" for xs in (solves, again, fresh)]
                row.append(
                    ms(timed(partial(raw.execute, REFACTORIZATION, settings))[1]) if columns == 1 else raw.check(8)
                )
            except Exception as error:
                row += [short(error), "-", "-", "-"]
        rows.append(row)
    head = ["kind", "dtype", "mode", "solve", "refactorization", "new data", "refactorization ms", "solve, 8 columns",
            "refactorization", "new data", "residual"]  # fmt: skip
    switched = Raw(laplacian(20, 20), "spd")
    switched.factorize()
    try:
        switched.execute(REFACTORIZATION, {DETERMINISTIC: 1})
        later = "residual " + switched.check(settings={DETERMINISTIC: 1})
    except Exception as error:
        later = short(error)
    return table(head, rows) + f"\n\nSwitched on after the analysis: {later}."


@task("Through SparseSystem: residual of x, and gradient against the CPU's, both in eps", 60)
def public(quick: bool) -> str:
    rows = []
    for kind, dtype in product(("spd", "symmetric", "hermitian", "general", "auto"), (F32, F64, C64, C128)):
        A = matrix("spd" if kind == "auto" else kind, dtype).tocoo()
        row = [kind, str(dtype).removeprefix("torch.")]
        try:
            system = SparseSystem(np.stack(A.coords), A.shape[0], kind=kind)
            values, b = torch.from_numpy(A.data).to(dtype), torch.ones(A.shape[0], 3, dtype=dtype)
            found = []
            for device in (DEVICE, torch.device("cpu")):
                v = values.to(device).requires_grad_()
                x = system.solve(v, b.to(device))
                found.append((x.detach().cpu(), torch.autograd.grad(x.abs().sum(), v)[0].cpu()))
            (x, g), (_, expected) = found
            r = abs(A @ x.numpy().astype(complex) - b.numpy()).max() / (abs(A).sum(0).max() * x.abs().max() + 1)
            eps = torch.finfo(dtype).eps
            rows.append(
                [*row, f"{float(r) / eps:.2g}", f"{float((g - expected).abs().max() / expected.abs().max()) / eps:.2g}"]
            )
        except Exception as error:
            rows.append([*row, short(error), "-"])
    return table(["kind", "dtype", "residual", "gradient"], rows)


@task("Storage that goes from stream to stream before it is done with: largest relative error", 40)
def streams(quick: bool) -> str:
    problem = Loop((60, 60), DEVICE)
    system, b = problem.system(check=False), problem.b
    u, v = problem.values(0), problem.values(1)
    expected = [problem.system().solve(t, b) for t in (u, v)]
    system.solve(u, b)
    default, rows = torch.cuda.default_stream(), []
    s, t = torch.cuda.Stream(), torch.cuda.Stream()
    for name, first, second in [("default, side", default, s), ("side, default", s, default), ("side, side", s, t)]:
        torch.cuda.synchronize()
        with torch.cuda.stream(first):
            torch.cuda._sleep(50_000_000)
            x = system.solve(u, b)
        with torch.cuda.stream(second):
            y = system.solve(v, b)
        torch.cuda.synchronize()
        errors = [float((a - e).abs().max() / e.abs().max()) for a, e in zip((x, y), expected, strict=True)]
        rows.append([name, *[f"{e:.1e}" for e in errors]])
    return table(["streams", "the first's solution", "the second's"], rows)


# --- the benchmark: an optimizer's loop -------------------------------------------------------------------------------


class Loop:
    """Weights on the edges of a grid are fitted so that the solution comes near to a target: one system, new values and
    one backward pass a step. float64, lower triangle."""

    def __init__(self, shape: tuple[int, ...], device: torch.device):
        edges, self.n = grid(*shape)
        self.device, self.edges = device, torch.from_numpy(edges).to(device)
        nodes = torch.arange(self.n, device=device)
        self.indices = torch.cat([self.edges, nodes.expand(2, -1)], 1).cpu()
        g = torch.Generator().manual_seed(0)
        self.start = torch.rand(edges.shape[1], dtype=F64, generator=g).to(device)
        self.b = torch.randn(self.n, dtype=F64, generator=g).to(device)
        self.target = torch.randn(self.n, dtype=F64, generator=g).to(device)
        self.weights = self.start.clone().requires_grad_()
        self.optimizer = torch.optim.SGD([self.weights], lr=1e-6)

    def system(self, **options: Any) -> SparseSystem:
        return SparseSystem(self.indices, self.n, kind="spd", triangle="lower", **options)

    def of(self, weights: Tensor) -> Tensor:
        w = weights.exp()
        diagonal = torch.full((self.n,), 0.1, dtype=F64, device=self.device).index_add(
            0, self.edges.flatten(), w.repeat(2)
        )
        return torch.cat([-w, diagonal])

    def values(self, seed: int) -> Tensor:
        return self.of(self.start * (1 + 0.1 * seed)).detach()

    def step(self, solve: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.optimizer.zero_grad()
        loss = (solve(self.of(self.weights), self.b) - self.target).square().mean()
        loss.backward()
        self.optimizer.step()

    def dense(self, values: Tensor, b: Tensor) -> Tensor:
        i, j = self.indices.to(self.device)
        A = values.new_zeros(self.n, self.n).index_put((i, j), values)
        A = A + A.tril(-1).mT
        return torch.linalg.solve(A, b)

    def gradient(self, solve: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        w = self.start.clone().requires_grad_()
        loss = (solve(self.of(w), self.b) - self.target).square().mean()
        return torch.autograd.grad(loss, w)[0].cpu()


def cholespy_solve(loop: Loop) -> Callable[[Tensor, Tensor], Tensor]:
    """cholespy knows neither gradients nor new values: a solver a step, and the derivative written here."""
    import cholespy

    i, j = loop.indices.to(loop.device)
    off = i != j
    rows, columns = torch.cat([i, j[off]]), torch.cat([j, i[off]])

    class Solve(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, values: Tensor, b: Tensor) -> Tensor:
            full = torch.cat([values, values[off]])
            ctx.solver = cholespy.CholeskySolverD(loop.n, rows, columns, full, cholespy.MatrixType.COO)
            x = torch.empty_like(b)
            ctx.solver.solve(b, x)
            ctx.save_for_backward(x)
            return x

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Any:
            (x,), lam = ctx.saved_tensors, torch.empty_like(g)
            ctx.solver.solve(g.contiguous(), lam)
            return -torch.where(off, lam[i] * x[j] + lam[j] * x[i], lam[i] * x[i]), None

    return Solve.apply


def anew(loop: Loop) -> Callable[[Tensor, Tensor], Tensor]:
    def solve(values: Tensor, b: Tensor) -> Tensor:
        plan_cache.clear()
        return loop.system().solve(values, b)

    return solve


def copies_to_host(run: Callable[[], Any]) -> str:
    """Number and bytes of copies from the device in one call, as torch's profiler sees them."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    copies = [e["args"].get("bytes", 0) for e in events if e.get("cat") == "gpu_memcpy" and "DtoH" in e["name"]]
    waits = sum(e.get("cat") == "cuda_runtime" and "Synchronize" in e["name"] for e in events)
    return f"{len(copies)} copies of {sum(copies)} bytes, {waits} synchronizing calls (with the profiler's and ours)"


@contextmanager
def time_in_cudss() -> Iterator[list[float]]:
    """Seconds inside of cudssExecute on the host."""
    spent, execute = [0.0], cudss._Slot.execute

    def clocked(*arguments: Any) -> None:
        start = time.perf_counter()
        execute(*arguments)
        spent[0] += time.perf_counter() - start

    cudss._Slot.execute = clocked  # type: ignore[method-assign]
    try:
        yield spent
    finally:
        cudss._Slot.execute = execute  # type: ignore[method-assign]


def attempt(run: Callable[[], str]) -> str:
    try:
        return run()
    except Exception as error:
        torch.cuda.empty_cache()
        return short(error)


def measure(shape: tuple[int, ...], quick: bool) -> str:
    steps, seconds = (5, 1.0) if quick else (20, 3.0)
    loop = Loop(shape, DEVICE)
    flat = len(shape) == 2
    checked, unchecked = loop.system(), loop.system(check=False)
    first = once(lambda: loop.step(checked.solve))
    expected: list[Tensor] = []

    def of(loop: Loop, solve: Callable[[Tensor, Tensor], Tensor], warm: int = 2) -> str:
        gradient = loop.gradient(solve)
        expected.append(gradient)
        off = float((gradient - expected[0]).abs().max() / expected[0].abs().max())
        took = ms(timed(lambda: loop.step(solve), steps, seconds, warm)[1])
        return took if off <= 1e-8 else f"{took} (**gradient off by {off:.0e}**)"

    rows = [["spcache, cuDSS", attempt(lambda: of(loop, checked.solve))],
            ["spcache, cuDSS, check=False", attempt(lambda: of(loop, unchecked.solve))],
            ["spcache, cuDSS, analyzed anew in each step", attempt(lambda: of(loop, anew(loop), 0))]]  # fmt: skip
    if loop.n <= 10_000:
        rows.append(["torch.linalg.solve, dense", attempt(lambda: of(loop, loop.dense, 0))])
        torch.cuda.empty_cache()
    if importlib.util.find_spec("cholespy") is not None:
        rows.append(["cholespy, a new solver in each step", attempt(lambda: of(loop, cholespy_solve(loop), 0))])
    if flat or loop.n <= 70_000:
        cpu = Loop(shape, torch.device("cpu"))
        rows.append(
            [f"spcache, CPU ({torch.get_num_threads()} threads)", attempt(lambda: of(cpu, cpu.system().solve, 0))]
        )

    def parts() -> str:
        values, many = loop.values(0), [loop.values(k) for k in range(1, 4)]
        pool = next(iter(checked._factorizer._pools.values()))
        turn = iter(range(10**9))
        v, b = values.clone().requires_grad_(), loop.b
        factor = checked.factorize(values)
        x = unchecked.solve(v, b)
        found = {
            "user's values": timed(lambda: loop.of(loop.start)),
            "assembly": timed(lambda: pool.assembly(values.view(1, -1))),
            "factorization (assembly and status too)": timed(lambda: checked.factorize(many[next(turn) % 3])),
            "factorization, check=False": timed(lambda: unchecked.factorize(many[next(turn) % 3])),
            "solve (comparison too)": timed(lambda: factor.solve(b)),
            "backward (solve and gradient)": timed(lambda: torch.autograd.grad(x, v, b, retain_graph=True)),
            "gradient of the values alone": timed(lambda: unchecked._factorizer.convention.outer(b, b, True)),
        }
        return "; ".join(f"{name} {ms(host)} / {ms(total)}" for name, (host, total) in found.items())

    def overhead() -> str:
        turn, many = iter(range(10**9)), [loop.values(k).requires_grad_() for k in range(1, 4)]

        def run() -> None:
            torch.autograd.backward(unchecked.solve(many[next(turn) % 3], loop.b), loop.target)

        timed(run)
        with time_in_cudss() as spent:
            host, inside, total = [], [], []
            for _ in range(steps):
                torch.cuda.synchronize()
                spent[0], start = 0.0, time.perf_counter()
                run()
                host.append(time.perf_counter() - start)
                inside.append(spent[0])
                torch.cuda.synchronize()
                total.append(time.perf_counter() - start)
        own = median(h - i for h, i in zip(host, inside, strict=True))
        return (
            f"the calls return after {ms(median(host))}, {ms(median(inside))} of it in cudssExecute, so {ms(own)} is "
            f"ours; all is done after {ms(median(total))}"
        )

    stats = checked.stats
    return "\n".join([
        f"n = {loop.n}, {len(loop.start)} weights, {stats.nnz_factor} in the factor; first step {ms(first)} ms.\n",
        table(["a step (new values, solve, backward, SGD), ms", "median"], rows),
        f"\nPhases, ms until the call returns / until done: {attempt(parts)}.",
        f"\nDevice to host in a warm step: {attempt(lambda: copies_to_host(lambda: loop.step(checked.solve)))}; "
        f"check=False: {attempt(lambda: copies_to_host(lambda: loop.step(unchecked.solve)))}.",
        f"\nA warm solve and backward pass, check=False, ms: {attempt(overhead)}.",
        f"\nDevice memory: {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB at most, "
        f"`system.nbytes` {checked.nbytes / 2**20:.0f} MiB.",
    ])  # fmt: skip


SHAPES = [(32, 32), (100, 100), (20, 20, 20), (316, 316), (40, 40, 40), (1000, 1000), (60, 60, 60), (100, 100, 100)]
for _shape in SHAPES:
    _name = "×".join(map(str, _shape))
    TASKS[_name] = Task(f"Grid {_name}", 100, True, partial(measure, _shape))


# --- the record -------------------------------------------------------------------------------------------------------


def output_of(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=ROOT, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def machine(commit: str) -> str:
    smi = output_of("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    if not commit:
        commit = output_of("git", "rev-parse", "--short", "HEAD") or "unknown"
        commit += ", with changes" * bool(output_of("git", "status", "--porcelain", "--untracked-files=no"))
    try:
        version = ".".join(map(str, library().version))
    except Exception as error:
        version = short(error)
    try:
        cpu = re.search("model name\\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        cpu = None
    p = torch.cuda.get_device_properties(DEVICE)
    facts = {
        "GPU": f"{p.name}, {p.total_memory / 2**30:.0f} GiB, compute capability {p.major}.{p.minor}",
        "driver": smi.splitlines()[0] if smi else "nvidia-smi says nothing",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda}",
        "cuDSS": version,
        "spcache": f"{spcache.__version__}, commit {commit}",
        "host": f"{cpu[1] if cpu else platform.processor()}, {os.cpu_count()} CPUs, Python {platform.python_version()}",
    }
    return table(["", ""], [[k, v] for k, v in facts.items()])


def tests(seconds: float) -> str:
    """pytest's last line, and the names of what failed; how far it came where time ran out."""
    with tempfile.TemporaryFile("w+") as log:
        options = ["-v", "-m", "cuda", "--tb=line", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
        command = [sys.executable, "-m", "pytest", *options, "tests"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        try:
            subprocess.run(command, stdout=log, stderr=log, cwd=ROOT, timeout=seconds, env=environment, check=False)
            end = ""
        except subprocess.TimeoutExpired:
            end = f"Stopped after {seconds:.0f} s. "
        log.seek(0)
        lines = [line.rstrip() for line in log if line.strip()]
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    failed = failed or [line for line in lines if " FAILED" in line]  # no summary: it was stopped
    last = lines[-1].strip("= ") if lines else "no output"
    return "\n".join([f"`pytest -m cuda`: {end}`{last}`", "", *[f"- `{line[:300]}`" for line in failed[:60]]])


class Record:
    """The section, written whole after every addition."""

    def __init__(self, path: Path, title: str):
        self.path = path
        before = path.read_text() if path.exists() else "# Runs on hardware\n"
        self.text = f"{before.replace(NONE_YET, '').rstrip()}\n\n## {title}\n"

    def add(self, text: str) -> None:
        print(text, flush=True)
        self.text += f"\n{text}\n"
        new = self.path.with_name(self.path.name + ".new")
        new.write_text(self.text)
        new.replace(self.path)


def child(names: list[str], quick: bool) -> None:
    """Runs tasks, a line of JSON for each; ends where the device can no longer be used."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what others print is not ours
    for name in names:
        start = time.perf_counter()
        try:
            answer = TASKS[name].run(quick)
        except Exception as error:
            answer = f"**{short(error)}**"
        try:
            torch.cuda.synchronize()
            plan_cache.clear()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        except Exception as error:
            print(
                json.dumps([name, f"{answer}\n\nThe device can no longer be used: {short(error)}"]),
                file=out,
                flush=True,
            )
            os._exit(0)
        print(json.dumps([name, f"{answer}\n\n({time.perf_counter() - start:.1f} s)"]), file=out, flush=True)


def run_tasks(names: list[str], quick: bool, deadline: float, record: Record) -> None:
    """Each task within its limit, in a process that lives as long as they go well."""
    waiting = list(names)
    while waiting:
        command = [sys.executable, str(Path(__file__).resolve()), "--child", *waiting, *["--quick"] * quick]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, bufsize=0)  # so that select sees all
        assert process.stdout is not None
        first = 30.0  # of torch's import, and of the device
        while waiting:
            name = waiting[0]
            limit = min(TASKS[name].limit + first, deadline - time.monotonic())
            first = 0.0
            ready = limit > 0 and select.select([process.stdout], [], [], limit)[0]
            line = process.stdout.readline() if ready else b""
            if line:
                waiting.pop(0)
                record.add(f"### {TASKS[name].title}\n\n{json.loads(line)[1]}")
                continue
            if deadline - time.monotonic() <= 0:
                process.kill()
                process.wait()
                record.add(f"Time is up; not answered: {', '.join(TASKS[n].title for n in waiting)}.")
                return
            if not ready:
                process.kill()
            status = process.wait()
            if ready and status == 0:  # it has said why, and ended: the rest in a new one
                break
            why = f"the process ended with status {status}" if ready else f"no answer within {limit:.0f} s"
            waiting.pop(0)
            record.add(f"### {TASKS[name].title}\n\n**{why}**")
            break
        process.stdout.close()
        process.wait()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "hardware.md", help="default: docs/hardware.md")
    parser.add_argument("--date", default=date.today().isoformat(), help="of the record (default: today)")
    parser.add_argument("--commit", default="", help="what is measured, where git cannot say")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"for everything (default: {SECONDS})")
    parser.add_argument("--quick", action="store_true", help="small matrices, few steps: does it run?")
    parser.add_argument("--skip-tests", action="store_true")
    parser.add_argument("--questions-only", action="store_true")
    parser.add_argument("--benchmark-only", action="store_true")
    parser.add_argument("--only", nargs="+", choices=list(TASKS), metavar="TASK", help=f"of {', '.join(TASKS)}")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    chosen = arguments()
    if not torch.cuda.is_available():
        print(
            f"hardware.py: torch {torch.__version__} sees no CUDA device here; run it on a machine with one.",
            file=sys.stderr,
        )
        return 1
    if chosen.child:
        child(chosen.child, chosen.quick)
        return 0
    deadline = time.monotonic() + chosen.seconds
    record = Record(chosen.out, f"{chosen.date}, {torch.cuda.get_device_name(DEVICE)}")
    record.add(machine(chosen.commit))
    if not (chosen.skip_tests or chosen.questions_only or chosen.benchmark_only or chosen.only):
        record.add(tests(min(TEST_SECONDS, deadline - time.monotonic())))
    names = chosen.only or [
        name for name, task in TASKS.items()
        if not (task.benchmark and chosen.questions_only) and not (not task.benchmark and chosen.benchmark_only)
    ]  # fmt: skip
    if chosen.quick:
        large = ["×".join(map(str, shape)) for shape in SHAPES[3:]]
        names = [name for name in names if name not in large]
    run_tasks(names, chosen.quick, deadline, record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
