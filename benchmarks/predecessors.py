"""The drop-ins of `spcache.compat` against what they replace: `.venv/bin/python benchmarks/predecessors.py`.

Forward and backward; contenders take turns in each round; medians in milliseconds, and their ratio. Peers that are not
installed are left out (pip install torchsparsegradutils==0.2.7 cholespy).
"""

import argparse
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import cycle
from statistics import median

import torch
from run import SETTLE, alone
from torch import Tensor

from spcache.compat import torch_sparse_solve
from spcache.compat.sparse_solver import SparseSolver
from spcache.compat.torchsparsegradutils import sparse_mm

BURST = 3  # calls of a contender in its turn

Contenders = dict[str, Callable[[], object]]


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

            def step(multiply: Callable[..., Tensor], A: Tensor = A, B: Tensor = B, g: Tensor = g) -> object:
                left, right = A.detach().requires_grad_(), B.detach().requires_grad_()
                return torch.autograd.grad(multiply(left, right), (left, right), g)

            contenders: Contenders = {"spcache": lambda step=step: step(sparse_mm)}
            try:
                import torchsparsegradutils
            except ImportError:
                pass
            else:
                contenders["original"] = lambda step=step: step(torchsparsegradutils.sparse_mm)
            yield f"sparse_mm {name}, {rows} rows, {entries} a row, {columns} columns", contenders


def grid(side: int) -> tuple[Tensor, int]:
    """I + the Laplacian of a square grid, and its order."""
    node = torch.arange(side * side).view(side, side)
    i = torch.cat([node[:, :-1].flatten(), node[:-1].flatten()])
    j = torch.cat([node[:, 1:].flatten(), node[1:].flatten()])
    n = side * side
    A = torch.sparse_coo_tensor(
        torch.cat([torch.stack([i, j]), torch.stack([j, i]), torch.stack([i, i]), torch.stack([j, j])], 1),
        torch.cat([-torch.ones(2 * len(i)), torch.ones(2 * len(i))]).double(),
        (n, n),
    )
    return (A + torch.sparse_coo_tensor(torch.arange(n).repeat(2, 1), torch.ones(n).double(), (n, n))).coalesce(), n


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

    def step(solve: Callable[..., Tensor]) -> object:
        v = (values * next(scales)).flatten()
        A = torch.sparse_coo_tensor(indices, v, (size, n, n), is_coalesced=True).requires_grad_()
        return torch.autograd.grad(solve(A, b), A, b)

    contenders: Contenders = {"spcache": lambda: step(torch_sparse_solve.solve)}
    try:
        import torch_sparse_solve as original
    except ImportError:
        pass
    else:
        contenders["original"] = lambda: step(original.solve)
    yield f"torch_sparse_solve, {size} systems of {n} unknowns", contenders


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
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    with alone():
        for cases in (products(arguments.rows, 10), symmetric(100), batch(64, 1000)):
            for name, contenders in cases:
                times = measure(contenders, arguments.rounds)
                ratio = f"{times['original'] / times['spcache']:6.1f}x" if "original" in times else "  (no original)"
                print(f"{name:60s}" + "".join(f"  {who} {t:9.2f} ms" for who, t in times.items()) + ratio, flush=True)


if __name__ == "__main__":
    main()
