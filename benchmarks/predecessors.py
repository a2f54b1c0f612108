"""The drop-ins of `spcache.compat` against what they replace: `.venv/bin/python benchmarks/predecessors.py`.

Forward and backward, but for the iterative methods by themselves; contenders take turns in each round; medians in
milliseconds, and their ratio. Peers that are not installed are left out:

    pip install torchsparsegradutils==0.2.7 cholespy
    pip install --no-deps dprox==0.2.1
    pip install --no-build-isolation torch_sparse_solve==0.0.5     # a C++ compiler and SuiteSparse's headers
"""

import argparse
import importlib
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import cycle
from statistics import median
from types import ModuleType
from typing import Any

import torch
from run import SETTLE, alone
from torch import Tensor

from spcache.compat import dprox, torch_sparse_solve, torchsparsegradutils
from spcache.compat.sparse_solver import SparseSolver

BURST = 3  # calls of a contender in its turn

Contenders = dict[str, Callable[[], object]]


def original(name: str) -> Any:
    """The predecessor's module, or None where it is not installed."""
    top = name.partition(".")[0]
    spec = None if top in sys.modules else find_spec(top)
    if spec is None and top not in sys.modules:
        return None
    if spec is not None and top == "dprox":  # its own __init__ needs a dozen packages, its linear solver none
        package = sys.modules[top] = ModuleType(top)
        package.__path__ = list(spec.submodule_search_locations or [])
    return importlib.import_module(name)


def versus(ours: Any, theirs: Any, run: Callable[[Any], object]) -> Contenders:
    """One thing done with both modules."""
    contenders: Contenders = {"spcache": lambda: run(ours)}
    if theirs is not None:
        contenders["original"] = lambda: run(theirs)
    return contenders


def products(rows: int, entries: int) -> Iterator[tuple[str, Contenders]]:
    """sparse_mm: a random matrix with so many entries a row, 1 to 64 columns."""
    generator = torch.Generator().manual_seed(0)
    row = torch.arange(rows).repeat_interleave(entries)
    column = torch.randint(0, rows, (rows * entries,), generator=generator)
    values = torch.randn(rows * entries, dtype=torch.float64, generator=generator)
    coo = torch.sparse_coo_tensor(torch.stack([row, column]), values, (rows, rows)).coalesce()
    for name, A in {"COO": coo, "CSR": coo.to_sparse_csr()}.items():
        for columns in (1, 4, 16, 64):
            B, g = (torch.randn(rows, columns, dtype=torch.float64, generator=generator) for _ in range(2))

            def step(module: Any, A: Tensor = A, B: Tensor = B, g: Tensor = g) -> object:
                left, right = A.detach().requires_grad_(), B.detach().requires_grad_()
                return torch.autograd.grad(module.sparse_mm(left, right), (left, right), g)

            contenders = versus(torchsparsegradutils, original("torchsparsegradutils"), step)
            yield f"sparse_mm {name}, {rows} rows, {entries} a row, {columns} columns", contenders


def grid(side: int, shift: float = 1.0) -> tuple[Tensor, int]:
    """shift I + the Laplacian of a square grid, and its order."""
    node = torch.arange(side * side).view(side, side)
    i = torch.cat([node[:, :-1].flatten(), node[:-1].flatten()])
    j = torch.cat([node[:, 1:].flatten(), node[1:].flatten()])
    n = side * side
    A = torch.sparse_coo_tensor(
        torch.cat([torch.stack([i, j]), torch.stack([j, i]), torch.stack([i, i]), torch.stack([j, j])], 1),
        torch.cat([-torch.ones(2 * len(i)), torch.ones(2 * len(i))]).double(),
        (n, n),
    )
    identity = torch.sparse_coo_tensor(torch.arange(n).repeat(2, 1), torch.ones(n).double(), (n, n))
    return (A + shift * identity).coalesce(), n


