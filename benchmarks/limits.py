"""What the machine can do at best: dgemm of OpenBLAS, and reading memory. A process of its own for each setting.

OpenBLAS takes the number of threads and the kernels (OPENBLAS_CORETYPE) from the environment when it is loaded; for
processors younger than itself it may choose old ones, so each of them is tried. `python limits.py` prints it.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product

import numpy as np

KERNELS = {"avx2": "Haswell", "avx512f": "SkylakeX"}  # by the flag of the processor that they need
ORDER = 1536  # of the matrices
BYTES = 2**29  # that are read: more than any cache holds
SECONDS = 0.25  # for each figure


def limits(flags: list[str], threads: list[int]) -> dict[str, dict[str, float]]:
    """Returns for each number of threads dgemm in GF/s, with each kernel and the best, and reading in GB/s."""
    kernels = [kernel for flag, kernel in KERNELS.items() if flag in flags] or [""]
    found: dict[str, dict[str, float]] = {str(count): {} for count in threads}
    for count, kernel in product(threads, kernels):
        environment = os.environ | {"OPENBLAS_NUM_THREADS": str(count)}
        environment |= {"OPENBLAS_CORETYPE": kernel} if kernel else {}
        command = [sys.executable, __file__, "measure"]
        answer = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
        measured, entry = json.loads(answer), found[str(count)]
        entry[f"dgemm {kernel or 'default'}"] = measured["dgemm"]
        for figure, value in measured.items():
            entry[figure] = max(entry.get(figure, 0.0), value)
    return found


def rate(work: float, run: Callable[[], object]) -> float:
    """Returns work per nanosecond of the fastest run."""
    best = float("inf")
    end = time.perf_counter() + SECONDS
    while time.perf_counter() < end:
        begin = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - begin)
    return work / best / 1e9


def measure() -> dict[str, float]:
    A, B = np.random.default_rng(0).standard_normal((2, ORDER, ORDER))
    C = np.empty_like(A)
    x = np.ones(BYTES // 8)
    return {
        "dgemm": rate(2.0 * ORDER**3, lambda: np.matmul(A, B, out=C)),
        "read": rate(BYTES, lambda: x @ x),  # ddot, which OpenBLAS shares between its threads
    }


if __name__ == "__main__":
    if "measure" in sys.argv:
        print(json.dumps(measure()))
    else:
        from run import machine

        print(json.dumps(limits(machine()["flags"], [1, os.cpu_count() or 1]), indent=1))
