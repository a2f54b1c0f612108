"""Gauss-Newton steps of pose graphs, as least squares: `.venv/bin/python benchmarks/least_squares.py`. It needs
scikit-sparse; the larger graph needs SPCACHE_DATA, see tests/data/README.md.

A step is x = A^+ b for new values and the gradient at the values. The contender assembles A^T A with SciPy and factors
it by scikit-sparse, analyzed once, wrapped by hand; it does not refine its solutions. They take turns; medians in
milliseconds.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterator
from itertools import cycle
from statistics import median
from typing import Any

os.environ.setdefault("OMP_THREAD_LIMIT", "1")  # CHOLMOD starts 4 threads

import numpy as np
import scipy.sparse as sp
import torch
from cases import data_files
from run import alone
from sksparse import cholmod
from torch import Tensor

from spcache import SparseSystem

GRAPHS = ("posegraph_w100.jac", "posegraph_sphere2500.jac")


class NormalEquations:
    def __init__(self, A: sp.csr_array, ordering: str) -> None:
        self.A = sp.csr_matrix(A)
        self.rows = torch.from_numpy(np.repeat(np.arange(A.shape[0]), np.diff(A.indptr)))
        self.columns = torch.from_numpy(A.indices.astype(np.int64))
        self.factor = cholmod.analyze_AAt(sp.csc_matrix(self.A.T), mode="supernodal", ordering_method=ordering)

    def solve(self, values: Tensor, b: Tensor) -> Tensor:
        return _Solve.apply(values, b, self)


class _Solve(torch.autograd.Function):
    """x = (A^T A)^-1 A^T b; with z = A (A^T A)^-1 g and r = b - A x: dl/db = z, dl/dA = r (A^T A)^-1 g - z x."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, b: Tensor, normal: NormalEquations) -> Tensor:
        normal.A.data[:] = values.detach().numpy()
        normal.factor.cholesky_inplace(sp.csc_matrix(normal.A.T @ normal.A))
        x = torch.from_numpy(normal.factor.solve_A(normal.A.T @ b.detach().numpy()))
        ctx.normal = normal
        ctx.save_for_backward(b, x)
        return x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:
        normal, (b, x) = ctx.normal, ctx.saved_tensors
        y = torch.from_numpy(normal.factor.solve_A(g.numpy()))
        z = torch.from_numpy(normal.A @ y.numpy())
        r = b.detach() - torch.from_numpy(normal.A @ x.numpy())
        i, j = normal.rows, normal.columns
        return r[i] * y[j] - z[i] * x[j], z, None


def steps(found: dict[str, Any], solve: Callable[[Tensor, Tensor], Tensor]) -> Iterator[tuple[float, Tensor, Tensor]]:
    """Seconds, x and the gradient at values of one step after the other."""
    captured = zip(found["data"], found["rhs"], strict=True)
    inputs = [(torch.from_numpy(values).requires_grad_(), torch.from_numpy(b)) for values, b in captured]
    for values, b in cycle(inputs):
        start = time.perf_counter()
        x = solve(values, b)
        (gradient,) = torch.autograd.grad(x, (values,), torch.ones_like(x))
        yield time.perf_counter() - start, x.detach(), gradient


def measure(name: str, rounds: int) -> None:
    found = data_files().load_sequence(name)
    A = sp.csr_array((found["data"][0], found["indices"], found["indptr"]), shape=found["shape"])
    rows = np.repeat(np.arange(A.shape[0]), np.diff(A.indptr))
    system = SparseSystem(torch.from_numpy(np.stack([rows, A.indices])), tuple(int(size) for size in A.shape))
    contenders = {"spcache": steps(found, system.lstsq)} | {
        f"scikit-sparse, {ordering}": steps(found, NormalEquations(A, ordering).solve)
        for ordering in ("amd", "metis", "nesdis")
    }
    times: dict[str, list[float]] = {each: [] for each in contenders}
    for turn in range(rounds + 2):
        first = None
        for each, run in contenders.items():
            seconds, x, gradient = next(run)
            first = first or (x, gradient)
            for found_, wanted in zip((x, gradient), first, strict=True):
                assert float((found_ - wanted).norm() / wanted.norm()) < 1e-5, each
            if turn >= 2:
                times[each].append(1e3 * seconds)
    middle = {each: median(t) for each, t in times.items()}
    best = min(t for each, t in middle.items() if each != "spcache")
    print(f"{name} {A.shape}: " + ", ".join(f"{each} {t:.2f} ms" for each, t in middle.items()))
    print(f"  best / spcache: {best / middle['spcache']:.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    with alone():
        for name in GRAPHS:
            try:
                measure(name, arguments.rounds)
            except FileNotFoundError as error:
                print(f"{name}: {error}")


if __name__ == "__main__":
    main()