def symmetric(side: int) -> Iterator[tuple[str, Contenders]]:
    """SparseSolver in an optimization loop: new values, forward, backward. The original factorizes with cholespy at
    each step, analysis included, solves three times, and multiplies sparse matrices for the gradient: here only the
    first two are counted against it."""
    A, n = grid(side)
    b, g = torch.randn(n, dtype=torch.float64), torch.randn(n, dtype=torch.float64)
    scales = cycle([1.0, 1.1, 1.2])

    def ours() -> object:
        M = torch.sparse_coo_tensor(A.indices(), A.values() * next(scales), A.shape, is_coalesced=True).requires_grad_()
        return torch.autograd.grad(SparseSolver.apply(M, b), M, g)

    contenders: Contenders = {"spcache": ours}
    try:
        from cholespy import CholeskySolverD, MatrixType
    except ImportError:
        pass
    else:

        def original() -> object:
            row, column = A.indices()
            solver = CholeskySolverD(n, row, column, A.values() * next(scales), MatrixType.COO)
            x = torch.zeros(n, dtype=torch.float64)
            for rhs in (b, g, g):
                solver.solve(rhs, x)
            return x

        contenders["original"] = original
    yield f"SparseSolver, grid of {n} unknowns", contenders


def batch(size: int, n: int) -> Iterator[tuple[str, Contenders]]:
    """torch_sparse_solve: a batch of general matrices of one pattern."""
    generator = torch.Generator().manual_seed(0)
    i = torch.arange(n)
    row = torch.cat([i, i.repeat_interleave(4)])
    column = torch.cat([i, (i.repeat_interleave(4) + torch.tensor([1, -1, 30, -30]).repeat(n)) % n])
    pattern = torch.sparse_coo_tensor(torch.stack([row, column]), torch.ones(5 * n), (n, n)).coalesce().indices()
    nnz = pattern.shape[1]
    values = torch.randn(size, nnz, dtype=torch.float64, generator=generator) + 8 * (pattern[0] == pattern[1])
    indices = torch.cat([torch.arange(size).repeat_interleave(nnz)[None], pattern.repeat(1, size)])
    b = torch.randn(size, n, 1, dtype=torch.float64, generator=generator)
    scales = cycle([1.0, 1.1, 1.2])

    def step(module: Any) -> object:
        v = (values * next(scales)).flatten()
        A = torch.sparse_coo_tensor(indices, v, (size, n, n), is_coalesced=True).requires_grad_()
        return torch.autograd.grad(module.solve(A, b), A, b)

    contenders = versus(torch_sparse_solve, original("torch_sparse_solve"), step)
    yield f"torch_sparse_solve, {size} systems of {n} unknowns", contenders


def methods(side: int) -> Iterator[tuple[str, Contenders]]:
    """The iterative methods at equal tolerances: on a grid; with convection (bicgstab); on random edges (lsmr)."""
    A, n = grid(side, 0.01)
    generator = torch.Generator().manual_seed(0)
    spd = A.to_sparse_csr()
    tilted = (
        A + 0.3 * torch.sparse_coo_tensor(A.indices(), torch.sign(A.indices()[0] - A.indices()[1]), A.shape)
    ).to_sparse_csr()
    edges = torch.arange(3 * n).repeat_interleave(2), torch.randint(0, n, (6 * n,), generator=generator)
    signs = torch.tensor([1.0, -1.0]).double().repeat(3 * n)
    tall = torch.sparse_coo_tensor(torch.stack(edges), signs, (3 * n, n)).coalesce()
    tall = torch.sparse_coo_tensor(
        torch.cat([tall.indices(), torch.stack([3 * n + torch.arange(n), torch.arange(n)])], 1),
        torch.cat([tall.values(), torch.ones(n).double()]),
        (4 * n, n),
    ).coalesce()
    tall, wide = tall.to_sparse_csr(), tall.mT.to_sparse_csr()
    b = torch.randn(n, dtype=torch.float64, generator=generator)
    many = torch.randn(n, 16, dtype=torch.float64, generator=generator)
    long = torch.randn(4 * n, dtype=torch.float64, generator=generator)

    def pair(run: Callable[[Any], object]) -> Contenders:
        return versus(torchsparsegradutils.utils, original("torchsparsegradutils.utils"), run)

    def cg(module: Any, b: Tensor) -> Tensor:
        return module.linear_cg(spd, b, settings=module.LinearCGSettings(cg_tolerance=1e-6))

    yield f"linear_cg, grid of {n}", pair(lambda module: cg(module, b))
    yield f"linear_cg, grid of {n}, 16 columns", pair(lambda module: cg(module, many))
    settings = {"minres_tolerance": 1e-6}
    yield f"minres, grid of {n}", pair(lambda m: m.minres(spd, b, settings=m.MINRESSettings(**settings)))
    yield f"minres, grid of {n}, 16 columns", pair(lambda m: m.minres(spd, many, settings=m.MINRESSettings(**settings)))
    yield f"bicgstab, convection on {n}", pair(lambda m: m.bicgstab(tilted, b))
    yield f"lsmr, {4 * n} x {n}", pair(lambda m: m.lsmr(tall, long, wide))


