"""What PyTorch's machinery around a solve costs, at sizes where nothing else does: `.venv/bin/python
benchmarks/overhead.py`.

Every contender runs in turn in each round, on one thread; medians and minima over rounds, in microseconds. A step is a
forward pass with new values and a backward pass to values and right-hand side.
"""

import argparse
import json
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from statistics import median

import torch
from run import alone
from torch import Tensor

from spcache import SparseSystem

N = 10
BATCH = 256


def chain(n: int) -> tuple[Tensor, Tensor]:
    """Indices and values of a positive definite tridiagonal matrix, lower triangle."""
    i = torch.arange(n)
    indices = torch.cat([torch.stack([i, i]), torch.stack([i[1:], i[:-1]])], 1)
    return indices, torch.cat([torch.full((n,), 4.0), -torch.ones(n - 1)]).double()


class Floor(torch.autograd.Function):
    """The cheapest differentiable operation of two arguments that Python can write."""

    @staticmethod
    def forward(ctx, values, b):
        ctx.save_for_backward(values, b)
        return b

    @staticmethod
    def backward(ctx, g):
        return ctx.saved_tensors[0], g


def contenders() -> dict[str, tuple[int, Callable[[], object]]]:
    """Name -> (calls a round, what is called)."""
    indices, values = chain(N)
    system = SparseSystem(indices, N, kind="spd", triangle="lower")
    b = torch.ones(N, dtype=torch.float64, requires_grad=True)
    g = torch.ones(N, dtype=torch.float64)
    new_values = cycle([(values * s).requires_grad_() for s in (1.0, 1.1)])  # so that every step factorizes

    def forward(solve):
        def run():
            with torch.no_grad():
                return solve(next(new_values), b)

        return run

    def step(solve):
        def run():
            v = next(new_values)
            return torch.autograd.grad(solve(v, b), (v, b), g)

        return run

    def compiled(backend):
        return torch.compile(system.solve, fullgraph=True, backend=backend)

    def loop():
        return [system.solve(v, c) for v, c in zip(next(many), rhs, strict=True)]

    many = cycle([values * torch.linspace(1, 2, BATCH, dtype=torch.float64)[:, None] * s for s in (1.0, 1.1)])
    rhs = torch.ones(BATCH, N, dtype=torch.float64)
    return {
        "bare autograd.Function, step": (1000, step(Floor.apply)),
        "eager, forward": (1000, forward(system.solve)),
        "eager, step": (1000, step(system.solve)),
        "compiled (aot_eager), step": (500, step(compiled("aot_eager"))),
        "compiled (inductor), forward": (500, forward(compiled("inductor"))),
        "compiled (inductor), step": (500, step(compiled("inductor"))),
        f"loop over {BATCH} systems, forward": (2, loop),
        f"vmap of {BATCH} systems, forward": (30, lambda: torch.func.vmap(system.solve)(next(many), rhs)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--out", type=Path, help="write the medians here, JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {}
    with alone():
        runs = contenders()
        for calls, run in runs.values():  # compiles, and warms up
            for _ in range(calls):
                run()
        for _ in range(arguments.rounds):
            for name, (calls, run) in runs.items():
                start = time.perf_counter()
                for _ in range(calls):
                    run()
                times.setdefault(name, []).append((time.perf_counter() - start) / calls * 1e6)
    for name, t in times.items():
        print(f"{name:36} median {median(t):8.1f} us   minimum {min(t):8.1f} us")
    middle = {name: median(t) for name, t in times.items()}
    loop, batched = (middle[f"{what} {BATCH} systems, forward"] for what in ("loop over", "vmap of"))
    print(f"compiled - eager: {middle['compiled (inductor), step'] - middle['eager, step']:.1f} us a step")
    print(f"loop / vmap: {loop / batched:.1f}")
    if arguments.out:
        arguments.out.write_text(
            json.dumps({"torch": torch.__version__, "n": N, "microseconds": middle}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
