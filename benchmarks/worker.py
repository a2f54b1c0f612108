"""One peer in a process of its own, commanded over pipes: one JSON object a line in, one out.

`run.py` starts one worker per peer, because thread settings and the libraries they reach differ, and speaks
to one at a time. Commands: {"do": "prepare", "case"}, {"do": "round"}, {"do": "check", "gradient": FILE}.
"""

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from statistics import median
from typing import Any

import numpy as np
import torch
from cases import CASES, Array, Case
from peers import PEERS, Configuration, Peer
from threadpoolctl import threadpool_info, threadpool_limits

Times = dict[str, list[float]]
STEPS = 4  # different sets of values, used in turn


def repeat(run: Callable[[], Times], seconds: float, least: int, most: int = 10_000) -> Times:
    """Runs a while to warm up, then for about `seconds`; returns all times of each phase."""
    times: Times = {}
    warm = time.perf_counter() + seconds / 10
    run()
    while time.perf_counter() < warm:
        run()
    end = time.perf_counter() + seconds
    gc.collect()
    gc.disable()
    for done in count():
        if done >= most or (done >= least and time.perf_counter() > end):
            break
        for phase, taken in run().items():
            times.setdefault(phase, []).extend(taken)
    gc.enable()
    return times


class Session:
    """A peer, the case it is prepared for, and the contenders: the fastest of its configurations."""

    peer: Peer
    case: Case
    contenders: list[Configuration]

    def __init__(self, name: str, seconds: float) -> None:
        self.kind = PEERS[name]
        if self.kind.torch_threads:
            torch.set_num_threads(self.kind.torch_threads)
        self.seconds = seconds

    def prepare(self, case: str) -> dict[str, Any]:
        """Makes the case, tries every configuration and keeps the fastest."""
        self.__dict__.pop("peer", None)  # lets go of the previous case's memory
        self.case = CASES[case]()
        self.peer = self.kind(self.case)
        self.values = [torch.from_numpy(self.case.values(step)) for step in range(STEPS)]
        self.b, self.w = torch.from_numpy(self.case.b), torch.from_numpy(self.case.w)
        self.turn = count()
        self.contenders = self.choose(list(self.peer.configurations()))
        return {
            "configurations": self.contenders,
            "facts": self.peer.facts(),
            "libraries": libraries(self.kind),
        }

    def choose(self, configurations: list[Configuration]) -> list[Configuration]:
        """Returns, after two passes, the two that refactorize fastest and the one whose step is fastest."""
        self.configure(configurations[0])
        self.step()
        if len(configurations) == 1:
            return configurations
        taken: dict[str, list[float]] = {
            phase: [float("inf")] * len(configurations) for phase in ("refactorize", "step")
        }
        for index, configuration in 2 * list(enumerate(configurations)):
            self.configure(configuration)
            for phase, run in (("refactorize", self.refactorize), ("step", self.step)):
                fastest = min(repeat(run, self.seconds / 4, least=1)[phase])
                taken[phase][index] = min(taken[phase][index], fastest)
        order = {phase: sorted(range(len(times)), key=times.__getitem__) for phase, times in taken.items()}
        return [configurations[index] for index in sorted({*order["refactorize"][:2], order["step"][0]})]

    def configure(self, configuration: Configuration) -> Times:
        if "threads" in configuration:
            threadpool_limits(configuration["threads"], user_api="blas")
        return clock("analyze", lambda: self.peer.analyze(configuration))

    def next_values(self) -> torch.Tensor:
        return self.values[next(self.turn) % STEPS]

    def start(self, configuration: Configuration) -> Times:
        """Analysis and the first factorization."""
        values = self.next_values()
        times = self.configure(configuration)
        if not self.kind.analyzes:
            times = {}
        times |= clock("factorize", lambda: self.peer.refactorize(values))
        if late := self.peer.late_analysis():
            times["analyze"][0] += late
            times["factorize"][0] -= late
        return times

    def refactorize(self) -> Times:
        values = self.next_values()
        return clock("refactorize", lambda: self.peer.refactorize(values))

    def solve(self) -> Times:
        return clock("solve", lambda: self.peer.solve(self.b))

    def step(self) -> Times:
        """The whole optimizer step: new values, forward, backward to the values."""
        values = self.next_values().requires_grad_()
        begin = time.perf_counter()
        x = self.peer.apply(values, self.b)
        middle = time.perf_counter()
        torch.autograd.grad(x, values, self.w)
        end = time.perf_counter()
        values.requires_grad_(False)
        return {"backward": [end - middle], "step": [end - begin]}

    def round(self) -> dict[str, Any]:
        """Measures every phase with each contender; the parent asks for several rounds, the peers in turn."""
        return {"contenders": [summary(self.measure(configuration)) for configuration in self.contenders]}

    def measure(self, configuration: Configuration) -> Times:
        times = repeat(lambda: self.start(configuration), self.seconds / 2, least=1, most=10)
        times |= repeat(self.refactorize, self.seconds, least=3)
        times |= repeat(self.solve, self.seconds / 4, least=3)
        return times | repeat(self.step, self.seconds, least=3)

    def check(self, gradient: str) -> dict[str, float]:
        """Returns the scaled residual; saves the gradient, symmetrized where A is, for comparison."""
        from scipy.sparse import csr_array

        values = self.values[1].clone().requires_grad_()
        x = self.peer.apply(values, self.b)
        (slope,) = torch.autograd.grad(x, values, self.w)
        n, indices = self.case.n, self.case.indices
        A = csr_array((self.values[1].numpy(), indices), shape=(n, n))
        slopes = csr_array((slope.numpy(), indices), shape=(n, n))
        if self.case.kind == "spd":
            slopes = (slopes + slopes.T) / 2
        np.save(gradient, slopes[indices[0], indices[1]])
        return {"residual": scaled_residual(A, x.detach().numpy(), self.case.b)}


def summary(times: Times) -> dict[str, dict[str, float]]:
    return {phase: {"median": median(t), "min": min(t), "samples": len(t)} for phase, t in times.items()}


def clock(phase: str, run: Callable[[], Any]) -> Times:
    begin = time.perf_counter()
    run()
    return {phase: [time.perf_counter() - begin]}


def scaled_residual(A: Any, x: Array, b: Array) -> float:
    """Returns |Ax - b|_inf / (|A|_1 |x|_inf + |b|_inf)."""
    norm = abs(A).sum(axis=0).max()
    return float(abs(A @ x - b).max() / (norm * abs(x).max() + abs(b).max()))


def libraries(kind: type[Peer]) -> dict[str, Any]:
    """Returns the versions of the peer's packages and the BLAS and OpenMP libraries in this process."""
    versions = {}
    for package in kind.packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed as a package"
    keys = ("internal_api", "version", "num_threads", "architecture", "filepath")
    pools = [{key: pool.get(key) for key in keys} for pool in threadpool_info()]
    return {
        "versions": versions,
        "environment": {k: os.environ.get(k) for k in kind.environment},
        "pools": pools,
    }


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what native libraries print goes to stderr, not between the answers
    session = Session(sys.argv[1], float(sys.argv[2]))
    for line in sys.stdin:
        command = json.loads(line)
        try:
            do = getattr(session, command.pop("do"))
            answer = do(**command)
        except ImportError as error:
            answer = {"error": f"not installed ({error}): see benchmarks/requirements.txt; spcache: ./dev setup"}
        except Exception as error:  # the parent shows it and goes on without this peer
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer, default=str), file=answers)


if __name__ == "__main__":
    main()