def generic(side: int) -> Iterator[tuple[str, Contenders]]:
    """sparse_generic_solve with its default, minres, forward and backward."""
    A, n = grid(side, 0.01)
    A = A.to_sparse_csr()
    b = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def step(module: Any) -> object:
        left, right = A.detach().requires_grad_(), b.detach().requires_grad_()
        return torch.autograd.grad(module.sparse_generic_solve(left, right), (left, right), b)

    contenders = versus(torchsparsegradutils, original("torchsparsegradutils"), step)
    yield f"sparse_generic_solve, grid of {n}", contenders


class Diffusion(torch.nn.Module):
    """x -> x - div(c grad x) on a periodic square, one coefficient c; x as a vector. Its own transpose, and cloned, as
    dprox needs it."""

    def __init__(self, side: int):
        super().__init__()
        self.side = side
        self.c = torch.nn.Parameter(torch.tensor(50.0, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        x = x.view(self.side, self.side)
        around = x.roll(1, 0) + x.roll(-1, 0) + x.roll(1, 1) + x.roll(-1, 1)
        return (x + self.c * (4 * x - around)).flatten()

    @property
    def T(self) -> "Diffusion":
        return self

    def clone(self) -> "Diffusion":
        other = Diffusion(self.side)
        other.c.data = self.c.data
        return other


def operators(side: int) -> Iterator[tuple[str, Contenders]]:
    """dprox's linear_solve, forward and backward to b and the operator's parameter."""
    b = torch.randn(side**2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def step(module: Any, solver: str) -> object:
        A, right = Diffusion(side), b.detach().requires_grad_()
        config = module.LinearSolveConfig(rtol=1e-6, max_iters=1000, solver_type=solver)
        return torch.autograd.grad(module.linear_solve(A, right, config), (A.c, right), b)

    for solver in ("cg", "cg2", "pcg"):  # dprox's minres takes no vector
        contenders = versus(dprox, original("dprox.linalg"), lambda module, solver=solver: step(module, solver))
        yield f"linear_solve {solver}, {side} x {side}", contenders


def measure(contenders: Contenders, rounds: int) -> dict[str, float]:
    """Milliseconds, medians over rounds of bursts."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            time.sleep(SETTLE)
            run()  # to warm up
            for _ in range(BURST):
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * median(times) for name, times in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="how often each contender runs")
    parser.add_argument("--rows", type=int, default=100_000, help="of the products")
    parser.add_argument("--only", nargs="*", help="groups of cases, see `groups`")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    groups = {
        "sparse_mm": lambda: products(arguments.rows, 10),
        "SparseSolver": lambda: symmetric(100),
        "torch_sparse_solve": lambda: batch(64, 1000),
        "methods": lambda: methods(100),
        "generic": lambda: generic(100),
        "linear_solve": lambda: operators(100),
    }
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    with alone():
        for group in arguments.only or groups:
            for name, contenders in groups[group]():
                times = measure(contenders, arguments.rounds)
                ratio = f"{times['original'] / times['spcache']:6.1f}x" if "original" in times else "  (no original)"
                print(f"{name:60s}" + "".join(f"  {who} {t:9.2f} ms" for who, t in times.items()) + ratio, flush=True)


if __name__ == "__main__":
    main()
